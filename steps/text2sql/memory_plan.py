"""How a training uses the memory that there is: tokens at once, recomputation, and how weights are held."""

import math
from dataclasses import dataclass

import psutil
import torch
from bitsandbytes.nn import Params4bit
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from steps.text2sql.errors import UserError
from steps.text2sql.packing import SHAPE_TOKENS

# More tokens at once make no GPU faster: its matrix units are full from about a thousand on.
MOST_TOKENS = 8192
ENOUGH_TOKENS = 1024
# What of the free memory is planned with; the rest is for fragments and other processes.
USED_SHARE = {"cuda": 0.85, "cpu": 0.5}
# Buffers of the libraries.
WORKSPACE_BYTES = 2**28
# PyTorch keeps more than the tensors that a backward pass needs: 5.6 MB a token where they are 4.5
# (Mistral-7B on an H100).
OVERHEAD = 1.25
# This process before it loads a base, which counts where the GPU has no memory of its own.
PROCESS_BYTES = {"cuda": 0, "cpu": int(0.7 * 2**30)}
# (dequantize, recompute) in the order of speed, by gradient_checkpointing.
WAYS = {
    "auto": [(True, False), (False, False), (False, True)],
    "yes": [(True, True), (False, True)],
    "no": [(True, False), (False, False)],
}
# What models call the width of their MLP; GPT-2 does not say it where it is four times the hidden one.
WIDTH_NAMES = ("intermediate_size", "ffn_dim", "n_inner")
# A trainable fp32 parameter with its gradient, AdamW's two moments and the 16-bit copy of autocast.
TRAINABLE_BYTES = 18


