"""What a run keeps of a step: choices, settings, metrics, pictures, inputs and tags to find it by."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlflow
from mlflow.data.dataset import Dataset
from mlflow.entities import LoggedModelInput, Metric, Run
from mlflow.exceptions import MlflowException

from steps.text2sql.active_run import run_id
from steps.text2sql.ranks import of_first_process
from steps.text2sql.retries import tried_again
from steps.text2sql.store_names import (
    CHOSEN,
    TAG_BASE_MODEL,
    TAG_DATASET,
    TAG_DRY_RUN,
    TAG_RESUMED_FROM,
    TAG_RESUMED_STEP,
)


@of_first_process
def log_choices(**choices: str) -> None:
    """Print what a step chose and why, and keep it as parameters `chosen/…`."""
    width = max(map(len, choices))
    print("\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in choices.items()) + "\n", flush=True)
    mlflow.log_params({f"{CHOSEN}/{name}": text for name, text in choices.items()})


def choices(run: Run) -> dict[str, str]:
    """What `log_choices` kept on a run."""
    prefix = f"{CHOSEN}/"
    return {
        name.removeprefix(prefix): text for name, text in run.data.params.items() if name.startswith(prefix)
    }


@of_first_process
def log_settings(prefix: str, settings: Mapping[str, Any]) -> None:
    """Log every setting as `prefix/name` and read them back, since MLflow can drop parameters silently.

    Raises:
        RuntimeError: naming those that did not arrive as they were.
    """
    sent = {f"{prefix}/{name}": str(value) for name, value in settings.items()}
    mlflow.log_params(sent)
    arrived = mlflow.get_run(run_id()).data.params
    lost = sorted(name for name, value in sent.items() if arrived.get(name) != value)
    if lost:
        raise RuntimeError(f"MLflow did not keep these parameters: {', '.join(lost)}")


@of_first_process
def log_metrics(**metrics: float) -> None:
    """Log single numbers."""
    mlflow.log_metrics(metrics)


class Point(NamedTuple):
    """Metrics at one optimizer step, and when they were taken, in milliseconds since 1970."""

    metrics: dict[str, float]
    step: int
    time_ms: int


def log_points(run: str, points: Sequence[Point]) -> None:
    """Log points of curves in one request, from any thread."""
    metrics = [
        Metric(name, value, point.time_ms, point.step)
        for point in points
        for name, value in point.metrics.items()
    ]
    mlflow.MlflowClient().log_batch(run, metrics=metrics)


@of_first_process
def log_figure(figure: Any, file: str) -> None:
    """Log a picture."""
    mlflow.log_figure(figure, file)


def log_input(data: Dataset, context: str, model: LoggedModelInput | None = None) -> None:
    """Log a dataset as an input of this run, also while another run logs the same one for the first time.

    Raises:
        MlflowException: it failed `TRIES` times; two that log a dataset for the first time collide.
    """
    tried_again(lambda: mlflow.log_input(data, context=context, model=model))


@of_first_process
def tag_data(*, base_model: str, dataset: str) -> None:
    """Let this run be found by its base model and its dataset."""
    mlflow.set_tags({TAG_BASE_MODEL: base_model, TAG_DATASET: dataset})


def tag_dry_run() -> None:
    """Let this run be told from those that did something."""
    mlflow.set_tag(TAG_DRY_RUN, "yes")


def exists(run: str) -> bool:
    """Whether the tracking store has a run of this id."""
    try:
        return bool(mlflow.get_run(run))
    except MlflowException:
        return False


@of_first_process
def note_resumed(run: str, step: int) -> None:
    """Say and keep which run's training this run goes on with, and after how many steps."""
    print(f"\nGoes on after step {step} of run {run}.", flush=True)
    mlflow.set_tags({TAG_RESUMED_FROM: run, TAG_RESUMED_STEP: step})


def resumed_from(run: str) -> str:
    """The run whose training a run went on with; empty for none, and where the store does not say."""
    try:
        return mlflow.get_run(run).data.tags.get(TAG_RESUMED_FROM, "")
    except MlflowException:
        return ""
