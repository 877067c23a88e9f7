"""Score a registered version, as it would be served, and its base alone, on test rows."""

from pathlib import Path
from typing import Any

import mlflow
import pandas
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.entities import LoggedModelInput
from mlflow.entities.model_registry import ModelVersion

from steps.text2sql import (
    active_run,
    adapter,
    artifacts,
    assessments,
    dataset,
    evaluation,
    figures,
    manifest,
    memory_plan,
    model_card,
    model_versions,
    packaging,
    report,
    reuse,
    run_log,
    run_page,
    scored_rows,
    scoring,
    slices,
    step_run,
    store_names,
    transformers_flavor,
)
from steps.text2sql.manifest import AdapterManifest, DatasetManifest
from steps.text2sql.params import Auto, EvaluateParams
from steps.text2sql.scoring import EXECUTION_ACCURACY
from steps.text2sql.sql_model import BaseModelError, SQLModel, pick_device

# The adapter is off for the second one; its metrics and columns begin with its prefix.
TUNED, BASE = "", scoring.BASE_PREFIX


def main(params: EvaluateParams) -> None:
    """Answer and score test rows with and without the adapter; log metrics and predictions."""
    version = model_versions.find_version(params.model_uri)
    uri, source = model_versions.uri_of(version), f"model_uri={params.model_uri}"
    with (
        artifacts.downloaded(uri, parameter="model_uri", needs=packaging.MLMODEL_FILE_NAME) as package,
        artifacts.logged_folder(store_names.ROWS) as folder,
    ):
        described, model_id = packaging.read_manifest(package, source=source), packaging.model_id(package)
        packaging.check_logged(model_id, source=source)
        rows = gather(params, described.of_dataset, folder)
        digest = scored_rows.digest(rows, folder)
        answers = generate(packaging.load(package, source=source), rows, batch_size=params.eval_batch_size)
        verdicts, unrepaired = score(rows, answers, folder, timeout_seconds=params.query_timeout_seconds)
        lora = adapter.settings(package / transformers_flavor.ADAPTER)
    run_log.tag_data(base_model=described.of_dataset.base_model, dataset=described.of_dataset.dataset)
    metrics = keep(version, model_id, rows, digest, answers, verdicts, unrepaired)
    update_card(version, metrics, described, lora)


def gather(params: EvaluateParams, trained_on: DatasetManifest, folder: Path) -> pandas.DataFrame:
    """The rows to score, written into a folder with their databases."""

    def keep(candidates: pandas.DataFrame) -> pandas.DataFrame:
        chosen = scored_rows.choose(candidates, params.eval_rows)
        return scored_rows.write(chosen, folder, seed=trained_on.seed)

    if params.dataset:
        return keep(scored_rows.of_dataset(dataset.resolve(params.dataset, base_is_hub=False), trained_on))
    with artifacts.downloaded(params.dataset_uri, parameter="dataset_uri", needs=manifest.FILE) as prepared:
        return keep(scored_rows.of_prepared(prepared, source=f"dataset_uri={params.dataset_uri}"))


def generate(model: SQLModel, rows: pandas.DataFrame, *, batch_size: int | Auto) -> dict[str, list]:
    """Answers of the tuned model and of its base, with the same budget of new tokens."""
    budget = evaluation.token_budget(model.tokenizer, rows["answer"])
    if batch_size == "auto":
        free = memory_plan.free_bytes(pick_device()[0])
        batch_size = evaluation.find_batch_size(model, rows, max_new_tokens=budget, free=free)
        run_log.log_choices(eval_batch_size=f"{batch_size} rows (auto: by free memory)")
    mlflow.log_param("max_new_tokens", budget)
    run_log.log_choices(max_new_tokens=f"{budget} for each answer (by the longest gold answer)")
    return {
        prefix: evaluation.answer(
            model, rows, adapter=prefix == TUNED, max_new_tokens=budget, batch_size=batch_size
        )
        for prefix in (TUNED, BASE)
    }


def score(
    rows: pandas.DataFrame, answers: dict[str, list], databases: Path, *, timeout_seconds: float
) -> tuple[dict[str, list], dict[str, float]]:
    """Verdicts of both; and shares of the tuned model's answers without repair, for comparison."""
    limits = {"databases": databases, "timeout_seconds": timeout_seconds}
    queries = {prefix: evaluation.served(rows, given) for prefix, given in answers.items()}
    verdicts = {
        prefix: evaluation.judge(rows, answers[prefix], queries[prefix], **limits) for prefix in answers
    }
    plain = evaluation.unrepaired(rows, answers[TUNED], queries[TUNED], verdicts[TUNED], **limits)
    return verdicts, scoring.metrics(plain, prefix=scoring.UNREPAIRED_PREFIX)


