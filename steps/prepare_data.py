"""Resolve base model and dataset; check, split and tokenize the rows."""

import json
from pathlib import Path

import datasets
import mlflow
import pandas
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.huggingface_dataset_source import HuggingFaceDatasetSource
from transformers import PreTrainedTokenizerFast

from steps.text2sql import (
    active_run,
    artifacts,
    base_model,
    databases,
    dataset,
    figures,
    manifest,
    preparation,
    project_source,
    prompt_template,
    run_log,
    splits,
    step_run,
    store_names,
)
from steps.text2sql.device import describe_device
from steps.text2sql.errors import UserError
from steps.text2sql.manifest import DatasetManifest
from steps.text2sql.params import PrepareDataParams
from steps.text2sql.sql_model import PROMPT_TEMPLATE, BaseModelError, load_base_tokenizer
from steps.text2sql.tokenization import fingerprint

# Parameters that the manifest keeps.
RECORDED = ("prompt_style", "max_length", "split_by", "test_size", "seed")
OVERLAPS = (("validation", "train"), ("validation", "test"), ("test", "train"))


def main(params: PrepareDataParams) -> None:
    """Prepare the dataset and log it with its manifest."""
    base = base_model.resolve(params.base_model)
    source = dataset.resolve(
        params.dataset, base_is_hub=base.is_hub, config=params.dataset_config, split=params.dataset_split
    )
    announce(base, source)
    check(base, params)
    tokenizer = load_base_tokenizer(base.reference)
    template = prompt(params, tokenizer, base.reference)
    given = read(source, params)
    parts = split(given, params)
    prepared = preparation.prepare(
        parts,
        tokenizer=tokenizer,
        template=template,
        style=params.prompt_style,
        max_length=params.max_length,
    )
    base_model.check_tokens(base.reference, preparation.highest_token(prepared))
    described = DatasetManifest(
        **origin(base, source),
        dataset_digest=dataset.digest(pandas.concat(given.values())),
        tokenizer_fingerprint=fingerprint(tokenizer),
        prompt_template=template,
        **{name: getattr(params, name) for name in RECORDED},
        counts=preparation.counts(parts, prepared) | overlaps(given, parts),
    )
    run_log.tag_data(base_model=described.base_model, dataset=described.dataset)
    log_rejected(prepared.rejected)
    save(prepared, described, source)
    show(prepared, source, described)


def check(base: base_model.BaseModel, params: PrepareDataParams) -> None:
    """Refuse a base that no training could take; in a chain also for this machine's memory."""
    base_model.check_layers(base.reference)
    base_model.check_length(base.reference, params.max_length)
    if active_run.is_chained():  # this machine trains next; nf4 is the least that can need
        base_model.check_memory(base.reference, "nf4")


def origin(base: base_model.BaseModel, source: dataset.DatasetSource) -> dict[str, str]:
    """What the manifest says of base and dataset."""
    return {
        "base_model": base.reference,
        "base_commit": base.commit,
        "base_license": base.license,
        "dataset": source.name,
        "dataset_source": source.location,
        "dataset_commit": source.commit,
        "dataset_config": source.config,
        "dataset_split": source.split,
    }


def prompt(params: PrepareDataParams, tokenizer: PreTrainedTokenizerFast, reference: str) -> str:
    """The prompt template: the default or the user's, in the model's chat form where that is asked for."""
    template = PROMPT_TEMPLATE
    if params.prompt_template != "default":
        template = prompt_template.read(Path(params.prompt_template))
    if params.prompt_style == "chat":
        template = prompt_template.as_chat(template, tokenizer, base_model=reference)
    mlflow.log_text(template, store_names.PROMPT)
    return template


def read(source: dataset.DatasetSource, params: PrepareDataParams) -> dict[str, pandas.DataFrame]:
    """The user's rows: those to split under `train`, and their own `validation` or `test`."""
    columns = dataset.Columns(
        params.question_column, params.context_column, params.answer_column, params.database_column
    )
    given = dataset.read(source, columns=columns, seed=params.seed)
    if "train" not in given:
        raise UserError(
            f"dataset={source.location}: has files of {' and '.join(given)} alone; it needs rows to train on."
        )
    if params.validation_dataset:
        if "validation" in given:
            raise UserError(
                f"validation_dataset={params.validation_dataset}: dataset={source.location} has a validation "
                "file of its own; give one of them."
            )
        given["validation"] = dataset.read_file(
            Path(params.validation_dataset),
            columns=columns._replace(database=""),
            parameter="validation_dataset",
        )
    return given


