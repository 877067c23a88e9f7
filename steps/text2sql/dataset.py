"""Rows of question, context and answer: where they come from, reading and checking them."""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import pandas
import pyarrow
import pyarrow.parquet

from steps.text2sql import databases, hub, sample_data
from steps.text2sql.databases import DATABASE
from steps.text2sql.errors import UserError
from steps.text2sql.parameter_checks import DATA_SUFFIXES
from steps.text2sql.sql_model import is_text

COLUMNS = ("question", "context", "answer")
INCOMPLETE = "is missing, empty or not text"
HUB_DATASET = "b-mc2/sql-create-context@9d80a6a118b838d9defc3798d659a54a2ac2ff37"
INSTEAD = "dataset=<absolute path of a JSONL, JSON, CSV or Parquet file> or dataset=sample"
# Files of a folder that are splits of their own: `test.csv`, `dev.csv`, and as the hub names them,
# `test-00000-of-00002.parquet`, also with a hash behind it.
SPLIT_FILE = re.compile(
    r"(?:train|(?P<validation>validation|valid|val|dev)|(?P<test>test))(?:-\d+-of-\d+(?:-[0-9a-f]{16})?)?",
    re.IGNORECASE,
)
# A CSV field may be as large as a row may be long; the module's own limit is 128 KiB.
csv.field_size_limit(2**31 - 1)


class Columns(NamedTuple):
    """The user's names for the columns of `COLUMNS`, and of the one with SQLite files; empty: none.

    Where the names `are_fixed`, no parameter of the step gives others, and rows may lack the last one.
    """

    question: str
    context: str
    answer: str
    database: str
    are_fixed: bool = False


@dataclass(frozen=True)
class DatasetSource:
    """Where rows come from, pinned to one state; `location` is a path, a hub id, or this project's module.

    `config` and `split` belong to a hub dataset; the others have none.
    """

    name: str
    kind: Literal["sample", "file", "hub"]
    location: str
    commit: str
    reason: str
    config: str = ""
    split: str = ""


def resolve(dataset: str, *, base_is_hub: bool, config: str = "", split: str = "") -> DatasetSource:
    """Pin `auto`, `sample`, a file, a folder of files, or a hub id; `split` empty is the hub's `train`.

    Raises:
        UserError: unknown or gated hub id, hub out of reach, or `config` or `split` without a hub id.
    """
    reason = "as given"
    if dataset == "auto":
        dataset = HUB_DATASET if base_is_hub else "sample"
        reason = f"auto: the base model comes from {'the hub' if base_is_hub else 'this machine'}"
    if (config or split) and (dataset == "sample" or Path(dataset).is_absolute()):
        given = f"dataset_config={config}" if config else f"dataset_split={split}"
        raise UserError(f"{given}: counts for a dataset of the hub only, and dataset={dataset} is none.")
    if dataset == "sample":
        return DatasetSource("sample", "sample", "steps.text2sql.sample_data", "", reason)
    if Path(dataset).is_absolute():
        return DatasetSource(Path(dataset).name, "file", dataset, "", reason)
    repository = hub.resolve(dataset, parameter="dataset", kind="dataset", instead=INSTEAD)
    return DatasetSource(
        repository.name, "hub", repository.name, repository.commit, reason, config, split or "train"
    )


def read(source: DatasetSource, *, columns: Columns, seed: int) -> dict[str, pandas.DataFrame]:
    """Rows to split under `train`; `validation` and `test` where a folder has files of these names, and then
    perhaps nothing to split.

    Rows have the columns of `COLUMNS`, and `DATABASE` where there is one: an absolute path, or the name of a
    domain for the built-in rows. The rows of each split are numbered from 0.

    Raises:
        UserError: naming the line, the encoding, the missing columns, or the rows without a database.
    """
    problem = f"dataset={source.location}"
    if columns.database and source.kind != "file" and not columns.are_fixed:
        raise UserError(f"database_column={columns.database}: needs a dataset of files, not {source.name}.")
    if source.kind == "sample":
        built_in = Columns(*columns[:3], database=DATABASE)
        return {"train": _select(pandas.DataFrame(sample_data.generate(seed)), built_in, problem)}
    if source.kind == "hub":
        return {"train": _select(_load_from_hub(source), columns._replace(database=""), problem)}
    path = Path(source.location)
    if path.is_dir():
        return _read_folder(path, columns)
    return {"train": read_file(path, columns=columns, parameter="dataset")}


def read_file(path: Path, *, columns: Columns, parameter: str) -> pandas.DataFrame:
    """Rows of one file; see `read`. `parameter` is the one that named it."""
    problem = f"{parameter}={path}"
    rows = _select(_parse(path, problem), columns, problem)
    if DATABASE in rows:
        rows[DATABASE] = databases.absolute(
            rows[DATABASE],
            path.parent,
            problem=f"{problem}, {'column ' if columns.are_fixed else 'database_column='}{columns.database}",
        )
    return rows


