"""A prediction is right when it means what gold means, on made databases alone."""

import time

import pytest

from steps.text2sql.scoring import execution_match
from steps.text2sql.sql_execution import QueryError

SINGERS = "CREATE TABLE singer (id INTEGER, name TEXT, country TEXT, age INTEGER, debut VARCHAR)"
TWO_TABLES = f"{SINGERS}; CREATE TABLE album (singer_id INTEGER, title TEXT, copies INTEGER, price REAL)"
JOINED = "FROM singer AS T1 JOIN album AS T2 ON T1.id = T2.singer_id"

# Gold, what is replaced in it, and by what.
MUTANTS = {
    "another column": ("SELECT name FROM singer", "name", "country"),
    "another column compared": ("SELECT id FROM singer WHERE name = 'Ann'", "name", "country"),
    "another operator": ("SELECT name FROM singer WHERE age > 30", ">", ">="),
    "the other side": ("SELECT name FROM singer WHERE age > 30", ">", "<"),
    "an operator beside an extreme": ("SELECT MIN(age) FROM singer WHERE name = 'Ann'", "=", "<="),
    "a number one off": ("SELECT name FROM singer WHERE age > 30", "30", "31"),
    "a number a bit off": ("SELECT title FROM album WHERE price < 9.5", "9.5", "9.6"),
    "a number in a text column": ("SELECT name FROM singer WHERE debut > 1999", "1999", "2000"),
    "another letter case": ("SELECT id FROM singer WHERE name = 'Ann'", "Ann", "ann"),
    "a letter less": ("SELECT id FROM singer WHERE name = 'Ann'", "Ann", "An"),
    "another constant": ("SELECT id FROM singer WHERE name = 'Ann'", "Ann", "Zoe"),
    "a prefix for an infix": ("SELECT id FROM singer WHERE name LIKE '%nn%'", "%nn", "nn"),
    "equality for LIKE": ("SELECT id FROM singer WHERE name LIKE '%nn%'", "LIKE '%nn%'", "= 'nn'"),
    "a range without an end": (
        "SELECT id FROM singer WHERE age BETWEEN 20 AND 30",
        "BETWEEN 20 AND 30",
        "> 20 AND age <= 30",
    ),
    "another order of a window": ("SELECT name, RANK() OVER (ORDER BY age) FROM singer", "age", "id"),
    "another function of a window": ("SELECT name, LAG(age) OVER (ORDER BY id) FROM singer", "LAG", "LEAD"),
    "another sum of a window": (
        "SELECT name, SUM(age) OVER (PARTITION BY country) FROM singer",
        "PARTITION BY country",
        "",
    ),
    "another aggregate": ("SELECT SUM(copies) FROM album", "SUM", "AVG"),
    "the other extreme": ("SELECT MAX(age) FROM singer WHERE name = 'Ann'", "MAX", "MIN"),
    "NULLs counted": ("SELECT COUNT(name) FROM singer", "name", "*"),
    "repetitions counted": ("SELECT COUNT(DISTINCT name) FROM singer", "DISTINCT", ""),
    "a condition dropped": (
        "SELECT id FROM singer WHERE name = 'Ann' AND age > 30",
        "AND age > 30",
        "",
    ),
    "a condition added": ("SELECT id FROM singer WHERE name = 'Ann'", "'Ann'", "'Ann' AND age > 0"),
    "a condition on NULL added": ("SELECT id FROM singer", "singer", "singer WHERE country IS NOT NULL"),
    "OR for AND": ("SELECT id FROM singer WHERE name = 'Ann' AND age > 30", "AND", "OR"),
    "DISTINCT dropped": ("SELECT DISTINCT country FROM singer", "DISTINCT", ""),
    "the order turned": ("SELECT name FROM singer ORDER BY age", "age", "age DESC"),
    "the order dropped": ("SELECT name FROM singer ORDER BY age", "ORDER BY age", ""),
    "another key of order": ("SELECT name FROM singer ORDER BY age", "age", "name"),
    "another limit": ("SELECT name FROM singer ORDER BY age LIMIT 3", "3", "4"),
    "the limit dropped": ("SELECT name FROM singer ORDER BY age LIMIT 10", "LIMIT 10", ""),
    "an offset dropped": ("SELECT name FROM singer ORDER BY age LIMIT 2 OFFSET 2", "OFFSET 2", ""),
    "another join key": (f"SELECT T1.name {JOINED}", "singer_id", "copies"),
    "an outer join": (f"SELECT T1.name, T2.title {JOINED}", "JOIN", "LEFT JOIN"),
    "a join for IN": (
        "SELECT name FROM singer WHERE id IN (SELECT singer_id FROM album)",
        "WHERE id IN (SELECT singer_id FROM album)",
        "JOIN album ON id = singer_id",
    ),
    "IN for NOT IN": (
        "SELECT name FROM singer WHERE id NOT IN (SELECT singer_id FROM album)",
        "NOT IN",
        "IN",
    ),
    "any letters for one": ("SELECT id FROM singer WHERE name LIKE 'A_n'", "A_n", "A%n"),
    "a longer text": ("SELECT name FROM singer WHERE LENGTH(name) > 5", "> 5", "> 6"),
    "a shorter text": ("SELECT name FROM singer WHERE LENGTH(name) > 5", "> 5", ">= 5"),
    "NULLs left out of NOT IN": (
        "SELECT name FROM singer WHERE id NOT IN (SELECT singer_id FROM album)",
        "album)",
        "album WHERE singer_id IS NOT NULL)",
    ),
    "another size of groups": (
        "SELECT country FROM singer GROUP BY country HAVING COUNT(*) > 3",
        "> 3",
        ">= 3",
    ),
    "another key of groups": (f"SELECT T1.name, COUNT(*) {JOINED} GROUP BY T1.id", "BY T1.id", "BY T1.name"),
    "the rarest for the most common": (
        "SELECT country FROM singer GROUP BY country ORDER BY COUNT(*) DESC LIMIT 1",
        "DESC",
        "",
    ),
    "another set operation": (
        "SELECT name FROM singer INTERSECT SELECT title FROM album",
        "INTERSECT",
        "UNION",
    ),
    "another query inside": (
        "SELECT id FROM singer WHERE age > (SELECT AVG(age) FROM singer)",
        "AVG",
        "MIN",
    ),
    "a column more": ("SELECT name FROM singer", "name", "name, age"),
}