def split(given: dict[str, pandas.DataFrame], params: PrepareDataParams) -> dict[str, pandas.DataFrame]:
    """Train, validation and test, whose test rows can be scored as the parameters promise."""
    own = {name: rows for name, rows in given.items() if name != "train"}
    parts = splits.split(
        given["train"], by=params.split_by, test_size=params.test_size, seed=params.seed, given=own
    )
    if params.database_column:
        databases.check_test_rows(parts["test"])
    return parts


def overlaps(given: dict[str, pandas.DataFrame], parts: dict[str, pandas.DataFrame]) -> dict[str, int]:
    """Say which rows of the user's own validation and test are in other splits too; as names of metrics."""
    found = {}
    for name, other in OVERLAPS:
        if name in given:
            found[f"overlap_{name}_{other}"] = splits.shared_rows(parts[name], parts[other])
            print(
                f"  {found[f'overlap_{name}_{other}']} of {len(parts[name])} {name} rows are in {other} too"
            )
    return found


def announce(base: base_model.BaseModel, source: dataset.DatasetSource) -> None:
    """Say first what `auto` means here, and what it downloads."""
    download = f", downloads {base.download_bytes / 2**30:.1f} GiB" if base.download_bytes else ""
    run_log.log_choices(
        device=describe_device(),
        base_model=f"{base.reference} ({base.reason}{download})",
        dataset=f"{source.name}{f'@{source.commit}' if source.commit else ''} ({source.reason})",
    )


def save(prepared: preparation.Prepared, described: DatasetManifest, source: dataset.DatasetSource) -> None:
    """Log the artifact `dataset/`, and how many rows it has."""
    with artifacts.logged_folder(store_names.DATASET) as folder:
        test = prepared.splits["test"]
        if source.kind == "sample":
            test = databases.build(test, folder, seed=described.seed)
        else:
            test = databases.copy(test, folder)
        splits = {**prepared.splits, "test": test}
        datasets.DatasetDict({name: rows for name, rows in splits.items() if len(rows)}).save_to_disk(folder)
        manifest.write(described, folder)
    mlflow.log_metrics(described.counts)


def log_rejected(rejected: pandas.DataFrame) -> None:
    """Log the rejected rows with their reasons, an object a line; bytes and other types as Python says."""
    cells = rejected.astype(object).where(rejected.notna(), None)
    lines = (json.dumps(row, default=str) for row in cells.to_dict("records"))
    mlflow.log_text("".join(f"{line}\n" for line in lines), store_names.REJECTED)


def show(prepared: preparation.Prepared, source: dataset.DatasetSource, described: DatasetManifest) -> None:
    """Log what a person looks at: the dataset, ten rows, the histogram of token lengths."""
    train = prepared.splits["train"].select_columns(list(dataset.COLUMNS)).to_pandas()
    log_dataset(train, source, described.dataset_digest)
    mlflow.log_table(train.head(10), "examples.json")
    mlflow.log_figure(
        figures.token_lengths(prepared.lengths, max_length=described.max_length), "token_lengths.png"
    )
    mlflow.log_metric("mean_tokens", float(prepared.lengths.mean()))
    print("  rows: " + ", ".join(f"{len(rows)} {name}" for name, rows in prepared.splits.items()))


def log_dataset(rows: pandas.DataFrame, source: dataset.DatasetSource, digest: str) -> None:
    """Log the rows as the run's dataset; MLflow keeps the first 36 characters of the digest."""
    origins = {
        "hub": lambda: HuggingFaceDatasetSource(
            source.location, config_name=source.config or None, split=source.split, revision=source.commit
        ),
        "file": lambda: source.location,
        "sample": lambda: CodeDatasetSource(
            {"module": source.location, "commit": project_source.git_commit()}
        ),
    }
    origin = origins[source.kind]()
    logged = mlflow.data.from_pandas(
        rows, source=origin, targets="answer", name=source.name, digest=digest[:36]
    )
    run_log.log_input(logged, context="training")


if __name__ == "__main__":
    step_run.run_step(PrepareDataParams, main, user_errors=(BaseModelError,))