def _read_folder(folder: Path, columns: Columns) -> dict[str, pandas.DataFrame]:
    files: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in DATA_SUFFIXES):
        named = SPLIT_FILE.fullmatch(path.stem)
        files.setdefault((named and named.lastgroup) or "train", []).append(path)
    if not files:
        raise UserError(f"dataset={folder}: has no files that end in {', '.join(DATA_SUFFIXES)}.")
    for split, paths in files.items():
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        print(f"  {split}: rows of {', '.join(path.name for path in paths[:5])}{more}")
    return {
        split: pandas.concat(
            [read_file(path, columns=columns, parameter="dataset") for path in paths], ignore_index=True
        )
        for split, paths in files.items()
    }


def _load_from_hub(source: DatasetSource) -> pandas.DataFrame:
    try:
        return datasets.load_dataset(
            source.location, name=source.config or None, revision=source.commit, split=source.split
        ).to_pandas()
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"dataset={source.location}, dataset_config={source.config}, dataset_split={source.split}: "
            f"cannot be loaded: {error}"
        ) from error


def _select(rows: pandas.DataFrame, columns: Columns, problem: str) -> pandas.DataFrame:
    """The columns that count, under this project's names."""
    wanted = {name: given for name, given in zip((*COLUMNS, DATABASE), columns[:4], strict=True) if given}
    if columns.are_fixed and columns.database not in rows:
        wanted.pop(DATABASE, None)
    if len(set(wanted.values())) < len(wanted):
        given = ", ".join(f"{name}_column={given}" for name, given in wanted.items())
        raise UserError(f"{problem}: one column is given for two things: {given}.")
    if rows.empty:
        raise UserError(f"{problem}: has no rows; it needs the columns {', '.join(wanted.values())}.")
    missing = [given for given in wanted.values() if given not in rows.columns]
    if missing:
        found = ", ".join(map(str, rows.columns))
        ways = ", ".join(f"{name}_column" for name, given in wanted.items() if given in missing)
        way = "Rename yours in the file" if columns.are_fixed else f"Name yours with {ways}"
        raise UserError(f"{problem}: lacks the columns {', '.join(missing)}; found: {found}. {way}.")
    return rows[list(wanted.values())].set_axis(list(wanted), axis="columns")


def _parse(path: Path, problem: str) -> pandas.DataFrame:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        return readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{problem}: is not UTF-8 at byte {error.start}; save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{problem}: cannot be read: {error}") from error
    # What pandas, pyarrow and json raise for a broken file.
    except (ValueError, KeyError, pyarrow.ArrowException) as error:
        raise UserError(f"{problem}: is not valid {path.suffix[1:].upper()}, mend it: {error}") from error


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
        raise ValueError(f"broken JSON at {'; '.join(problems[:5])}{more}")
    return pandas.DataFrame(rows)


def _read_parquet(path: Path) -> pandas.DataFrame:
    # What pandas says there of an index is left out: rows count from 0, and it may be one of the columns.
    return pyarrow.parquet.read_table(path, partitioning=None).to_pandas(ignore_metadata=True)


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
        names = Counter(filter(None, reader.fieldnames or ()))  # columns without a name are never asked for
        if repeated := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"has several columns named {', '.join(repeated)}")
        for row in reader:
            if None in row:
                raise ValueError(
                    f"line {reader.line_num} has more cells than columns; quote cells with commas"
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(
            f"line {reader.reader.line_num}: {error}; between cells stands a comma, and around those with a "
            'comma, a quote or a line break stand double quotes, where " is written ""'
        ) from error
    return pandas.DataFrame(rows)


def digest(rows: pandas.DataFrame) -> str:
    """SHA-256 of all rows in their order, 64 hexadecimal digits."""
    state = hashlib.sha256()
    for row in rows[list(COLUMNS)].itertuples(index=False):
        state.update(json.dumps(list(row), ensure_ascii=True, default=str).encode())
    return state.hexdigest()


def check(rows: pandas.DataFrame) -> tuple[pandas.DataFrame, pandas.Series]:
    """Take out the rows that cannot teach: incomplete, contradictory or repeated ones.

    Returns the kept rows, stripped of outer white space, and the reason of each other row, by its index.
    Of repeated rows the first stays; of contradictory ones none, since nothing tells which is right.
    """
    reasons = pandas.Series("", index=rows.index, dtype=object)
    rows = rows.copy()
    for name in COLUMNS:
        # As objects: a column of pandas' categories takes no value that is not one of them.
        values = rows[name].astype(object)
        rows[name] = values.where(values.map(is_text), "").str.strip()
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
