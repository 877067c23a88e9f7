"""Scores by the rules that are promised, and shares by arithmetic."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from steps.text2sql import scoring
from steps.text2sql.scoring import Verdict
from steps.text2sql.sql_execution import QueryError

CONTEXT = "CREATE TABLE singer (name TEXT, age INTEGER)"
GOLD = "SELECT name FROM singer WHERE age = 30"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Ann and Cy are 30, Bob is 20."""
    path = tmp_path / "singers.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(CONTEXT)
        connection.executemany("INSERT INTO singer VALUES (?, ?)", [("Ann", 30), ("Bob", 20), ("Cy", 30)])
        connection.commit()
    return path


def judge(predicted: str, *, gold: str = GOLD, database: Path | None, context: str = CONTEXT) -> Verdict:
    return scoring.judge(
        context=context, gold=gold, predicted=predicted, stopped=True, database=database, timeout_seconds=10
    )


def verdict(**scores: bool | None) -> Verdict:
    missed = dict.fromkeys(scoring.METRICS, False)
    return Verdict(**{**missed, "execution_accuracy": None, **scores}, reason="")


@pytest.mark.parametrize(
    ("gold", "predicted", "without_case", "with_case"),
    [
        ("SELECT a FROM t", "SELECT a FROM t", True, True),
        ("SELECT a FROM t", "\n SELECT a FROM t \t", True, True),
        ("SELECT a FROM t", "SELECT a FROM t;", True, True),
        ("SELECT a FROM t;", "SELECT a FROM t", True, True),
        ("SELECT a FROM t", "SELECT a FROM t ; ", True, True),
        ("SELECT a FROM t", "SELECT  a\n\tFROM   t", True, True),
        ("SELECT a FROM t WHERE b = 'x'", 'SELECT a FROM t WHERE b = "x"', True, True),
        ("SELECT a FROM t", "select A from T", True, False),
        ("SELECT a FROM t WHERE b = 'x'", "SELECT a FROM t WHERE b = 'X'", True, False),
        ("SELECT a, b FROM t", "SELECT a,b FROM t", False, False),
        ("SELECT a FROM t", "SELECT a FROM t; SELECT", False, False),
        ("SELECT a FROM t", ";SELECT a FROM t", False, False),
        ("SELECT a FROM t WHERE b = `x`", "SELECT a FROM t WHERE b = 'x'", False, False),
        ("SELECT a FROM t", "", False, False),
    ],
)
def test_exact_match_follows_its_rules(gold, predicted, without_case, with_case):
    assert scoring.exact_match(gold, predicted) is without_case
    assert scoring.exact_match(gold, predicted, ignore_case=False) is with_case


@pytest.mark.parametrize(
    ("gold", "predicted", "expected"),
    [
        (GOLD, "SELECT s.name FROM singer AS s WHERE NOT age <> 30", True),
        (GOLD, "SELECT name FROM singer WHERE age = 30 ORDER BY name DESC", True),
        (f"{GOLD} ORDER BY name", f"{GOLD} ORDER BY name DESC", False),
        ("SELECT name FROM singer WHERE name = 'Ann'", "SELECT name FROM singer WHERE name = 'ann'", False),
        ("SELECT age FROM singer", "SELECT DISTINCT age FROM singer", False),
        ("SELECT name, age FROM singer", "SELECT age, name FROM singer", False),
        ("SELECT COUNT(*) FROM singer", "SELECT COUNT(*) AS total FROM singer", True),
    ],
)
def test_execution_match_compares_the_rows_that_come_back(database, gold, predicted, expected):
    assert scoring.execution_match_on(database, gold, predicted, timeout_seconds=10) is expected


def test_execution_match_needs_both_queries_to_run(database):
    for gold, predicted in [(GOLD, "SELECT height FROM singer"), ("SELECT height FROM singer", GOLD)]:
        with pytest.raises(QueryError, match="no such column"):
            scoring.execution_match_on(database, gold, predicted, timeout_seconds=10)


def test_a_right_prediction_has_all_scores_and_no_reason(database):
    assert judge(GOLD, database=database) == Verdict(True, True, True, True, True, "")


def test_another_query_with_the_same_rows_is_right_without_being_an_exact_match(database):
    found = judge("SELECT name FROM singer WHERE age > 20", database=database)
    assert found == Verdict(False, False, True, True, True, "")