REWRITES = {
    "layout and letter case": (
        "SELECT name FROM singer WHERE age > 30",
        "select  NAME\nfrom SINGER where AGE>30;",
    ),
    "aliases": (
        "SELECT name FROM singer WHERE age > 30",
        "SELECT s.name AS n FROM singer s WHERE s.age > 30",
    ),
    "conditions turned": (
        "SELECT id FROM singer WHERE name = 'Ann' AND age > 30",
        "SELECT id FROM singer WHERE 30 < age AND name = 'Ann'",
    ),
    "COUNT(1)": ("SELECT COUNT(*) FROM singer", "SELECT COUNT(1) FROM singer"),
    "a query around": (
        "SELECT name FROM singer WHERE age > 30",
        "SELECT * FROM (SELECT name FROM singer WHERE age > 30)",
    ),
    "a join as IN": (
        f"SELECT DISTINCT T1.name {JOINED}",
        "SELECT DISTINCT name FROM singer WHERE id IN (SELECT singer_id FROM album)",
    ),
    "tables turned": (
        f"SELECT T1.name, COUNT(*) {JOINED} GROUP BY T1.id",
        "SELECT T1.name, COUNT(*) FROM album AS T2 JOIN singer AS T1 ON T1.id = T2.singer_id GROUP BY T1.id",
    ),
    "BETWEEN as two conditions": (
        "SELECT id FROM singer WHERE age BETWEEN 20 AND 30",
        "SELECT id FROM singer WHERE age >= 20 AND age <= 30",
    ),
    "IN as OR": (
        "SELECT id FROM singer WHERE name IN ('Ann', 'Bob')",
        "SELECT id FROM singer WHERE name = 'Bob' OR name = 'Ann'",
    ),
    "an order where none is asked": ("SELECT name FROM singer", "SELECT name FROM singer ORDER BY age"),
    "ties in another order": (
        "SELECT name FROM singer ORDER BY age",
        "SELECT name FROM singer ORDER BY age, name DESC",
    ),
    "another of those that tie at the limit": (
        "SELECT country FROM singer GROUP BY country ORDER BY COUNT(*) LIMIT 1",
        "SELECT country FROM singer GROUP BY country ORDER BY COUNT(*), country DESC LIMIT 1",
    ),
    "another order of groups that tie, with a column from any row": (
        f"SELECT T1.id, T1.name {JOINED} GROUP BY T1.id ORDER BY COUNT(*) DESC LIMIT 1",
        f"SELECT T1.id, T1.name {JOINED} GROUP BY T1.id ORDER BY COUNT(*) DESC, T1.id LIMIT 1",
    ),
    "ties of different rows by a column that is not selected": (
        "SELECT DISTINCT age FROM singer ORDER BY age % 2",
        "SELECT DISTINCT age FROM singer ORDER BY age % 2, age DESC",
    ),
    "a length as a bound": (
        "SELECT name FROM singer WHERE LENGTH(name) > 5",
        "SELECT name FROM singer WHERE LENGTH(name) >= 6",
    ),
    "ties by an expression of an alias": (
        "SELECT name, age AS a FROM singer ORDER BY a * 2",
        "SELECT name, age FROM singer ORDER BY age, name",
    ),
    "the order by an alias": (
        "SELECT country, COUNT(*) FROM singer GROUP BY country ORDER BY COUNT(*)",
        "SELECT country, COUNT(*) AS n FROM singer GROUP BY country ORDER BY n",
    ),
    "an average by hand": (
        "SELECT AVG(price) FROM album",
        "SELECT SUM(price) / COUNT(price) FROM album",
    ),
    "a whole number as a fraction": ("SELECT COUNT(*) FROM singer", "SELECT COUNT(*) * 1.0 FROM singer"),
    "columns turned": ("SELECT name, age FROM singer", "SELECT age, name FROM singer"),
    "other quotes": (
        "SELECT id FROM singer WHERE name = 'Ann'",
        'SELECT id FROM singer WHERE name = "Ann"',
    ),
}


