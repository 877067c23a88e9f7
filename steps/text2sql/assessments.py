"""Finished answers and their verdicts in MLflow's own evaluation view."""

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import mlflow
import pandas
from mlflow.entities import Feedback
from mlflow.genai.scorers import scorer

from steps.text2sql import scoring
from steps.text2sql.retries import tried_again

# MLflow writes every verdict in a transaction of its own: 100 rows cost a local store ten seconds and more.
MAX_ROWS = 100
VERDICTS = (scoring.EXECUTION_ACCURACY, "exact_match", "valid_sql")
# There is no service to spare, and of ten threads that write to SQLite at once most rows' traces got lost.
SETTINGS = {
    "MLFLOW_GENAI_EVAL_MAX_WORKERS": "1",
    "MLFLOW_GENAI_EVAL_MAX_SCORER_WORKERS": "1",
    "MLFLOW_GENAI_EVAL_PREDICT_RATE_LIMIT": "0",
    "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "false",
}


def log(predictions: pandas.DataFrame, *, model_id: str | None) -> None:
    """Score finished answers through `mlflow.genai.evaluate`: a trace a row, with its verdicts as feedback.

    `predictions` as `evaluation.predictions` makes them. The scorers look the verdicts up: nothing is
    generated or executed again, no model is asked, and no further metrics are logged. Only the first
    `MAX_ROWS` rows go there.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    rows = predictions.head(MAX_ROWS).to_dict("records")
    verdicts = {(row["question"], row["context"]): row for row in rows}
    judges = [_judge(name, verdicts) for name in VERDICTS]
    data = [
        {
            "inputs": {"question": row["question"], "context": row["context"]},
            "outputs": row["prediction"],
            "expectations": {"expected_response": row["gold"]},
        }
        for row in rows
    ]
    with _quiet():
        # It logs the rows first, where two that evaluate the same ones collide; no trace is written by then.
        tried_again(lambda: mlflow.genai.evaluate(data=data, scorers=judges, model_id=model_id))


def _judge(name: str, verdicts: dict[tuple[str, str], dict[str, Any]]) -> Callable[..., Feedback]:
    def look_up(inputs: dict[str, str]) -> Feedback:
        row = verdicts[inputs["question"], inputs["context"]]
        return Feedback(value=bool(row[name]), rationale=row["detail"] or None)

    return scorer(look_up, name=name, aggregations=[])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bar and the invitation that evaluate prints: this takes seconds, after a bar of its own."""
    logger = logging.getLogger("mlflow.genai")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
    logger.setLevel(level)
