"""Queries and contexts that mean harm, each with what it tries and how it ends, and how to measure them.

The name says what the SQL tries; the pattern after it fits the error that it ends with, or is RETURNS where
it does no harm and returns rows. `{folder}` is the folder of the database.
"""

import json
import re
import resource
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from steps.text2sql.sql_execution import MadeDatabase, QueryError, check_query, run_query
from steps.text2sql.sql_process import PROCESS

# What getrusage counts in.
KIB = 1 if sys.platform == "darwin" else 1024
RETURNS = "returns"
# For what does not end by its time: a busy machine must not end it so.
AMPLE_SECONDS = 60
LATE = "took over"
# Seconds in one opcode: it ends where the limit is longer.
SLOW_OR_LATE = f"{LATE}|{RETURNS}"
DENIED = "not authorized|authorization denied|prohibited"
TOO_BIG = "too big"
MEMORY = "takes too much memory|took over"  # on a slow machine the time is over first
TOO_MUCH = "more than 100000 rows or 5000000 characters|took over"
N = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n)"
# Each of 980,000 zeros is compared with 40,000 characters: minutes in one opcode.
SLOW = "trim(hex(zeroblob(490000)), replace(hex(zeroblob(20000)), '0', 'a') || '0') = ''"

QUERIES: dict[str, tuple[str, str]] = {
    # Time that SQLite's own deadline bounds.
    "counts an endless recursion": (f"{N} SELECT COUNT(*) FROM n", LATE),
    "filters an endless recursion": (f"{N} SELECT x FROM n WHERE x < 0", LATE),
    "looks for the last row of an endless recursion": (
        f"{N} SELECT x FROM n LIMIT 1 OFFSET 1000000000",
        LATE,
    ),
    "nests one endless recursion in another": (f"{N} SELECT (SELECT MAX(x) FROM n) FROM n", LATE),
    "two recursions that feed on strings": (
        f"{N}, m(y) AS (SELECT 'a' UNION ALL SELECT substr(y || 'b', 1, 9) FROM m) SELECT COUNT(*) FROM n, m",
        MEMORY,
    ),
    "joins a million rows with a million rows": (
        "SELECT COUNT(*) FROM numbers a, numbers b, numbers c, numbers d WHERE a.x + b.x + c.x + d.x = 7",
        LATE,
    ),
    "compares a million rows by LIKE": (
        "SELECT COUNT(*) FROM numbers a, numbers b, numbers c WHERE a.x || b.x LIKE '%' || c.x || '%9_9'",
        LATE,
    ),
    "counts in a correlated subquery of subqueries": (
        "SELECT (SELECT COUNT(*) FROM numbers b, numbers c WHERE b.x * c.x > a.x) FROM numbers a, numbers d",
        LATE,
    ),
    "ranks a cross join by windows": (
        "SELECT SUM(r) FROM (SELECT RANK() OVER (PARTITION BY a.x % 2 ORDER BY b.x) r "
        "FROM numbers a, numbers b, numbers c)",
        f"{LATE}|{MEMORY}",
    ),
    "deletes itself in a recursion over EXISTS": (
        f"{N} SELECT COUNT(*) FROM n WHERE NOT EXISTS (SELECT 1 FROM numbers WHERE x = n.x + 5000)",
        LATE,
    ),
    "hashes random text for ever": (f"{N} SELECT MAX(hex(randomblob(1000))) FROM n", LATE),
    "walks a recursive join of a table": (
        "WITH RECURSIVE p(x) AS (SELECT 1 UNION ALL SELECT numbers.x FROM p, numbers) SELECT MIN(x) FROM p",
        f"{LATE}|{MEMORY}",
    ),
    "natural joins of 40 copies of a table": (
        "SELECT COUNT(*) FROM " + ", ".join(f"singer s{i}" for i in range(40)),
        LATE,
    ),
    # Time in one opcode, which only the end of the process bounds.
    "blows up LIKE in one call": (f"SELECT hex(zeroblob(400000)) LIKE '%{'0' * 990}1'", SLOW_OR_LATE),
    "blows up LIKE with an escape": (
        f"SELECT hex(zeroblob(400000)) LIKE '%{'0' * 990}1' ESCAPE '!'",
        SLOW_OR_LATE,
    ),
    "blows up GLOB in one call": (f"SELECT hex(zeroblob(400000)) GLOB '*{'[^1]' * 240}1'", SLOW_OR_LATE),
    "looks for a long text in a long text": (
        "SELECT instr(hex(zeroblob(490000)), hex(zeroblob(240000)) || '1')",
        LATE,
    ),
    "replaces a long text in a long text": (
        "SELECT replace(hex(zeroblob(490000)), hex(zeroblob(240000)) || '1', '')",
        LATE,
    ),
    "trims a long text by a long list": (f"SELECT {SLOW}", LATE),
    "blows up LIKE for each row": (
        f"SELECT COUNT(*) FROM numbers WHERE hex(zeroblob(x * 400)) LIKE '%{'0' * 500}1'",
        LATE,
    ),
    "parses a query that doubles 30 times": (
        "WITH c0 AS (SELECT x FROM numbers), "
        + ", ".join(f"c{i} AS (SELECT a.x FROM c{i - 1} a, c{i - 1} b)" for i in range(1, 31))
        + " SELECT COUNT(*) FROM c30",
        f"{LATE}|{MEMORY}|{TOO_BIG}|too many|at most",
    ),
    # Memory.
    "a zeroblob of 4 GB": ("SELECT zeroblob(4000000000)", TOO_BIG),
    "a zeroblob of 900 MB": ("SELECT length(zeroblob(900000000))", TOO_BIG),
    "a randomblob of 1 GB": ("SELECT randomblob(1000000000)", TOO_BIG),
    "a blob of the greatest integer": ("SELECT zeroblob(9223372036854775807)", TOO_BIG),
    "hex of a long blob": ("SELECT hex(zeroblob(600000))", TOO_BIG),
    "printf with a width of 2 GB": ("SELECT printf('%2000000000d', 1)", f"{RETURNS}|{TOO_BIG}|{MEMORY}"),
    "printf with a width from an argument": (
        "SELECT printf('%*d', 2000000000, 1)",
        f"{RETURNS}|{TOO_BIG}|{MEMORY}",
    ),
    "printf with a precision of 2 GB": (
        "SELECT printf('%.2000000000f', 1.5)",
        f"{RETURNS}|{TOO_BIG}|{MEMORY}",
    ),
    "printf of a repeated character": ("SELECT printf('%.*c', 999999999, 'x')", f"{TOO_BIG}|{MEMORY}"),
    "nested replace that multiplies": (
        "SELECT replace(replace(replace(hex(zeroblob(99)), '0', hex(zeroblob(99))), '0', hex(zeroblob(99)))"
        ", '0', hex(zeroblob(99)))",
        TOO_BIG,
    ),
    "doubles a text until it is too long": (
        "WITH RECURSIVE b(t) AS (SELECT 'a' UNION ALL SELECT t || t FROM b) SELECT MAX(length(t)) FROM b",
        TOO_BIG,
    ),
    "quotes quotes": (
        "SELECT " + "quote(" * 30 + "''''" + ")" * 30,
        TOO_BIG,
    ),
    "concatenates for ever": (f"{N} SELECT length(group_concat(x)) FROM n", f"{TOO_BIG}|{LATE}"),
    "gathers JSON for ever": (f"{N} SELECT length(json_group_array(x)) FROM n", f"{TOO_BIG}|{MEMORY}"),
    "keeps distinct blobs for ever": (f"{N} SELECT COUNT(DISTINCT randomblob(900000)) FROM n", MEMORY),
    "sorts long blobs for ever": (f"{N} SELECT randomblob(90000) b FROM n ORDER BY b", MEMORY),
    "a union of ever new rows": (
        "WITH RECURSIVE n(x, b) AS (SELECT 1, '' UNION SELECT x + 1, hex(randomblob(9000)) FROM n) "
        "SELECT COUNT(*) FROM n",
        MEMORY,
    ),
    "groups by ever new keys": (
        f"{N} SELECT COUNT(*) FROM (SELECT hex(randomblob(9000)) k FROM n GROUP BY k)",
        MEMORY,
    ),
    "materializes an endless table": (
        f"{N}, m AS MATERIALIZED (SELECT hex(randomblob(9000)) h FROM n) SELECT COUNT(*) FROM m a, m b",
        f"{MEMORY}|syntax error",
    ),
    "queues a recursion that branches": (
        "WITH RECURSIVE n(x, b) AS (SELECT 1, '' UNION ALL SELECT n.x * 2 + numbers.x, hex(randomblob(5000)) "
        "FROM n, numbers ORDER BY 1 DESC) SELECT COUNT(*) FROM n",
        f"{MEMORY}|{LATE}",
    ),
    "an index by itself for a big join": (
        f"{N} SELECT COUNT(*) FROM (SELECT hex(randomblob(9000)) h FROM n LIMIT 99999) a "
        f"JOIN (SELECT hex(randomblob(9000)) h FROM n LIMIT 99999) b USING (h)",
        f"{MEMORY}|{LATE}",
    ),
    "JSON of 90,000 brackets": (f"SELECT json('{'[' * 45_000}{']' * 45_000}')", "malformed JSON"),
    "JSON that is searched again and again": (
        f"{N} SELECT COUNT(*) FROM n, json_tree('[[' || replace(hex(zeroblob(90000)), '0', '0,') || '0]]')",
        "vtable constructor failed",
    ),
    # Results, which the calling process has to hold.
    "returns rows for ever": (f"{N} SELECT x FROM n", TOO_MUCH),
    "returns a million rows": ("SELECT a.x FROM numbers a, numbers b", TOO_MUCH),
    "returns a thousand long texts": ("SELECT hex(zeroblob(490000)) FROM numbers", f"{TOO_MUCH}|{MEMORY}"),
    "returns a thousand long blobs": ("SELECT zeroblob(990000) FROM numbers", f"{TOO_MUCH}|{MEMORY}"),
    "returns 2,000 columns a thousand times": (
        f"SELECT {', '.join(['x'] * 2000)} FROM numbers",
        TOO_MUCH,
    ),
    "returns a row that is as long as memory": (
        f"SELECT {', '.join(['hex(zeroblob(490000))'] * 2000)}",
        MEMORY,
    ),
    "returns as many small values as it may": (
        f"SELECT {', '.join(['x % 90 + 0.5'] * 40)} FROM numbers a JOIN numbers b USING (x)",
        RETURNS,
    ),
    "returns text that JSON makes longer": ("SELECT replace(hex(zeroblob(400000)), '0', char(1))", RETURNS),
    "returns text with zero bytes": ("SELECT CAST(zeroblob(900000) AS TEXT)", f"{RETURNS}|{TOO_MUCH}"),
    # Writing and reaching out.
    "attaches a file": ("ATTACH '{folder}/other.sqlite' AS other", DENIED),
    "attaches memory": ("ATTACH ':memory:' AS other", DENIED),
    "attaches a file for writing by URI": ("ATTACH 'file:{folder}/singers.sqlite?mode=rw' AS other", DENIED),
    "detaches the database": ("DETACH main", DENIED),
    "copies the database by VACUUM": ("VACUUM INTO '{folder}/other.sqlite'", DENIED),
    "vacuums": ("VACUUM", DENIED),
    "makes the schema writable": ("PRAGMA writable_schema = ON", DENIED),
    "lifts the limit on memory": ("PRAGMA hard_heap_limit = 0", DENIED),
    "turns reading only off": ("PRAGMA query_only = OFF", DENIED),
    "changes the journal": ("PRAGMA journal_mode = WAL", DENIED),
    "changes the folder of temporary files": ("PRAGMA temp_store_directory = '{folder}'", DENIED),
    "asks a pragma as a table": ("SELECT * FROM pragma_database_list", DENIED),
    "calls a pragma with an argument": ("SELECT * FROM pragma_table_info('singer')", DENIED),
    "loads code": ("SELECT load_extension('{folder}/evil.so')", DENIED),
    "loads code with an entry point": ("SELECT load_extension('evil', 'main')", DENIED),
    "registers a tokenizer at an address": ("SELECT fts3_tokenizer('simple', x'4141414141414141')", DENIED),
    "reads a file": ("SELECT readfile('/etc/passwd')", f"{DENIED}|no such function"),
    "writes a file": ("SELECT writefile('{folder}/x', 'x')", f"{DENIED}|no such function"),
    "starts an editor": ("SELECT edit('x', 'touch {folder}/x')", f"{DENIED}|no such function"),
    "lists a folder": ("SELECT * FROM fsdir('/')", "no such table"),
    "opens an archive": ("SELECT * FROM zipfile('{folder}/x.zip')", "no such table"),
    "reads pages of the file": ("SELECT * FROM sqlite_dbpage", "no such table"),
    "edits the schema table": ("UPDATE sqlite_master SET sql = 'x'", f"{DENIED}|may not be modified"),
    "inserts": ("INSERT INTO singer VALUES ('Eve', 1)", DENIED),
    "inserts and returns": ("INSERT INTO singer VALUES ('Eve', 1) RETURNING name", DENIED),
    "deletes behind a WITH": ("WITH a AS (SELECT 1) DELETE FROM singer", DENIED),
    "replaces": ("REPLACE INTO singer VALUES ('Ann', 1)", DENIED),
    "drops a table": ("DROP TABLE singer", DENIED),
    "renames a table": ("ALTER TABLE singer RENAME TO singers", DENIED),
    "makes a temporary table": ("CREATE TEMP TABLE other (a INT)", DENIED),
    "makes a temporary trigger": (
        "CREATE TEMP TRIGGER t AFTER INSERT ON singer BEGIN DELETE FROM singer; END",
        DENIED,
    ),
    "makes a virtual table": ("CREATE VIRTUAL TABLE v USING fts5(a)", DENIED),
    "makes a table of a file": ("CREATE VIRTUAL TABLE temp.v USING csv(filename='/etc/passwd')", DENIED),
    "opens a transaction": ("BEGIN EXCLUSIVE", DENIED),
    "opens a savepoint": ("SAVEPOINT s", DENIED),
    "rebuilds indexes": ("REINDEX", f"{DENIED}|is no query"),
    "writes statistics": ("ANALYZE", DENIED),
    # Text.
    "a second statement": ("SELECT 1; DROP TABLE singer", "one statement"),
    "a second statement behind a comment": ("SELECT 1 /* */; -- \n DELETE FROM singer", "one statement"),
    "a NUL byte between two statements": ("SELECT 1;\0DROP TABLE singer", "null character"),
    "a NUL byte at the end": ("SELECT 1\0", "null character"),
    "bytes that are not UTF-8": (b"SELECT '\xff\xfe'".decode(errors="surrogateescape"), "surrogates"),
    "half a pair of surrogates": ("SELECT '\ud83d'", "surrogates"),
    "1 MB of parentheses": ("SELECT " + "(" * 500_000 + "1" + ")" * 500_000, "too large|too big|overflow"),
    "1 MB of open parentheses": ("(" * 1_000_000, "too large|too big|overflow"),
    "90 KB of parentheses": ("SELECT " + "(" * 45_000 + "1" + ")" * 45_000, "overflow|too large"),
    "90 KB of NOT": ("SELECT " + "NOT " * 22_000 + "1", "overflow|too large|depth"),
    "90 KB of minus signs": ("SELECT " + "- " * 45_000 + "1", "overflow|too large|depth"),
    "90 KB of plus": ("SELECT 1" + " + 1" * 22_000, "too large|depth"),
    "90 KB of CASE": (
        "SELECT " + "CASE WHEN 1 THEN " * 5_000 + "1" + " END" * 5_000,
        "overflow|too large|depth",
    ),
    "5,000 subqueries in each other": ("SELECT (" * 5_000 + "1" + ")" * 5_000, "overflow|too large|depth"),
    "5,000 tables from subqueries in each other": (
        "SELECT * FROM (" * 5_000 + "SELECT 1" + ")" * 5_000,
        "overflow|too large|depth",
    ),
    "5,000 compound parts": (" UNION ALL ".join(["SELECT 1"] * 5_000), "too many terms"),
    "5,000 columns": ("SELECT " + ",".join(["1"] * 5_000), "too many columns"),
    "a join of 100 tables": ("SELECT 1 FROM " + ", ".join(["singer"] * 100), "at most 64 tables"),
    "a list of 40,000 values": (f"SELECT 1 WHERE 1 IN ({','.join(['2'] * 40_000)})", RETURNS),
    "a text of 10 MB": (f"SELECT '{'x' * 10_000_000}'", "too large|too big"),
    "a comment of 5 MB": (f"SELECT 1 /*{'x' * 5_000_000}*/", "too large|too big"),
    "a comment without an end": ("SELECT 1 /*" + "x" * 90_000, RETURNS),
    "a text without an end": ("SELECT '" + "x" * 90_000, "unrecognized token"),
    "a token of 90 KB": ("SELECT " + "x" * 90_000, "no such column"),
    "a pattern of 90 KB": (f"SELECT 'x' LIKE '{'%_' * 40_000}'", "pattern too complex"),
    "a number of 90 KB": ("SELECT " + "9" * 90_000, RETURNS),
    "a parameter": ("SELECT ?1, :x, @y, $z", "parameters|bindings"),
    "a variable number that is too high": ("SELECT ?999999999", "variable number"),
    "EXPLAIN of a write": ("EXPLAIN DROP TABLE singer", DENIED),
    "a format that shifts its arguments": ("SELECT printf('%s%s%s%n%p', 1)", RETURNS),
    "the absolute value of the least integer": ("SELECT abs(-9223372036854775808)", "integer overflow"),
}

