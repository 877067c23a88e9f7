"""Made databases hold what a gold query needs to be told from its neighbours."""

import hashlib
import os
import subprocess
import sys

import pytest
from sqlglot import exp

from steps.text2sql.column_values import constants_of, holds, stored
from steps.text2sql.gold_query import Column, Condition, read_needs, read_tables
from steps.text2sql.made_databases import make_databases
from steps.text2sql.sql_execution import QueryError, run_query

SINGERS = "CREATE TABLE singer (name TEXT, age INTEGER, debut VARCHAR)"
TWO_TABLES = "CREATE TABLE singer (id INTEGER, name TEXT); CREATE TABLE album (singer_id INTEGER, title TEXT)"


def column(context: str, gold: str, table: str, place: int) -> list[set]:
    """The values of a column, by database."""
    return [{row[place] for row in d.rows[table]} for d in make_databases(context, gold)]


def everywhere(context: str, gold: str, table: str, place: int) -> set:
    return set().union(*column(context, gold, table, place))


def results(context: str, gold: str, query: str) -> list[list]:
    return [run_query(d, query, timeout_seconds=10) for d in make_databases(context, gold)]


def test_a_number_of_gold_occurs_with_its_neighbours_and_its_negative():
    found = everywhere(SINGERS, "SELECT name FROM singer WHERE age > 30", "singer", 1)
    assert {29, 30, 31, -30} <= found


def test_a_text_of_gold_occurs_in_other_letter_case_and_with_a_letter_more_and_less():
    found = everywhere(SINGERS, "SELECT age FROM singer WHERE name = 'Ann'", "singer", 0)
    assert {"Ann", "ann", "ANN", "Annx", "An", "nn", ""} <= found


def test_a_pattern_of_gold_occurs_as_prefix_suffix_infix_and_not_at_all():
    found = everywhere(SINGERS, "SELECT age FROM singer WHERE name LIKE '%nn%'", "singer", 0)
    assert {"nn", "nnx", "xnn", "xnnx", "n", "other"} <= found


def test_a_double_quoted_constant_is_found():
    found = everywhere(SINGERS, 'SELECT age FROM singer WHERE name = "Ann Lee"', "singer", 0)
    assert "Ann Lee" in found


def test_a_number_in_a_text_column_is_stored_as_text():
    found = everywhere(SINGERS, "SELECT age FROM singer WHERE debut < 1999", "singer", 2)
    assert {"1999", "1998"} <= found
    assert not {1999, 1998} & found


def test_every_subset_of_three_conditions_holds_for_some_row_of_one_database():
    gold = "SELECT name FROM singer WHERE name = 'Ann' AND age > 30 AND debut < 1999"
    query = "SELECT DISTINCT name = 'Ann', age > 30, debut < 1999 FROM singer"
    found = [{row for row in rows if None not in row} for rows in results(SINGERS, gold, query)]
    assert max(map(len, found)) == 8


def test_columns_that_are_joined_share_values_and_have_others():
    gold = "SELECT T1.name FROM singer AS T1 JOIN album AS T2 ON T1.id = T2.singer_id"
    parents, children = column(TWO_TABLES, gold, "singer", 0), column(TWO_TABLES, gold, "album", 0)
    pairs = list(zip(parents, children, strict=True))
    assert all(p & c for p, c in pairs)
    assert any(p - c for p, c in pairs)
    assert any(c - p for p, c in pairs)


def test_columns_that_are_not_compared_hold_different_values():
    overlaps = 0
    for database in make_databases(SINGERS, "SELECT name, debut FROM singer"):
        names, debuts = ({row[i] for row in database.rows["singer"]} - {None, "", 0} for i in (0, 2))
        overlaps += bool(names & debuts)
    assert overlaps <= 1  # by chance


def test_sides_of_a_set_operation_overlap_and_differ():
    gold = "SELECT name FROM singer EXCEPT SELECT title FROM album"
    names, titles = column(TWO_TABLES, gold, "singer", 1), column(TWO_TABLES, gold, "album", 1)
    assert any(n & t and n - t and t - n for n, t in zip(names, titles, strict=True))


def test_groups_lie_on_both_sides_of_a_size_and_on_it():
    gold = "SELECT debut FROM singer GROUP BY debut HAVING COUNT(*) > 4"
    found = results(SINGERS, gold, "SELECT COUNT(*) FROM singer GROUP BY debut")
    assert {3, 4, 5} <= {size for rows in found for (size,) in rows}


def test_there_are_more_rows_than_a_limit_and_an_offset_leave():
    gold = "SELECT name FROM singer ORDER BY age LIMIT 10 OFFSET 5"
    assert sum(len(d.rows["singer"]) > 15 for d in make_databases(SINGERS, gold)) > 12


def test_there_are_nulls_and_repeated_rows():
    databases = make_databases(SINGERS, "SELECT name FROM singer")
    assert None in everywhere(SINGERS, "SELECT name FROM singer", "singer", 0)
    assert any(len(set(d.rows["singer"])) < len(d.rows["singer"]) for d in databases)