def test_other_rows_are_valid_sql_and_wrong(database):
    found = judge("SELECT name FROM singer", database=database)
    assert (found.valid_sql, found.execution_accuracy) == (True, False)
    assert found.reason == "other rows than gold"


def test_a_prediction_that_is_no_sql_is_wrong_and_says_why(database):
    found = judge("SELECT height FROM singer", database=database)
    assert (found.valid_sql, found.execution_accuracy) == (False, False)
    assert "no such column: height" in found.reason


def test_a_prediction_that_writes_is_wrong_and_changes_nothing(database):
    before = database.read_bytes()
    found = judge("DELETE FROM singer", database=database)
    assert (found.valid_sql, found.execution_accuracy) == (False, False)
    assert database.read_bytes() == before


@pytest.mark.parametrize("predicted", ["", "-- nothing", ";"])
def test_an_empty_prediction_is_wrong_even_where_gold_finds_no_rows(database, predicted):
    found = judge(predicted, gold="SELECT name FROM singer WHERE age > 99", database=database)
    assert (found.valid_sql, found.execution_accuracy) == (False, False)


def test_a_prediction_that_takes_too_long_is_wrong(database):
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n"
    found = scoring.judge(
        context=CONTEXT, gold=GOLD, predicted=endless, stopped=False, database=database, timeout_seconds=0.1
    )
    assert (found.valid_sql, found.execution_accuracy, found.stopped) == (True, False, False)
    assert found.reason == "took over 0.1 s"


def test_without_a_database_the_rows_of_made_databases_decide():
    assert judge(f"{GOLD} AND 1", database=None) == Verdict(False, False, True, True, True, "")
    found = judge("SELECT name FROM singer WHERE age = 31", database=None)
    assert (found.valid_sql, found.execution_accuracy) == (True, False)
    assert found.reason == "other rows than gold"


def test_a_broken_context_makes_the_prediction_invalid_and_keeps_the_match_of_its_text():
    found = judge(GOLD, database=None, context="CREATE TABLE")
    assert (found.exact_match, found.valid_sql) == (True, False)
    assert found.reason.startswith("context: ")


def test_metrics_are_shares_of_all_rows():
    verdicts = [
        verdict(
            exact_match=True, exact_match_case=True, valid_sql=True, execution_accuracy=True, stopped=True
        ),
        verdict(exact_match=True, valid_sql=True, execution_accuracy=True, stopped=True),
        verdict(valid_sql=True, execution_accuracy=False, stopped=True),
        verdict(execution_accuracy=False, stopped=True),
    ]
    assert scoring.metrics(verdicts) == {
        "exact_match": 0.5,
        "exact_match_case": 0.25,
        "valid_sql": 0.75,
        "execution_accuracy": 0.5,
        "stopped": 1.0,
    }


def test_a_prefix_stands_before_each_metric():
    names = scoring.metrics([verdict(execution_accuracy=False)], prefix="base_")
    assert set(names) == {f"base_{name}" for name in scoring.METRICS}


def test_execution_accuracy_is_absent_where_one_row_could_not_be_run():
    found = scoring.metrics([verdict(execution_accuracy=True, stopped=True), verdict(stopped=True)])
    assert "execution_accuracy" not in found
    assert found["stopped"] == 1.0


def test_the_comparison_has_a_line_for_each_metric_base_first():
    tuned = {"exact_match": 0.5, "exact_match_case": 0.25, "valid_sql": 1.0, "stopped": 0.999}
    base = {
        "base_exact_match": 0.0,
        "base_exact_match_case": 0.0,
        "base_valid_sql": 0.125,
        "base_stopped": 0.0,
    }
    text = scoring.comparison({**tuned, **base, "other": 3.0}, base_prefix="base_")
    assert [line.split() for line in text.splitlines()] == [
        ["base", "tuned"],
        ["exact_match", "0.0%", "50.0%"],
        ["exact_match_case", "0.0%", "25.0%"],
        ["valid_sql", "12.5%", "100.0%"],
        ["stopped", "0.0%", "99.9%"],
    ]
    assert len({len(line) for line in text.splitlines()}) == 1  # the columns stand under each other