SINGER = "CREATE TABLE singer (name TEXT, age INTEGER)"
ROWS = {"t": [(i, f"text {i}") for i in range(50)]}
T = "CREATE TABLE t (a INTEGER, b TEXT)"
CONTEXTS: dict[str, tuple[str, str]] = {
    "makes a table of an endless query": (f"CREATE TABLE u AS {N} SELECT x FROM n", f"{LATE}|{MEMORY}"),
    "makes a table of long blobs": (f"CREATE TABLE u AS {N} SELECT randomblob(900000) FROM n", MEMORY),
    "makes a table of a LIKE that blows up": (
        f"{T}; CREATE TABLE u AS SELECT {SLOW} AS x",
        LATE,
    ),
    "makes a table of a cross join of JSON": (
        f"{T}; CREATE TABLE u AS {N} SELECT value FROM n, json_each('[1,2,3,4,5,6,7,8,9]')",
        f"{LATE}|{MEMORY}",
    ),
    "inserts for ever": (f"{T}; INSERT INTO t {N} SELECT x, hex(randomblob(9000)) FROM n", MEMORY),
    "doubles a table 60 times": (
        f"{T}; INSERT INTO t VALUES (1, 'x')" + "; INSERT INTO t SELECT * FROM t" * 60,
        f"{LATE}|{MEMORY}",
    ),
    "doubles a WITHOUT ROWID table": (
        "CREATE TABLE t (a INTEGER, b TEXT, PRIMARY KEY (a, b)) WITHOUT ROWID; INSERT INTO t VALUES (1, 'x')"
        + "; INSERT INTO t SELECT a + (SELECT MAX(a) FROM t), hex(randomblob(900)) FROM t" * 60,
        f"{LATE}|{MEMORY}",
    ),
    "updates a table to long texts": (
        f"{T}; INSERT INTO t {N} SELECT x, '' FROM n LIMIT 1000; UPDATE t SET b = hex(zeroblob(400000))",
        MEMORY,
    ),
    "a CHECK that takes for ever": (
        f"CREATE TABLE t (a INTEGER, b TEXT, CHECK (NOT {SLOW}))",
        LATE,
    ),
    "a CHECK with a query": (
        f"CREATE TABLE t (a INTEGER, b TEXT, CHECK (a IN ({N} SELECT x FROM n)))",
        "prohibited",
    ),
    "a generated column that takes for ever": (
        f"CREATE TABLE t (a INTEGER, b TEXT, c GENERATED ALWAYS AS ({SLOW}) STORED)",
        LATE,
    ),
    "a generated column of a gigabyte": (
        "CREATE TABLE t (a INTEGER, b TEXT, c GENERATED ALWAYS AS (zeroblob(999999999)) STORED)",
        TOO_BIG,
    ),
    "an index that takes for ever": (
        f"{T}; INSERT INTO t VALUES (1, 'x'); CREATE INDEX i ON t ({SLOW})",
        LATE,
    ),
    "an index of long texts": (
        f"CREATE TABLE t (a INTEGER, b TEXT); CREATE INDEX i ON t (hex(zeroblob(450000 + a))); "
        f"INSERT INTO t {N} SELECT x, '' FROM n LIMIT 1000",
        MEMORY,
    ),
    "a default with an endless query": (
        f"CREATE TABLE t (a INTEGER DEFAULT ({N} SELECT x FROM n))",
        "syntax error|not constant",
    ),
    "a default that loads code": (
        "CREATE TABLE t (a INT, b DEFAULT (load_extension('{folder}/x.so'))); INSERT INTO t (a) VALUES (1)",
        DENIED + "|unsafe use",
    ),
    "selects for ever": (f"{T}; {N} SELECT COUNT(*) FROM n", LATE),
    "a trigger": (
        f"{T}; CREATE TRIGGER g AFTER INSERT ON t BEGIN INSERT INTO t SELECT * FROM t; END",
        DENIED,
    ),
    "a view": (f"{T}; CREATE VIEW v AS {N} SELECT x FROM n", DENIED),
    "a temporary table": ("CREATE TEMP TABLE t (a INTEGER, b TEXT)", DENIED),
    "a full text table": ("CREATE VIRTUAL TABLE t USING fts5(a, b)", DENIED),
    "an R-tree": ("CREATE VIRTUAL TABLE t USING rtree(a, b, c)", DENIED),
    "a table of pages": ("CREATE VIRTUAL TABLE t USING dbstat(main)", DENIED),
    "a table of a file": ("CREATE VIRTUAL TABLE t USING csv(filename='/etc/passwd')", DENIED),
    "a table of an archive": ("CREATE TABLE t AS SELECT * FROM zipfile('{folder}/x.zip')", "no such table"),
    "a table of a read file": (
        "CREATE TABLE t AS SELECT readfile('/etc/passwd')",
        f"{DENIED}|no such function",
    ),
    "attaches a file": ("ATTACH '{folder}/x.sqlite' AS x; CREATE TABLE x.t (a INT)", DENIED),
    "copies into a file": (
        "CREATE TABLE t (a INT); VACUUM INTO '{folder}/x.sqlite'",
        f"{DENIED}|cannot VACUUM",
    ),
    "lifts the limit on memory": ("PRAGMA hard_heap_limit = 0", DENIED),
    "makes the schema writable": ("PRAGMA writable_schema = ON", DENIED),
    "writes into the schema table": (
        f"{T}; INSERT INTO sqlite_master VALUES ('table', 'x', 'x', 2, 'x')",
        f"{DENIED}|may not be modified",
    ),
    "moves temporary files": ("PRAGMA temp_store_directory = '{folder}'", DENIED),
    "deletes": (f"{T}; DELETE FROM t", DENIED),
    "drops a table": (f"{T}; DROP TABLE t", DENIED),
    "loads code": ("SELECT load_extension('{folder}/x.so')", DENIED),
    "1 MB of columns": (
        f"CREATE TABLE t ({', '.join(f'column_{i} TEXT' for i in range(60_000))})",
        "too large|too big",
    ),
    "5,000 columns": (f"CREATE TABLE t ({', '.join(f'c{i} INT' for i in range(5_000))})", "too many columns"),
    "3,000 tables, and a value too many": (
        "; ".join(f"CREATE TABLE t{i} (a)" for i in range(3_000)) + "; CREATE TABLE t (a)",
        f"1 columns|{LATE}",
    ),
    "90 KB of parentheses": (
        f"CREATE TABLE t (a INTEGER CHECK ({'(' * 45_000}1{')' * 45_000}))",
        "overflow|too large",
    ),
    "a NUL byte": ("CREATE TABLE t (a\0 INTEGER)", "null character"),
    "bytes that are not UTF-8": ("CREATE TABLE t (a\udcff INTEGER)", "surrogates"),
    "a transaction without an end": (f"BEGIN; {T}; BEGIN", "within a transaction"),
    "a context of 5 MB": (f"{T} /*{'x' * 5_000_000}*/", "too large|too big"),
}


