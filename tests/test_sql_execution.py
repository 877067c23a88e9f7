"""Queries that nobody has looked at can read one database, and do nothing else."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from steps.text2sql import sql_execution
from steps.text2sql.sql_execution import QueryError, check_query, check_query_on
from steps.text2sql.sql_worker import MAX_ROWS

CONTEXT = "CREATE TABLE singer (name TEXT, age INTEGER)"
ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n)"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Three singers, an index, and a name that is not UTF-8; the folder's name needs quoting in a URI."""
    path = tmp_path / "50% of #1?" / "singers.sqlite"
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(f"{CONTEXT}; CREATE INDEX by_age ON singer (age)")
        connection.executemany("INSERT INTO singer VALUES (?, ?)", [("Ann", 30), ("Bob", 20), ("Cy", 30)])
        connection.commit()
    return path


def run(database: Path, query: str, *, timeout_seconds: float = 10) -> list[tuple[object, ...]]:
    return sql_execution.run_query(database, query, timeout_seconds=timeout_seconds)


def check(context: str, query: str) -> None:
    check_query(context, query, timeout_seconds=10)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SELECT name FROM singer WHERE age = 20", [("Bob",)]),
        ("SELECT age, COUNT(*) FROM singer GROUP BY age ORDER BY age;", [(20, 1), (30, 2)]),
        ("SELECT a.name FROM singer a JOIN singer b ON a.age < b.age GROUP BY a.name", [("Bob",)]),
        ("WITH old AS (SELECT * FROM singer WHERE age > 20) SELECT COUNT(*) FROM old", [(2,)]),
        ("SELECT name FROM singer WHERE age = (SELECT MIN(age) FROM singer)", [("Bob",)]),
        ("SELECT UPPER(name) FROM singer WHERE name LIKE 'a%' -- comment", [("ANN",)]),
        ("SELECT age FROM singer EXCEPT SELECT 20", [(30,)]),
        ("SELECT name FROM singer WHERE age > 99", []),
    ],
)
def test_queries_that_read_return_their_rows(database, query, expected):
    assert run(database, query) == expected


def test_text_that_is_not_utf8_is_read_with_replacement_characters(database):
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("INSERT INTO singer VALUES (CAST(x'41ff' AS TEXT), 1)")
        connection.commit()
    assert run(database, "SELECT name FROM singer WHERE age = 1") == [("A\N{REPLACEMENT CHARACTER}",)]


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO singer VALUES ('Eve', 1)",
        "WITH x AS (SELECT 1) INSERT INTO singer SELECT 'Eve', 1",
        "INSERT INTO singer VALUES ('Eve', 1) RETURNING name",
        "UPDATE singer SET age = 0",
        "DELETE FROM singer",
        "REPLACE INTO singer VALUES ('Ann', 1)",
        "DROP TABLE singer",
        "ALTER TABLE singer RENAME TO singers",
        "CREATE TABLE other (a INT)",
        "CREATE TEMP TABLE other (a INT)",
        "CREATE VIEW other AS SELECT 1",
        "CREATE TRIGGER t AFTER INSERT ON singer BEGIN SELECT 1; END",
        "ATTACH '{folder}/other.sqlite' AS other",
        "ATTACH ':memory:' AS other",
        "DETACH main",
        "PRAGMA writable_schema = ON",
        "PRAGMA query_only = OFF",
        "PRAGMA table_info(singer)",
        "SELECT * FROM pragma_database_list",
        "SELECT load_extension('{folder}/evil.so')",
        "SELECT fts3_tokenizer('simple')",
        "VACUUM",
        "VACUUM INTO '{folder}/other.sqlite'",
        "REINDEX",
        "ANALYZE",
        "BEGIN",
        "SAVEPOINT s",
        "SELECT 1; DROP TABLE singer",
        "SELECT 1; SELECT 2",
    ],
)
def test_queries_that_do_more_than_read_are_refused_and_leave_no_trace(database, query):
    before = database.read_bytes()
    with pytest.raises(QueryError):
        run(database, query.format(folder=database.parent))
    assert database.read_bytes() == before
    assert list(database.parent.iterdir()) == [database]


