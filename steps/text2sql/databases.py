"""SQLite files of the test rows, on which evaluate runs queries: checked, then built or copied."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas

from steps.text2sql import sample_data
from steps.text2sql.errors import UserError
from steps.text2sql.sql_execution import unfinished_log

# Column with a row's database: its file, or the domain of a built-in row.
DATABASE = "database"
FOLDER = "databases"
# The first bytes of every SQLite 3 file, https://www.sqlite.org/fileformat.html
MAGIC = b"SQLite format 3\x00"
# There: bytes of a page, counter of changes, number of pages, and the count for which that number is right.
HEADER_BYTES, HEADER_PARTS = 100, ((16, 18), (24, 28), (28, 32), (92, 96))
# They are kept with every prepared dataset, and fetched by every evaluation.
MAX_BYTES = 2 * 2**30
# Characters of a path in a message, of which five are named.
MOST_SHOWN = 200


def absolute(cells: pandas.Series, folder: Path, *, problem: str) -> pandas.Series:
    """Cells of a user's column as absolute paths, relative ones taken from `folder`; None for an empty cell.

    Raises:
        UserError: naming row and path of what is no SQLite file; `problem` begins the message.
    """
    paths = cells.map(lambda cell: _path(cell, folder)).astype(object)
    wrong = {path: why for path in paths.dropna().unique() if (why := _trouble(path))}
    rows = [f"row {row}: {_shown(path)} {wrong[path]}" for row, path in paths.items() if path in wrong]
    if rows:
        more = f" (and {len(rows) - 5} more)" if len(rows) > 5 else ""
        raise UserError(f"{problem}: {'; '.join(rows[:5])}{more}. Rows count from 0.")
    return paths.where(paths.notna(), None)


def _path(cell: Any, folder: Path) -> str | None:
    if pandas.api.types.is_scalar(cell) and (pandas.isna(cell) or not str(cell).strip()):
        return None
    path = str(cell).strip()
    # Not Path.expanduser, which raises for a user who does not exist. None has a NUL in the name.
    return str(folder / (path if "\0" in path else os.path.expanduser(path)))


def _shown(path: str) -> str:
    """A path in a message; its beginning where the column named is one of long texts."""
    return path if len(path) <= MOST_SHOWN else f"{path[:MOST_SHOWN]} …"


def _trouble(path: str) -> str:
    """What keeps a file from being a test row's database; empty if nothing does."""
    try:
        return _content_trouble(Path(path))
    except OSError as error:  # also a name that is too long
        return f"cannot be read: {error.strerror}"


def _content_trouble(path: Path) -> str:
    if not path.is_file():
        return "is no file"
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    if not header.startswith(MAGIC):
        return "is no SQLite database"
    if path.stat().st_size < _told_size(header):
        return "is cut short: its header tells of more pages than it has"
    if log := unfinished_log(path.resolve()):  # it lies beside the file itself, whatever links to that
        kind = log.name.rpartition("-")[2]
        return (
            f"is open for writing or was not closed: a copy would lack what is in its -{kind} file; close it"
        )
    return ""


def _told_size(header: bytes) -> int:
    """Bytes that a header tells of; 0 where it was written by an SQLite before 3.7, which did not."""
    page, changed, pages, known = (int.from_bytes(header[a:b]) for a, b in HEADER_PARTS)
    return pages * (page if page > 1 else 65536) if changed == known else 0


def check_test_rows(test: pandas.DataFrame) -> None:
    """Refuse test rows without a database, or with more of them than should be kept.

    Raises:
        UserError: naming the rows, or the sizes.
    """
    if DATABASE not in test:
        return
    without = list(test.index[test[DATABASE].isna()])
    if without:
        named = ", ".join(map(str, without[:5])) + (" …" if len(without) > 5 else "")
        raise UserError(
            f"database_column: {len(without)} of {len(test)} test rows have no database, so their execution "
            f"accuracy could not be told: rows {named}, counted from 0. Give each one, or no database_column."
        )
    sizes = {path: Path(path).stat().st_size for path in test[DATABASE].unique()}
    if sum(sizes.values()) > MAX_BYTES:
        largest = max(sizes, key=sizes.get)
        raise UserError(
            f"database_column: the {len(sizes)} databases of the test rows have {sum(sizes.values()):,} "
            f"bytes, more than the {MAX_BYTES:,} that are copied; the largest is {largest}. Give smaller "
            "ones, or a smaller test_size."
        )


def place(
    test: datasets.Dataset, folder: Path, write: Callable[[str, Path], object], *, name: Callable[[str], str]
) -> datasets.Dataset:
    """Write each database of the test rows once; the rows come back with paths below `folder`.

    `write` takes what a row names and the file to make, `name` gives that file's name.
    """
    if DATABASE not in test.column_names:
        return test
    (folder / FOLDER).mkdir()
    files = {given: f"{FOLDER}/{name(given)}" for given in sorted(set(test[DATABASE]))}
    for given, file in files.items():
        write(given, folder / file)
    paths = [files[given] for given in test[DATABASE]]
    return test.remove_columns(DATABASE).add_column(DATABASE, paths)


def build(test: datasets.Dataset, folder: Path, *, seed: int) -> datasets.Dataset:
    """Build the built-in databases of test rows; see `place`."""
    return place(
        test,
        folder,
        lambda domain, file: sample_data.build_database(domain, file, seed=seed),
        name=lambda domain: f"{domain}.sqlite",
    )


def copy(test: datasets.Dataset, folder: Path) -> datasets.Dataset:
    """Copy the databases that test rows name; see `place`. A hash of the path tells apart equal names."""
    return place(test, folder, shutil.copyfile, name=_copied_name)


def _stem(path: str) -> str:
    """A file's name without its ending, in letters that every disk and every table takes."""
    return re.sub(r"[^\w-]", "_", Path(path).stem, flags=re.ASCII)[:80]


def _copied_name(path: str) -> str:
    return f"{_stem(path)}-{hashlib.sha256(path.encode(errors='surrogateescape')).hexdigest()[:12]}.sqlite"


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
        stem, number = _stem(name), 1
        while f"{FOLDER}/{stem}.sqlite".lower() in {file.lower() for file in found.values()}:
            number += 1
            stem = f"{_stem(name)}-{number}"
        found[name] = f"{FOLDER}/{stem}.sqlite"
    return found
