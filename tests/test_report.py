"""The page about an evaluation: what it shows, and that nothing in it is taken for markup."""

import re

import pandas
import pytest
from matplotlib.figure import Figure

from steps.text2sql import failures, report, scoring

HOSTILE = "<script>alert('x')</script> & \"quoted\" {{ 1 + 1 }}"


def page(*, right: int, wrong: int, **columns: str) -> str:
    """A page about so many rows, all with the same texts."""
    names = ("question", "context", "gold", "prediction", "reason", "detail")
    texts = {name: columns.get(name, f"the {name}") for name in names}
    table = pandas.DataFrame([texts] * (right + wrong))
    table["execution_accuracy"] = [True] * right + [False] * wrong
    metrics = {f"{prefix}{failures.metric_name(r)}": 0 for prefix in ("", "base_") for r in failures.REASONS}
    metrics |= {"failures/wrong_rows": 7, "base_failures/wrong_rows": 9}
    shares = {"execution_accuracy": 0.5, "execution_accuracy_low": 0.25, "execution_accuracy_high": 0.75}
    metrics |= shares | {f"base_{name}": value / 2 for name, value in shares.items()}
    return report.render("sql version 3", metrics=metrics, predictions=table, picture=Figure())


def test_the_page_shows_scores_with_their_intervals_and_counts_of_failures():
    text = re.sub(r"<[^>]+>|\s+", " ", page(right=1, wrong=1))
    text = re.sub(r"\s+", " ", text)
    assert "sql version 3" in text
    assert "execution_accuracy 25.0 % 12.5 to 37.5 50.0 % 25.0 to 75.0" in text
    assert "wrong rows 9 7" in text


@pytest.mark.parametrize(("right", "wrong", "shown"), [(12, 30, (10, 10)), (3, 0, (3, 0)), (0, 1, (0, 1))])
def test_ten_right_and_ten_wrong_rows_are_shown_or_all_there_are(right, wrong, shown):
    found = page(right=right, wrong=wrong)
    assert (found.count('<article class="right">'), found.count('<article class="wrong">')) == shown


@pytest.mark.parametrize("column", ["question", "context", "gold", "prediction", "reason", "detail"])
def test_text_of_rows_and_models_stays_text(column):
    found = page(right=0, wrong=1, **{column: HOSTILE})
    assert "&lt;script&gt;alert(" in found
    assert "<script" not in found
    assert "{{ 1 + 1 }}" in found


def test_the_page_needs_nothing_beside_itself():
    found = page(right=1, wrong=1)
    assert re.findall(r"(?:src|href)\s*=\s*\"(.{22})", found) == ["data:image/png;base64,"]
    assert not re.search(r"<script|<link|<iframe|@import|url\(|https?:|\son\w+=", found)


def test_metrics_that_are_missing_have_no_line():
    assert set(scoring.METRICS) - {"execution_accuracy"} == {
        name for name in scoring.METRICS if f"<td>{name}</td>" not in page(right=1, wrong=0)
    }
