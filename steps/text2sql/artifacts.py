"""Folders and files that runs keep: logging, listing, copying with checks, digests."""

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path

from steps.text2sql import manifest
from steps.text2sql.errors import UserError
from steps.text2sql.model_versions import model_version

# What fetching an artifact raises; ImportError where the client of a store is not installed, ValueError for a
# URI that MLflow does not take apart.
UNREADABLE = (MlflowException, OSError, ImportError, ValueError)


def check_location() -> None:
    """See that this run's artifacts can be written, as far as that can be told without writing one.

    Raises:
        UserError: they cannot: a folder that cannot be made, a client that is not installed, no access.
    """
    uri = mlflow.get_artifact_uri()
    try:
        get_artifact_repository(uri).list_artifacts()
        if urlsplit(uri).scheme in ("", "file"):
            folder = Path(local_file_uri_to_path(uri))
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except UNREADABLE as error:
        raise UserError(
            f"the artifact location {uri} cannot be used: {error}; install its client in this environment, "
            "give a server that passes artifacts on, or take an experiment with another location."
        ) from error


@contextmanager
def logged_folder(path: str) -> Iterator[Path]:
    """Scratch folder whose contents become the artifact folder `path` when the block ends well."""
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        mlflow.log_artifacts(scratch, path)


def log_folder(run: str, folder: Path, path: str) -> None:
    """Log a folder's files as the artifact folder `path` of a run, from any thread."""
    mlflow.MlflowClient().log_artifacts(run, str(folder), path)


def keep_newest(run: str, path: str, keep: int, *, age: Callable[[str], int]) -> None:
    """Delete all but the `keep` folders of highest `age` in an artifact folder, if its store can delete."""
    old = sorted(listed(run, path), key=age, reverse=True)[keep:]
    repository = get_artifact_repository(mlflow.get_run(run).info.artifact_uri)
    try:
        for folder in old:
            repository.delete_artifacts(folder)
    except (MlflowException, NotImplementedError, OSError) as error:
        _say_once(f"\nOlder {path} stay in the store, which did not delete them: {error}")


@functools.cache
def _say_once(text: str) -> None:
    print(text, flush=True)


def listed(run: str, path: str = "") -> list[str]:
    """Paths of what lies in an artifact folder of a run; none where there is no such run or folder."""
    try:
        return [found.path for found in mlflow.MlflowClient().list_artifacts(run, path or None)]
    except MlflowException:
        return []


def is_complete(run: str, path: str) -> bool:
    """Whether a logged folder with a manifest has every file that it names, by name and size."""
    try:
        expected = json.loads(_manifest_of(f"runs:/{run}/{path}"))[manifest.FILES]
        sizes = dict(_sizes(run, path))
    except (MlflowException, OSError, ValueError, KeyError):
        return False
    return all(sizes.get(f"{path}/{name}") == one["bytes"] for name, one in expected.items())


def _sizes(run: str, path: str) -> Iterator[tuple[str, int]]:
    for found in mlflow.MlflowClient().list_artifacts(run, path):
        if found.is_dir:
            yield from _sizes(run, found.path)
        else:
            yield found.path, found.file_size


@contextmanager
def downloaded(uri: str, *, parameter: str, needs: str) -> Iterator[Path]:
    """Local copy of an artifact folder, removed at the end; `needs` is a file that it must have.

    Raises:
        UserError: no such run or artifact, or it is something else.
    """
    if Path(uri).is_dir():  # the copy would have their contents in the links' places
        manifest.refuse_links(Path(uri), source=f"{parameter}={uri}")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = download(uri, Path(scratch))
        except UNREADABLE as error:
            raise UserError(f"{parameter}={uri}: cannot be read: {error}. {_artifacts_of(uri)}") from error
        if not (path / needs).is_file():
            raise UserError(f"{parameter}={uri}: has no {needs}. {_artifacts_of(uri)}")
        if (path / manifest.FILE).is_file():
            manifest.check(path, source=f"{parameter}={uri}")
        yield path


def download(uri: str, folder: Path) -> Path:
    """Copy an artifact into a folder; its path there comes back."""
    return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))


def _artifacts_of(uri: str) -> str:
    if not uri.startswith("runs:/"):
        return ""
    run = uri.removeprefix("runs:/").split("/")[0]
    try:
        found = [artifact.path for artifact in mlflow.MlflowClient().list_artifacts(run)]
    except MlflowException as error:
        return str(error.message)
    return f"Run {run} has: {', '.join(found) or 'no artifacts'}."


def read_manifest(uri: str) -> dict[str, Any]:
    """The manifest of a logged folder, unchecked.

    Raises:
        UserError: there is none.
    """
    try:
        return json.loads(_manifest_of(uri))
    except UNREADABLE as error:
        raise UserError(f"{uri}: cannot be read: {error}. {_artifacts_of(uri)}") from error


def digest_of(uri: str) -> str:
    """What names a result for good: the SHA-256 of a folder's manifest, a version with its source."""
    if uri.startswith("models:/"):
        return f"{uri} {model_version(*uri.removeprefix('models:/').split('/')).source}"
    return hashlib.sha256(_manifest_of(uri)).hexdigest()


def _manifest_of(uri: str) -> bytes:
    before = MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.get_raw()
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)  # for a file of a few kilobytes
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return download(f"{uri}/{manifest.FILE}", Path(scratch)).read_bytes()
    finally:
        MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.unset()
        if before is not None:
            MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(before)
