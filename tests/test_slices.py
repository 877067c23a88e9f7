"""Slices of hand-written queries, counted by hand."""

import pytest

from steps.text2sql import slices


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        # Spider's rules: at most one clause of the first kind and nothing else.
        ("SELECT COUNT(*) FROM singer", "easy"),
        ("SELECT name FROM singer WHERE age > 30", "easy"),
        ("SELECT name FROM singer ORDER BY age", "easy"),
        ("SELECT T1.name FROM singer AS T1 JOIN song AS T2 ON T1.id = T2.singer", "easy"),
        # One of the others: two columns; two conditions.
        ("SELECT name, age FROM singer", "medium"),
        ("SELECT name FROM singer WHERE age > 30 AND country = 'France'", "medium"),
        ("SELECT name FROM singer ORDER BY age LIMIT 1", "medium"),
        ("SELECT name FROM singer WHERE age > 30 ORDER BY age", "medium"),
        ("SELECT name FROM singer WHERE name LIKE '%a%'", "medium"),
        ("SELECT name FROM singer WHERE name NOT LIKE '%a%'", "medium"),
        # WHERE, OR: two; two conditions: one of the others.
        ("SELECT name FROM singer WHERE age > 30 OR age < 20", "medium"),
        ("SELECT country, COUNT(*) FROM singer GROUP BY country", "medium"),
        # HAVING counts as no clause of its own, its AND as an aggregate: two of those.
        ("SELECT COUNT(*) FROM singer GROUP BY country HAVING COUNT(*) > 1 AND COUNT(*) < 9", "medium"),
        # Three clauses: a join, ORDER BY, LIMIT.
        ("SELECT T1.a FROM t AS T1 JOIN u AS T2 ON T1.i = T2.i ORDER BY T2.b LIMIT 1", "hard"),
        ("SELECT name FROM singer WHERE id IN (SELECT singer FROM song)", "hard"),
        ("SELECT name FROM singer UNION SELECT name FROM band", "hard"),
        # A negated condition counts as an aggregate: beside COUNT that is two.
        ("SELECT COUNT(*) FROM singer WHERE id NOT IN (SELECT singer FROM song)", "extra"),
        ("SELECT name FROM singer WHERE id NOT IN (SELECT singer FROM song)", "hard"),
        # Four clauses: WHERE, GROUP BY, ORDER BY, LIMIT.
        ("SELECT a FROM t WHERE b > 1 GROUP BY a ORDER BY COUNT(*) DESC LIMIT 1", "extra"),
        ("SELECT a FROM t WHERE b > (SELECT AVG(b) FROM t) AND c = 1", "extra"),
        ("SELECT a FROM t WHERE i IN (SELECT i FROM u) AND j IN (SELECT j FROM u)", "extra"),
        # What is inside a subquery does not count itself: one clause, one nesting.
        ("SELECT a FROM t WHERE i IN (SELECT i FROM u WHERE b LIKE 'x' OR c = 1 ORDER BY d LIMIT 1)", "hard"),
        ("SELECT a FROM t WHERE i IN (SELECT i FROM u UNION SELECT i FROM v)", "hard"),
    ],
)
def test_hardness_follows_spiders_rules(gold, expected):
    assert slices.describe(gold)["hardness"] == expected


@pytest.mark.parametrize(
    ("gold", "tables", "joins", "aggregates", "conditions", "nesting"),
    [
        ("SELECT a FROM t", "1", "0", "0", "0", "flat"),
        ("SELECT COUNT(*), MAX(a), MIN(a) FROM t", "1", "0", "3_or_more", "0", "flat"),
        ("SELECT a FROM t JOIN u ON t.i = u.i WHERE t.b = 1", "2", "1", "0", "1", "flat"),
        ("SELECT a FROM t, u WHERE t.i = u.i AND t.b = 1", "2", "1", "0", "2", "flat"),
        ("SELECT a FROM t AS x JOIN t AS y ON x.i = y.j", "1", "1", "0", "0", "flat"),
        (
            "SELECT a FROM t WHERE (b = 1 OR NOT c = 2) AND d BETWEEN 1 AND 3",
            "1",
            "0",
            "0",
            "3_or_more",
            "flat",
        ),
        ("SELECT a FROM t GROUP BY a HAVING SUM(b) > 1", "1", "0", "1", "1", "flat"),
        ("SELECT a FROM t WHERE b = (SELECT MAX(b) FROM u WHERE c = 1)", "2", "0", "1", "2", "nested"),
        ("SELECT a FROM t EXCEPT SELECT a FROM u", "2", "0", "0", "0", "nested"),
        ("WITH x AS (SELECT a FROM t) SELECT a FROM x", "1", "0", "0", "0", "nested"),
        (
            "SELECT a FROM t JOIN u ON t.i=u.i JOIN v ON u.i=v.i JOIN T ON 1",
            "3_or_more",
            "3_or_more",
            "0",
            "0",
            "flat",
        ),
    ],
)
def test_parts_are_counted_over_the_whole_query(gold, tables, joins, aggregates, conditions, nesting):
    found = slices.describe(gold)
    assert (found["tables"], found["joins"], found["aggregates"]) == (tables, joins, aggregates)
    assert (found["conditions"], found["nesting"]) == (conditions, nesting)


@pytest.mark.parametrize("gold", ["SELECT a FROM t WHERE b = {q}x y{q} OR c LIKE {q}%z{q}"])
def test_a_constant_in_double_quotes_changes_no_slice(gold):
    assert slices.describe(gold.format(q='"')) == slices.describe(gold.format(q="'"))


@pytest.mark.parametrize("gold", ["", "SELECT FROM WHERE", "DROP TABLE t", "(VALUES (1))", "(" * 2000])
def test_what_is_no_query_is_unknown_in_every_dimension(gold):
    assert slices.describe(gold) == dict.fromkeys(slices.DIMENSIONS, "unknown")


def test_the_table_has_share_rows_and_bounds_of_each_slice_in_order():
    golds = ["SELECT a FROM t WHERE b = 1"] * 2 + ["SELECT a, b FROM t"] * 2 + ["no sql"]
    right = {"": [True, False, True, True, False], "base_": [False] * 5}
    found = slices.table(golds, right)
    of_hardness = found[found["dimension"] == "hardness"].set_index("slice")
    assert list(of_hardness.index) == ["easy", "medium", "unknown"]
    assert list(of_hardness["rows"]) == [2, 2, 1]
    assert list(of_hardness["accuracy"]) == [0.5, 1.0, 0.0]
    assert list(of_hardness["base_accuracy"]) == [0.0, 0.0, 0.0]
    assert (found["low"] <= found["accuracy"]).all()
    assert (found["accuracy"] <= found["high"] + 1e-9).all()
    assert set(found.groupby("dimension")["rows"].sum()) == {5}


def test_slices_are_metrics_by_dimension_and_name():
    found = slices.table(["SELECT a FROM t"] * 4, {"": [True] * 3 + [False], "base_": [False] * 4})
    metrics = slices.metrics(found, metric="execution_accuracy", prefixes=("", "base_"))
    assert metrics["execution_accuracy/hardness/easy"] == 0.75
    assert metrics["base_execution_accuracy/hardness/easy"] == 0.0
    assert metrics["rows/hardness/easy"] == 4
    assert metrics["execution_accuracy_low/tables/1"] < 0.75 < metrics["execution_accuracy_high/tables/1"]
    assert len(metrics) == 7 * len(slices.DIMENSIONS)
