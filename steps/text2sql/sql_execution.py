"""Running SQL that nobody has looked at, and comparing what it returns.

Covered: a query can only read one database, which is opened read-only (`mode=ro`, `query_only`, and an
authorizer that allows nothing but reading), cannot attach another file or load code, and is bounded in time,
in memory for one value, in rows returned and in the length and depth of its text.

Not covered: one opcode that runs long by itself, since the deadline is looked at between opcodes only (a
nested replace() ran for seconds past it), and the memory of the process as a whole.
"""

import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlglot
from sqlglot.errors import SqlglotError

Row = tuple[object, ...]

READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
# What CREATE TABLE and CREATE INDEX do inside SQLite: they write to its own schema table.
CREATING = READING | {
    sqlite3.SQLITE_CREATE_TABLE,
    sqlite3.SQLITE_CREATE_INDEX,
    sqlite3.SQLITE_INSERT,
    sqlite3.SQLITE_UPDATE,
    sqlite3.SQLITE_TRANSACTION,
    sqlite3.SQLITE_REINDEX,
}
FORBIDDEN_FUNCTIONS = {"load_extension", "writefile", "readfile", "edit", "fts3_tokenizer"}
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 10_000_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1_000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
# Often enough to stop within milliseconds, seldom enough to cost nothing.
OPCODES_BETWEEN_CHECKS = 1_000
MAX_ROWS = 100_000
MAX_RESULT_LENGTH = 50_000_000


class QueryError(Exception):
    """The query did not return a result; the message is the reason, such as `no such column: x`."""


@dataclass(frozen=True)
class MadeDatabase:
    """Tables as a context creates them, and the rows to put in, by table, in the order of its columns."""

    context: str
    rows: Mapping[str, Sequence[Row]]


Database = Path | MadeDatabase


def run_query(database: Database, query: str, *, timeout_seconds: float) -> list[Row]:
    """All rows that one SELECT returns from a database file, or from one made in memory.

    Raises:
        QueryError: it does not parse, writes, takes too long or returns too much.
    """
    (result,) = run_queries(database, [query], timeout_seconds=timeout_seconds)
    if isinstance(result, QueryError):
        raise result
    return result


def run_queries(
    database: Database, queries: Sequence[str], *, timeout_seconds: float
) -> list[list[Row] | QueryError]:
    """What each query returns from the same database, or why it returns nothing; a limit for each.

    Raises:
        QueryError: the database cannot be made, since its context does not execute.
    """
    with closing(_opened(database, timeout_seconds)) as connection:
        connection.set_authorizer(None)
        connection.execute("PRAGMA query_only = ON")
        return [_result(connection, query, timeout_seconds) for query in queries]


def _opened(database: Database, timeout_seconds: float) -> sqlite3.Connection:
    if isinstance(database, Path):
        return sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)
    connection = sqlite3.connect(":memory:")
    with _guarded(connection, CREATING, timeout_seconds, what="context: "):
        connection.executescript(database.context)
        for table, rows in database.rows.items():
            places = ", ".join("?" * len(rows[0])) if rows else ""
            name = table.replace('"', '""')
            connection.executemany(f'INSERT INTO "{name}" VALUES ({places})', rows)
    connection.commit()
    return connection


def _result(connection: sqlite3.Connection, query: str, timeout_seconds: float) -> list[Row] | QueryError:
    try:
        with _guarded(connection, READING, timeout_seconds):
            cursor = connection.execute(query)
            if cursor.description is None:
                raise QueryError("is no query")
            return _fetch(cursor)
    except QueryError as error:
        return error


def _fetch(cursor: sqlite3.Cursor) -> list[Row]:
    rows, size = [], 0
    for row in cursor:
        rows.append(row)
        size += sum(len(value) for value in row if isinstance(value, str | bytes))
        if len(rows) > MAX_ROWS or size > MAX_RESULT_LENGTH:
            raise QueryError(f"more than {MAX_ROWS} rows or {MAX_RESULT_LENGTH} characters")
    return rows


def check_query(context: str, query: str, *, timeout_seconds: float) -> None:
    """Prepare a query against the tables that a context creates, without running it.

    Raises:
        QueryError: the context does not execute, or the query is not valid for its tables.
    """
    with closing(sqlite3.connect(":memory:")) as connection:
        with _guarded(connection, CREATING, timeout_seconds, what="context: "):
            connection.executescript(context)
        with _guarded(connection, READING, timeout_seconds):
            program = connection.execute(f"EXPLAIN {query}")
            # EXPLAIN lists opcodes; another first column means that the text went on with QUERY PLAN.
            if program.description[0][0] != "addr":
                raise QueryError("is no query")


@contextmanager
def _guarded(
    connection: sqlite3.Connection, allowed: set[int], timeout_seconds: float, *, what: str = ""
) -> Iterator[None]:
    deadline = time.monotonic() + timeout_seconds
    for limit, value in LIMITS.items():
        connection.setlimit(limit, value)
    connection.text_factory = lambda raw: raw.decode("utf-8", errors="replace")

    def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        is_forbidden = action == sqlite3.SQLITE_FUNCTION and second in FORBIDDEN_FUNCTIONS
        return sqlite3.SQLITE_OK if action in allowed and not is_forbidden else sqlite3.SQLITE_DENY

    connection.set_authorizer(authorize)
    connection.set_progress_handler(lambda: time.monotonic() > deadline, OPCODES_BETWEEN_CHECKS)
    try:
        yield
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
        late = time.monotonic() > deadline
        raise QueryError(what + (f"took over {timeout_seconds:g} s" if late else str(error))) from error


def same_result(gold: list[Row], predicted: list[Row], *, ordered: bool) -> bool:
    """Whether two results have the same rows as often, and in the same order where that counts.

    Names of columns do not matter, their order does.
    """
    return gold == predicted if ordered else Counter(gold) == Counter(predicted)


def is_ordered(query: str) -> bool:
    """Whether the order of the query's rows is asked for: an ORDER BY of the whole query."""
    try:
        return sqlglot.parse_one(query, read="sqlite").args.get("order") is not None
    except (SqlglotError, RecursionError):
        return "order by" in query.lower().rsplit(")", 1)[-1]
