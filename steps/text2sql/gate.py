"""The decision whether a version becomes champion."""

import math
from dataclasses import dataclass

from steps.text2sql.scoring import EXECUTION_ACCURACY


@dataclass(frozen=True)
class Evaluation:
    """What an evaluate run found: its metrics, and the digest of the rows that were scored."""

    metrics: dict[str, float]
    rows_digest: str

    @property
    def execution_accuracy(self) -> float:
        """Share of right answers, NaN where it is missing."""
        return self.metrics.get(EXECUTION_ACCURACY, math.nan)


@dataclass(frozen=True)
class Decision:
    """Whether to promote, and the reason in a sentence."""

    promote: bool
    reason: str


def decide(candidate: Evaluation, champion: Evaluation | None, *, floor: float) -> Decision:
    """Promote the first version over the floor, later ones if better than the champion on the same rows."""
    score = candidate.execution_accuracy
    if math.isnan(score):
        return Decision(False, f"{EXECUTION_ACCURACY} is missing or NaN")
    if score < floor:
        return Decision(
            False, f"{EXECUTION_ACCURACY} {score:.4f} is under min_execution_accuracy {floor:.4f}"
        )
    if champion is None:
        return Decision(True, f"first champion, {EXECUTION_ACCURACY} {score:.4f}")
    if champion.rows_digest != candidate.rows_digest:
        return Decision(
            False, "the champion was scored on other rows; evaluate it on this dataset, then promote again"
        )
    best = champion.execution_accuracy
    if not score > best:
        return Decision(False, f"{EXECUTION_ACCURACY} {score:.4f} is not above the champion's {best:.4f}")
    return Decision(True, f"{EXECUTION_ACCURACY} {score:.4f} is above the champion's {best:.4f}")
