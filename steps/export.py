"""Write a registered version as one merged model for other engines, once it answers as the version does."""

import shlex
from pathlib import Path
from typing import NamedTuple

import mlflow
import pandas
import torch
from mlflow.entities.model_registry import ModelVersion

from steps.text2sql import (
    artifacts,
    evaluation,
    manifest,
    merging,
    model_versions,
    packaging,
    run_log,
    sample_data,
    scored_rows,
    step_run,
    store_names,
    transformers_flavor,
)
from steps.text2sql.errors import UserError
from steps.text2sql.manifest import AdapterManifest
from steps.text2sql.params import ExportParams
from steps.text2sql.sql_model import ROWS_PER_BATCH, BaseModelError, SQLModel, extract_sql

# Any fixed one: the same questions for every export.
SAMPLE_SEED = 0


class Answered(NamedTuple):
    """What a model made of rows: the SQL of each, and the logits of the token after each prompt."""

    sql: list[str]
    logits: torch.Tensor


def main(params: ExportParams) -> None:
    """Merge beside the output folder, ask both models the same, and move the merged one into place."""
    version = model_versions.find_version(params.model_uri)
    output, uri = Path(params.output), model_versions.uri_of(version)
    with artifacts.downloaded(uri, parameter="model_uri", needs=transformers_flavor.CARD) as package:
        adapter = package / transformers_flavor.ADAPTER
        described = manifest.read(AdapterManifest, adapter, source=f"model_uri={uri}")
        dtype = check(adapter, described, params)
        with merging.made_at_once(output) as folder:
            merging.write(package, adapter, described, dtype=dtype, folder=folder)
            rows = scored_rows.choose(
                pandas.DataFrame(sample_data.generate(SAMPLE_SEED)), params.compare_rows
            )
            served, merged = ask_both(package, folder, described, rows, source=f"model_uri={uri}")
            offer(rows, served, merged, min_same_sql=params.min_same_sql)
    report(version, output)


def check(adapter: Path, described: AdapterManifest, params: ExportParams) -> torch.dtype:
    """Refuse before long work what cannot be merged or has no room; the dtype to write comes back."""
    base = described.of_dataset.base_model
    merging.check_mergeable(adapter, base)
    dtype = merging.choose_dtype(base, params.dtype)
    merging.check_disk(Path(params.output), base, dtype)
    run_log.log_choices(
        base_model=f"{base}, quantization {described.quantization}",
        dtype=f"{str(dtype).removeprefix('torch.')} ({params.dtype})",
    )
    return dtype


def ask_both(
    package: Path, folder: Path, described: AdapterManifest, rows: pandas.DataFrame, *, source: str
) -> tuple[Answered, Answered]:
    """Answers of the version, as it is served, and of the merged model, as it was written; one at a time."""
    served = packaging.load(package, source=source)
    budget = evaluation.token_budget(served.tokenizer, rows["answer"])
    first = ask(served, rows, budget)
    del served
    merged = SQLModel.of_merged(
        str(folder),
        prompt_template=described.of_dataset.prompt_template,
        prompt_style=described.of_dataset.prompt_style,
    )
    return first, ask(merged, rows, budget)


def ask(model: SQLModel, rows: pandas.DataFrame, max_new_tokens: int) -> Answered:
    """Answers of one model."""
    answers = evaluation.answer(
        model, rows, adapter=True, max_new_tokens=max_new_tokens, batch_size=ROWS_PER_BATCH
    )
    logits = merging.next_token_logits(model.model, model.tokenizer, model.prompts(rows))
    return Answered([extract_sql(one.text) for one in answers], logits)


def offer(rows: pandas.DataFrame, served: Answered, merged: Answered, *, min_same_sql: float) -> None:
    """Log how far both agree.

    Raises:
        UserError: too few rows get the same SQL.
    """
    table = rows[["question", "context"]].assign(served=served.sql, merged=merged.sql)
    same = float((table["served"] == table["merged"]).mean())
    difference = float((served.logits - merged.logits).abs().max())
    mlflow.log_metrics({"same_sql": same, "max_logit_difference": difference, "compared_rows": len(rows)})
    mlflow.log_table(table, store_names.COMPARISON)
    print(f"\n  same SQL on {same:.1%} of {len(rows)} rows, logits differ by at most {difference:.3g}\n")
    if not same >= min_same_sql:
        raise UserError(
            f"min_same_sql={min_same_sql:g}: the merged model gives the same SQL on {same:.1%} of "
            f"{len(rows)} rows only, so it is not offered. Look at {store_names.COMPARISON} of this run; "
            "try dtype=float32."
        )


def report(version: ModelVersion, output: Path) -> None:
    """Note and show where the merged model is."""
    mlflow.set_tags(
        {
            store_names.TAG_MODEL_NAME: version.name,
            store_names.TAG_MODEL_VERSION: version.version,
            store_names.TAG_EXPORTED_TO: str(output),
        }
    )
    serve = shlex.join(["vllm", "serve", str(output), "--served-model-name", version.name])
    print(f"  {output}\n  serve       {serve}\n")


if __name__ == "__main__":
    step_run.run_step(ExportParams, main, user_errors=(BaseModelError,))
