"""When a version becomes champion; expected p from counting heads in tossed coins."""

import math

import pytest

from steps.text2sql.gate import Evaluation, decide, decide_alone, discordant, mcnemar_p
from steps.text2sql.training_rows import hashes, read, row_hash, write


def row(i):
    return (f"question {i}", f"CREATE TABLE t{i} (a INT)", f"SELECT a FROM t{i}")


def verdicts(text):
    """A verdict a letter: 1 right, 0 wrong, ? none."""
    return {row(i): {"1": True, "0": False, "?": None}[letter] for i, letter in enumerate(text)}


def scored(tuned, base=None, **metrics):
    base = base or "0" * len(tuned)
    return Evaluation(
        {"execution_accuracy": 0.5, "base_execution_accuracy": 0.5} | metrics, verdicts(tuned), verdicts(base)
    )


def gate(candidate, champion, seen=(), floor=0.0, alpha=0.05):
    return decide(candidate, champion, seen=seen, floor=floor, alpha=alpha)


def alone(candidate, seen=(), floor=0.0):
    return decide_alone(candidate, seen=seen, floor=floor)


# McNemar's test


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1 / 2),
        (4, 0, 1 / 16),
        (5, 0, 1 / 32),
        (0, 5, 1.0),
        (8, 1, (9 + 1) / 2**9),
        (1, 1, 3 / 4),
        (3, 2, (10 + 5 + 1) / 2**5),
    ],
)
def test_p_is_the_chance_of_as_many_heads(b, c, p):
    assert mcnemar_p(b, c) == pytest.approx(p, rel=1e-12)


def test_rows_that_only_one_has_right_are_paired_by_row_and_not_by_position():
    second = dict(reversed(verdicts("0101").items()))
    assert discordant(verdicts("1110"), second) == (2, 1)


# The first version


@pytest.mark.parametrize(
    ("tuned", "floor", "promote", "reason"),
    [
        ("10", 0.1, True, "first champion, execution_accuracy 0.5000"),
        ("1000000000", 0.1, True, "first champion, execution_accuracy 0.1000"),
        ("00", 0.0, True, "first champion, execution_accuracy 0.0000"),
        ("1000", 0.3, False, "execution_accuracy 0.2500 is under min_execution_accuracy 0.3000"),
        ("11?", 0.0, False, "execution_accuracy is missing for 1 of 3 rows"),
    ],
)
def test_the_first_version_needs_only_the_floor(tuned, floor, promote, reason):
    decision = alone(scored(tuned, base="1" * len(tuned)), floor=floor)
    assert (decision.promote, decision.reason) == (promote, reason)


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_missing_metric_never_promotes_even_if_the_table_is_complete(value):
    candidate = scored("1" * 40)
    metrics = dict(candidate.metrics)
    del metrics["execution_accuracy"]
    if value is not None:
        metrics["execution_accuracy"] = value
    broken = Evaluation(metrics, candidate.tuned, candidate.base)
    for decision in (alone(broken), gate(broken, scored("0" * 40))):
        assert (decision.promote, decision.reason) == (False, "execution_accuracy is missing or NaN")


def test_a_first_version_that_saw_every_row_is_not_promoted():
    decision = alone(scored("11"), seen={row(0), row(1)})
    assert not decision.promote
    assert decision.reason.startswith("only 0 rows can be compared and 1 are needed")
    assert decision.reason.endswith("; 2 rows are left out that a model was trained on")


def test_the_floor_is_that_of_the_rows_that_were_not_seen():
    decision = alone(scored("1100"), seen={row(0), row(1)}, floor=0.4)
    assert not decision.promote
    assert "execution_accuracy 0.0000 is under min_execution_accuracy 0.4000" in decision.reason


# Later versions


def test_five_rows_more_and_none_less_are_enough_and_four_are_not():
    best = scored("0" * 40)
    enough = gate(scored("1" * 5 + "0" * 35), best)
    assert enough.promote
    assert enough.reason == (
        "execution_accuracy 0.1250 is above the champion's 0.0000 and its base's 0.0000 "
        "(5 against 0 of 40 rows that only one has right, p 0.0312)"
    )
    four = gate(scored("1" * 4 + "0" * 36), best)
    assert not four.promote
    assert four.reason == (
        "execution_accuracy 0.1000 is above the champion's 0.0000, but that may be chance: "
        "4 against 0 of 40 rows that only one has right, p 0.0625 is not under gate_alpha 0.05"
    )
    assert gate(scored("1" * 4 + "0" * 36), best, alpha=0.07).promote


def test_p_at_alpha_is_not_under_it():
    assert not gate(scored("1" * 5 + "0" * 35), scored("0" * 40), alpha=1 / 32).promote


