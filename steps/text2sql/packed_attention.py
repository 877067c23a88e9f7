"""Attention within the rows of a pack, as transformers takes it, and the loss that uses it."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from steps.text2sql.packing import Pack, pack
from steps.text2sql.tokenization import IGNORED

NAME, PROBE = "text2sql_packed", "text2sql_probe"
# torch 2.11 takes fewer key than query heads without being told, later ones want to be told.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
FLASH_CAPABILITY = (8, 0)
# What some models hand to their attention and this one does not compute.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    sliding_window: int | None = None,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row to itself; tensors are `(1, heads, tokens, head size)`, the result
    `(1, tokens, heads, head size)`.

    With `has_flash` one variable-length flash attention (arXiv 2307.08691), elsewhere row by row. A dropout
    that the base's config may have for its attention is left out.

    Raises:
        NotImplementedError: the model asks for more, such as a soft cap on the scores.
    """
    asked = _unsupported(named)
    if asked:
        raise NotImplementedError(f"packed attention without {', '.join(asked)}")
    window = sliding_window if sliding_window and sliding_window < max_length_q else None
    if query.is_cuda and has_flash():
        return _flash(query, key, value, cu_seq_lens_q, max_length_q, scaling, window), None
    return _row_by_row(query, key, value, cu_seq_lens_q, scaling, window), None


def _unsupported(named: Mapping[str, Any]) -> list[str]:
    return [name for name in UNSUPPORTED if named.get(name) is not None]


@functools.cache
def has_flash() -> bool:
    """Whether this process computes on a GPU that flash attention has kernels for: Ampere and later."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= FLASH_CAPABILITY


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    parts = (part[0].transpose(0, 1) for part in (query, key, value))
    left = window - 1 if window else -1
    return varlen_attn(
        *parts, offsets, offsets, longest, longest, scale=scaling, window_size=(left, 0), **GROUPED
    )[None]


def _row_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    lengths = offsets.diff().tolist()
    rows = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    found = [
        scaled_dot_product_attention(
            *row, **_causal(row[0].shape[2], window, row[0].device), scale=scaling, enable_gqa=True
        )
        for row in rows
    ]
    return torch.cat(found, dim=2).transpose(1, 2)


def _causal(length: int, window: int | None, device: torch.device) -> dict[str, Any]:
    if not window or length <= window:
        return {"is_causal": True}
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return {"attn_mask": (distance >= 0) & (distance < window)}


AttentionInterface.register(NAME, packed_attention)


def summed_loss(model: PreTrainedModel, pack: Pack, *, longest: int) -> torch.Tensor:
    """Negative log likelihood of a pack's answer tokens, summed, in nats (fp32 scalar).

    Logits are computed at the answers alone. `longest` is not under the length of any row.
    """
    logits = model(
        input_ids=pack.input_ids,
        position_ids=pack.position_ids,
        cu_seq_lens_q=pack.offsets,
        max_length_q=longest,
        logits_to_keep=pack.answer_positions,
        use_cache=False,
    ).logits[0]
    return cross_entropy(logits.float(), pack.answers, ignore_index=IGNORED, reduction="sum")


def not_apart(model: PreTrainedModel) -> str:
    """Why a model would not read the rows of a pack apart, in words; empty where it does.

    One pass shows it, for which weights on the meta device are enough: every layer has to leave its attention
    to transformers' interface and hand on where rows begin. Recurrent layers, convolutions and attention that
    is written into a layer do not.
    """
    asking: set[nn.Module] = set()
    unsupported: set[str] = set()

    def probe(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **named: Any
    ) -> tuple[torch.Tensor, None]:
        unsupported.update(_unsupported(named))
        if "cu_seq_lens_q" in named:
            asking.add(module)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(PROBE, probe)
    before = model.config._attn_implementation
    model.set_attn_implementation(PROBE)
    row = {"input_ids": [0, 0], "labels": [0, 0]}
    [two_rows] = pack([row, row], capacity=4)
    with torch.no_grad():
        summed_loss(model, two_rows.to(model.device), longest=2)
    model.set_attn_implementation(before)
    layers = model.config.get_text_config().num_hidden_layers
    if unsupported:
        return f"its attention has {', '.join(sorted(unsupported))}"
    if len(asking) < layers:
        return f"{layers - len(asking)} of its {layers} layers would read the rows of a step as one text"
    return ""
