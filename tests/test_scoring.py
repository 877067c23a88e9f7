"""Scores by the rules that are promised, and shares by arithmetic."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from steps.text2sql import failures, scoring
from steps.text2sql.scoring import Verdict
from steps.text2sql.sql_execution import QueryError

CONTEXT = "CREATE TABLE singer (name TEXT, age INTEGER)"
GOLD = "SELECT name FROM singer WHERE age = 30"
# Python reads integers of up to 4,300 digits.
DIGITS = "9" * 5000


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


def verdict(**scores: bool | str | None) -> Verdict:
    missed = dict.fromkeys(scoring.METRICS, False)
    return Verdict(**{**missed, "reason": "", "detail": "", **scores})


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
        ("SELECT name, age FROM singer", "SELECT age, name FROM singer", True),
        ("SELECT name, age FROM singer", "SELECT age, age FROM singer", False),
        ("SELECT name, age AS name FROM singer", "SELECT age, name FROM singer", False),
        ("SELECT name FROM singer ORDER BY age", "SELECT name FROM singer ORDER BY age, name DESC", True),
        ("SELECT name FROM singer ORDER BY age", "SELECT name FROM singer ORDER BY age DESC", False),
        (f"{GOLD} LIMIT 1", "SELECT name FROM singer WHERE age = 20", False),
        (f"{GOLD} ORDER BY age LIMIT 1", f"{GOLD} ORDER BY name DESC LIMIT 1", True),
        (f"{GOLD} ORDER BY name LIMIT 1", f"{GOLD} ORDER BY name DESC LIMIT 1", False),
        (
            "SELECT name, COUNT(*) FROM singer GROUP BY age",
            "SELECT MAX(name), COUNT(*) FROM singer GROUP BY age",
            True,
        ),
        (
            "SELECT name, COUNT(*) FROM singer GROUP BY age",
            "SELECT name, 2 FROM singer GROUP BY age",
            False,
        ),
        ("SELECT name FROM singer WHERE age = 1", "SELECT age FROM singer WHERE name = ''", False),
        ("SELECT name FROM singer WHERE age = 1", "SELECT name FROM singer", False),
        ("SELECT age FROM singer WHERE age = 20", "SELECT '20'", False),
        ("SELECT age FROM singer WHERE age = 20", "SELECT 20.0", True),
        ("SELECT NULL", "SELECT 0", False),
        ("SELECT COUNT(*) FROM singer", "SELECT COUNT(*) AS total FROM singer", True),
    ],
)
def test_execution_match_compares_the_rows_that_come_back(database, gold, predicted, expected):
    found = scoring.execution_difference_on(database, gold, predicted, timeout_seconds=10)
    assert found == ("" if expected else "other rows than gold")


def test_a_query_that_fails_is_told_from_gold_that_fails(database):
    fails = "SELECT height FROM singer"
    found = scoring.execution_difference_on(database, GOLD, fails, timeout_seconds=10)
    assert found == "no such column: height"
    with pytest.raises(QueryError, match="^gold: no such column: height"):
        scoring.execution_difference_on(database, fails, GOLD, timeout_seconds=10)


def test_a_right_prediction_has_all_scores_and_no_reason(database):
    assert judge(GOLD, database=database) == Verdict(True, True, True, True, True, "", "")


def test_another_query_with_the_same_rows_is_right_without_being_an_exact_match(database):
    found = judge("SELECT name FROM singer WHERE age > 20", database=database)
    assert found == Verdict(False, False, True, True, True, "", "")


def test_other_rows_are_valid_sql_and_wrong(database):
    found = judge("SELECT name FROM singer", database=database)
    assert (found.valid_sql, found.execution_accuracy) == (True, False)
    assert (found.reason, found.detail) == ("wrong rows", "other rows than gold")


def test_a_prediction_that_is_no_sql_is_wrong_and_says_why(database):
    found = judge("SELECT height FROM singer", database=database)
    assert (found.valid_sql, found.execution_accuracy) == (False, False)
    assert found.reason == "unknown column"
    assert "no such column: height" in found.detail


def test_a_prediction_that_writes_is_wrong_and_changes_nothing(database):
    before = database.read_bytes()
    found = judge("DELETE FROM singer", database=database)
    assert (found.valid_sql, found.execution_accuracy) == (False, False)
    assert database.read_bytes() == before


@pytest.mark.parametrize("predicted", ["", "-- nothing", ";"])
def test_an_empty_prediction_is_wrong_even_where_gold_finds_no_rows(database, predicted):
    found = judge(predicted, gold="SELECT name FROM singer WHERE age > 99", database=database)
    assert (found.valid_sql, found.execution_accuracy) == (False, False)
    assert found.reason in ("no answer", "does not parse")


@pytest.mark.parametrize(("factor", "expected"), [("1.0 / 3", True), ("1.0 / 3.0001", False)])
def test_many_numbers_in_another_order_are_compared_in_a_moment(tmp_path, factor, expected):
    path = tmp_path / "numbers.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE number (name TEXT, x INTEGER)")
        connection.executemany("INSERT INTO number VALUES (?, ?)", [(f"n{x}", x) for x in range(20_000)])
        connection.commit()
    start = time.monotonic()
    predicted = f"SELECT name, x * ({factor}) FROM number ORDER BY x DESC"
    found = judge(predicted, gold="SELECT name, x / 3.0 FROM number", database=path)
    assert found.execution_accuracy is expected
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ("SELECT name FROM singer WHERE age > 99", True),
        ("select NAME from singer where age >= 100", True),
        ("SELECT name FROM singer WHERE age > 98", False),
        ("SELECT age FROM singer WHERE age > 99", False),
        ("SELECT name, 1, 2 FROM singer WHERE 1 = 0", False),
    ],
)
def test_queries_without_rows_are_told_apart_on_made_rows_of_the_same_tables(database, predicted, expected):
    gold = "SELECT name FROM singer WHERE age > 99"
    found = judge(predicted, gold=gold, database=database, context="Table singer has columns name and age")
    assert (found.valid_sql, found.execution_accuracy) == (True, expected)
    assert found.reason == ("" if expected else "wrong rows")


def test_rows_that_nothing_can_be_judged_by_are_said(database):
    right = judge(GOLD, database=database)
    assert scoring.not_judged([right]) == ""
    wrong = judge(GOLD, gold="SELECT nope FROM singer", database=database)
    assert scoring.not_judged([right, wrong, wrong]) == (
        "  2 of 3 rows cannot be judged; the first: gold: no such column: nope\n"
    )


def test_a_prediction_that_takes_too_long_is_wrong(database):
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n"
    found = scoring.judge(
        context=CONTEXT, gold=GOLD, predicted=endless, stopped=False, database=database, timeout_seconds=2
    )
    assert (found.valid_sql, found.execution_accuracy, found.stopped) == (True, False, False)
    assert (found.reason, found.detail) == ("time limit", "took over 2 s")


@pytest.mark.parametrize(
    "context",
    [
        "Table singer has columns name and age",
        "CREATE TABLE singer (name ENUM('Ann', 'Bob'), age INTEGER) ENGINE=InnoDB",
        "CREATE TABLE singer (full_name TEXT)",
    ],
)
def test_a_row_with_a_database_is_judged_on_it_whatever_its_context_is(database, context):
    assert judge(GOLD, database=database, context=context) == Verdict(True, True, True, True, True, "", "")
    for predicted, reason in [
        ("SELECT full_name FROM singer", "unknown column"),
        ("SELECT name FROM song", "unknown table"),
        ("DELETE FROM singer", "other error"),
    ]:
        found = judge(predicted, database=database, context=context)
        assert (found.valid_sql, found.execution_accuracy, found.reason) == (False, False, reason)


def test_a_database_that_does_not_open_is_the_rows_fault(tmp_path):
    (tmp_path / "text.sqlite").write_text("text" * 1000)
    found = judge(GOLD, database=tmp_path / "text.sqlite")
    assert (found.valid_sql, found.reason) == (False, "cannot be judged")
    assert found.detail == "context: text.sqlite: file is not a database"


@pytest.mark.parametrize(
    "gold",
    [
        pytest.param("SELECT name FROM singer ORDER BY age LIMIT 5.0", id="limit 5.0"),
        pytest.param("SELECT name FROM singer ORDER BY age LIMIT 1e1", id="limit 1e1"),
        pytest.param("SELECT name FROM singer ORDER BY age LIMIT 2 OFFSET 1.0", id="offset 1.0"),
        pytest.param("SELECT name FROM singer ORDER BY 1.5", id="order by 1.5"),
        pytest.param(f"SELECT name FROM singer ORDER BY {DIGITS}", id="order by digits"),
        pytest.param("SELECT age FROM singer GROUP BY age HAVING COUNT(*) < 1e400", id="infinite size"),
        pytest.param(f"SELECT name FROM singer WHERE name <> '{DIGITS}'", id="text of digits"),
        pytest.param(f"SELECT name FROM singer WHERE age <> '{DIGITS}'", id="digits for a number"),
        pytest.param(f"SELECT name FROM singer WHERE age < {DIGITS}", id="number of digits"),
        pytest.param(f"SELECT name FROM singer WHERE age < {DIGITS[:400]}", id="more than a float holds"),
    ],
)
def test_numbers_that_are_no_integers_of_python_are_judged(database, gold):
    for place in (None, database):
        found = judge(gold, gold=gold, database=place)
        assert (found.execution_accuracy, found.detail) == (True, "")
        assert judge("SELECT 'Eve'", gold=gold, database=place).reason == "wrong rows"


def test_an_error_in_judging_costs_one_row_and_says_what_it_is(database, monkeypatch):
    def fail(_: str) -> None:
        raise ValueError("an odd number")

    monkeypatch.setattr(scoring, "GoldQuery", fail)
    found = judge(GOLD, database=database)
    assert (found.exact_match, found.valid_sql, found.execution_accuracy) == (True, True, False)
    assert (found.reason, found.detail) == ("cannot be judged", "gold: ValueError: an odd number")


def test_an_error_of_the_machine_ends_judging(database, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(scoring, "run_query", fail)
    with pytest.raises(OSError, match="no more processes"):
        judge(GOLD, database=database)


def test_without_a_database_the_rows_of_made_databases_decide():
    assert judge(f"{GOLD} AND 1", database=None) == Verdict(False, False, True, True, True, "", "")
    found = judge("SELECT name FROM singer WHERE age = 31", database=None)
    assert (found.valid_sql, found.execution_accuracy) == (True, False)
    assert found.reason == "wrong rows"


def test_a_broken_context_makes_the_prediction_invalid_and_keeps_the_match_of_its_text():
    found = judge(GOLD, database=None, context="CREATE TABLE")
    assert (found.exact_match, found.valid_sql) == (True, False)
    assert found.reason == "cannot be judged"
    assert found.detail.startswith("context: ")


def test_gold_that_fails_or_returns_nothing_is_the_rows_fault():
    empty = f"{GOLD} AND 1 = 2"
    for gold, predicted in [("SELECT height FROM singer", GOLD), (empty, f"{GOLD} AND 2 = 3")]:
        found = judge(predicted, gold=gold, database=None)
        assert (found.execution_accuracy, found.reason) == (False, "cannot be judged")


def test_a_prediction_that_is_late_on_made_databases_is_no_wrong_rows():
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n"
    found = scoring.judge(
        context=CONTEXT, gold=GOLD, predicted=endless, stopped=True, database=None, timeout_seconds=2
    )
    assert (found.reason, found.detail) == ("time limit", "took over 2 s on the made databases")


def test_metrics_are_shares_of_all_rows():
    verdicts = [
        verdict(
            exact_match=True, exact_match_case=True, valid_sql=True, execution_accuracy=True, stopped=True
        ),
        verdict(exact_match=True, valid_sql=True, execution_accuracy=True, stopped=True),
        verdict(valid_sql=True, execution_accuracy=False, stopped=True),
        verdict(execution_accuracy=False, stopped=True),
    ]
    found = scoring.metrics(verdicts)
    assert {name: found[name] for name in scoring.METRICS} == {
        "exact_match": 0.5,
        "exact_match_case": 0.25,
        "valid_sql": 0.75,
        "execution_accuracy": 0.5,
        "stopped": 1.0,
    }


def test_a_prefix_stands_before_each_metric():
    names = scoring.metrics([verdict(execution_accuracy=False)], prefix="base_")
    assert set(names) == {f"base_{name}{end}" for name in scoring.METRICS for end in ("", "_low", "_high")}


def test_the_interval_is_wilsons():
    # By hand from his formula for 8 of 10 and z = 1.95996: (0.8 + z²/20 ∓ z √(0.016 + z²/400)) / (1 + z²/10).
    z = 1.959964
    middle, width = 0.8 + z**2 / 20, z * (0.016 + z**2 / 400) ** 0.5
    low, high = scoring.wilson_interval(8, 10)
    assert low == pytest.approx((middle - width) / (1 + z**2 / 10), abs=1e-6)
    assert high == pytest.approx((middle + width) / (1 + z**2 / 10), abs=1e-6)


@pytest.mark.parametrize(
    "gold", ["SELECT n FROM t WHERE length(n) > 1000", "SELECT n FROM t GROUP BY n HAVING COUNT(*) > 100"]
)
def test_where_no_made_database_shows_a_row_of_gold_only_golds_own_text_is_right(gold):
    judged = [
        scoring.judge(
            context="CREATE TABLE t (n TEXT)",
            gold=gold,
            predicted=text,
            stopped=True,
            database=None,
            timeout_seconds=5,
        )
        for text in (f"{gold} ;", gold.replace("10", "11"))
    ]
    assert [one.execution_accuracy for one in judged] == [True, False]
    assert judged[1].detail == "gold: returns no row on any made database"


@pytest.mark.parametrize("right", [0, 7])
def test_an_interval_has_a_width_and_stays_a_share_also_where_none_or_all_are_right(right):
    low, high = scoring.wilson_interval(right, 7)
    assert 0 <= low < high <= 1


def test_a_share_stands_between_its_bounds():
    found = scoring.metrics([verdict(stopped=True), verdict(stopped=True), verdict()])
    assert found["stopped_low"] < found["stopped"] < found["stopped_high"]


def test_failures_are_counted_by_reason_and_reasons_that_do_not_occur_count_nothing():
    verdicts = [verdict(reason="unknown column"), verdict(reason="unknown column"), verdict()]
    found = scoring.failure_counts(verdicts, prefix="base_")
    assert found["base_failures/unknown_column"] == 2
    assert sum(found.values()) == 2
    assert set(found) == {f"base_{failures.metric_name(reason)}" for reason in failures.REASONS}


def test_the_comparison_has_a_line_for_each_metric_base_first():
    found = {"exact_match": 0.5, "exact_match_low": 0.25, "exact_match_high": 0.75, "base_exact_match": 0.0}
    found |= {"stopped": 0.999, "stopped_low": 0.9, "stopped_high": 1.0, "base_stopped": 0.125}
    found |= {"unrepaired_exact_match": 0.375, "unrepaired_stopped": 0.999}
    text = scoring.comparison({**found, "other": 3.0}, base_prefix="base_")
    assert [line.split() for line in text.splitlines()] == [
        ["base", "tuned", "95", "%", "interval", "unrepaired"],
        ["exact_match", "0.0%", "50.0%", "25.0%", "to", "75.0%", "37.5%"],
        ["stopped", "12.5%", "99.9%", "90.0%", "to", "100.0%", "99.9%"],
    ]
    assert len({len(line) for line in text.splitlines()[1:]}) == 1  # the columns stand under each other
