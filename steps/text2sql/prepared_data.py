"""What prepare_data made, as a training takes it."""

from contextlib import AbstractContextManager
from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerFast

from steps.text2sql import artifacts, collectives, manifest
from steps.text2sql.errors import UserError
from steps.text2sql.manifest import DatasetManifest
from steps.text2sql.sql_model import load_base_tokenizer
from steps.text2sql.tokenization import fingerprint


def load(dataset_uri: str) -> tuple[DatasetManifest, datasets.DatasetDict]:
    """The dataset and what its manifest says; fetched once a machine."""

    def download() -> AbstractContextManager[Path]:
        return artifacts.downloaded(dataset_uri, parameter="dataset_uri", needs=manifest.FILE)

    with collectives.once_a_machine(download) as folder:
        described = manifest.read(DatasetManifest, folder, source=f"dataset_uri={dataset_uri}")
        return described, splits_in(folder)


def splits_in(folder: Path) -> datasets.DatasetDict:
    """The splits of a dataset of prepare_data, `validation` among them even where it has no rows.

    datasets writes a split without rows but cannot read it, so that none is written.
    """
    found = datasets.load_from_disk(folder, keep_in_memory=True)
    return datasets.DatasetDict({"validation": found["train"].select([]), **found})


def load_tokenizer(described: DatasetManifest, dataset_uri: str) -> PreTrainedTokenizerFast:
    """Tokenizer of the base, which must be the one that the dataset was made with."""
    tokenizer = load_base_tokenizer(described.base_model)
    if fingerprint(tokenizer) != described.tokenizer_fingerprint:
        raise UserError(
            f"dataset_uri={dataset_uri}: was tokenized with another tokenizer than base model "
            f"{described.base_model} has now; run prepare_data again."
        )
    return tokenizer
