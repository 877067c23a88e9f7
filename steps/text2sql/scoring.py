"""Scores of predicted SQL against gold SQL."""

import functools
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from steps.text2sql.gold_answers import Answer, Comparison, GoldQuery
from steps.text2sql.made_databases import make_databases
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


def execution_match(
    context: str, gold: str, predicted: str, *, timeout_seconds: float = 10.0, seed: int = 0
) -> bool:
    """Whether a prediction returns what gold returns on every database that is made for the row.

    A prediction that does not execute is wrong, and so is one that takes longer than `timeout_seconds` on all
    databases together. A row whose gold returns nothing on each of them proves nothing: wrong.

    Raises:
        QueryError: the context or gold does not execute, so that no prediction can be judged; says which.
    """
    answers, may_permute = _gold_answers(context, gold, timeout_seconds, seed)
    comparison = Comparison(may_permute=may_permute)
    deadline = time.monotonic() + timeout_seconds
    for answer in answers:
        left = max(deadline - time.monotonic(), 0.0)
        try:
            found = run_query(answer.database, predicted, timeout_seconds=left)
        except QueryError:
            return False
        if not comparison.agrees(answer, found):
            return False
    return any(answer.length for answer in answers)


# The rows of one evaluation, so that base and tuned model share the work; about 0.1 MB each.
@functools.lru_cache(maxsize=256)
def _gold_answers(
    context: str, gold: str, timeout_seconds: float, seed: int
) -> tuple[tuple[Answer, ...], bool]:
    query = GoldQuery(gold)
    answers = []
    for database in make_databases(context, gold, seed=seed):
        try:
            answers.append(query.answer(database, timeout_seconds=timeout_seconds))
        except QueryError as error:
            raise error if str(error).startswith("context: ") else QueryError(f"gold: {error}") from error
    return tuple(answer for answer in answers if answer is not None), query.may_permute


def judge(
    *, context: str, gold: str, predicted: str, stopped: bool, database: Path | None, timeout_seconds: float
) -> Verdict:
    """All scores of one prediction."""
    reason, is_valid, is_right = "", True, None
    try:
        check_query(context, predicted, timeout_seconds=timeout_seconds)
    except QueryError as error:
        is_valid, reason = False, str(error)
    try:
        is_right = is_valid and (
            execution_match_on(database, gold, predicted, timeout_seconds=timeout_seconds)
            if database
            else execution_match(context, gold, predicted, timeout_seconds=timeout_seconds)
        )
        reason = reason or ("" if is_right else "other rows than gold")
    except QueryError as error:
        is_right, reason = False, reason or str(error)
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