def test_constraints_of_the_context_are_kept():
    context = "CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT NOT NULL, c TEXT, d TEXT, UNIQUE (c, d))"
    gold = "SELECT b FROM t WHERE a > 3 AND c = 'x' AND b IS NULL"
    counts = [n for ((n,),) in results(context, gold, "SELECT COUNT(*) FROM t")]
    assert min(counts) > 0
    assert sum(counts) > 5 * len(counts)


@pytest.mark.parametrize(
    "context",
    [
        "CREATE TABLE t (a INT, b TEXT, CONSTRAINT t_pkey PRIMARY KEY (a))",
        "CREATE TABLE t (a INT, b TEXT, CONSTRAINT u UNIQUE (a, b))",
        "CREATE TABLE t (a INT, b TEXT, CONSTRAINT u UNIQUE (b COLLATE NOCASE))",
        "CREATE TABLE t (a INT, b TEXT); CREATE UNIQUE INDEX i ON t (a)",
        'CREATE TABLE t (a INT, b TEXT); CREATE UNIQUE INDEX i ON "t" ("b" COLLATE NOCASE DESC)',
        "CREATE TABLE t (a INT, b TEXT); CREATE UNIQUE INDEX i ON t (a) WHERE b > 'c'",
        "CREATE TABLE t (a INT, b TEXT COLLATE NOCASE UNIQUE)",
        "CREATE TABLE t (a INT, b TEXT COLLATE RTRIM, UNIQUE (b))",
        "CREATE TABLE t (a PRIMARY KEY, b)",
        "CREATE TABLE t (c INT AS (a * 2), a INT, b TEXT)",
        "CREATE TABLE t (a INT, c INT GENERATED ALWAYS AS (a * 2) STORED, b TEXT, UNIQUE (a, c))",
        "CREATE TABLE t (a INT, b TEXT, PRIMARY KEY (a DESC))",
        "CREATE TABLE t (a INT, b TEXT); CREATE UNIQUE INDEX i ON t (lower(b))",
        "CREATE TABLE t (a INT, b TEXT, c INT AS (a % 5) UNIQUE)",
        "CREATE TABLE t (a INT PRIMARY KEY, b TEXT); INSERT INTO t VALUES (1, 'x'), (4, 'Ann')",
        "CREATE TABLE t (a INT UNIQUE ON CONFLICT IGNORE, b TEXT NOT NULL ON CONFLICT FAIL)",
        "CREATE TABLE t (a INT, b TEXT[], c INTEGER[3], checked INT)",
        "CREATE TABLE t (a INT, b TEXT, PRIMARY KEY (a, b)) STRICT, WITHOUT ROWID",
        "CREATE TABLE t (a INT, b TEXT CHECK (b > 'c'), PRIMARY KEY (a)) WITHOUT ROWID, STRICT",
    ],
)
def test_tables_are_filled_as_sqlite_takes_them(context):
    gold = "SELECT b FROM t WHERE a > 3 AND (b = 'Ann' OR b IS NULL)"
    counts = [n for ((n,),) in results(context, gold, "SELECT COUNT(*) FROM t")]
    assert min(counts) > 0
    assert sum(counts) > 5 * len(counts)
    assert sum(bool(rows) for rows in results(context, gold, gold)) > 6


def test_a_unique_column_keeps_other_letter_case_apart_unless_its_collation_does_not():
    gold = "SELECT a FROM t WHERE b = 'Ann'"
    for collation, differs in [("BINARY", True), ("NOCASE", False)]:
        context = f"CREATE TABLE t (a INT, b TEXT COLLATE {collation} UNIQUE)"
        found = results(context, gold, "SELECT COUNT(DISTINCT b) > COUNT(DISTINCT LOWER(b)) FROM t")
        assert any(rows == [(1,)] for rows in found) is differs


def test_a_column_named_like_an_order_is_one():
    (table,) = read_tables("CREATE TABLE t (asc INT, desc TEXT, [2010] INT, PRIMARY KEY (desc))").values()
    assert list(table.columns) == ["asc", "desc", "2010"]
    assert table.columns["desc"].is_unique


def test_a_unique_column_that_is_no_rowid_takes_a_text_constant():
    context = "CREATE TABLE t (id INT, b TEXT, UNIQUE (id))"
    gold = "SELECT b FROM t WHERE id = 'x'"
    assert sum(bool(rows) for rows in results(context, gold, gold)) > 6


def test_a_check_of_the_context_keeps_no_row_out():
    context = "CREATE TABLE t (a INTEGER CHECK (a > 100), b TEXT, CHECK (b IN ('x', 'y')))"
    counts = results(
        context, "SELECT b FROM t WHERE a = 5", "SELECT COUNT(*) FROM t WHERE a <= 100 AND b <> 'x'"
    )
    assert any(n > 0 for ((n,),) in counts)