@pytest.mark.parametrize(("gold", "old", "new"), MUTANTS.values(), ids=MUTANTS)
def test_a_query_that_means_something_else_is_wrong(gold, old, new):
    assert gold != gold.replace(old, new)
    assert not execution_match(TWO_TABLES, gold, gold.replace(old, new))


@pytest.mark.parametrize(("gold", "predicted"), REWRITES.values(), ids=REWRITES)
def test_a_query_that_means_the_same_is_right(gold, predicted):
    assert execution_match(TWO_TABLES, gold, predicted)


@pytest.mark.parametrize("gold", [gold for gold, *_ in (MUTANTS | REWRITES).values()])
def test_gold_itself_is_right(gold):
    assert execution_match(TWO_TABLES, gold, gold)


def test_a_double_quoted_name_that_is_no_column_is_a_constant():
    gold = 'SELECT id FROM singer WHERE name = "Ann"'
    assert execution_match(SINGERS, gold, gold)
    assert not execution_match(SINGERS, gold, 'SELECT id FROM singer WHERE name = "Bob"')
    assert not execution_match(SINGERS, gold, 'SELECT id FROM singer WHERE name = "country"')


def test_a_double_quoted_column_stays_a_column():
    gold = 'SELECT id FROM singer WHERE "age" = 30'
    assert execution_match(SINGERS, gold, "SELECT id FROM singer WHERE age = 30")
    assert not execution_match(SINGERS, gold, "SELECT id FROM singer WHERE age = 31")


def test_two_results_that_are_always_empty_prove_nothing():
    gold = "SELECT name FROM singer WHERE 1 = 0"
    assert not execution_match(SINGERS, gold, "SELECT country FROM singer WHERE age < 0 AND age > 0")


def test_columns_of_one_name_may_not_be_turned():
    gold = "SELECT a.name, b.name FROM singer AS a JOIN singer AS b ON a.age < b.age"
    assert not execution_match(SINGERS, gold, gold.replace("a.name, b.name", "b.name, a.name"))


def test_columns_must_be_turned_the_same_way_in_every_row():
    gold = "SELECT name, country FROM singer"
    turned = "SELECT country, name FROM singer WHERE age <= 20"
    assert not execution_match(SINGERS, gold, f"{gold} WHERE age > 20 UNION ALL {turned}")


def test_a_key_by_constraint_makes_distinct_needless():
    context = "CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL)"
    assert execution_match(context, "SELECT DISTINCT id FROM t", "SELECT id FROM t")
    assert execution_match(context, "SELECT COUNT(name) FROM t", "SELECT COUNT(DISTINCT name) FROM t")


def test_what_sqlite_takes_from_any_row_of_a_group_is_not_compared():
    gold = "SELECT name, COUNT(*) FROM singer GROUP BY country"
    assert execution_match(SINGERS, gold, gold.replace("name", "MAX(name)"))
    assert not execution_match(SINGERS, gold, "SELECT name, COUNT(*) FROM singer GROUP BY age")


def test_the_row_of_an_extreme_is_compared():
    gold = "SELECT name, MAX(age) FROM singer"
    assert execution_match(SINGERS, gold, gold)
    assert not execution_match(SINGERS, gold, "SELECT MAX(name), MAX(age) FROM singer")


@pytest.mark.parametrize(
    "predicted",
    ["", "SELECT", "DROP TABLE singer", "SELECT height FROM singer", "SELECT name FROM band", "no SQL"],
)
def test_a_prediction_that_returns_nothing_is_wrong(predicted):
    assert not execution_match(SINGERS, "SELECT name FROM singer", predicted)


def test_a_prediction_that_never_ends_is_wrong_within_the_limit_for_all_databases():
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n"
    begin = time.monotonic()
    assert not execution_match(SINGERS, "SELECT name FROM singer", endless, timeout_seconds=0.3)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("context", "gold", "reason"),
    [
        (SINGERS, "SELECT height FROM singer", "gold: no such column: height"),
        (SINGERS, "SELECT name FROM", "gold: incomplete input"),
        ("CREATE TABLE t (a TEXT, order TEXT)", "SELECT a FROM t", "context: "),
        ("no tables", "SELECT 1", "context: "),
    ],
)
def test_a_row_that_does_not_execute_is_an_error_that_names_what_fails(context, gold, reason):
    with pytest.raises(QueryError, match=f"^{reason}"):
        execution_match(context, gold, "SELECT 1")


def test_every_seed_gives_the_same_verdict_on_a_plain_pair():
    for seed in range(5):
        assert execution_match(SINGERS, "SELECT name FROM singer", "SELECT s.name FROM singer s", seed=seed)
        assert not execution_match(SINGERS, "SELECT name FROM singer", "SELECT id FROM singer", seed=seed)
