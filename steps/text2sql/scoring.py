"""Scores of predicted SQL against gold SQL."""

import functools
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import binomtest
from sqlglot.errors import SqlglotError

from steps.text2sql import failures
from steps.text2sql.gold_answers import Answer, Comparison, GoldQuery
from steps.text2sql.made_databases import make_databases
from steps.text2sql.sql_execution import MadeDatabase, QueryError, check_query_on, run_query

# The metric that decides on promotion.
EXECUTION_ACCURACY = "execution_accuracy"
# Before the names of metrics and columns of the base, with the adapter off.
BASE_PREFIX = "base_"
# Before those of the answers as the model wrote them, without the repair that the served model does.
UNREPAIRED_PREFIX = "unrepaired_"
OTHER_ROWS = "other rows than gold"
TABLES = (
    "SELECT sql FROM sqlite_master WHERE type = 'table' AND name NOT GLOB 'sqlite_*' "
    "AND sql NOT LIKE 'CREATE VIRTUAL%' ORDER BY rowid"
)
METRICS = ("exact_match", "exact_match_case", "valid_sql", EXECUTION_ACCURACY, "stopped")
# What a gold query that was not foreseen makes the code raise that reads it. Errors of the machine are not
# among them: they end the run.
FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    SqlglotError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Verdict:
    """Scores of one prediction.

    `reason` is the one of `failures.REASONS` for which it is no valid SQL or returns something else, and
    `detail` the message behind it; both are empty when it is right.
    """

    exact_match: bool
    exact_match_case: bool
    valid_sql: bool
    execution_accuracy: bool
    stopped: bool
    reason: str
    detail: str


def normalize(query: str) -> str:
    """Form in which exact_match_case compares: outer space and `;` gone, space runs to one, `'` to `"`."""
    return re.sub(r"\s+", " ", query.strip().rstrip(";").rstrip()).replace("'", '"')


def exact_match(gold: str, predicted: str, *, ignore_case: bool = True) -> bool:
    """Whether two queries are the same text after `normalize`."""
    gold, predicted = normalize(gold), normalize(predicted)
    return gold.lower() == predicted.lower() if ignore_case else gold == predicted


def execution_difference_on(database: Path, gold: str, predicted: str, *, timeout_seconds: float) -> str:
    """Why a prediction is wrong on a populated database; empty if it returns what gold returns.

    Where gold returns no row, so do many queries: one that does too is judged on databases that are made for
    the same tables, as in `execution_difference`.

    Raises:
        QueryError: gold returns no result.
    """
    query = GoldQuery(gold)
    try:
        expected = query.answer_from(database, timeout_seconds=timeout_seconds)
    except QueryError as error:
        raise _of_gold(error) from error
    try:
        found = run_query(database, predicted, timeout_seconds=timeout_seconds)
    except QueryError as error:
        return str(error)
    if not Comparison(may_permute=query.may_permute).agrees(expected, found):
        return OTHER_ROWS
    if expected.length or normalize(predicted) == normalize(gold):
        return ""
    tables = _tables_of(database, timeout_seconds=timeout_seconds)
    return execution_difference(tables, gold, predicted, timeout_seconds=timeout_seconds)


def _tables_of(database: Path, *, timeout_seconds: float) -> str:
    rows = run_query(database, TABLES, timeout_seconds=timeout_seconds)
    return "".join(f"{sql};\n" for (sql,) in rows)


def execution_match(
    context: str, gold: str, predicted: str, *, timeout_seconds: float = 10.0, seed: int = 0
) -> bool:
    """Whether a prediction returns what gold returns on every database that is made for the row.

    A prediction that does not execute is wrong, and so is one that takes longer than `timeout_seconds` on all
    databases together. A row whose gold returns nothing on each of them proves nothing: wrong.

    Raises:
        QueryError: the context or gold does not execute, so that no prediction can be judged; says which.
    """
    return not execution_difference(context, gold, predicted, timeout_seconds=timeout_seconds, seed=seed)


def execution_difference(
    context: str, gold: str, predicted: str, *, timeout_seconds: float, seed: int = 0
) -> str:
    """Why `execution_match` calls a prediction wrong; empty for a right one."""
    answers, may_permute = _gold_answers(context, gold, timeout_seconds, seed)
    comparison = Comparison(may_permute=may_permute)
    deadline = time.monotonic() + timeout_seconds
    for answer in answers:
        left = max(deadline - time.monotonic(), 0.0)
        try:
            found = run_query(answer.database, predicted, timeout_seconds=left)
        except QueryError as error:
            late = time.monotonic() >= deadline
            return f"took over {timeout_seconds:g} s on the made databases" if late else str(error)
        if not comparison.agrees(answer, found):
            return OTHER_ROWS
    can_tell = any(answer.length for answer in answers) or normalize(predicted) == normalize(gold)
    return "" if can_tell else "gold: returns no row on any made database"


