"""The process in which SQL that nobody has looked at runs, and the guards around it.

`sql_process` starts it by its path, so it imports nothing but the standard library and is ready in 30 ms. It
reads a request a line and writes replies, one a line, all JSON. A request names a database, what to do with
the queries (`run` or `check`), the queries, and the seconds that each may take. The first reply is for
opening the database, which is part of the first query's time, then comes one for each query:
`["rows", [...]]`, `["error", reason]` or `["late"]`. What this covers and what not stands in `sql_execution`.
"""

import json
import resource
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO

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
MAX_SQL_LENGTH = 100_000
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: MAX_SQL_LENGTH,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1_000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
# Bytes that SQLite may allocate, and the whole process with what Python needs to hand on a result.
MAX_SQLITE_MEMORY = 100_000_000
MAX_PROCESS_MEMORY = 200_000_000
# Sorting would otherwise go to files.
SETTINGS = f"""
    PRAGMA hard_heap_limit = {MAX_SQLITE_MEMORY};
    PRAGMA temp_store = MEMORY;
"""
# Often enough to stop within milliseconds, seldom enough to cost nothing.
OPCODES_BETWEEN_CHECKS = 1_000
MAX_ROWS = 100_000
# Of the reply as JSON; Python objects made of it take up to 15 times as much.
MAX_RESULT_LENGTH = 5_000_000
# So few that a row of many long values is measured before the next ones are fetched.
ROWS_AT_ONCE = 16
# A token of the query may be the reason's longest part.
MAX_REASON_LENGTH = 300
# The process ends by itself when it is that late: then the one that should have killed it is gone.
ORPHAN_SECONDS = 2

ENCODER = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), default=lambda blob: {"hex": blob.hex()}
)

NO_ROWS = "[]"
READY = f'["rows",{NO_ROWS}]'


class Refused(Exception):
    """SQLite would do it, and it is refused all the same; the message is the reason."""


class Late(Exception):
    """The time is over."""


