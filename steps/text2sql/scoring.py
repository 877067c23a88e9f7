"""Scores of predicted SQL against gold SQL."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from steps.text2sql.sql_execution import QueryError, check_query, is_ordered, run_query, same_result

# The metric that decides on promotion.
EXECUTION_ACCURACY = "execution_accuracy"
# Before the names of metrics and columns of the base, with the adapter off.
BASE_PREFIX = "base_"
METRICS = ("exact_match", "exact_match_case", "valid_sql", EXECUTION_ACCURACY, "stopped")


@dataclass(frozen=True)
class Verdict:
    """Scores of one prediction. `execution_accuracy` is None where the row has no database to run on.

    `reason` says why a prediction is no valid SQL or returns something else; empty when it is right.
    """

    exact_match: bool
    exact_match_case: bool
    valid_sql: bool
    execution_accuracy: bool | None
    stopped: bool
    reason: str


def normalize(query: str) -> str:
    """Form in which exact_match_case compares: outer space and `;` gone, space runs to one, `'` to `"`."""
    return re.sub(r"\s+", " ", query.strip().rstrip(";").rstrip()).replace("'", '"')


def exact_match(gold: str, predicted: str, *, ignore_case: bool = True) -> bool:
    """Whether two queries are the same text after `normalize`."""
    gold, predicted = normalize(gold), normalize(predicted)
    return gold.lower() == predicted.lower() if ignore_case else gold == predicted


def execution_match_on(database: Path, gold: str, predicted: str, *, timeout_seconds: float) -> bool:
    """Whether a prediction returns what gold returns on a populated database.

    Raises:
        QueryError: one of them returns no result.
    """
    expected = run_query(database, gold, timeout_seconds=timeout_seconds)
    found = run_query(database, predicted, timeout_seconds=timeout_seconds)
    return same_result(expected, found, ordered=is_ordered(gold))


def judge(
    *, context: str, gold: str, predicted: str, stopped: bool, database: Path | None, timeout_seconds: float
) -> Verdict:
    """All scores of one prediction."""
    reason, is_valid, is_right = "", True, None
    try:
        check_query(context, predicted, timeout_seconds=timeout_seconds)
    except QueryError as error:
        is_valid, reason = False, str(error)
    if database:
        try:
            is_right = is_valid and execution_match_on(
                database, gold, predicted, timeout_seconds=timeout_seconds
            )
            reason = reason or ("" if is_right else "other rows than gold")
        except QueryError as error:
            is_right, reason = False, str(error)
    return Verdict(
        exact_match=exact_match(gold, predicted),
        exact_match_case=exact_match(gold, predicted, ignore_case=False),
        valid_sql=is_valid,
        execution_accuracy=is_right,
        stopped=stopped,
        reason=reason,
    )


def metrics(verdicts: Sequence[Verdict], *, prefix: str = "") -> dict[str, float]:
    """Shares of all rows, 0 to 1, by name; execution accuracy only where every row could be run."""
    values = {name: [getattr(verdict, name) for verdict in verdicts] for name in METRICS}
    return {prefix + name: sum(found) / len(found) for name, found in values.items() if None not in found}


def comparison(found: Mapping[str, float], *, base_prefix: str) -> str:
    """Text table of a model's metrics beside those of its base."""
    lines = [f"  {'':<20}{'base':>8}{'tuned':>8}"]
    lines += [
        f"  {name:<20}{found[base_prefix + name]:>8.1%}{found[name]:>8.1%}"
        for name in METRICS
        if name in found
    ]
    return "\n".join(lines)
