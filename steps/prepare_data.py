"""Resolve base model and dataset; check, split and tokenize the rows."""

import datasets
import mlflow
import pandas
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.huggingface_dataset_source import HuggingFaceDatasetSource

from steps.text2sql import base_model, dataset, figures, manifest, preparation, splits, tracking
from steps.text2sql.device import describe_device
from steps.text2sql.manifest import DatasetManifest
from steps.text2sql.params import PrepareDataParams
from steps.text2sql.sql_model import PROMPT_TEMPLATE, BaseModelError, load_base_tokenizer
from steps.text2sql.tokenization import fingerprint


def main(params: PrepareDataParams) -> None:
    """Prepare the dataset and log it with its manifest."""
    base = base_model.resolve(params.base_model)
    source = dataset.resolve(params.dataset, base_is_hub=base.is_hub)
    announce(base, source)
    if tracking.is_chained():  # this machine trains next; nf4 is the least that can need
        base_model.check_memory(base.reference, "nf4")
    rows = dataset.read(source, seed=params.seed)
    parts = splits.split(rows, by=params.split_by, test_size=params.test_size, seed=params.seed)
    tokenizer = load_base_tokenizer(base.reference)
    prepared = preparation.prepare(
        parts, tokenizer=tokenizer, template=PROMPT_TEMPLATE, max_length=params.max_length
    )
    counts = preparation.counts(parts, prepared)
    described = DatasetManifest(
        base_model=base.reference,
        base_commit=base.commit,
        base_license=base.license,
        dataset=source.name,
        dataset_source=source.location,
        dataset_commit=source.commit,
        dataset_digest=dataset.digest(rows),
        tokenizer_fingerprint=fingerprint(tokenizer),
        prompt_template=PROMPT_TEMPLATE,
        max_length=params.max_length,
        split_by=params.split_by,
        test_size=params.test_size,
        seed=params.seed,
        counts=counts,
    )
    save(prepared, described)
    mlflow.log_metrics(counts)
    show(prepared, source, described)
    print("  rows: " + ", ".join(f"{len(rows)} {name}" for name, rows in prepared.splits.items()))


def announce(base: base_model.BaseModel, source: dataset.DatasetSource) -> None:
    """Say first what `auto` means here, and what it downloads."""
    download = f", downloads {base.download_bytes / 2**30:.1f} GiB" if base.download_bytes else ""
    tracking.log_choices(
        device=describe_device(),
        base_model=f"{base.reference} ({base.reason}{download})",
        dataset=f"{source.name}{f'@{source.commit}' if source.commit else ''} ({source.reason})",
    )


def save(prepared: preparation.Prepared, described: DatasetManifest) -> None:
    """Log the artifact `dataset/`, and the rejected rows beside it."""
    with tracking.logged_folder(tracking.DATASET) as folder:
        test = preparation.write_databases(prepared.splits["test"], folder, seed=described.seed)
        datasets.DatasetDict({**prepared.splits, "test": test}).save_to_disk(folder)
        manifest.write(described, folder)
    lines = prepared.rejected.to_json(orient="records", lines=True, force_ascii=True)
    mlflow.log_text(lines, tracking.REJECTED)


def show(prepared: preparation.Prepared, source: dataset.DatasetSource, described: DatasetManifest) -> None:
    """Log what a person looks at: the dataset, ten rows, the histogram of token lengths."""
    train = prepared.splits["train"].select_columns(list(dataset.COLUMNS)).to_pandas()
    log_dataset(train, source, described.dataset_digest)
    mlflow.log_table(train.head(10), "examples.json")
    mlflow.log_figure(
        figures.token_lengths(prepared.lengths, max_length=described.max_length), "token_lengths.png"
    )
    mlflow.log_metric("mean_tokens", float(prepared.lengths.mean()))


def log_dataset(rows: pandas.DataFrame, source: dataset.DatasetSource, digest: str) -> None:
    """Log the rows as the run's dataset; MLflow keeps the first 36 characters of the digest."""
    origins = {
        "hub": lambda: HuggingFaceDatasetSource(source.location, revision=source.commit),
        "file": lambda: source.location,
        "sample": lambda: CodeDatasetSource({"module": source.location, "commit": tracking.git_commit()}),
    }
    origin = origins[source.kind]()
    logged = mlflow.data.from_pandas(
        rows, source=origin, targets="answer", name=source.name, digest=digest[:36]
    )
    mlflow.log_input(logged, context="training")


if __name__ == "__main__":
    tracking.run_step(PrepareDataParams, main, user_errors=(BaseModelError,))
