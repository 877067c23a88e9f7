"""The run of a step: names of artifacts, tags and aliases, opening and ending runs, artifact URIs."""

import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import ExecutionException, MlflowException
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_BRANCH,
    MLFLOW_GIT_COMMIT,
    MLFLOW_GIT_REPO_URL,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_PROJECT_ENV,
    MLFLOW_SOURCE_NAME,
)

from steps.text2sql.errors import UserError
from steps.text2sql.params import parse, users_folder

DATASET = "dataset"
REJECTED = "rejected.jsonl"
PROMPT = "prompt_template.txt"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
PREDICTIONS = "predictions.json"
ROWS = "rows"
ROWS_FILE = "rows.jsonl"
REPORT = "report.html"
SLICES = "slices.json"
SLICES_PICTURE = "slices.png"
COMPARISON = "comparison.json"
MODEL = "model"
TRAINING_ROWS = "training_rows"

CHALLENGER = "challenger"
CHAMPION = "champion"

TAG_FAILURE = "failure_reason"
TAG_STOPPED_BY = "stopped_by"
TAG_MODEL_VERSION = "model_version"
TAG_MODEL_NAME = "registered_model_name"
TAG_EVALUATION_RUN = "evaluation_run_id"
TAG_EVALUATED_ROWS = "evaluated_rows_digest"
TAG_REPLACED = "replaced_version"
TAG_REPLACED_BY = "replaced_by_version"
TAG_PROMOTED = "promoted"
TAG_GATE_REASON = "gate_reason"
# Before the names of the gate's numbers, as tags of a version.
GATE = "gate_"
# Before the number of a record, as tags of a registered model.
PROMOTION = "promotion/"
TAG_EXPORTED_TO = "exported_to"
CHOSEN = "chosen"
# Where the project came from, as MLflow notes it.
SOURCE_TAGS = (MLFLOW_SOURCE_NAME, MLFLOW_GIT_COMMIT, MLFLOW_GIT_BRANCH, MLFLOW_GIT_REPO_URL)

PROJECT = Path(__file__).parents[2]
Params = TypeVar("Params")


class Interrupted(Exception):
    """A signal stopped the step, and what was worth keeping has been logged."""


def run_step(
    params_class: type[Params],
    step: Callable[[Params], None],
    *,
    user_errors: tuple[type[Exception], ...] = (),
) -> None:
    """Parse the command line and call a step inside its run.

    A `UserError`, or another of `user_errors`, is printed as its message alone. Whatever ends the step, the
    run ends too: FINISHED, FAILED with the reason as a tag, or KILLED.
    """
    run_in_run(lambda: step(parse(params_class, sys.argv[1:])), user_errors=user_errors)


def run_in_run(body: Callable[[], None], *, user_errors: tuple[type[Exception], ...] = ()) -> None:
    """See `run_step`; for a body that reads its parameters itself."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _quiet()
    signal.signal(signal.SIGTERM, _interrupt)
    check_store()
    mlflow.start_run()
    try:
        take_source_of_parent()
        body()
    except (UserError, *user_errors) as error:
        _end("FAILED", TAG_FAILURE, str(error))
        raise SystemExit(f"\nError: {error}") from error
    except (KeyboardInterrupt, Interrupted) as error:
        _end("KILLED", TAG_STOPPED_BY, str(error) or "SIGINT")
        raise SystemExit(f"\nStopped by {str(error) or 'SIGINT'}.") from error
    except BaseException as error:
        _end("FAILED", TAG_FAILURE, f"{type(error).__name__}: {error}")
        raise
    mlflow.end_run()


def check_store() -> None:
    """Refuse a store whose file each process would look for in its own folder, before one is made there."""
    stores = {
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "MLFLOW_REGISTRY_URI": mlflow.get_registry_uri(),
    }
    for name, uri in stores.items():
        start, slashes, file = uri.partition(":///")
        if start.startswith("sqlite") and slashes and not Path(file).is_absolute():
            raise SystemExit(
                f"\nError: {name}={uri}: is a relative path, but steps run in the project's folder; "
                f"give the absolute form: {start}:///{users_folder() / file}"
            )


def take_source_of_parent() -> None:
    """Note on a step's run where the project came from: main starts it from a folder, perhaps a clone."""
    parent = _tags().get(MLFLOW_PARENT_RUN_ID)
    if parent:
        tags = mlflow.get_run(parent).data.tags
        mlflow.set_tags({name: tags[name] for name in SOURCE_TAGS if name in tags})


def _interrupt(number: int, _: Any) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _end(status: str, tag: str, reason: str) -> None:
    try:
        mlflow.set_tag(tag, reason[:5000])
    finally:
        mlflow.end_run(status)


