"""What a dataset and an adapter were made of, as JSON beside them: later steps read it and guess nothing."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from steps.text2sql.errors import UserError

FILE = "manifest.json"
AnyManifest = TypeVar("AnyManifest")


@dataclass(frozen=True)
class DatasetManifest:
    """Everything that prepare_data resolved. `counts` are rows by split and by reason of rejection.

    `prompt_template` is what `sql_model.render_prompt` takes in this style: a chat's has its control tokens.
    """

    base_model: str
    base_commit: str
    base_license: str
    dataset: str
    dataset_source: str
    dataset_commit: str
    dataset_config: str
    dataset_split: str
    dataset_digest: str
    tokenizer_fingerprint: str
    prompt_template: str
    prompt_style: str
    max_length: int
    split_by: str
    test_size: float
    seed: int
    counts: dict[str, int]


@dataclass(frozen=True)
class AdapterManifest:
    """What an adapter belongs to: the base as it was quantized, after how many steps, on which rows."""

    quantization: str
    global_step: int
    max_steps: int
    dataset: dict[str, Any]

    @property
    def of_dataset(self) -> DatasetManifest:
        """Manifest of the dataset that the adapter was trained on."""
        return DatasetManifest(**self.dataset)


def write(manifest: Any, folder: Path) -> None:
    """Write a manifest into a folder."""
    (folder / FILE).write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n", encoding="utf-8")


def read(kind: type[AnyManifest], folder: Path, *, source: str) -> AnyManifest:
    """Read a folder's manifest; `source` is the parameter and value that the folder came from.

    Raises:
        UserError: there is none, or it is one of another kind.
    """
    try:
        return kind(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        wanted = "a dataset of prepare_data" if kind is DatasetManifest else "an adapter of train"
        raise UserError(f"{source}: is not {wanted}: {error}") from error
