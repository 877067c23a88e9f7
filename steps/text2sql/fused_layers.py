"""Layers with LoRA that take fewer launches and passes over memory in training."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import linear

from steps.text2sql import correction, fused_norms, side_by_side
from steps.text2sql.correction import TRAINED

# Up to so many tokens a second stream gains: of Mistral-7B on an H200 2 % with 2,048, and none with 4,096.
SMALL_TOKENS = 2048
# What models call layers of one parent that read the same input.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse(model: PeftModel) -> None:
    """Compute layers that way where gradients are wanted; elsewhere they are as before, as they are served.

    Adapted layers are those without dropout. Compiled layers are fused by the compiler.
    """
    groups = [SameInput(layers) for layers in _groups(model)]
    model.get_base_model().register_forward_pre_hook(lambda *_: cast(groups))
    for group in groups:
        for i, layer in enumerate(group.layers):
            layer.forward = partial(group.forward, i)
    fused_norms.fuse(model)


class SameInput:
    """Adapted layers of one parent that read the same input: the first that is called computes all.

    `down` (ranks of all, inputs) and `ups` (outputs, rank) are their A and B in the type that is computed in,
    each with those of a correction behind them.
    """

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        self.layers = layers
        self.bases = [layer.base_layer for layer in layers]
        self.scale = layers[0].scaling[TRAINED]
        self.own = [one for layer in layers for one in _trained(layer)]
        self.ranks = [sum(one.out_features for one in layer.lora_A.values()) for layer in layers]
        self.trained_ranks = [layer.lora_A[TRAINED].out_features for layer in layers]
        self.down: torch.Tensor | None = None
        self.ups: list[torch.Tensor] = []
        self.copies: list[torch.Tensor] = []
        self.usual = [layer.forward for layer in layers]
        self.read: torch.Tensor | None = None
        self.waiting: dict[int, torch.Tensor] = {}
        self.blocks = list(_blocks(self.bases))
        for block in self.blocks:
            side_by_side.lay(block)

    @torch.no_grad()
    def take(self, dtype: torch.dtype) -> None:
        """Take all factors over in a type; those of a correction do not change afterwards.

        `copies` are where those that are trained, `own`, are taken over to from now on.
        """
        self.down = torch.cat([one for layer in self.layers for one in _weights(layer.lora_A)]).to(dtype)
        self.ups = [torch.cat(_weights(layer.lora_B), dim=1).to(dtype) for layer in self.layers]
        parts = zip(self.down.split(self.ranks), self.ups, self.trained_ranks, strict=True)
        self.copies = [part for down, up, rank in parts for part in (down[:rank], up[:, :rank])]

    def forward(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """Output of layer i."""
        if not torch.is_grad_enabled():
            return self.usual[i](x)
        if x is not self.read or i not in self.waiting:
            self.read, self.waiting = x, dict(enumerate(self._computed(x)))
        out = self.waiting.pop(i)
        if not self.waiting:
            self.read = None
        return out

    def _computed(self, x: torch.Tensor) -> list[torch.Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            outs = AdaptedLinears.apply(x.to(self.down.dtype).flatten(0, -2), self, *self.own)
        return [out.unflatten(0, x.shape[:-1]) for out in outs]


def cast(groups: Sequence[SameInput]) -> None:
    """Take over the values that the optimizer left, of all layers at once, for a pass with gradients."""
    if not torch.is_grad_enabled() or not groups:
        return
    device, usual = groups[0].own[0].device.type, groups[0].own[0].dtype
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else usual
    for group in groups:
        if group.down is None or group.down.dtype != dtype:
            group.take(dtype)
    copies = [one for group in groups for one in group.copies]
    torch._foreach_copy_(copies, [one.detach() for group in groups for one in group.own])


class AdaptedLinears(torch.autograd.Function):
    """y_i = x W_i^T + b_i + scale (x A_i^T) B_i^T for layers i of one input; W_i and b_i have no gradient.

    LoRA (arXiv 2106.09685) as peft computes it, but that sums are part of a product instead of passes of
    their own, and that products by all A_i are one. Gradients of `own`, A_i and B_i in turns, are added to
    those that they have. Directions of a correction behind the trained ones have none. A weight of 4 bits is
    dequantized once for each pass, as in bitsandbytes.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, group: SameInput, *own: nn.Parameter
    ) -> tuple[torch.Tensor, ...]:
        """Outputs (tokens, outputs) for x (tokens, inputs), in its type, which is that of the copies."""
        with _beside(x):
            hidden = x @ group.down.T
        outs = list(_base_outputs(group, x))
        _wait_beside(x)
        ctx.save_for_backward(x, hidden)
        ctx.group = group
        parts = zip(outs, hidden.split(group.ranks, dim=1), group.ups, strict=True)
        return tuple(out.addmm_(part, up.T, alpha=group.scale) for out, part, up in parts)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradient of x; those of `own` where they have none yet."""
        group, (x, hidden) = ctx.group, ctx.saved_tensors
        with _beside(x):
            of_hidden = torch.empty_like(hidden)
            for part, *product in zip(of_hidden.split(group.ranks, dim=1), gradients, group.ups, strict=True):
                torch.mm(*product, out=part)
            own = _of_factors(group, x, hidden, gradients, of_hidden)
        of_x = _of_input(group, gradients) if ctx.needs_input_grad[0] else None
        _wait_beside(x)
        if of_x is not None:
            of_x.addmm_(of_hidden, group.down, alpha=group.scale)
        return of_x, None, *own


def _of_factors(
    group: SameInput,
    x: torch.Tensor,
    hidden: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    of_hidden: torch.Tensor,
) -> list[torch.Tensor | None]:
    """Gradients of A and B that are trained, for autograd to keep where they are not added already."""
    downs = (of_hidden.T @ x).split(group.ranks)
    parts = zip(downs, gradients, hidden.split(group.ranks, dim=1), group.trained_ranks, strict=True)
    found = [part for down, y, h, rank in parts for part in (down[:rank], y.T @ h[:, :rank])]
    return [_added(*pair, group.scale) for pair in zip(group.own, found, strict=True)]


def _of_input(group: SameInput, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Gradient of x by way of the base's weights, summed in the products."""
    of_x = None
    for gradient, base in zip(gradients, group.bases, strict=True):
        weight = _weight(base, gradient.dtype)
        of_x = gradient @ weight if of_x is None else of_x.addmm_(gradient, weight)
    return of_x


