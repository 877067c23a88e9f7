"""The rows that an evaluation scores: where they come from, which ones, and keeping them with the run."""

import hashlib
import logging
from pathlib import Path

import datasets
import pandas

from steps.text2sql import databases, dataset, manifest, splits
from steps.text2sql.errors import UserError
from steps.text2sql.manifest import DatasetManifest
from steps.text2sql.store_names import ROWS_FILE

logger = logging.getLogger(__name__)


def of_prepared(folder: Path, *, source: str) -> pandas.DataFrame:
    """Test rows of a dataset of prepare_data; `source` is the parameter and value that the folder came from.

    Raises:
        UserError: it has no test rows.
    """
    try:
        rows = datasets.load_from_disk(folder, keep_in_memory=True)["test"].to_pandas()
    except IndexError:  # datasets writes a split without rows, but cannot read it
        rows = pandas.DataFrame()
    except (FileNotFoundError, KeyError) as error:
        raise UserError(f"{source}: is no dataset of prepare_data: {error}") from error
    if rows.empty:
        raise UserError(f"{source}: its test split has no rows; prepare the data with a larger test_size.")
    if dataset.DATABASE in rows:
        rows[dataset.DATABASE] = rows[dataset.DATABASE].map(lambda name: name and str(folder / name))
    return rows


def of_dataset(source: dataset.DatasetSource, trained_on: DatasetManifest) -> pandas.DataFrame:
    """All rows of a file or hub dataset that can be scored, or the test split of the built-in ones.

    The built-in rows are split as prepare_data did it for the version that is scored, so that none of them is
    one of its training rows.

    Raises:
        UserError: a row lacks question, context or answer, naming the first ones; or none is left.
    """
    columns = dataset.Columns(*dataset.COLUMNS, dataset.DATABASE, are_fixed=True)
    found = dataset.read(source, columns=columns, seed=trained_on.seed)
    rows = found.get("test", found.get("train"))
    if rows is None:
        raise UserError(f"dataset={source.location}: has validation files alone; it needs rows to score.")
    if source.kind == "sample":
        how = {"by": trained_on.split_by, "test_size": trained_on.test_size, "seed": trained_on.seed}
        rows = splits.split(rows, **how)["test"]
    kept, reasons = dataset.check(rows)
    problem = f"dataset={source.location}"
    incomplete = reasons[reasons.str.contains(dataset.INCOMPLETE, regex=False)]
    if len(incomplete):
        some = "; ".join(f"row {row}: {reason}" for row, reason in incomplete.head(5).items())
        raise UserError(
            f"{problem}: {len(incomplete)} of {len(rows)} rows cannot be scored ({some}; "
            "counted from 0); mend or remove them."
        )
    if kept.empty:
        raise UserError(f"{problem}: no row is left to score; the first: {reasons.iloc[0]}.")
    if len(reasons):
        logger.info("%d rows are not scored: contradictions, and duplicates of others", len(reasons))
    return kept


def choose(rows: pandas.DataFrame, count: int) -> pandas.DataFrame:
    """`count` rows, or all if there are fewer: the same ones for every seed and every order of rows."""
    hashes = rows.apply(_row_hash, axis="columns")
    return rows.loc[hashes.sort_values().index[:count]].reset_index(drop=True)


def digest(rows: pandas.DataFrame, folder: Path) -> str:
    """SHA-256 of rows and of their databases in a folder: evaluations with the same one can be compared."""
    hashes = rows.apply(_row_hash, axis="columns")
    if dataset.DATABASE in rows:
        of_file = {name: manifest.sha256(folder / name) for name in rows[dataset.DATABASE].dropna().unique()}
        hashes += rows[dataset.DATABASE].map(of_file).fillna("")
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _row_hash(row: pandas.Series) -> str:
    return hashlib.sha256("\x00".join(row[list(dataset.COLUMNS)]).encode()).hexdigest()


def write(rows: pandas.DataFrame, folder: Path, *, seed: int) -> pandas.DataFrame:
    """Write rows and their databases, so that `dataset=<that file>` scores another version on exactly these.

    The rows come back with databases as paths relative to `folder`, as the file has them.
    """
    kept = rows[list(dataset.COLUMNS)].copy()
    if dataset.DATABASE in rows:
        names = rows[dataset.DATABASE].astype(object).where(rows[dataset.DATABASE].notna(), None)
        kept[dataset.DATABASE] = databases.write(list(names), folder, seed=seed)
    kept.to_json(folder / ROWS_FILE, orient="records", lines=True, force_ascii=True)
    return kept