def limit_process() -> None:
    """Bound the memory of this process, and let it write no file, not even of its own memory."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "darwin":  # whose kernel refuses it
        resource.setrlimit(resource.RLIMIT_AS, (MAX_PROCESS_MEMORY, MAX_PROCESS_MEMORY))


def decoded(line: bytes) -> Any:
    """The value that ENCODER wrote; lone surrogates pass, so that it is SQLite that refuses them."""
    return json.loads(line, object_hook=_with_blob)


def _with_blob(found: dict[str, Any]) -> Any:
    # A table may be named hex, but its rows are no text.
    return bytes.fromhex(found["hex"]) if isinstance(found.get("hex"), str) else found


def connect(uri: str) -> sqlite3.Connection:
    """A connection with the limits that SQLite itself has; text that is not UTF-8 is read with U+FFFD."""
    connection = sqlite3.connect(uri, uri=True)
    connection.executescript(SETTINGS)
    for limit, value in LIMITS.items():
        connection.setlimit(limit, value)
    connection.text_factory = lambda raw: raw.decode("utf-8", errors="replace")
    return connection


def open_file(uri: str, deadline: float) -> sqlite3.Connection:
    """Open a database for reading only; a file of another kind fails here, since its schema is read."""
    connection = connect(f"{uri}?mode=ro&immutable=1")
    with guarded(connection, READING, deadline):
        connection.execute("SELECT COUNT(*) FROM sqlite_master")
    return connection


def make(context: str, rows: dict[str, list[list[object]]], deadline: float) -> sqlite3.Connection:
    """Make a database in memory, with the tables that a context creates and these rows in them."""
    connection = connect(":memory:")
    with guarded(connection, CREATING, deadline):
        connection.executescript(context)
        for table, values in rows.items():
            places = ", ".join("?" * len(values[0])) if values else ""
            name = table.replace('"', '""')
            connection.executemany(f'INSERT OR IGNORE INTO "{name}" VALUES ({places})', values)
        connection.commit()
    return connection


def run(connection: sqlite3.Connection, query: str, deadline: float) -> str:
    """Run one SELECT; all its rows as JSON."""
    with guarded(connection, READING, deadline):
        cursor = connection.execute(query)
        if cursor.description is None:
            raise Refused("is no query")
        return json_rows(cursor)


def check(connection: sqlite3.Connection, query: str, deadline: float) -> str:
    """Prepare one SELECT without running it; no rows."""
    with guarded(connection, READING, deadline):
        program = connection.execute(f"EXPLAIN {query}")
        # EXPLAIN lists opcodes; another first column means that the text went on with QUERY PLAN.
        if program.description[0][0] != "addr":
            raise Refused("is no query")
    return NO_ROWS


ACTIONS = {"run": run, "check": check}


def json_rows(cursor: sqlite3.Cursor) -> str:
    """The rows of a cursor as JSON: there are never many of them as Python objects."""
    parts, count, length = [], 0, 0
    while rows := cursor.fetchmany(ROWS_AT_ONCE):
        parts.append(ENCODER.encode(rows)[1:-1])
        count, length = count + len(rows), length + len(parts[-1])
        if count > MAX_ROWS or length > MAX_RESULT_LENGTH:
            raise Refused(f"more than {MAX_ROWS} rows or {MAX_RESULT_LENGTH} characters")
    return f"[{','.join(parts)}]"


@contextmanager
def guarded(connection: sqlite3.Connection, allowed: set[int], deadline: float) -> Iterator[None]:
    """Allow only these actions on a connection, and interrupt it after the deadline, a monotonic time."""

    def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        is_forbidden = action == sqlite3.SQLITE_FUNCTION and second in FORBIDDEN_FUNCTIONS
        return sqlite3.SQLITE_OK if action in allowed and not is_forbidden else sqlite3.SQLITE_DENY

    connection.set_authorizer(authorize)
    connection.set_progress_handler(lambda: time.monotonic() > deadline, OPCODES_BETWEEN_CHECKS)
    try:
        yield
    except sqlite3.Error as error:
        raise Late if time.monotonic() > deadline else error from error


class Worker:
    """The database that is open, and the replies to requests."""

    def __init__(self) -> None:
        self._connection = sqlite3.connect(":memory:")

    def replies(
        self, database: dict[str, Any], action: str, queries: list[str], seconds: float
    ) -> Iterator[str]:
        """The reply to opening a database and, if it opens, one for each query."""
        deadline = time.monotonic() + seconds
        opened = answer(lambda: self._open(database, deadline), deadline)
        yield opened
        if opened != READY:
            return
        for query in queries:
            yield answer(partial(ACTIONS[action], self._connection, query, deadline), deadline)
            deadline = time.monotonic() + seconds

    def _open(self, database: dict[str, Any], deadline: float) -> str:
        self._connection.close()
        opening = open_file if "uri" in database else make
        self._connection = opening(**database, deadline=deadline)
        self._connection.set_authorizer(None)
        self._connection.execute("PRAGMA query_only = ON")
        return NO_ROWS


def answer(action: Callable[[], str], deadline: float) -> str:
    """The reply for one action: its rows, or why there are none."""
    signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 0) + ORPHAN_SECONDS)
    try:
        return f'["rows",{action()}]'
    except Late:
        return '["late"]'
    except MemoryError:
        reason = "takes too much memory"
    except (Refused, sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        reason = str(error)[:MAX_REASON_LENGTH]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ENCODER.encode(["error", reason])


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Say that it is ready, then answer requests until there are no more."""

    def send(reply: str) -> None:
        replies.write(f"{reply}\n".encode(errors="surrogatepass"))
        replies.flush()

    worker = Worker()
    send(READY)
    for line in requests:
        for reply in worker.replies(**decoded(line)):
            send(reply)


if __name__ == "__main__":
    limit_process()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    serve(sys.stdin.buffer, sys.stdout.buffer)
