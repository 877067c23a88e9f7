"""Score a registered version, as it would be served, and its base alone, on test rows."""

from pathlib import Path

import datasets
import mlflow
import pandas
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from steps.text2sql import evaluation, manifest, scoring, tracking
from steps.text2sql.errors import UserError
from steps.text2sql.params import EvaluateParams
from steps.text2sql.sql_model import BaseModelError, SQLModel

# The adapter is off for the second one; its metrics and columns begin with its prefix.
TUNED, BASE = "", scoring.BASE_PREFIX


def main(params: EvaluateParams) -> None:
    """Answer and score test rows with and without the adapter; log metrics and predictions."""
    version = find_version(params.model_uri)
    with tracking.downloaded(params.dataset_uri, parameter="dataset_uri", needs=manifest.FILE) as folder:
        test = datasets.load_from_disk(folder, keep_in_memory=True)["test"].to_pandas()
        rows = evaluation.choose_rows(test, params.eval_rows)
        answers = generate(load(version), rows, batch_size=params.eval_batch_size)
        verdicts = score(rows, answers, folder, timeout_seconds=params.query_timeout_seconds)
    report(version, rows, answers, verdicts)


def find_version(model_uri: str) -> ModelVersion:
    """The registered version behind `models:/name/version` or `models:/name@alias`."""
    name, _, alias = model_uri.removeprefix("models:/").partition("@")
    if not alias:
        return tracking.model_version(*name.split("/"))
    try:
        return mlflow.MlflowClient().get_model_version_by_alias(name, alias)
    except MlflowException as error:
        raise UserError(f"model_uri={model_uri}: {error.message}") from error


def load(version: ModelVersion) -> SQLModel:
    """The package as it is registered, not a model left over in memory."""
    return mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}").unwrap_python_model()


def generate(model: SQLModel, rows: pandas.DataFrame, *, batch_size: int) -> dict[str, list]:
    """Answers of the tuned model and of its base, with the same budget of new tokens."""
    budget = evaluation.token_budget(model.tokenizer, rows["answer"])
    mlflow.log_param("max_new_tokens", budget)
    return {
        prefix: evaluation.answer(
            model, rows, adapter=prefix == TUNED, max_new_tokens=budget, batch_size=batch_size
        )
        for prefix in (TUNED, BASE)
    }


def score(
    rows: pandas.DataFrame, answers: dict[str, list], databases: Path, *, timeout_seconds: float
) -> dict[str, list]:
    """Verdicts of both."""
    return {
        prefix: evaluation.judge(rows, given, databases=databases, timeout_seconds=timeout_seconds)
        for prefix, given in answers.items()
    }


def report(
    version: ModelVersion, rows: pandas.DataFrame, answers: dict[str, list], verdicts: dict[str, list]
) -> None:
    """Log metrics and the table of predictions, and link version and run to each other."""
    metrics = scoring.metrics(verdicts[TUNED]) | scoring.metrics(verdicts[BASE], prefix=BASE)
    mlflow.log_metrics(metrics | {"evaluated_rows": len(rows)})
    mlflow.log_table(evaluation.predictions(rows, answers, verdicts), tracking.PREDICTIONS)
    mlflow.set_tags(
        {
            tracking.TAG_MODEL_NAME: version.name,
            tracking.TAG_MODEL_VERSION: version.version,
            tracking.TAG_EVALUATED_ROWS: evaluation.rows_digest(rows),
        }
    )
    mlflow.MlflowClient().set_model_version_tag(
        version.name, version.version, tracking.TAG_EVALUATION_RUN, tracking.run_id()
    )
    print("\n" + scoring.comparison(metrics, base_prefix=BASE) + "\n")


if __name__ == "__main__":
    tracking.run_step(EvaluateParams, main, user_errors=(BaseModelError,))
