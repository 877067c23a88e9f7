"""Package an adapter as a model that carries its prompt template, and register it as challenger."""

import tempfile
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion

from steps.text2sql import (
    active_run,
    adapter,
    artifacts,
    manifest,
    model_card,
    model_versions,
    packaging,
    prepared_data,
    project_source,
    prompt_registry,
    run_log,
    step_run,
    store_names,
    training_rows,
)
from steps.text2sql.errors import UserError
from steps.text2sql.manifest import AdapterManifest, DatasetManifest
from steps.text2sql.params import RegisterParams
from steps.text2sql.sql_model import BaseModelError


def main(params: RegisterParams) -> None:
    """Log the package, try it in a fresh process, register it."""
    prompt_registry.check_model_name(params.registered_model_name)
    with artifacts.downloaded(params.dataset_uri, parameter="dataset_uri", needs=manifest.FILE) as folder:
        of_dataset = manifest.read(DatasetManifest, folder, source=f"dataset_uri={params.dataset_uri}")
        seen = hashes_of_training(folder)
    with artifacts.downloaded(params.adapter_uri, parameter="adapter_uri", needs=adapter.WEIGHTS) as folder:
        described = manifest.read(AdapterManifest, folder, source=f"adapter_uri={params.adapter_uri}")
        check_match(described, of_dataset, params)
        run_log.tag_data(base_model=of_dataset.base_model, dataset=of_dataset.dataset)
        lora = adapter.settings(folder)
        card = partial(model_card.render, described, lora, name=params.registered_model_name)
        logged = packaging.log_model(folder, described, name=store_names.MODEL, card=card())
    log_training_rows(logged.model_id, seen)
    answer = packaging.ask_in_fresh_process(logged.model_uri, active_run.clear_run_id())
    prompt = prompt_registry.publish(
        of_dataset.prompt_template,
        style=of_dataset.prompt_style,
        model_name=params.registered_model_name,
        model_id=logged.model_id,
        run_id=active_run.run_id(),
    )
    version = register(logged.model_uri, described, params, card=card, prompt=prompt)
    print(f"\n  {packaging.EXAMPLE['question']}\n  {answer}\n\n  {model_versions.uri_of(version)}\n")


def check_match(described: AdapterManifest, of_dataset: DatasetManifest, params: RegisterParams) -> None:
    """Refuse an adapter of another base, other rows, or rows split otherwise: test rows would leak."""
    trained_on = described.of_dataset
    first = ("dataset_digest", "tokenizer_fingerprint", "base_model")
    for name in (*first, *vars(trained_on)):
        if getattr(trained_on, name) != getattr(of_dataset, name):
            raise UserError(
                f"adapter_uri={params.adapter_uri}: was trained with {name} {getattr(trained_on, name)}, but "
                f"dataset_uri={params.dataset_uri} has {getattr(of_dataset, name)}; give the dataset of its "
                "training."
            )


def hashes_of_training(dataset: Path) -> list[str]:
    """Hashes of the rows that training reads, also of those that it only validates with."""
    splits = prepared_data.splits_in(dataset)
    parts = [splits[name].select_columns(["question", "context"])[:] for name in ("train", "validation")]
    rows = (zip(part["question"], part["context"], strict=True) for part in parts)
    return training_rows.hashes(chain.from_iterable(rows))


def log_training_rows(model_id: str, hashes: list[str]) -> None:
    """Let the package say which rows it has seen, so that it is never judged by them."""
    with tempfile.TemporaryDirectory() as scratch:
        training_rows.write(hashes, Path(scratch))
        mlflow.MlflowClient().log_model_artifacts(model_id, scratch, store_names.TRAINING_ROWS)


def register(
    model_uri: str,
    described: AdapterManifest,
    params: RegisterParams,
    *,
    card: Callable[..., str],
    prompt: str,
) -> ModelVersion:
    """Register a logged model that works, with its origin as tags and its card, as challenger."""
    source = described.of_dataset
    tags = {
        "base_model": source.base_model,
        "base_commit": source.base_commit,
        "quantization": described.quantization,
        "prompt": prompt,
        "dataset": source.dataset,
        "dataset_digest": source.dataset_digest,
        "git_commit": project_source.git_commit(),
        "global_step": str(described.global_step),
    }
    version = model_versions.register_version(model_uri, params.registered_model_name, tags)
    mlflow.MlflowClient().update_model_version(
        version.name, version.version, description=card(version=version.version)
    )
    model_versions.point_to_newest(version.name, store_names.CHALLENGER)
    mlflow.set_tags(
        {store_names.TAG_MODEL_NAME: version.name, store_names.TAG_MODEL_VERSION: version.version}
    )
    return version


if __name__ == "__main__":
    step_run.run_step(RegisterParams, main, user_errors=(BaseModelError,))