def _quiet() -> None:
    # Each of these says at INFO or WARNING what a user can neither use nor change.
    for name in (
        "httpx",
        "alembic",
        "mlflow.projects",
        "bitsandbytes.backends.cpu.ops",
        "mlflow.store.db.utils",
        "matplotlib",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def run_id() -> str:
    """Id of this step's run."""
    return mlflow.active_run().info.run_id


def run_child(step: str, values: Mapping[str, str]) -> Run:
    """Run a step as a child of this run, in this environment, a process of its own.

    Raises:
        UserError: it failed; its own message stands above on the screen.
    """
    try:
        submitted = mlflow.projects.run(
            uri=str(PROJECT), entry_point=step, parameters=dict(values), env_manager="local", run_name=step
        )
    except ExecutionException as error:
        raise UserError(f"{step} failed; its message stands above. {error}") from error
    return mlflow.get_run(submitted.run_id)


def is_chained() -> bool:
    """Whether main started this step."""
    return MLFLOW_PARENT_RUN_ID in _tags()


def artifact_uri(path: str) -> str:
    """`runs:/` URI of an artifact of this run."""
    return f"runs:/{run_id()}/{path}"


@contextmanager
def downloaded(uri: str, *, parameter: str, needs: str) -> Iterator[Path]:
    """Local copy of an artifact folder, removed at the end; `needs` is a file that it must have.

    Raises:
        UserError: no such run or artifact, or it is something else.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=scratch))
        except (
            MlflowException,
            OSError,
            ImportError,
        ) as error:  # ImportError: a store's client is not installed
            raise UserError(f"{parameter}={uri}: cannot be read: {error}. {_artifacts_of(uri)}") from error
        if not (path / needs).is_file():
            raise UserError(f"{parameter}={uri}: has no {needs}. {_artifacts_of(uri)}")
        yield path


def _artifacts_of(uri: str) -> str:
    if not uri.startswith("runs:/"):
        return ""
    run = uri.removeprefix("runs:/").split("/")[0]
    try:
        found = [artifact.path for artifact in mlflow.MlflowClient().list_artifacts(run)]
    except MlflowException as error:
        return str(error.message)
    return f"Run {run} has: {', '.join(found) or 'no artifacts'}."


@contextmanager
def logged_folder(path: str) -> Iterator[Path]:
    """Scratch folder whose contents become the artifact folder `path` when the block ends well."""
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        mlflow.log_artifacts(scratch, path)


def log_choices(**choices: str) -> None:
    """Print what a step chose and why, and keep it as parameters `chosen/…`."""
    width = max(map(len, choices))
    print("\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in choices.items()) + "\n", flush=True)
    mlflow.log_params({f"{CHOSEN}/{name}": text for name, text in choices.items()})


def log_settings(prefix: str, settings: Mapping[str, Any]) -> None:
    """Log every setting as `prefix/name` and read them back, since MLflow can drop parameters silently.

    Raises:
        RuntimeError: naming those that did not arrive as they were.
    """
    sent = {f"{prefix}/{name}": str(value) for name, value in settings.items()}
    mlflow.log_params(sent)
    arrived = mlflow.get_run(run_id()).data.params
    lost = sorted(name for name, value in sent.items() if arrived.get(name) != value)
    if lost:
        raise RuntimeError(f"MLflow did not keep these parameters: {', '.join(lost)}")


def choices(run: Run) -> dict[str, str]:
    """What `log_choices` kept on a run."""
    prefix = f"{CHOSEN}/"
    return {
        name.removeprefix(prefix): text for name, text in run.data.params.items() if name.startswith(prefix)
    }


def run_page() -> tuple[str, str]:
    """The tracking URI, and this run in its user interface: that of `mlflow ui` for a local store."""
    store = mlflow.get_tracking_uri()
    host = store.rstrip("/") if store.startswith("http") else "http://127.0.0.1:5000"
    return store, f"{host}/#/experiments/{mlflow.active_run().info.experiment_id}/runs/{run_id()}"


def env_manager() -> str:
    """Environment manager that `mlflow run` was given for this run."""
    return _tags().get(MLFLOW_PROJECT_ENV, "local")


def project_uri() -> str:
    """What `mlflow run` takes to run this project again: the git URL it came from, or this folder."""
    source = _tags().get(MLFLOW_SOURCE_NAME, "")
    return source if re.match(r"(https?|ssh|git)://|git@", source) else str(PROJECT)


def project_version() -> list[str]:
    """`-v <commit>` for a git URL, nothing for a folder, where it would check that commit out."""
    return ["-v", git_commit()] if project_uri() != str(PROJECT) else []


def _tags() -> dict[str, str]:
    return mlflow.get_run(run_id()).data.tags


def model_version(name: str, version: int | str) -> ModelVersion:
    """Look up a version of a registered model.

    Raises:
        UserError: naming the versions that exist.
    """
    try:
        return mlflow.MlflowClient().get_model_version(name, str(version))
    except MlflowException as error:
        raise UserError(
            f"registered_model_name={name}: has no version {version}; there are: {_versions(name)}."
        ) from error


def _versions(name: str) -> str:
    found = []
    with suppress(MlflowException):  # a name that MLflow does not allow
        found = mlflow.MlflowClient().search_model_versions(f'name = "{name}"')
    return ", ".join(map(str, sorted(int(one.version) for one in found))) or "none"


def find_version(model_uri: str) -> ModelVersion:
    """The registered version behind `models:/name/version` or `models:/name@alias`.

    Raises:
        UserError: there is no such model, version or alias.
    """
    name, _, alias = model_uri.removeprefix("models:/").partition("@")
    if not alias:
        return model_version(*name.split("/"))
    try:
        return mlflow.MlflowClient().get_model_version_by_alias(name, alias)
    except MlflowException as error:
        raise UserError(f"model_uri={model_uri}: {error.message}") from error


def git_commit() -> str:
    """Commit of the project as MLflow noted it on this run; empty outside a git checkout."""
    return _tags().get(MLFLOW_GIT_COMMIT, "")


def clear_run_id() -> dict[str, str]:
    """Environment for a process that must not find this run."""
    return {name: value for name, value in os.environ.items() if name != "MLFLOW_RUN_ID"}
