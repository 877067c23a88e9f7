"""What a training would take, from the shapes of its base alone."""

from typing import NamedTuple

from transformers import PreTrainedModel

from steps.text2sql import memory_plan, screen
from steps.text2sql.base_model import Held
from steps.text2sql.sql_model import pick_device
from steps.text2sql.training_speed import Speed, rows_seen


class Work(NamedTuple):
    """What a training goes through: `steps` of `batch_size` rows, `mean_tokens` each, out of `rows`.

    The longest of all has `longest` tokens, and `deviation` is the standard deviation.
    """

    rows: int
    mean_tokens: float
    deviation: float
    longest: int
    batch_size: int
    steps: int

    @property
    def step_tokens(self) -> float:
        """Tokens of an optimizer step."""
        return self.mean_tokens * min(self.batch_size, self.rows)

    @property
    def most_step_tokens(self) -> float:
        """About the tokens of the largest step: one of some hundreds is three standard deviations above."""
        return self.step_tokens + 3 * self.deviation * self.batch_size**0.5

    @property
    def rows_in_all(self) -> int:
        """Rows of all steps."""
        return rows_seen(self.steps, rows=self.rows, batch_size=self.batch_size)

    @property
    def tokens(self) -> float:
        """Tokens of all steps."""
        return self.mean_tokens * self.rows_in_all


def peak_bytes(
    base: PreTrainedModel, held: Held, plan: memory_plan.Plan, work: Work, *, trainable: int
) -> int:
    """Most memory of the training's steps; `trainable` are the parameters of the adapter."""
    device, dtype = pick_device()
    return memory_plan.peak_bytes(
        plan,
        memory_plan.Shape.of(base.config, dtype),
        device=device,
        weights=held.bytes,
        four_bit=held.four_bit,
        trainable=trainable,
        longest=work.longest,
        step_tokens=work.most_step_tokens,
    )


def describe(
    work: Work, speed: Speed, *, recompute: bool, peak_bytes: int, download_bytes: int
) -> dict[str, str]:
    """Rows, memory, download and time, in words by name."""
    return screen.estimates(
        rows=work.rows,
        rows_to_train_on=work.rows_in_all,
        peak_bytes=peak_bytes,
        download_bytes=download_bytes,
        seconds=speed.seconds(tokens=work.tokens, device=pick_device()[0], recompute=recompute),
    )