def test_a_refused_query_does_not_disturb_the_next_one(database):
    with pytest.raises(QueryError, match="not authorized"):
        run(database, "DROP TABLE singer")
    assert run(database, "SELECT COUNT(*) FROM singer") == [(3,)]


def test_a_database_that_does_not_exist_is_not_made(tmp_path):
    with pytest.raises(QueryError, match="unable to open"):
        run(tmp_path / "none.sqlite", "SELECT 1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["SELECT COUNT(*) FROM n", "SELECT x FROM n WHERE x < 0"])
def test_an_endless_query_ends_near_its_deadline(database, what):
    begin = time.monotonic()
    with pytest.raises(QueryError, match=r"took over 0\.2 s"):
        run(database, f"{ENDLESS} {what}", timeout_seconds=0.2)
    assert 0.2 <= time.monotonic() - begin < 2


@pytest.mark.parametrize(
    "query",
    [
        "SELECT zeroblob(4000000000)",
        "SELECT randomblob(1000000000)",
        "SELECT hex(zeroblob(9000000))",
        "SELECT replace(hex(zeroblob(4000000)), '0', '0000000000')",
    ],
)
def test_a_value_of_many_megabytes_is_refused(database, query):
    with pytest.raises(QueryError, match="too big"):
        run(database, query)


def test_rows_are_returned_up_to_a_limit(database):
    rows = run(database, f"{ENDLESS} SELECT x FROM n LIMIT {MAX_ROWS}")
    assert rows == [(x,) for x in range(1, MAX_ROWS + 1)]
    with pytest.raises(QueryError, match="more than 100000 rows"):
        run(database, f"{ENDLESS} SELECT x FROM n LIMIT {MAX_ROWS + 1}")


def test_an_endless_result_is_refused_at_the_limit(database):
    with pytest.raises(QueryError, match="more than 100000 rows"):
        run(database, f"{ENDLESS} SELECT x FROM n", timeout_seconds=60)


@pytest.mark.parametrize(
    "query",
    [
        pytest.param("SELECT '\0'", id="NUL"),
        pytest.param("SELECT '\ud800'", id="surrogate"),
        pytest.param("SELECT " + "(" * 40_000 + "1" + ")" * 40_000, id="deep parentheses"),
        pytest.param("(" * 40_000, id="open parentheses"),
        pytest.param("SELECT " + "-" * 1 + " -".join("1" * 5_000), id="deep expression"),
        pytest.param(" UNION ALL ".join(["SELECT 1"] * 500), id="long compound"),
        pytest.param("SELECT '" + "x" * 100_001 + "'", id="long text"),
        pytest.param("SELECT ?", id="parameter"),
        pytest.param("SELECT", id="incomplete"),
        pytest.param("Here is your query: SELECT 1", id="prose"),
        pytest.param("SELECT height FROM singer", id="unknown column"),
        pytest.param("SELECT name FROM song", id="unknown table"),
    ],
)
def test_text_that_is_no_sound_query_is_a_query_error(database, query):
    with pytest.raises(QueryError):
        run(database, query)


@pytest.mark.parametrize("query", ["", " \n", "-- only a comment"])
def test_text_without_a_statement_is_a_query_error(database, query):
    with pytest.raises(QueryError):
        run(database, query)


def test_a_file_that_is_no_database_is_a_query_error(tmp_path):
    (tmp_path / "text.sqlite").write_text("text" * 1000)
    with pytest.raises(QueryError, match="not a database"):
        run(tmp_path / "text.sqlite", "SELECT 1 FROM t")


@pytest.mark.parametrize(
    "context",
    [
        CONTEXT,
        f"{CONTEXT}; CREATE TABLE song (title VARCHAR(20))",
        "CREATE TABLE IF NOT EXISTS singer (name TEXT UNIQUE, age DECIMAL(10,2) DEFAULT 0 CHECK (age > 0))",
        "CREATE TABLE singer (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, "
        "FOREIGN KEY (name) REFERENCES song (title)); CREATE INDEX i ON singer (name)",
        f"{CONTEXT}; INSERT INTO singer VALUES ('Ann', 30)",
    ],
)
def test_a_query_that_fits_its_context_is_valid(context):
    check(context, "SELECT name FROM singer WHERE name = 'x';")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("SELECT height FROM singer", "no such column: height"),
        ("SELECT name FROM song", "no such table: song"),
        ("SELEC name FROM singer", "syntax error"),
        ("SELECT MEDIAN(age) FROM singer", "no such function: MEDIAN"),
        ("", "incomplete input"),
        ("SELECT name FROM singer; DROP TABLE singer", "one statement"),
        ("DROP TABLE singer", "not authorized"),
        ("INSERT INTO singer VALUES ('Eve', 1)", "not authorized"),
        ("PRAGMA table_info(singer)", "not authorized|syntax error"),
        ("SELECT '\0'", "null character"),
        ("SELECT " + "(" * 40_000 + "1" + ")" * 40_000, "overflow|too large|too big"),
    ],
)
def test_a_query_that_does_not_fit_its_context_is_refused_with_the_reason(query, reason):
    with pytest.raises(QueryError, match=reason):
        check(CONTEXT, query)


