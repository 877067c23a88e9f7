"""A merged model: the base as it was quantized, its weights whole again, with the adapter added into them.

Merging into 4-bit weights would round the sum to 4 bits again; merging into the base as it was published
would leave out the rounding that the adapter was trained with.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from steps.text2sql import base_model
from steps.text2sql.adapter import settings
from steps.text2sql.errors import UserError
from steps.text2sql.manifest import AdapterManifest
from steps.text2sql.model_card import FILE as CARD
from steps.text2sql.sql_model import encode_prompts, load_base
from steps.text2sql.tokenization import for_filled_prompts

PROMPT_TEMPLATE = "prompt_template.txt"
LICENSE = "LICENSE"
MERGED = """
## This folder

Base and adapter merged, in {dtype}; the licence of the base is in `LICENSE`. Fill `{{context}}` and
`{{question}}` in `prompt_template.txt`, ask greedily (temperature 0), and take what comes before EOS.
"""
# Tokenizer, configuration and the like beside the weights.
OTHER_FILES_BYTES = 64 * 2**20
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_dtype(reference: str, dtype: str) -> torch.dtype:
    """The dtype that `dtype` names; `auto` is that of the base's own weights, or bfloat16."""
    return DTYPES[dtype] if dtype != "auto" else base_model.config(reference).dtype or torch.bfloat16


def check_mergeable(adapter: Path, reference: str) -> None:
    """Refuse an adapter that cannot be added into the weights of its base alone.

    Raises:
        UserError: it is on an output layer that is tied to the embeddings, or carries whole layers.
    """
    lora = settings(adapter)
    adapted = {name.split(".")[-1] for name in lora["target_modules"]}
    if "lm_head" in adapted and base_model.config(reference).tie_word_embeddings:
        raise UserError(
            f"base_model={reference}: its lm_head is tied to the embeddings and this adapter is on lm_head: "
            "merging would change the embeddings too. Train without lm_head in target_modules."
        )
    if lora["modules_to_save"]:
        raise UserError(
            f"base_model={reference}: the adapter replaces whole layers, {lora['modules_to_save']}"
        )


def check_disk(output: Path, reference: str, dtype: torch.dtype) -> None:
    """Refuse an output folder on a disk that is too small for the merged model.

    Raises:
        UserError: naming what is needed and what there is.
    """
    base = base_model.skeleton(reference)
    weights = sum(parameter.numel() for parameter in base.parameters()) * dtype.itemsize
    needed, free = weights + OTHER_FILES_BYTES, shutil.disk_usage(output.parent).free
    if needed > free:
        raise UserError(
            f"output={output}: the merged model needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
            "are free there; give a folder on another disk."
        )


@contextmanager
def made_at_once(output: Path) -> Iterator[Path]:
    """A folder beside `output`, not made yet, that is moved there when the block ends well, else removed.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        work = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-")
    except OSError as error:
        raise UserError(f"output={output}: cannot be written: {error}") from error
    with work:
        folder = Path(work.name) / "merged"
        yield folder
        try:
            folder.rename(output)
        except OSError as error:
            raise UserError(f"output={output}: cannot be written: {error}") from error


def merge(adapter: Path, reference: str, quantization: str, dtype: torch.dtype) -> PreTrainedModel:
    """Base with the adapter of a folder added into its weights, in a dtype.

    The sum is rounded once, to that dtype or before to the one that this device computes in.
    """
    base = load_base(reference, quantization)
    if quantization != "none":
        base = base.dequantize()
    if dtype == torch.float32:
        base = base.to(dtype)
    return PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True).to(dtype)


def write(
    package: Path, adapter: Path, described: AdapterManifest, *, dtype: torch.dtype, folder: Path
) -> None:
    """Merge, and write what Hugging Face tools expect: safetensors, tokenizer, EOS, licence and card.

    `package` is the registered one, `adapter` the folder of its adapter.
    """
    source = described.of_dataset
    model = merge(adapter, source.base_model, described.quantization, dtype)
    model.generation_config = GenerationConfig.from_pretrained(package)
    model.save_pretrained(folder)
    for weights in folder.glob(
        "*.safetensors"
    ):  # written for their owner alone, but an engine is another user
        weights.chmod((folder / "config.json").stat().st_mode)
    tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False)
    for_filled_prompts(tokenizer, source.prompt_style).save_pretrained(folder)
    (folder / PROMPT_TEMPLATE).write_text(source.prompt_template, encoding="utf-8")
    (folder / LICENSE).write_text(source.base_license, encoding="utf-8")
    card = (package / CARD).read_text(encoding="utf-8")
    (folder / CARD).write_text(
        card + MERGED.format(dtype=str(dtype).removeprefix("torch.")), encoding="utf-8"
    )


def next_token_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> torch.Tensor:
    """Logits of the token after each prompt: (prompts, vocabulary), fp32, on the CPU."""
    rows = []
    with torch.inference_mode():
        for ids in encode_prompts(tokenizer, prompts):
            logits = model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=1).logits
            rows.append(logits[0, -1].float().cpu())
    return torch.stack(rows)