def attention_sizes(config: PreTrainedConfig) -> tuple[int, int]:
    """Numbers of a token's query, and of its key or value, in one layer; all heads together."""
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return head_size * heads, head_size * (getattr(config, "num_key_value_heads", None) or heads)


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder as memory depends on them; `item` is the bytes of one activation."""

    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    vocabulary: int
    item: int

    @classmethod
    def of(cls, config: PreTrainedConfig, dtype: torch.dtype) -> "Shape":
        """Read a configuration of transformers."""
        hidden, (queries, keys) = config.hidden_size, attention_sizes(config)
        widths = (getattr(config, name, None) for name in WIDTH_NAMES)
        return cls(
            layers=config.num_hidden_layers,
            hidden=hidden,
            intermediate=next(filter(None, widths), 4 * hidden),
            queries=queries,
            keys=keys,
            vocabulary=config.vocab_size,
            item=dtype.itemsize,
        )

    @property
    def layer_bytes(self) -> int:
        """What the backward pass of one layer needs, a token: inputs of norms and linear layers, q, k, v."""
        values = 4 * self.hidden + 2 * self.queries + 2 * self.keys + 3 * self.intermediate
        return int(values * self.item * OVERHEAD)

    def token_bytes(self, *, recompute: bool) -> int:
        """Activations a token; with recomputation each layer keeps its input alone, and one is whole."""
        # Logits in the compute type and fp32 with gradients, for the half that has room for answers.
        logits = self.vocabulary * (2 * self.item + 8) // 2
        if recompute:
            return self.layers * self.hidden * self.item + 2 * self.layer_bytes + logits
        return self.layers * self.layer_bytes + logits


@dataclass(frozen=True)
class Plan:
    """`tokens` is the capacity of a micro-batch; `dequantize` holds 4-bit weights as what they stand for."""

    tokens: int
    recompute: bool
    dequantize: bool
    reason: str

    def halved(self, *, largest: int) -> "Plan":
        """Half the tokens of the largest micro-batch, after memory ran out."""
        return Plan(min(self.tokens, largest) // 2, self.recompute, self.dequantize, self.reason)


def free_bytes(device: str, *, processes: int = 1) -> int:
    """Memory that this process, one of so many on this machine, may still take; on CUDA under the cap of
    `torch.cuda.set_per_process_memory_fraction`."""
    if device == "cpu":
        return psutil.virtual_memory().available // processes
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    cap = int(total * torch.cuda.get_per_process_memory_fraction())
    return min(free + reserved, cap) - torch.cuda.memory_allocated()


def four_bit_parameters(model: PreTrainedModel) -> int:
    """Weights that are held in 4 bits, counted as what they stand for."""
    return sum(
        module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, nn.Linear) and isinstance(module.weight, Params4bit)
    )


def make(
    shape: Shape,
    *,
    device: str,
    free: int,
    trainable: int,
    four_bit: int,
    longest: int,
    step_tokens: int,
    gradient_checkpointing: str,
    micro_batch_tokens: str | int = "auto",
    may_dequantize: bool = True,
) -> Plan:
    """The fastest way to train that fits.

    Without recomputation where a micro-batch of `ENOUGH_TOKENS` (or the whole step, if that is less) fits,
    and with the weights held dequantized where that fits too: the same values, dequantized once.

    Args:
        free: bytes, with the base loaded and nothing else.
        trainable: parameters of the adapter.
        four_bit: parameters that are held in 4 bits.
        longest: tokens of the longest row, which is never cut.
        step_tokens: tokens of a usual optimizer step in one process.
        gradient_checkpointing: auto, yes or no.
        micro_batch_tokens: auto, or how many tokens to take at once if they fit.
        may_dequantize: False where dequantized weights would be slow to come by.

    Raises:
        UserError: the longest row does not fit in any way.
    """
    budget = int(free * USED_SHARE[device]) - WORKSPACE_BYTES - trainable * TRAINABLE_BYTES
    unpacked = _unpacked_bytes(four_bit, shape)  # else one layer's worth is dequantized at a time
    filled_up_to = SHAPE_TOKENS if device == "cuda" else 1
    longest = -(-longest // filled_up_to) * filled_up_to
    wanted = max(longest, min(step_tokens, ENOUGH_TOKENS))
    for dequantize, recompute in WAYS[gradient_checkpointing]:
        room = budget - (unpacked if dequantize else shape.hidden * shape.intermediate * shape.item)
        tokens = room // shape.token_bytes(recompute=recompute) // filled_up_to * filled_up_to
        is_choice = gradient_checkpointing == "auto" and not recompute
        is_open = not dequantize or (four_bit and may_dequantize)
        if is_open and tokens >= (wanted if is_choice else longest):
            most = MOST_TOKENS if micro_batch_tokens == "auto" else int(micro_batch_tokens)
            return Plan(
                max(longest, min(tokens, most)),
                recompute,
                dequantize,
                _reason(free, recompute, gradient_checkpointing),
            )
    raise UserError(
        f"{free / 2**30:.1f} GiB of free memory do not hold the longest row of {longest} tokens in training; "
        "prepare the data with a smaller max_length, or give gradient_checkpointing=auto, a smaller lora_r "
        "or a smaller base_model."
    )


def peak_bytes(
    plan: Plan,
    shape: Shape,
    *,
    device: str,
    weights: int,
    four_bit: int,
    trainable: int,
    longest: int,
    step_tokens: float,
) -> int:
    """What the steps of a training take at their peak, `weights` bytes of the base among it; the arithmetic
    of `make`."""
    unpacked = _unpacked_bytes(four_bit, shape) if plan.dequantize else 0
    tokens = min(plan.tokens, max(longest, int(step_tokens)))
    activations = tokens * shape.token_bytes(recompute=plan.recompute)
    held = weights + unpacked + trainable * TRAINABLE_BYTES
    return held + activations + WORKSPACE_BYTES + PROCESS_BYTES[device]


def _unpacked_bytes(four_bit: int, shape: Shape) -> int:
    """What dequantizing adds: a weight is held in 4 bits and 0.127 of scales before."""
    return int(four_bit * (shape.item - 0.516))


def _reason(free: int, recompute: bool, gradient_checkpointing: str) -> str:
    why = "short" if gradient_checkpointing == "auto" else f"gradient_checkpointing={gradient_checkpointing}"
    return f"{free / 2**30:.1f} GiB free" + (f", {why}: activations are recomputed" if recompute else "")


def describe(plan: Plan, *, step_tokens: float, device: str) -> str:
    """The plan in a line."""
    held = "weights dequantized once" if plan.dequantize else "weights as loaded"
    count = math.ceil(step_tokens / plan.tokens)
    return (
        f"{plan.tokens} tokens at once (about {count} micro-batch{'es' if count > 1 else ''} a step), "
        f"{held}, {plan.reason} on the {'GPU' if device == 'cuda' else 'CPU'}"
    )
