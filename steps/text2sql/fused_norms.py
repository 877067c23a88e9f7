"""RMS norms that take one launch in training."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.functional import rms_norm

# Of the largest values of a norm's outputs, which are rounded once less here.
ROUNDING = 2e-2


def fuse(model: nn.Module) -> None:
    """Compute RMS norms that way where gradients are wanted: those that do what
    `torch.nn.functional.rms_norm` does."""
    for norm in filter(_is_rms_norm, model.modules()):
        norm.forward = partial(_normed, norm, norm.forward)


def _normed(norm: nn.Module, usual: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return usual(x)
    with torch.autocast(x.device.type, enabled=False):
        return rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), _epsilon(norm))


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
