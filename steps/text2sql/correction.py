"""A frozen low-rank term beside the adapter that takes back most of what 4-bit weights change in a base.

Quantizing adds an error E to each adapted layer's weights. Of all terms of its rank the correction C is the
one for which the layer's outputs change least: with M the second moments of the layer's inputs, M = L L^T,
the squared error |(E - C) L|^2 is least where C L is E L cut to its largest directions (QERA,
arXiv 2410.06040; any root L will do). While training it is an adapter of its own, which is not trained;
saved, the two are one adapter of twice the rank, the trained directions first.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from transformers import PreTrainedModel

from steps.text2sql import packed_attention, packing
from steps.text2sql.packing import Row
from steps.text2sql.sql_model import pick_device

NAME, TRAINED = "correction", "default"
# Rows whose tokens the second moments are taken of: with twice as many the error on others is the same.
ROWS = 16
# Of the mean of the moments' diagonal: tokens may be fewer than inputs, and a few inputs are very large.
DAMPING = 1e-2
POWER_ITERATIONS = 8
# `auto`: measured at 1.35e8 parameters. Larger bases lose less to 4 bits, and take longer to correct.
MOST_PARAMETERS = 10**9


def is_due(given: str, *, quantization: str, parameters: int) -> bool:
    """Whether a base of so many parameters is corrected: as given, or with `auto` where it is small and nf4.

    It does not depend on the machine, so that a training goes on anywhere.
    """
    return given == "yes" or (given == "auto" and quantization == "nf4" and parameters <= MOST_PARAMETERS)


def add(model: PeftModel, original: PreTrainedModel, rows: datasets.Dataset) -> float:
    """Give an adapter on a base that was quantized its correction, of the same rank and on the same layers.

    `original` is the same base, not quantized, on the same device. `rows` are tokenized as for training; the
    first `ROWS` are read. Gives the share of the squared error of the layers' outputs that is left, the mean
    of all layers that have one.
    """
    attach(model)
    left: list[torch.Tensor] = []
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    hooks = [
        layer.register_forward_pre_hook(partial(_correct, published=original.get_submodule(name), left=left))
        for name, layer in layers.items()
    ]
    _read(model, rows.select(range(min(ROWS, len(rows)))).to_list())
    for hook in hooks:
        hook.remove()
    return torch.stack(left).mean().item() if left else 0.0


def attach(model: PeftModel) -> None:
    """Give an adapter a correction that is still to be set, by `add` or `load_weights`."""
    model.add_adapter(NAME, dataclasses.replace(model.peft_config[TRAINED], lora_dropout=0.0))
    model.base_model.set_adapter([TRAINED, NAME])
    model.set_requires_grad(NAME, False)


def is_in(model: PeftModel) -> bool:
    """Whether an adapter has a correction."""
    return NAME in model.peft_config


def joined_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """Adapter and correction as one adapter's weights, named as peft saves them."""
    trained, fixed = (get_peft_model_state_dict(model, adapter_name=name) for name in (TRAINED, NAME))
    return {name: torch.cat((one, fixed[name]), _rank_side(name)) for name, one in trained.items()}


def joined_config(model: PeftModel) -> LoraConfig:
    """Settings of that adapter: twice the rank, and the same scale."""
    lora = model.peft_config[TRAINED]
    alpha = lora.lora_alpha * (2**0.5 if lora.use_rslora else 2)
    config = dataclasses.replace(lora, r=2 * lora.r, lora_alpha=alpha, inference_mode=True)
    config.target_modules = sorted(config.target_modules)  # a set has another order in each process
    return config


def load_weights(model: PeftModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Put an adapter's weights into a model with a correction, where they are joined, or without.

    Raises:
        RuntimeError: the shapes differ.
    """
    if not is_in(model):
        set_peft_model_state_dict(model, dict(weights))
        return
    rank = model.peft_config[TRAINED].r
    for name, start in ((TRAINED, 0), (NAME, rank)):
        part = {key: one.narrow(_rank_side(key), start, rank) for key, one in weights.items()}
        set_peft_model_state_dict(model, part, adapter_name=name)


def _rank_side(name: str) -> int:
    return 1 if ".lora_B." in name else 0


def _read(model: PeftModel, rows: Sequence[Row]) -> None:
    """Compute rows as training does, all in one pack."""
    device, dtype = pick_device()
    usual = model.config._attn_implementation
    model.set_attn_implementation(packed_attention.NAME)
    lengths = [len(row["input_ids"]) for row in rows]
    (pack,) = packing.pack(rows, capacity=sum(lengths))
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        packed_attention.summed_loss(model, pack.to(device), longest=max(lengths))
    model.set_attn_implementation(usual)


def _correct(
    layer: LoraLayer,
    given: tuple[torch.Tensor, ...],
    *,
    published: torch.nn.Module,
    left: list[torch.Tensor],
) -> None:
    """Set a layer's correction by its inputs; what is left of the error goes to `left`."""
    down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    with torch.autocast(down.device.type, enabled=False):
        quantized = dequantize_module_weight(layer.base_layer).detach().float()
        error = published.weight.detach().float() - quantized
        if not error.any():  # bitsandbytes leaves the head of a model as it is
            return
        found = least(error, given[0].flatten(0, -2).float(), rank=len(down))
    directions = len(found[0])  # a small layer has fewer than the rank; B is zero for the others
    down.data[:directions].copy_(found[0])
    up.data[:, :directions].copy_(found[1] / layer.scaling[NAME])
    left.append(found[2])


def least(
    error: torch.Tensor, inputs: torch.Tensor, *, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors (rank, inputs) and (outputs, rank) of the C nearest to an error, (outputs, inputs), for inputs
    (tokens, inputs), and the share of the squared error that it leaves."""
    moments = inputs.T @ inputs / len(inputs)
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    root = torch.linalg.cholesky(moments)
    weighted = error @ root
    searched = min(2 * rank, *weighted.shape)  # with no more than `rank` the last directions are not found
    left, sizes, right = (
        one[..., :rank] for one in torch.svd_lowrank(weighted, q=searched, niter=POWER_ITERATIONS)
    )
    down = torch.linalg.solve_triangular(root, sizes[:, None] * right.T, upper=False, left=False)
    return down, left, 1 - sizes.square().sum() / weighted.square().sum()