def test_a_query_is_prepared_against_a_database_file(database):
    check_query_on(database, "SELECT name FROM singer", timeout_seconds=10)
    check_query_on(database, f"{ENDLESS} SELECT x FROM n", timeout_seconds=10)
    for query, reason in [
        ("SELECT height FROM singer", "^no such column: height"),
        ("DELETE FROM singer", "^not authorized"),
    ]:
        with pytest.raises(QueryError, match=reason):
            check_query_on(database, query, timeout_seconds=10)


def test_a_file_that_does_not_open_is_told_from_a_query_that_fails(tmp_path, database):
    with pytest.raises(QueryError, match=r"^context: none\.sqlite: unable to open"):
        check_query_on(tmp_path / "none.sqlite", "SELECT 1", timeout_seconds=10)
    database.with_name("singers.sqlite-wal").write_text("unfinished")
    with pytest.raises(QueryError, match=r"^context: singers\.sqlite has changes"):
        check_query_on(database, "SELECT 1", timeout_seconds=10)


def test_words_that_are_sql_only_after_explain_are_not_valid():
    with pytest.raises(QueryError):
        check(CONTEXT, "QUERY PLAN SELECT name FROM singer")


def test_a_query_is_only_prepared_not_run():
    check(CONTEXT, f"{ENDLESS} SELECT x FROM n")


@pytest.mark.parametrize(
    "context",
    [
        "CREATE TABLE singer (name TEXT",
        "no tables here",
        "CREATE TABLE t (a); CREATE TABLE t (a)",
        "CREATE\0",
    ],
)
def test_a_context_that_does_not_execute_is_a_query_error_that_says_so(context):
    with pytest.raises(QueryError, match="^context: "):
        check(context, "SELECT 1")


@pytest.mark.parametrize(
    "context",
    [
        "ATTACH '{folder}/x.sqlite' AS x; CREATE TABLE x.t (a INT)",
        "VACUUM INTO '{folder}/x.sqlite'",
        "PRAGMA temp_store_directory = '{folder}'",
        "PRAGMA journal_mode = WAL",
        "SELECT load_extension('{folder}/x.so')",
        "CREATE VIRTUAL TABLE t USING fts5(a)",
        "CREATE TRIGGER t AFTER INSERT ON singer BEGIN SELECT 1; END",
    ],
)
def test_a_context_can_only_create_tables_in_memory(tmp_path, monkeypatch, context):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QueryError, match="^context: .*(not authorized|authorization denied)"):
        check(f"{CONTEXT}; {context.format(folder=tmp_path)}", "SELECT name FROM singer")
    assert list(tmp_path.iterdir()) == []


def test_an_endless_context_ends_near_its_deadline():
    begin = time.monotonic()
    with pytest.raises(QueryError, match=r"context: took over 0\.2 s"):
        check_query(f"CREATE TABLE t AS {ENDLESS} SELECT x FROM n", "SELECT 1", timeout_seconds=0.2)
    assert time.monotonic() - begin < 2