def test_a_text_constant_for_a_rowid_is_left_out():
    for context in (
        "CREATE TABLE t (id INTEGER PRIMARY KEY, b TEXT)",
        "CREATE TABLE t (id INTEGER, b TEXT, PRIMARY KEY (id))",
    ):
        gold = "SELECT b FROM t WHERE id = 'x' OR b = 'y'"
        assert all(n > 0 for ((n,),) in results(context, gold, "SELECT COUNT(*) FROM t"))


def test_a_number_too_large_for_sqlite_is_stored_as_sqlite_reads_it():
    gold = "SELECT name FROM singer WHERE age = 9223372036854775807"
    assert sum(bool(rows) for rows in results(SINGERS, gold, gold)) > 12


def test_tables_of_a_natural_join_share_values():
    context = "CREATE TABLE a (id INTEGER, x TEXT); CREATE TABLE b (id INTEGER, y TEXT)"
    gold = "SELECT x, y FROM a NATURAL JOIN b"
    assert sum(bool(rows) for rows in results(context, gold, gold)) > 12


def test_gold_returns_rows_on_most_databases_and_not_always_the_same():
    gold = "SELECT name FROM singer WHERE name = 'Ann' AND age > 30 AND debut < 1999"
    found = [tuple(sorted(rows)) for rows in results(SINGERS, gold, gold)]
    assert sum(map(bool, found)) > 12
    assert len(set(found)) > 3


def test_a_query_that_does_not_parse_still_gives_rows_with_its_constants():
    gold = "SELECT name FROM singer WHERE ((( age = 30 'Ann'"
    assert "Ann" in everywhere(SINGERS, gold, "singer", 0)
    assert 30 in everywhere(SINGERS, gold, "singer", 1)


@pytest.mark.parametrize("digits", ["9" * 400, "9" * 5000], ids=len)
def test_a_number_of_hundreds_of_digits_is_infinite_as_in_sqlite(digits):
    for gold in (f"SELECT name FROM singer WHERE age < {digits}", f"SELECT ((( age < {digits}"):
        assert float("inf") in everywhere(SINGERS, gold, "singer", 1)


def test_the_databases_are_those_of_the_seed():
    gold = "SELECT name FROM singer WHERE age > 30"
    assert make_databases(SINGERS, gold, seed=1) == make_databases(SINGERS, gold, seed=1)
    assert make_databases(SINGERS, gold, seed=1) != make_databases(SINGERS, gold, seed=2)


def test_the_databases_are_the_same_in_processes_that_hash_otherwise():
    gold = (
        "SELECT T1.name, COUNT(*) FROM singer AS T1 JOIN album AS T2 ON T1.id = T2.singer_id GROUP BY T1.id"
    )
    program = (
        "import hashlib; from steps.text2sql.made_databases import make_databases;"
        f"print(hashlib.sha256(repr(make_databases({TWO_TABLES!r}, {gold!r})).encode()).hexdigest())"
    )
    expected = hashlib.sha256(repr(make_databases(TWO_TABLES, gold)).encode()).hexdigest()
    for hash_seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.strip() == expected


def test_a_context_that_does_not_parse_is_an_error():
    with pytest.raises(QueryError, match="^context: "):
        make_databases("CREATE TABLE t (a", "SELECT 1")


@pytest.mark.parametrize(
    ("operator", "constants", "affinity", "value", "expected"),
    [
        (exp.EQ, (24,), "TEXT", "24", True),
        (exp.EQ, ("24",), "INTEGER", 24, True),
        (exp.LT, (179,), "TEXT", "99", False),
        (exp.LT, (179,), "INTEGER", 99, True),
        (exp.GT, (5,), "INTEGER", "word", True),
        (exp.NEQ, ("a",), "TEXT", None, False),
        (exp.Is, (None,), "TEXT", None, True),
        (exp.Like, ("a_c%",), "TEXT", "ABCD", True),
        (exp.Between, (1, 3), "REAL", 3, True),
        (exp.In, ("a", "b"), "TEXT", "c", False),
    ],
)
def test_conditions_hold_as_in_sqlite(operator, constants, affinity, value, expected):
    kept = constants_of(Condition(operator, constants), affinity)
    assert holds(operator, kept, stored(value, affinity)) is expected


def test_columns_are_found_through_aliases_derived_tables_and_common_tables():
    tables = read_tables(TWO_TABLES)
    for gold in (
        "SELECT 1 FROM singer AS T1 WHERE T1.name = 'Ann'",
        "SELECT 1 FROM (SELECT name AS n FROM singer) AS d WHERE d.n = 'Ann'",
        "WITH d AS (SELECT name FROM singer) SELECT 1 FROM d WHERE name = 'Ann'",
        "SELECT 1 FROM album WHERE EXISTS (SELECT 1 FROM singer WHERE 'Ann' = name)",
    ):
        assert read_needs(tables, gold).constants == {Column("singer", "name"): ["Ann"]}
