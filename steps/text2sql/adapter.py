"""The LoRA adapter on a loaded base model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from steps.text2sql import correction, manifest
from steps.text2sql.errors import UserError
from steps.text2sql.manifest import AdapterManifest

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"


class ParameterCount(NamedTuple):
    """Numbers of parameters; 4-bit ones are counted as what they stand for, tied ones once."""

    trainable: int
    all: int

    @property
    def frozen(self) -> int:
        """Those of the base."""
        return self.all - self.trainable

    @property
    def share(self) -> float:
        """Trainable ones of all, 0 to 1."""
        return self.trainable / self.all


def lora_config(
    *, r: int, alpha: float, dropout: float, target_modules: str, rank_stabilized: bool = False
) -> LoraConfig:
    """LoRA (arXiv 2106.09685) as peft takes it; `target_modules` is `all-linear` or a comma list.

    Its scale is alpha / r, `rank_stabilized` (rsLoRA, arXiv 2312.03732) alpha / sqrt(r).
    """
    modules = target_modules if target_modules == "all-linear" else target_modules.split(",")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rank_stabilized,
        target_modules=modules,
        bias="none",
    )


def attach(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Put a new adapter on a base, whose own parameters are frozen and keep their dtype.

    Raises:
        UserError: modules that the base does not have, or an output layer that is tied to the embeddings.
    """
    if isinstance(config.target_modules, set):
        check_modules(model, config.target_modules)
    model.requires_grad_(False)
    adapted = get_peft_model(model, config)
    # peft keeps a set, whose order differs from process to process.
    adapted.peft_config[correction.TRAINED].target_modules = sorted(
        adapted.peft_config[correction.TRAINED].target_modules
    )
    return adapted


def size(model: PreTrainedModel, config: LoraConfig) -> int:
    """Parameters that `attach` would add: r for every input and output of an adapted layer.

    Raises:
        UserError: as `attach`.
    """
    if isinstance(config.target_modules, set):
        check_modules(model, config.target_modules)
    head = model.get_output_embeddings()
    layers = {name.split(".")[-1]: 0 for name, module in _linear(model) if module is not head}
    chosen = config.target_modules if isinstance(config.target_modules, set) else layers
    return sum(
        config.r * _features(module) for name, module in _linear(model) if name.split(".")[-1] in chosen
    )


def _features(module: torch.nn.Module) -> int:
    """Inputs and outputs together; 4-bit weights are packed, and GPT-2's layers do not count theirs."""
    is_transposed = isinstance(module, Conv1D)
    return sum(module.weight.shape) if is_transposed else module.in_features + module.out_features


def _linear(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    linear = (torch.nn.Linear, Conv1D)
    return ((name, module) for name, module in model.named_modules() if isinstance(module, linear))


def check_modules(model: PreTrainedModel, names: set[str]) -> None:
    """Refuse module names that LoRA cannot be put on; see `attach`."""
    linear = {name.split(".")[-1] for name, _ in _linear(model)}
    unknown = sorted(names - linear)
    problem = f"target_modules={','.join(sorted(names))}"
    if unknown:
        raise UserError(
            f"{problem}: this base has no linear layers {', '.join(unknown)}; "
            f"it has: {', '.join(sorted(linear))}."
        )
    if "lm_head" in names and model.config.tie_word_embeddings:
        raise UserError(
            f"{problem}: lm_head is tied to the embeddings in this base, so an adapter on it would carry the "
            "whole layer and merge wrongly; leave lm_head out."
        )


def decoder_layers(model: PeftModel) -> torch.nn.ModuleList:
    """The layers of the base, in the order of computation: the outermost list of as many modules."""
    base = model.get_base_model()
    lists = (module for module in base.modules() if isinstance(module, torch.nn.ModuleList))
    return next(found for found in lists if len(found) == base.config.num_hidden_layers)


def count_parameters(model: PeftModel) -> ParameterCount:
    """Count with peft, which knows how 4-bit weights are packed."""
    return ParameterCount(*model.get_nb_trainable_parameters())


def own(model: PeftModel) -> Iterator[torch.nn.Parameter]:
    """All parameters that are not the base's, trained or not."""
    return (parameter for name, parameter in model.named_parameters() if ".lora_" in name)


def settings(folder: Path) -> dict[str, Any]:
    """The LoRA settings of a saved adapter, as peft wrote them."""
    return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))


def save(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, described: AdapterManifest, folder: Path
) -> None:
    """Write adapter (safetensors), tokenizer and manifest into a folder, and nothing of the base.

    The tokenizer is written without the padding and truncation that it may have from training.
    """
    # Otherwise a path of this machine; register and the served model read the manifest.
    model.peft_config[correction.TRAINED].base_model_name_or_path = described.of_dataset.base_model
    model.save_pretrained(
        folder, safe_serialization=True, save_embedding_layers=False, selected_adapters=[correction.TRAINED]
    )
    (folder / "README.md").unlink()  # peft's card is an empty form
    if correction.is_in(model):
        save_file(correction.joined_weights(model), folder / WEIGHTS, metadata={"format": "pt"})
        correction.joined_config(model).save_pretrained(folder)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    manifest.write(described, folder)
