"""Which reason stands behind which message."""

import pytest

from steps.text2sql import failures


def reason(message: str, *, predicted: str = "SELECT a FROM t", stopped: bool = True) -> str:
    return failures.classify(message, predicted=predicted, stopped=stopped)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("", ""),
        ("no such column: T1.age", "unknown column"),
        ("no such table: singers", "unknown table"),
        ("other rows than gold", "wrong rows"),
        ("took over 5 s", "time limit"),
        ('near "FROM": syntax error', "does not parse"),
        ("incomplete input", "does not parse"),
        ('unrecognized token: "#"', "does not parse"),
        ("You can only execute one statement at a time.", "does not parse"),
        ("is no query", "does not parse"),
        ("ambiguous column name: id", "other error"),
        ("no such function: CONCATENATE", "other error"),
        ("more than 100000 rows or 50000000 characters", "other error"),
        ("context: no such column: a", "cannot be judged"),
        ("gold: no such column: a", "cannot be judged"),
    ],
)
def test_each_message_has_its_reason(message, expected):
    assert reason(message) == expected
    assert expected in ("", *failures.REASONS)


@pytest.mark.parametrize("predicted", ["", "  ", ";", " ; "])
def test_an_empty_answer_is_no_answer(predicted):
    assert reason("incomplete input", predicted=predicted) == "no answer"


def test_text_that_was_cut_and_does_not_parse_did_not_stop():
    assert reason("incomplete input", stopped=False) == "did not stop"
    assert reason("", predicted="", stopped=False) == ""
    assert reason("incomplete input", predicted="", stopped=False) == "did not stop"


def test_text_that_was_cut_and_runs_is_judged_by_its_rows():
    assert reason("other rows than gold", stopped=False) == "wrong rows"
    assert reason("no such column: a", stopped=False) == "unknown column"


def test_each_reason_has_a_metric_of_its_own_with_a_name_that_mlflow_takes():
    names = [failures.metric_name(name) for name in failures.REASONS]
    assert len(set(names)) == len(failures.REASONS) == 9
    assert failures.metric_name("does not parse") == "failures/does_not_parse"
