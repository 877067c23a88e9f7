"""Rows of question, context and answer: where they come from, reading and checking them."""

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import pandas

from steps.text2sql import hub, sample_data
from steps.text2sql.errors import UserError

COLUMNS = ("question", "context", "answer")
INCOMPLETE = "is missing, empty or not text"
# Path of a SQLite file that belongs to a row's context, relative to the rows' own folder.
DATABASE = "database"
HUB_DATASET = "b-mc2/sql-create-context@9d80a6a118b838d9defc3798d659a54a2ac2ff37"
INSTEAD = "dataset=<absolute path of a JSONL, JSON, CSV or Parquet file> or dataset=sample"
# A CSV field may be as large as a row may be long; the module's own limit is 128 KiB.
csv.field_size_limit(2**31 - 1)


@dataclass(frozen=True)
class DatasetSource:
    """Where rows come from, pinned to one state; `location` is a path, a hub id, or this project's module."""

    name: str
    kind: Literal["sample", "file", "hub"]
    location: str
    commit: str
    reason: str


def resolve(dataset: str, *, base_is_hub: bool) -> DatasetSource:
    """Pin `auto`, `sample`, a file or a hub id.

    Raises:
        UserError: an unknown or gated hub id, or the hub is out of reach.
    """
    reason = "as given"
    if dataset == "auto":
        dataset = HUB_DATASET if base_is_hub else "sample"
        reason = f"auto: the base model comes from {'the hub' if base_is_hub else 'this machine'}"
    if dataset == "sample":
        return DatasetSource("sample", "sample", "steps.text2sql.sample_data", "", reason)
    if Path(dataset).is_absolute():
        return DatasetSource(Path(dataset).name, "file", dataset, "", reason)
    repository = hub.resolve(dataset, parameter="dataset", kind="dataset", instead=INSTEAD)
    return DatasetSource(repository.name, "hub", repository.name, repository.commit, reason)


def read(source: DatasetSource, *, seed: int) -> pandas.DataFrame:
    """All rows with the columns of `COLUMNS`, and `DATABASE` where they have it.

    For the built-in rows that is the name of a domain, for others the absolute path of a file.

    Raises:
        UserError: naming the line, the encoding, the missing columns or the missing database files.
    """
    if source.kind == "sample":
        rows = pandas.DataFrame(sample_data.generate(seed))
    elif source.kind == "hub":
        rows = datasets.load_dataset(source.location, revision=source.commit, split="train").to_pandas()
    else:
        rows = _read_file(Path(source.location))
    missing = [name for name in COLUMNS if name not in rows.columns]
    problem = f"dataset={source.location}"
    if rows.empty:
        raise UserError(f"{problem}: has no rows; it needs the columns {', '.join(COLUMNS)}.")
    if missing:
        found = ", ".join(map(str, rows.columns))
        raise UserError(f"{problem}: lacks the columns {', '.join(missing)}; found: {found}.")
    if DATABASE in rows.columns and source.kind == "file":
        rows[DATABASE] = _located(rows[DATABASE], Path(source.location))
    return rows[[*COLUMNS, *(c for c in (DATABASE,) if c in rows.columns and source.kind != "hub")]]


def _located(names: pandas.Series, file: Path) -> pandas.Series:
    """Absolute path of each row's database, None where a row names none."""
    paths = names.map(lambda name: str(file.parent / name) if isinstance(name, str) and name else None)
    missing = sorted({path for path in paths.dropna() if not Path(path).is_file()})
    if missing:
        some = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UserError(
            f"dataset={file}: its column {DATABASE} names files that do not exist: {some}. Give paths that "
            "are absolute or relative to the file of the rows, or rename the column if it is something else."
        )
    return paths.astype(object).where(paths.notna(), None)


def _read_file(path: Path) -> pandas.DataFrame:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": pandas.read_parquet}
    try:
        return readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"dataset={path}: is not UTF-8 at byte {error.start}; save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"dataset={path}: cannot be read: {error}") from error
    except ValueError as error:  # what pandas, pyarrow and json raise for a broken file
        raise UserError(
            f"dataset={path}: is not valid {path.suffix[1:].upper()}, mend it: {error}"
        ) from error


def _read_jsonl(path: Path) -> pandas.DataFrame:
    rows, problems = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        try:
            if line.strip():
                rows.append(_object(json.loads(line)))
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {error}")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise UserError(f"dataset={path}: broken JSON at {'; '.join(problems[:5])}{more}. Mend or remove it.")
    return pandas.DataFrame(rows)


def _read_json(path: Path) -> pandas.DataFrame:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(rows, list):
        raise ValueError("expected a list of objects")
    return pandas.DataFrame(map(_object, rows))


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError("not an object")
    return row


def _read_csv(path: Path) -> pandas.DataFrame:
    # Every cell is text: a question "NA" and an answer "1.0" stay what they are.
    reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row:
                raise ValueError(
                    f"line {reader.line_num} has more cells than columns; quote cells with commas"
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error
    return pandas.DataFrame(rows)


def digest(rows: pandas.DataFrame) -> str:
    """SHA-256 of all rows in their order, 64 hexadecimal digits."""
    state = hashlib.sha256()
    for row in rows[list(COLUMNS)].itertuples(index=False):
        state.update(json.dumps(list(row), ensure_ascii=True, default=str).encode())
    return state.hexdigest()


def _is_text(value: Any) -> bool:
    """Whether a cell is text that UTF-8 can write: half of a surrogate pair, as JSON allows it, is not."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def check(rows: pandas.DataFrame) -> tuple[pandas.DataFrame, pandas.Series]:
    """Take out the rows that cannot teach: incomplete, contradictory or repeated ones.

    Returns the kept rows, stripped of outer white space, and the reason of each other row, by its index.
    Of repeated rows the first stays; of contradictory ones none, since nothing tells which is right.
    """
    reasons = pandas.Series("", index=rows.index, dtype=object)
    rows = rows.copy()
    for name in COLUMNS:
        is_text = rows[name].map(_is_text)
        rows[name] = rows[name].where(is_text, "").str.strip()
        reasons[(rows[name] == "") & (reasons == "")] = f"{name} {INCOMPLETE}"
    complete = rows[reasons == ""]
    answers = (
        complete.drop_duplicates(list(COLUMNS)).groupby(["question", "context"])["answer"].transform("size")
    )
    contradictory = complete.merge(
        complete.loc[answers.index[answers > 1], ["question", "context"]].drop_duplicates(), how="inner"
    )
    key = pandas.MultiIndex.from_frame(contradictory[["question", "context"]])
    is_contradictory = pandas.MultiIndex.from_frame(complete[["question", "context"]]).isin(key)
    reasons[complete.index[is_contradictory]] = "contradiction: another row answers this question otherwise"
    kept = rows[reasons == ""]
    reasons[kept.index[kept.duplicated(list(COLUMNS))]] = "duplicate of an earlier row"
    return rows[reasons == ""], reasons[reasons != ""]
