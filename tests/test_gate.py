"""When a version becomes champion."""

import math

import pytest

from steps.text2sql import scoring
from steps.text2sql.gate import Decision, Evaluation, decide


def scored(accuracy: float | None, rows: str = "rows") -> Evaluation:
    return Evaluation({} if accuracy is None else {"execution_accuracy": accuracy, "exact_match": 1.0}, rows)


def test_the_gate_reads_the_metric_that_evaluate_writes():
    assert scoring.EXECUTION_ACCURACY == "execution_accuracy"
    assert scored(0.25).execution_accuracy == 0.25
    assert math.isnan(scored(None).execution_accuracy)


@pytest.mark.parametrize(
    ("candidate", "champion", "floor", "promote", "reason"),
    [
        (scored(0.5), None, 0.1, True, "first champion, execution_accuracy 0.5000"),
        (scored(0.1), None, 0.1, True, "first champion, execution_accuracy 0.1000"),
        (scored(0.0), None, 0.0, True, "first champion, execution_accuracy 0.0000"),
        (scored(0.0999), None, 0.1, False, "0.0999 is under min_execution_accuracy 0.1000"),
        (scored(0.5), scored(0.4), 0.1, True, "0.5000 is above the champion's 0.4000"),
        (scored(0.4), scored(0.4), 0.1, False, "0.4000 is not above the champion's 0.4000"),
        (scored(0.3), scored(0.4), 0.1, False, "0.3000 is not above the champion's 0.4000"),
        (scored(0.3), scored(0.2), 0.5, False, "0.3000 is under min_execution_accuracy 0.5000"),
        (scored(0.9), scored(0.4, "other rows"), 0.1, False, "other rows; evaluate it on this dataset"),
        (scored(0.1), scored(0.4, "other rows"), 0.1, False, "other rows; evaluate it on this dataset"),
        (scored(None), None, 0.0, False, "missing or NaN"),
        (scored(math.nan), None, 0.0, False, "missing or NaN"),
        (scored(math.nan), scored(0.0), 0.0, False, "missing or NaN"),
        (scored(None), scored(math.nan), 0.0, False, "missing or NaN"),
        (scored(0.9), scored(math.nan), 0.1, False, "not above the champion's nan"),
        (scored(0.9), scored(None), 0.1, False, "not above the champion's nan"),
    ],
)
def test_a_version_is_promoted_over_the_floor_and_above_the_champion(
    candidate, champion, floor, promote, reason
):
    decision = decide(candidate, champion, floor=floor)
    assert isinstance(decision, Decision)
    assert decision.promote is promote
    assert reason in decision.reason


def test_other_metrics_do_not_decide():
    better_text = Evaluation({"execution_accuracy": 0.4, "exact_match": 1.0}, "rows")
    worse_text = Evaluation({"execution_accuracy": 0.4, "exact_match": 0.0}, "rows")
    assert decide(better_text, worse_text, floor=0).promote is False