def _beside(x: torch.Tensor) -> AbstractContextManager[None]:
    """Compute LoRA's small products on a stream of their own, where x is small: those of the base then leave
    processors idle. Memory is safe, since what is on either stream waits for all that was on the other."""
    if not _is_small(x):
        return nullcontext()
    side = _side_stream(x.device.index)
    side.wait_stream(torch.cuda.current_stream(x.device))
    return torch.cuda.stream(side)


def _wait_beside(x: torch.Tensor) -> None:
    if _is_small(x):
        torch.cuda.current_stream(x.device).wait_stream(_side_stream(x.device.index))


def _is_small(x: torch.Tensor) -> bool:
    return x.is_cuda and len(x) <= SMALL_TOKENS


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def _base_outputs(group: SameInput, x: torch.Tensor) -> Iterator[torch.Tensor]:
    for block in group.blocks:
        weight = side_by_side.seen_as_one(block)
        biases = [base.bias.to(x.dtype) for base in block if base.bias is not None]
        if weight is not None and len(biases) in (0, len(block)):
            out = linear(x, weight.to(x.dtype), torch.cat(biases) if biases else None)
            yield from out.split([base.out_features for base in block], dim=1)
            continue
        for base in block:
            yield linear(x, _weight(base, x.dtype), None if base.bias is None else base.bias.to(x.dtype))


def _weight(base: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    if not isinstance(base, Linear4bit):
        return base.weight.to(dtype)
    # A divided layer's weight has lost its state; the layer keeps it too.
    return dequantize_4bit(base.weight, base.quant_state or base.weight.quant_state).to(dtype)


def _added(parameter: nn.Parameter, gradient: torch.Tensor, scale: float) -> torch.Tensor | None:
    """A gradient for autograd to keep, or None where it is added to the one that there is."""
    if parameter.grad is None:
        return gradient.to(parameter.dtype) * scale
    parameter.grad.add_(gradient, alpha=scale)
    return None


def _is_plain(module: nn.Module) -> bool:
    return (
        isinstance(module, LoraLayer)
        and type(module.base_layer) in (nn.Linear, Linear4bit)
        and module.lora_A.keys() <= {TRAINED, correction.NAME}
        and not module.lora_variant
        and module.lora_B[TRAINED].bias is None
        and isinstance(module.lora_dropout[TRAINED], nn.Identity)
    )


def _trained(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight


def _weights(factors: nn.ModuleDict) -> list[torch.Tensor]:
    return [one.weight for one in factors.values()]


def _groups(model: PeftModel) -> Iterator[list[LoraLayer]]:
    """Layers to compute together; most are alone."""
    for parent in model.modules():
        left = {name: child for name, child in parent.named_children() if _is_plain(child)}
        for names in SAME_INPUT:
            group = [left[name] for name in names if name in left]
            if len({(one.base_layer.in_features, one.scaling[TRAINED]) for one in group}) == 1:
                yield group
                left = {name: child for name, child in left.items() if child not in group}
        yield from ([layer] for layer in left.values())


def _blocks(bases: Sequence[nn.Linear]) -> Iterator[list[nn.Linear]]:
    """Layers to compute in one product: those of few outputs, such as keys and values that several query
    heads share. Alone they do not fill a GPU."""
    for is_narrow, some in itertools.groupby(bases, lambda base: base.out_features < base.in_features):
        block = list(some)
        yield from [block] if is_narrow else ([base] for base in block)
