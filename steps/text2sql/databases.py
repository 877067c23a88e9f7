"""The SQLite files that rows name: built-in ones are made, others are copied, beside the rows."""

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from steps.text2sql import sample_data

FOLDER = "databases"


def write(names: Sequence[str | None], folder: Path, *, seed: int) -> list[str | None]:
    """Put the database of each row below `folder`; paths relative to it come back, in the order of the rows.

    A name is an absolute path, that of a built-in domain (made with `seed`), or None for no database.
    """
    files = _file_names(name for name in names if name)
    if files:
        (folder / FOLDER).mkdir()
    for name, file in files.items():
        if os.path.isabs(name):
            shutil.copyfile(name, folder / file)
        else:
            sample_data.build_database(name, folder / file, seed=seed)
    return [files[name] if name else None for name in names]


def _file_names(names: Iterable[str]) -> dict[str, str]:
    """A file of its own for each name, though two folders may have files of one name."""
    found: dict[str, str] = {}
    for name in sorted(set(names)):
        stem, number = Path(name).stem, 1
        while f"{FOLDER}/{stem}.sqlite".lower() in {file.lower() for file in found.values()}:
            number += 1
            stem = f"{Path(name).stem}-{number}"
        found[name] = f"{FOLDER}/{stem}.sqlite"
    return found