def make_database(path: Path) -> None:
    """Write the database that the queries run on: three singers, and a thousand numbers."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(f"{SINGER}; CREATE TABLE numbers (x INTEGER)")
        connection.executemany("INSERT INTO singer VALUES (?, ?)", [("Ann", 30), ("Bob", 20), ("Cy", 30)])
        connection.executemany("INSERT INTO numbers VALUES (?)", [(i,) for i in range(1, 1001)])
        connection.commit()


class Attempt(NamedTuple):
    """A call that raises QueryError or returns, the pattern of how it ends, and its limit."""

    call: Callable[[], object]
    end: str
    seconds: float


def attempts(database: Path, *, seconds: float) -> dict[str, Attempt]:
    """All of the corpus, by claim; `seconds` is the limit of what may end by its time."""

    def attempt(end: str, call: Callable[..., object], *given: object) -> Attempt:
        limit = seconds if re.search(end, LATE) else AMPLE_SECONDS
        return Attempt(partial(call, *given, timeout_seconds=limit), end, limit)

    def on_file(sql: str, end: str) -> Attempt:
        return attempt(end, run_query, database, sql)

    def prepared(sql: str) -> Attempt:
        return attempt(".*", check_query, SINGER, sql)

    def as_context(sql: str, end: str) -> Attempt:
        return attempt(end, run_query, MadeDatabase(sql, ROWS), "SELECT 1")

    def placed(sql: str) -> str:
        return sql.replace("{folder}", str(database.parent))

    return (
        {f"query: {claim}": on_file(placed(sql), end) for claim, (sql, end) in QUERIES.items()}
        | {f"only prepared: {claim}": prepared(placed(sql)) for claim, (sql, _) in QUERIES.items()}
        | {f"context: {claim}": as_context(placed(sql), end) for claim, (sql, end) in CONTEXTS.items()}
    )


def measure(database: Path, *, seconds: float, only: str = "") -> list[dict[str, object]]:
    """Run the corpus, or the part whose names fit `only`: how each ended and how late.

    What is over 0.1 s late is tried twice more, and the best time counts: the machine may be busy.
    """
    report = []
    for claim, attempt in attempts(database, seconds=seconds).items():
        if re.search(only, claim):
            found, late = _outcome(attempt)
            for _ in range(2):
                late = min(late, _outcome(attempt)[1]) if late > 0.1 else late
            report.append({"claim": claim, "end": attempt.end, "found": found, "late": late})
    return report


def _outcome(attempt: Attempt) -> tuple[str, float]:
    # Where the one before ended the process, the next one starts before its time begins.
    run_query(MadeDatabase("", {}), "SELECT 1", timeout_seconds=AMPLE_SECONDS)
    begin, found = time.monotonic(), RETURNS
    try:
        attempt.call()
    except QueryError as error:
        found = str(error)
    return found, time.monotonic() - begin - attempt.seconds


def peak_memory() -> int:
    """Peak memory of this process in bytes; getrusage would count what forked it as well."""
    if sys.platform == "linux":
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * KIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def main() -> None:
    """Print the report and the peak memory, in bytes, of this process and of the largest that it started."""
    database, seconds, only = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    report = measure(database, seconds=seconds, only=only)
    PROCESS.stop()  # only what has ended is counted
    peaks = [peak_memory(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * KIB]
    print(json.dumps({"report": report, "peak_bytes": peaks}))


if __name__ == "__main__":
    main()
