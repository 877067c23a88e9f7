"""Running SQL that nobody has looked at.

Covered. A query can only read one database: a file is opened read-only (`mode=ro`, and `immutable`, so that
not even a lock or a `-shm` file is written), `query_only` is on, an authorizer allows nothing but reading,
nothing can be attached and no code loaded. It is bounded in time, in memory, in rows returned, and in the
length and depth of its text, by SQLite itself as far as SQLite does so. All of it runs in a process of its
own (sql_worker.py), which can write no file and has a limit on its memory. One opcode that runs long by
itself knows no deadline; it ends with that process, which is killed and replaced. Contexts, whose CREATE
TABLE statements run in memory, and database files that are made to do harm are held by the same limits.

Not covered. A fault of SQLite itself that lets a query run code: the process has the rights of the user and
is no sandbox for system calls or the network. One core, kept busy up to the limit of each query. Time, random
numbers and SQLite's version, which a query can ask for. A file that another program changes meanwhile: it is
read as it happens to be. macOS, where only SQLite has a limit on its memory, not the process as a whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from steps.text2sql.sql_process import PROCESS, Reply
from steps.text2sql.sql_worker import MAX_SQL_LENGTH

Row = tuple[object, ...]


class QueryError(Exception):
    """The query did not return a result; the message is the reason, such as `no such column: x`.

    It begins with `context: ` where there are no tables to query: the database cannot be opened or made.
    """


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
    """What each query returns from the same database, or why it returns nothing.

    The limit is for each query; opening or making the database is part of the first one's.

    Raises:
        QueryError: the database cannot be opened, or cannot be made, since its context does not execute.
    """
    return _results(database, "run", queries, timeout_seconds)


def check_query(context: str, query: str, *, timeout_seconds: float) -> None:
    """Prepare a query against the tables that a context creates, without running it.

    Raises:
        QueryError: the context does not execute, or the query is not valid for its tables.
    """
    check_query_on(MadeDatabase(context, {}), query, timeout_seconds=timeout_seconds)


def check_query_on(database: Database, query: str, *, timeout_seconds: float) -> None:
    """Prepare a query against the tables of a database, without running it.

    Raises:
        QueryError: the database cannot be opened or made, or the query is not valid for its tables.
    """
    (result,) = _results(database, "check", [query], timeout_seconds)
    if isinstance(result, QueryError):
        raise result


def _results(
    database: Database, action: str, queries: Sequence[str], timeout_seconds: float
) -> list[list[Row] | QueryError]:
    what = "context: " if isinstance(database, MadeDatabase) else f"context: {database.name}: "
    opening, texts, results = _opening(database), [_cut(query) for query in queries], []
    with PROCESS.lock:
        while True:
            request = {"database": opening, "action": action, "queries": texts[len(results) :]}
            replies = PROCESS.ask(request, timeout_seconds)
            opened, *answers = (_result(reply, timeout_seconds) for reply in replies)
            if isinstance(opened, QueryError):
                raise QueryError(f"{what}{opened}")
            results += answers
            # A query that ends the process leaves those behind it to the next one.
            if len(results) == len(texts):
                return results


def _result(reply: Reply, timeout_seconds: float) -> list[Row] | QueryError:
    match reply:
        case ["rows", rows]:
            return rows
        case ["error", reason]:
            return QueryError(reason)
        case ["died"]:
            return QueryError("ended the process that ran it")
    return QueryError(f"took over {timeout_seconds:g} s")


def _opening(database: Database) -> dict[str, object]:
    if isinstance(database, MadeDatabase):
        rows = {table: list(values) for table, values in database.rows.items()}
        return {"context": _cut(database.context), "rows": rows}
    path = database.absolute()
    if unfinished := unfinished_log(path):
        raise QueryError(
            f"context: {path.name} has changes in {unfinished.name}: close the program that writes it"
        )
    return {"uri": path.as_uri()}


def unfinished_log(database: Path) -> Path | None:
    """The file beside a database with changes that it lacks, or that are to be undone; None if there is none.

    Both would have to be worked off, which is writing, before the database alone says what is in it.
    """
    logs = (database.with_name(f"{database.name}-{kind}") for kind in ("wal", "journal"))
    return next((log for log in logs if log.exists() and log.stat().st_size), None)


def _cut(text: str) -> str:
    # One character more than is allowed is enough for SQLite to refuse it.
    return text[: MAX_SQL_LENGTH + 1]