def test_the_numbers_are_those_of_the_rows_that_were_compared():
    candidate = scored("1" * 9 + "0" + "1" * 20 + "0" * 10, base="0" * 39 + "1")
    decision = gate(candidate, scored("0" * 8 + "1" * 22 + "0" * 10), seen={row(0), row(39)}, alpha=0.1)
    assert decision.promote
    assert decision.numbers == pytest.approx(
        {
            "execution_accuracy": 28 / 38,
            "base_execution_accuracy": 0,
            "champion_execution_accuracy": 22 / 38,
            "rows": 38,
            "rows_left_out": 2,
            "min_execution_accuracy": 0,
            "only_candidate_right": 7,
            "only_champion_right": 1,
            "p_value": (8 + 1) / 2**8,
            "alpha": 0.1,
        }
    )


@pytest.mark.parametrize(
    ("candidate", "champion", "options", "reason"),
    [
        (
            scored("1" * 20 + "0" * 20),
            scored("1" * 20 + "0" * 20),
            {},
            "0.5000 is not above the champion's 0.5000",
        ),
        (
            scored("1" * 4 + "0" * 36),
            scored("1" * 20 + "0" * 20),
            {},
            "0.1000 is not above the champion's 0.5000",
        ),
        (
            scored("1" * 20 + "0" * 20),
            scored("0" * 40),
            {"floor": 0.6},
            "0.5000 is under min_execution_accuracy",
        ),
        (
            scored("1" * 20 + "0" * 20, "0" * 20 + "1" * 20),
            scored("0" * 40),
            {},
            "not above its base's 0.5000",
        ),
        (
            scored("1" * 40, "?" + "0" * 39),
            scored("0" * 40),
            {},
            "base_execution_accuracy is missing for 1 of 40",
        ),
        (scored("1" * 39 + "?"), scored("0" * 40), {}, "execution_accuracy is missing for 1 of 40 rows"),
        (
            scored("1" * 40),
            scored("?" + "0" * 39),
            {},
            "the champion's execution_accuracy is missing for 1 of 40",
        ),
        (
            scored("1" * 40, base_execution_accuracy=math.nan),
            scored("0" * 40),
            {},
            "base_execution_accuracy is missing or NaN",
        ),
        (
            scored("1" * 40),
            scored("0" * 40, execution_accuracy=math.nan),
            {},
            "the champion's execution_accuracy is missing or NaN",
        ),
        (scored("1" * 29), scored("0" * 29), {}, "only 29 rows can be compared and 30 are needed"),
        (
            scored("1" * 40),
            scored("0" * 38),
            {},
            "for 38 of the candidate's 40 rows and for 0 others: not the same",
        ),
        (
            scored("1" * 40),
            scored("0" * 41),
            {},
            "for 40 of the candidate's 40 rows and for 1 others: not the same",
        ),
    ],
)
def test_a_later_version_is_refused_with_the_reason(candidate, champion, options, reason):
    decision = gate(candidate, champion, **options)
    assert decision.promote is False
    assert reason in decision.reason


def test_thirty_rows_are_enough():
    assert gate(scored("1" * 30), scored("0" * 30)).promote


def test_rows_that_were_seen_do_not_count_for_or_against():
    candidate, best = scored("1" * 10 + "0" * 30), scored("0" * 40)
    assert gate(candidate, best).promote
    decision = gate(candidate, best, seen={row(i) for i in range(10)})
    assert not decision.promote
    assert "execution_accuracy 0.0000 is not above its base's 0.0000" in decision.reason
    few = gate(candidate, best, seen={row(i) for i in range(5, 16)})
    assert not few.promote
    assert few.reason == (
        "only 29 rows can be compared and 30 are needed; evaluate on more rows (eval_rows) or on others "
        "(dataset); 11 rows are left out that a model was trained on"
    )


def test_a_missing_verdict_of_a_row_that_is_left_out_does_not_matter():
    assert gate(scored("?" + "1" * 30), scored("?" + "0" * 30), seen={row(0)}).promote


# Rows of training


def test_a_row_is_known_however_it_is_spaced_and_capitalized():
    known = row_hash("How many heads?", "CREATE TABLE head (age INTEGER)")
    assert row_hash(" how  many\nHEADS?", "create table head\t(age integer) ") == known
    assert row_hash("How many heads", "CREATE TABLE head (age INTEGER)") != known
    assert row_hash("How many heads? CREATE", "TABLE head (age INTEGER)") != known


def test_hashes_are_written_once_and_sorted_and_read_back(tmp_path):
    found = hashes([("a", "b"), ("c", "d"), ("A ", "b")])
    write(found, tmp_path)
    assert len(found) == 2
    assert (tmp_path / "hashes.txt").read_text().split() == sorted([row_hash("a", "b"), row_hash("c", "d")])
    assert read(tmp_path, source="models:/a/1") == set(found)