# The rows of one evaluation, so that base and tuned model, judged one after the other, share the work; about
# 0.1 MB each.
@functools.lru_cache(maxsize=2048)
def _gold_answers(
    context: str, gold: str, timeout_seconds: float, seed: int
) -> tuple[tuple[Answer, ...], bool]:
    query = GoldQuery(gold)
    answers = []
    for database in make_databases(context, gold, seed=seed):
        try:
            answers.append(query.answer(database, timeout_seconds=timeout_seconds))
        except QueryError as error:
            raise _of_gold(error) from error
    return tuple(answer for answer in answers if answer is not None), query.may_permute


def _of_gold(error: QueryError) -> QueryError:
    return error if str(error).startswith("context: ") else QueryError(f"gold: {error}")


def judge(
    *, context: str, gold: str, predicted: str, stopped: bool, database: Path | None, timeout_seconds: float
) -> Verdict:
    """All scores of one prediction: on the row's database, or from its context where it has none."""
    is_valid = False
    try:
        tables = database or MadeDatabase(context, {})
        check_query_on(tables, predicted, timeout_seconds=timeout_seconds)
        is_valid = True
        if database:
            detail = execution_difference_on(database, gold, predicted, timeout_seconds=timeout_seconds)
        else:
            detail = execution_difference(context, gold, predicted, timeout_seconds=timeout_seconds)
    except QueryError as error:
        detail = str(error)
    except FAULTS as error:  # one row less, rather than all answers lost
        detail = f"gold: {type(error).__name__}: {error}"
    return Verdict(
        exact_match=exact_match(gold, predicted),
        exact_match_case=exact_match(gold, predicted, ignore_case=False),
        valid_sql=is_valid,
        execution_accuracy=not detail,
        stopped=stopped,
        reason=failures.classify(detail, predicted=predicted, stopped=stopped),
        detail=detail,
    )


def metrics(verdicts: Sequence[Verdict], *, prefix: str = "") -> dict[str, float]:
    """Shares of all rows, 0 to 1, by name, each with `_low` and `_high`, the bounds of its 95 % interval."""
    found: dict[str, float] = {}
    for name in METRICS:
        values = [getattr(verdict, name) for verdict in verdicts]
        low, high = wilson_interval(sum(values), len(values))
        found |= {name: sum(values) / len(values), f"{name}_low": low, f"{name}_high": high}
    return {prefix + name: value for name, value in found.items()}


def summary(found: Mapping[str, float], name: str) -> str:
    """One metric in words: its share and interval, that of the base, and the number of rows."""
    low, high = found[f"{name}_low"], found[f"{name}_high"]
    base, rows = found[BASE_PREFIX + name], found["evaluated_rows"]
    return f"{found[name]:.4f} ({low:.4f} to {high:.4f}), base {base:.4f}, {rows:.0f} rows"


def wilson_interval(right: int, rows: int) -> tuple[float, float]:
    """Bounds of the 95 % score interval of a share (Wilson 1927, doi 10.1080/01621459.1927.10502953).

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with p = right/rows, n = rows, z = 1.96: it
    stays within 0 to 1 and has a width also where none or all are right.
    """
    interval = binomtest(right, rows).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def failure_counts(verdicts: Sequence[Verdict], *, prefix: str = "") -> dict[str, int]:
    """Rows by reason of failure, as names of metrics; reasons that do not occur count 0."""
    found = Counter(verdict.reason for verdict in verdicts)
    return {prefix + failures.metric_name(reason): found[reason] for reason in failures.REASONS}


def not_judged(verdicts: Sequence[Verdict]) -> str:
    """How many rows nothing can be judged by, which count as wrong, and why the first; empty for none."""
    found = [verdict.detail for verdict in verdicts if verdict.reason == failures.CANNOT_BE_JUDGED]
    return (
        f"  {len(found)} of {len(verdicts)} rows cannot be judged; the first: {found[0]}\n" if found else ""
    )


def comparison(found: Mapping[str, float], *, base_prefix: str) -> str:
    """Text table of a model's metrics beside those of its base, with their intervals and without repair."""
    lines = [f"  {'':<20}{'base':>8}{'tuned':>8}   95 % interval     unrepaired"]
    lines += [
        f"  {name:<20}{found[base_prefix + name]:>8.1%}{found[name]:>8.1%}"
        f"{found[f'{name}_low']:>8.1%} to{found[f'{name}_high']:>7.1%}"
        f"{found[UNREPAIRED_PREFIX + name]:>15.1%}"
        for name in METRICS
        if name in found
    ]
    return "\n".join(lines)
