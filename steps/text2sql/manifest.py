"""What a dataset and an adapter were made of, as JSON beside them: later steps read it and guess nothing.

The manifest also has size and SHA-256 of every other file of its folder, so that a torn or changed folder is
recognised. It is not signed: who can change a file and the manifest alike is not found out.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from steps.text2sql.errors import UserError

FILE = "manifest.json"
FILES = "files"
# Files that loaders of others would unpickle, which can run any code; none is ever read or written here.
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
AnyManifest = TypeVar("AnyManifest")


@dataclass(frozen=True)
class DatasetManifest:
    """Everything that prepare_data resolved. `counts` are rows by split and by reason of rejection.

    `prompt_template` is what `sql_model.render_prompt` takes in this style: a chat's has its control tokens.
    """

    base_model: str
    base_commit: str
    base_license: str
    dataset: str
    dataset_source: str
    dataset_commit: str
    dataset_config: str
    dataset_split: str
    dataset_digest: str
    tokenizer_fingerprint: str
    prompt_template: str
    prompt_style: str
    max_length: int
    split_by: str
    test_size: float
    seed: int
    counts: dict[str, int]


@dataclass(frozen=True)
class AdapterManifest:
    """What an adapter belongs to: the base as it was quantized, after how many steps, on which rows.

    With `corrected` half of its rank is trained, and half takes back what quantizing changes.
    """

    quantization: str
    global_step: int
    max_steps: int
    dataset: dict[str, Any]
    corrected: bool = False

    @property
    def of_dataset(self) -> DatasetManifest:
        """Manifest of the dataset that the adapter was trained on."""
        return DatasetManifest(**self.dataset)


def write(manifest: Any, folder: Path) -> None:
    """Write a manifest into a folder that has all its other files."""
    content = dataclasses.asdict(manifest) | {FILES: _digests(folder)}
    (folder / FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read(kind: type[AnyManifest], folder: Path, *, source: str) -> AnyManifest:
    """Read the manifest of a folder, after `check`; `source` is the parameter and value that it came from.

    Raises:
        UserError: there is none, it is one of another kind, or a file is not as it says.
    """
    check(folder, source=source)
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        found = kind(**{name: value for name, value in content.items() if name != FILES})
        if isinstance(found, AdapterManifest):
            found.of_dataset  # noqa: B018 - raises if it is none
        return found
    except (OSError, ValueError, TypeError) as error:
        wanted = "a dataset of prepare_data" if kind is DatasetManifest else "an adapter of train"
        raise UserError(f"{source}: is not {wanted}: {error}") from error


def check(folder: Path, *, source: str) -> None:
    """Compare every file of a folder with its manifest.

    Raises:
        UserError: naming each file that was changed, is missing, a link or a pickle, or that the manifest
            lacks.
    """
    refuse_links(folder, source=source)
    try:
        expected = json.loads((folder / FILE).read_text(encoding="utf-8"))[FILES]
        problems = list(_problems(folder, expected))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{source}: its {FILE} has no digests of its files: {error!r}.") from error
    if problems:
        raise UserError(f"{source}: {'; '.join(problems)}. It is not used; make it again.")


def refuse_links(folder: Path, *, source: str) -> None:
    """Refuse a folder with symbolic links, which may lead out of it.

    Raises:
        UserError: naming each.
    """
    links = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink())
    if links or folder.is_symlink():
        raise UserError(
            f"{source}: has symbolic links, which are not followed: {', '.join(links) or folder}."
        )


def _problems(folder: Path, expected: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    sizes = {name: path.stat().st_size for name, path in _others(folder)}
    yield from (
        f"{name} is a pickle, which can run any code" for name in sizes if Path(name).suffix in PICKLES
    )
    yield from (f"{name} is missing" for name in sorted(expected.keys() - sizes.keys()))
    yield from (f"{name} is not named by its {FILE}" for name in sorted(sizes.keys() - expected.keys()))
    for name in sorted(sizes.keys() & expected.keys()):
        if sizes[name] != expected[name]["bytes"] or sha256(folder / name) != expected[name]["sha256"]:
            yield f"{name} was changed (size or SHA-256 differs)"


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in _others(folder)}


def _others(folder: Path) -> list[tuple[str, Path]]:
    found = ((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if not path.is_dir())
    return sorted((name, path) for name, path in found if name != FILE)


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