def keep(
    version: ModelVersion,
    model_id: str,
    rows: pandas.DataFrame,
    digest: str,
    answers: dict[str, list],
    verdicts: dict[str, list],
    unrepaired: dict[str, float],
) -> dict[str, float]:
    """Log all that there is to read, and link version and run to each other; the metrics come back."""
    metrics = evaluation.metrics(verdicts) | unrepaired
    predictions = evaluation.predictions(rows, answers, verdicts)
    right = {prefix: predictions[f"{prefix}{EXECUTION_ACCURACY}"] for prefix in (TUNED, BASE)}
    by_slice = slices.table(predictions["gold"], right)
    of_slices = slices.metrics(by_slice, metric=EXECUTION_ACCURACY, prefixes=(TUNED, BASE))
    log_metrics(model_id, rows, digest, metrics | of_slices)
    link(version, digest, {EXECUTION_ACCURACY: scoring.summary(metrics, EXECUTION_ACCURACY)})
    show(version, metrics, predictions, by_slice)
    assessments.log(predictions, model_id=model_id)
    print("\n" + scoring.comparison(metrics, base_prefix=BASE) + "\n" + scoring.not_judged(verdicts[TUNED]))
    return metrics


def log_metrics(model_id: str, rows: pandas.DataFrame, digest: str, metrics: dict[str, float]) -> None:
    """Log metrics with the model and the rows that they belong to: they show on the version's page too."""
    # MLflow knows no kind of source for an artifact of a run.
    source = CodeDatasetSource(
        {"artifact": active_run.artifact_uri(f"{store_names.ROWS}/{store_names.ROWS_FILE}")}
    )
    of_rows = mlflow.data.from_pandas(
        rows, source=source, targets="answer", name="evaluated_rows", digest=digest[:36]
    )
    run_log.log_input(of_rows, context="evaluation", model=LoggedModelInput(model_id))
    mlflow.log_metrics(metrics, model_id=model_id, dataset=of_rows)


def link(version: ModelVersion, digest: str, scores: dict[str, str]) -> None:
    """Name version and run in each other; scores become tags of the version, whose page has no metrics."""
    mlflow.set_tags(
        {
            store_names.TAG_MODEL_NAME: version.name,
            store_names.TAG_MODEL_VERSION: version.version,
            store_names.TAG_EVALUATED_ROWS: digest,
            store_names.TAG_CODE: reuse.code_digest(),
        }
    )
    for name, value in (scores | {store_names.TAG_EVALUATION_RUN: active_run.run_id()}).items():
        mlflow.MlflowClient().set_model_version_tag(version.name, version.version, name, value)


def update_card(
    version: ModelVersion, metrics: dict[str, float], described: AdapterManifest, lora: dict[str, Any]
) -> None:
    """Put the scores into the version's description; the card in the package stays as it was registered."""
    card = model_card.render(
        described,
        lora,
        name=version.name,
        version=version.version,
        scores=model_card.scores_of(metrics),
        evaluated_rows=int(metrics["evaluated_rows"]),
        evaluation_run=run_page.run_link(mlflow.active_run(), active_run.run_id()),
    )
    mlflow.MlflowClient().update_model_version(version.name, version.version, description=card)


def show(
    version: ModelVersion,
    metrics: dict[str, float],
    predictions: pandas.DataFrame,
    by_slice: pandas.DataFrame,
) -> None:
    """Log what a person looks at: the tables, the picture of the slices, and the page."""
    picture = figures.slice_accuracy(by_slice, base_prefix=BASE, metric=EXECUTION_ACCURACY)
    page = report.render(
        f"{version.name} version {version.version}",
        metrics=metrics,
        predictions=predictions,
        picture=picture,
    )
    mlflow.log_table(predictions, store_names.PREDICTIONS)
    mlflow.log_table(by_slice, store_names.SLICES)
    mlflow.log_figure(picture, store_names.SLICES_PICTURE)
    mlflow.log_text(page, store_names.REPORT)


if __name__ == "__main__":
    step_run.run_step(EvaluateParams, main, user_errors=(BaseModelError,))
