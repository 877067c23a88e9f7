"""Splitting rows into train, validation and test, so that no test table occurs in training."""

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import datasets
import numpy
import pandas
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from steps.text2sql.errors import UserError

VALIDATION_ROWS = 500
VALIDATION_SHARE = 0.05
CREATE_TABLE = re.compile(
    r"CREATE\s+(?:TEMP(?:ORARY)?\s+)?TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?"
    r"(\"[^\"]+\"|`[^`]+`|\[[^]]+\]|[^\s(]+)\s*\(",
    re.I,
)
# Names in quotes, which stay; texts, unless the quote is an apostrophe in a name; and comments.
NO_CODE = re.compile(
    r"(\"[^\"]*\"|`[^`]*`|\[[^]]*\])|(?<!\w)'(?:''|[^'])*'|--[^\n]*|/\*.*?(?:\*/|$)", re.DOTALL
)
# Words that begin a constraint, not a column, in SQLite's grammar of CREATE TABLE.
CONSTRAINTS = {"PRIMARY", "FOREIGN", "UNIQUE", "CHECK", "CONSTRAINT"}
# sql-create-context numbers the tables of WikiSQL without meaning: only their columns tell them apart.
NAMELESS = re.compile(r"table_name_\d+")


def split(
    rows: pandas.DataFrame,
    *,
    by: Literal["schema", "random"],
    test_size: float,
    seed: int,
    given: Mapping[str, pandas.DataFrame] | None = None,
) -> dict[str, pandas.DataFrame]:
    """Split into `train`, `validation` and `test`, each row in one of them, with its index.

    `schema`: a group is a connected set of rows that share a table; it is test when the hash of its tables
    falls under `test_size`, so for every seed and every order of rows the same groups are. `random`: rows
    as `datasets.Dataset.train_test_split` draws them. Validation is whole groups, or random rows, of train.
    `given` are the user's own `validation` and `test`: they stay as they are, and none is taken from `rows`.

    Raises:
        UserError: train or test would be empty.
    """
    given = given or {}
    share = 0.0 if "test" in given else test_size
    takes_validation = "validation" not in given
    if by == "schema":
        is_test, is_validation = _by_schema(rows["context"], share, takes_validation)
    else:
        is_test, is_validation = _at_random(rows, share, seed, takes_validation)
    parts = {
        "train": rows[~is_test & ~is_validation],
        "validation": rows[is_validation],
        "test": rows[is_test],
        **given,
    }
    empty = [name for name in ("train", "test") if parts[name].empty]
    if empty:
        raise UserError(
            f"split_by={by}, test_size={test_size}: leaves no rows for {' and '.join(empty)} out of "
            f"{len(rows)} rows; give more rows or tables, another test_size, or split_by=random."
        )
    return parts


def tables(context: str) -> frozenset[str]:
    """Name and sorted columns of each table that a context creates, in lower case.

    Not sqlglot: parsing 78,577 contexts with it takes longer than all the rest of the preparation.
    """
    found, context = set(), NO_CODE.sub(r"\1 ", context)
    for match in CREATE_TABLE.finditer(context):
        name = match.group(1).strip('"`[]').lower()
        columns = sorted(_columns(context, match.end()))
        found.add(f"{'' if NAMELESS.fullmatch(name) else name}({','.join(columns)})")
    return frozenset(found or {context.strip().lower()})


def _columns(context: str, start: int) -> list[str]:
    """Names of the columns between the parenthesis that opens before `start` and its partner."""
    depth, item, names = 1, start, []
    for match in re.compile(r"[(),]").finditer(context, start):
        depth += {"(": 1, ")": -1, ",": 0}[match.group()]
        if (match.group() == "," and depth == 1) or depth == 0:
            names.append(context[item : match.start()].strip())
            item = match.end()
        if depth == 0:
            break
    words = [re.match(r"\"[^\"]+\"|`[^`]+`|\[[^]]+\]|[^\s(]*", name).group() for name in names]
    return [word.strip('"`[]').lower() for word in words if word.upper() not in CONSTRAINTS]


def groups(contexts: pandas.Series) -> numpy.ndarray:
    """Number of the group of each row, `(rows,)`: rows that share a table, directly or through others."""
    cached = lru_cache(maxsize=None)(tables)
    codes: dict[str, int] = {}
    pairs = [
        (row, codes.setdefault(t, len(codes)))
        for row, c in enumerate(contexts.astype(str))
        for t in cached(c)
    ]
    row, table = numpy.array(pairs).T
    size = len(contexts) + len(codes)
    graph = coo_matrix((numpy.ones(len(pairs)), (row, len(contexts) + table)), shape=(size, size))
    return connected_components(graph, directed=False)[1][: len(contexts)]


def shared_rows(rows: pandas.DataFrame, others: pandas.DataFrame) -> int:
    """How many of `rows` ask a question of a context that `others` ask too."""
    asked = pandas.MultiIndex.from_frame(others[["question", "context"]].astype(str))
    return int(pandas.MultiIndex.from_frame(rows[["question", "context"]].astype(str)).isin(asked).sum())


def _by_schema(
    contexts: pandas.Series, test_size: float, takes_validation: bool
) -> tuple[numpy.ndarray, numpy.ndarray]:
    group = groups(contexts)
    members = pandas.Series(contexts.astype(str).to_numpy()).groupby(group)
    hashes = members.agg(lambda of_group: _hash(frozenset().union(*map(tables, of_group.unique()))))
    is_test = hashes < test_size
    sizes = members.size()[~is_test]
    in_order = sizes.loc[hashes[~is_test].sort_values().index]
    chosen = _fill(in_order, _validation_rows(int(sizes.sum()))) if takes_validation else []
    return is_test.loc[group].to_numpy(), numpy.isin(group, chosen)


def _hash(table_names: frozenset[str]) -> float:
    """Number in [0, 1) that only the names decide."""
    digest = hashlib.sha256("\n".join(sorted(table_names)).encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _fill(sizes: pandas.Series, wanted: int) -> list[int]:
    """Groups in their order as long as they fit into `wanted` rows; the smallest one where none does."""
    chosen, taken = [], 0
    for group, size in sizes.items():
        if taken + size <= wanted:
            chosen.append(group)
            taken += size
    return chosen or ([sizes.idxmin()] if len(sizes) > 1 else [])


def _validation_rows(train_rows: int) -> int:
    return min(VALIDATION_ROWS, int(train_rows * VALIDATION_SHARE))


def _at_random(
    rows: pandas.DataFrame, test_size: float, seed: int, takes_validation: bool
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Rows with the same question and context stay together: the same row, or one that contradicts."""
    asked = rows[["question", "context"]].astype(str)  # cells may be of any type
    row = asked.groupby(["question", "context"], sort=False).ngroup().to_numpy()
    is_test, is_validation = _draw(row.max() + 1, test_size, seed, takes_validation)
    return is_test[row], is_validation[row]


def _draw(
    count: int, test_size: float, seed: int, takes_validation: bool
) -> tuple[numpy.ndarray, numpy.ndarray]:
    train, test = datasets.Dataset.from_dict({"row": range(count)}), []
    try:
        if test_size:
            outer = train.train_test_split(test_size=test_size, seed=seed)
            train, test = outer["train"], outer["test"]["row"]
    except ValueError as error:
        raise UserError(f"split_by=random, test_size={test_size}: {error}") from error
    wanted = _validation_rows(len(train)) if takes_validation else 0
    every = numpy.arange(count)
    return numpy.isin(every, test), numpy.isin(every, train.shuffle(seed=seed)["row"][:wanted])
