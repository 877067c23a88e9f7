"""Layers that take fewer launches and passes over memory in training: LoRA, and RMS norms."""

from collections.abc import Callable
from functools import partial

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import linear, rms_norm

from steps.text2sql import correction
from steps.text2sql.correction import TRAINED

# Of the largest values of a norm's outputs, which are rounded once less here.
ROUNDING = 2e-2


def fuse(model: PeftModel) -> None:
    """Compute layers that way where gradients are wanted; elsewhere they are as before, as they are served.

    Adapted layers are those without dropout. Norms are those that do what `torch.nn.functional.rms_norm`
    does. Compiled layers are fused by the compiler.
    """
    factors = Factors([module for module in model.modules() if _is_plain(module)])
    model.get_base_model().register_forward_pre_hook(lambda *_: factors.cast())
    for i, layer in enumerate(factors.layers):
        layer.forward = partial(_adapted, layer, layer.forward, factors, i)
    for norm in filter(_is_rms_norm, model.modules()):
        norm.forward = partial(_normed, norm, norm.forward)


class Factors:
    """A (rank, inputs) and B (outputs, rank) of all layers in the type that is computed in, each with those
    of a correction behind them; cast at once before each forward pass."""

    def __init__(self, layers: list[LoraLayer]) -> None:
        self.layers = layers
        self.now: list[torch.Tensor] = []
        self.trained: list[torch.Tensor] = []

    def cast(self) -> None:
        """Take over the values that the optimizer left."""
        if not torch.is_grad_enabled() or not self.layers:
            return
        own = [one.detach() for layer in self.layers for one in _trained(layer)]
        device = own[0].device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else own[0].dtype
        if not self.now or self.now[0].dtype != dtype:
            # Of a correction, which does not change, the values are taken here.
            self.now = [one.detach().to(dtype) for layer in self.layers for one in _joined(layer)]
            self.trained = [now[: len(one), : one.shape[1]] for now, one in zip(self.now, own, strict=True)]
        torch._foreach_copy_(self.trained, own)


class AdaptedLinear(torch.autograd.Function):
    """y = x W^T + b + scale (x A^T) B^T for x (tokens, inputs), W (outputs, inputs), A (rank, inputs) and
    B (outputs, rank); W and b, of `base`, have no gradient.

    LoRA (arXiv 2106.09685) as peft computes it, but that sums are part of a product instead of passes of
    their own. `own` are the trained A and B, of which `down` and `up` are copies; their gradients are added
    to those that they have. Those may have more directions, which are not trained, behind the trained ones. A
    weight of 4 bits is dequantized once for each pass, as in bitsandbytes.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        base: nn.Linear,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
        *own: nn.Parameter,
    ) -> torch.Tensor:
        """Outputs (tokens, outputs) in the type of x, which is that of `down` and `up`."""
        hidden = x @ down.T
        ctx.save_for_backward(x, hidden, down, up)
        ctx.base, ctx.scale, ctx.own = base, scale, own
        bias = None if base.bias is None else base.bias.to(x.dtype)
        return linear(x, _weight(base, x.dtype), bias).addmm_(hidden, up.T, alpha=scale)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradient of x; those of `own` where they have none yet."""
        x, hidden, down, up = ctx.saved_tensors
        of_hidden, of_x = gradient @ up, None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ _weight(ctx.base, x.dtype)).addmm_(of_hidden, down, alpha=ctx.scale)
        rank = len(ctx.own[0])
        products = of_hidden[:, :rank].T @ x, gradient.T @ hidden[:, :rank]
        own = [_added(*pair, ctx.scale) for pair in zip(ctx.own, products, strict=True)]
        return of_x, None, None, None, None, *own


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


def _adapted(
    layer: LoraLayer,
    usual: Callable[..., torch.Tensor],
    factors: Factors,
    i: int,
    x: torch.Tensor,
) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return usual(x)
    down, up = factors.now[2 * i : 2 * i + 2]
    given = layer.base_layer, down, up, layer.scaling[TRAINED], *_trained(layer)
    with torch.autocast(x.device.type, enabled=False):
        out = AdaptedLinear.apply(x.to(down.dtype).flatten(0, -2), *given)
    return out.unflatten(0, x.shape[:-1])


def _normed(norm: nn.Module, usual: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return usual(x)
    with torch.autocast(x.device.type, enabled=False):
        return rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), _epsilon(norm))


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


def _joined(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Without a correction those of the adapter."""
    down, up = ([one.weight for one in factors.values()] for factors in (layer.lora_A, layer.lora_B))
    return torch.cat(down), torch.cat(up, dim=1)


def _epsilon(norm: nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a module computes what it says it is: some models' norms scale by 1 + weight."""
    if not type(module).__name__.endswith("RMSNorm") or getattr(module, "weight", None) is None:
        return False
    x = torch.linspace(-2, 3, len(module.weight), dtype=module.weight.dtype, device=module.weight.device)
    expected = module(x).float()
    found = rms_norm(x, module.weight.shape, module.weight, _epsilon(module)).float()
    return bool((expected - found).abs().max() <= ROUNDING * expected.abs().max())
