"""Weights of layers that lie side by side in memory, so that one product computes all of the layers."""

from collections.abc import Sequence

import torch
from torch import nn


@torch.no_grad()
def lay(bases: Sequence[nn.Linear]) -> None:
    """Move whole weights of one type into one block of memory, one after the other."""
    weights = [base.weight for base in bases]
    kinds = {(type(one), one.dtype) for one in weights}
    if len(kinds) > 1 or type(weights[0]) is not nn.Parameter or seen_as_one(bases) is not None:
        return
    for one, part in zip(weights, torch.cat(weights).split([len(w) for w in weights]), strict=True):
        one.data = part


def seen_as_one(bases: Sequence[nn.Linear]) -> torch.Tensor | None:
    """Weights (outputs, inputs) that follow each other in memory as a view of all of it, without a copy."""
    weights, first, end = [base.weight for base in bases], bases[0].weight, bases[0].weight.data_ptr()
    for base, one in zip(bases, weights, strict=True):
        is_plain = type(one) is nn.Parameter and type(base) is nn.Linear and one.is_contiguous()
        follows = one.data_ptr() == end and _storage(one) == _storage(first) and one.dtype == first.dtype
        if not (is_plain and follows):
            return None
        end += one.nbytes
    return first.detach().as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


def _storage(weight: torch.Tensor) -> int:
    return weight.untyped_storage().data_ptr()
