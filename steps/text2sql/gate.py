"""The decision whether a version becomes champion."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from scipy.stats import binomtest

from steps.text2sql.scoring import BASE_PREFIX, EXECUTION_ACCURACY

# With fewer rows than this, one row is over 3 points of accuracy.
MIN_ROWS = 30
Row = tuple[str, str, str]
Verdicts = Mapping[Row, bool | None]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluate run found: metrics, and by row whether model and base were right.

    A row is its question, context and gold SQL; a verdict is None where there is none.
    """

    metrics: Mapping[str, float]
    tuned: Verdicts
    base: Verdicts


@dataclass(frozen=True)
class Decision:
    """Whether to promote, the reason in a sentence, and the numbers that it rests on, by name."""

    promote: bool
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)


def decide_alone(
    candidate: Evaluation, *, seen: Collection[Row], floor: float, is_first: bool = True
) -> Decision:
    """Judge by the candidate's own scores: all that the first version needs, and later ones before more.

    `seen` are the rows to leave out, since a model that is compared was trained on them. A later version also
    needs `MIN_ROWS` rows and to be above its base.
    """
    tuned, base = (_without(verdicts, seen) for verdicts in (candidate.tuned, candidate.base))
    score, of_base = accuracy(tuned), accuracy(base)
    numbers = {
        EXECUTION_ACCURACY: score,
        BASE_PREFIX + EXECUTION_ACCURACY: of_base,
        "rows": len(tuned),
        "rows_left_out": len(candidate.tuned) - len(tuned),
        "min_execution_accuracy": floor,
    }
    problem = _missing(candidate, tuned, base if not is_first else None) or _too_few(
        numbers, 1 if is_first else MIN_ROWS
    )
    if not problem and score < floor:
        problem = f"{EXECUTION_ACCURACY} {score:.4f} is under min_execution_accuracy {floor:.4f}"
    if not problem and not is_first and not score > of_base:
        problem = f"{EXECUTION_ACCURACY} {score:.4f} is not above its base's {of_base:.4f}"
    said = problem or f"{'first champion, ' if is_first else ''}{EXECUTION_ACCURACY} {score:.4f}"
    return Decision(not problem, said + _left_out(numbers), numbers)


def decide(
    candidate: Evaluation, champion: Evaluation, *, seen: Collection[Row], floor: float, alpha: float
) -> Decision:
    """Promote a version that is above its base and, beyond chance, above the champion on the same rows.

    Beyond chance: the one-sided exact p of McNemar's test (McNemar 1947, Psychometrika 12, 153-157; exact by
    the binomial distribution) is under `alpha`. See `decide_alone` for what else it needs.
    """
    alone = decide_alone(candidate, seen=seen, floor=floor, is_first=False)
    if not alone.promote:
        return alone
    tuned, best = _without(candidate.tuned, seen), _without(champion.tuned, seen)
    problem = _unpaired(tuned, best) or _missing(champion, best, whose="the champion's ")
    if problem:
        return Decision(False, problem, alone.numbers)
    score, of_champion = accuracy(tuned), accuracy(best)
    b, c = discordant(tuned, best)
    p = mcnemar_p(b, c)
    numbers = {
        **alone.numbers,
        f"champion_{EXECUTION_ACCURACY}": of_champion,
        "only_candidate_right": b,
        "only_champion_right": c,
        "p_value": p,
        "alpha": alpha,
    }
    is_above = score > of_champion
    said = f"{EXECUTION_ACCURACY} {score:.4f} is {'' if is_above else 'not '}above the champion's "
    said += f"{of_champion:.4f}"
    of_rows = f"{b} against {c} of {len(tuned)} rows that only one has right, p {p:.4f}"
    if is_above and p < alpha:
        of_base = numbers[BASE_PREFIX + EXECUTION_ACCURACY]
        said += f" and its base's {of_base:.4f} ({of_rows})"
    elif is_above:
        said += f", but that may be chance: {of_rows} is not under gate_alpha {alpha:g}"
    return Decision(is_above and p < alpha, said + _left_out(numbers), numbers)


def accuracy(verdicts: Verdicts) -> float:
    """Share of right rows; NaN without rows or where a verdict is missing."""
    if not verdicts or None in verdicts.values():
        return math.nan
    return sum(map(bool, verdicts.values())) / len(verdicts)


def discordant(first: Verdicts, second: Verdicts) -> tuple[int, int]:
    """Rows that only the first has right, and rows that only the second has right."""
    pairs = [(first[row], second[row]) for row in first]
    return pairs.count((True, False)), pairs.count((False, True))


def mcnemar_p(b: int, c: int) -> float:
    """Chance of at least `b` of `b + c` discordant rows if both models were equally good."""
    return float(binomtest(b, b + c, 0.5, alternative="greater").pvalue) if b + c else 1.0


def _without(verdicts: Verdicts, seen: Collection[Row]) -> Verdicts:
    return {row: verdict for row, verdict in verdicts.items() if row not in seen}


def _missing(
    evaluation: Evaluation, tuned: Verdicts, base: Verdicts | None = None, *, whose: str = ""
) -> str:
    """Which metric or verdict is missing, if any; without `base`, its base does not count."""
    of = {EXECUTION_ACCURACY: tuned} | ({} if base is None else {BASE_PREFIX + EXECUTION_ACCURACY: base})
    for name, verdicts in of.items():
        if not math.isfinite(evaluation.metrics.get(name, math.nan)):
            return f"{whose}{name} is missing or NaN"
        if None in verdicts.values():
            without = list(verdicts.values()).count(None)
            return f"{whose}{name} is missing for {without} of {len(verdicts)} rows"
    return ""


def _too_few(numbers: Mapping[str, float], needed: int) -> str:
    if numbers["rows"] >= needed:
        return ""
    return (
        f"only {numbers['rows']} rows can be compared and {needed} are needed; "
        "evaluate on more rows (eval_rows) or on others (dataset)"
    )


def _unpaired(candidate: Verdicts, champion: Verdicts) -> str:
    if candidate.keys() == champion.keys():
        return ""
    return (
        f"the champion has verdicts for {len(candidate.keys() & champion.keys())} of the candidate's "
        f"{len(candidate)} rows and for {len(champion.keys() - candidate.keys())} others: not the same rows"
    )


def _left_out(numbers: Mapping[str, float]) -> str:
    count = numbers["rows_left_out"]
    return f"; {count} rows are left out that a model was trained on" if count else ""
