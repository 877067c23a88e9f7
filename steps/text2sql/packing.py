"""Rows into packs: micro-batches without padding between rows, in which no row sees another."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy
import torch

from steps.text2sql.tokenization import IGNORED

# Shapes of packs differ by this many tokens on a GPU, where every shape is recorded once.
SHAPE_TOKENS = 128
Row = Mapping[str, Sequence[int]]


class Pack(NamedTuple):
    """Rows one after the other, as tensors on one device.

    `input_ids` and `position_ids` are `(1, tokens)`, positions begin at 0 in each row. `offsets`
    `(rows + 2,)` int32 has the first token of each row, of the filler behind them, and the end.
    `answer_positions` and `answers` are `(slots,)`: where the model has to say which token; unused slots say
    `IGNORED`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    offsets: torch.Tensor
    answer_positions: torch.Tensor
    answers: torch.Tensor

    def to(self, device: torch.device | str) -> "Pack":
        """The same on another device."""
        return Pack(*(part.to(device, non_blocking=True) for part in self))


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the rows of each pack, by first-fit decreasing (Johnson 1973).

    A row longer than `capacity` gets a pack of its own.
    """
    packs: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = next((pack for pack, room in enumerate(free) if room >= lengths[i]), None)
        if fitting is None:
            packs.append([i])
            free.append(capacity - lengths[i])
        else:
            packs[fitting].append(i)
            free[fitting] -= lengths[i]
    return packs


def spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Indices of the rows of at most `count` packs of much the same size.

    The longest first, each to the pack that is the emptiest so far (Graham 1969: longest processing time);
    then rows of the fullest and the emptiest pack change places as long as these two become more alike. That
    leaves a token between the two packs of a step instead of ten, for which both may take a larger shape.
    """
    packs: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        emptiest = filled.index(min(filled))
        packs[emptiest].append(i)
        filled[emptiest] += lengths[i]
    while _exchange(packs, lengths):
        pass
    return [pack for pack in packs if pack]


def _exchange(packs: list[list[int]], lengths: Sequence[int]) -> bool:
    """Whether a row of the fullest pack and one of the emptiest changed places, to make them more alike."""
    packs.sort(key=lambda pack: sum(lengths[i] for i in pack))
    thin, full = packs[0], packs[-1]
    given, back = (numpy.array([lengths[i] for i in pack], dtype=int) for pack in (full, thin))
    gap = given.sum() - back.sum()
    left = abs(gap - 2 * (given[:, None] - back))  # the gap after it, by row of either
    if left.size == 0 or left.min() >= gap:
        return False
    i, j = numpy.unravel_index(left.argmin(), left.shape)
    full[i], thin[j] = thin[j], full[i]
    return True


def pack(rows: Sequence[Row], *, capacity: int, multiple: int = 1) -> list[Pack]:
    """Pack tokenized rows (`input_ids`, `labels`) into micro-batches of at most `capacity` tokens.

    With a `multiple`, tokens are filled up to one of its multiples and every `offsets` has the same length,
    so that few shapes occur and a recorded step can be replayed. The largest pack comes first.
    """
    lengths = _lengths(rows)
    groups = sorted(first_fit(lengths, capacity), key=lambda group: -sum(lengths[i] for i in group))
    return [_join([rows[i] for i in group], multiple, places=len(rows)) for group in groups]


def pack_evenly(rows: Sequence[Row], *, capacity: int, multiple: int, processes: int) -> list[Pack]:
    """As `pack`, in as many packs for each process as for the others, of much the same size.

    With a `multiple` all packs of a step have one shape: processes that compute a layer together record and
    replay it together. Where rows do not suffice, packs without an answer make up the number.
    """
    if processes == 1:
        return pack(rows, capacity=capacity, multiple=multiple)
    groups = [[rows[i] for i in group] for group in _even_groups(_lengths(rows), capacity, processes)]
    tokens = max(sum(_lengths(group)) for group in groups) if multiple > 1 else 0
    answers = max(map(answer_tokens, groups)) if multiple > 1 else 0
    packs = [_join(one, multiple, places=len(rows), tokens=tokens, answers=answers) for one in groups]
    return packs + [empty_like(packs[-1])] * (-len(packs) % processes)


def largest(lengths: Sequence[int], *, capacity: int, processes: int) -> int:
    """Tokens of the largest pack of a step, of rows of such lengths, as `pack_evenly` makes them."""
    even = processes > 1
    groups = _even_groups(lengths, capacity, processes) if even else first_fit(lengths, capacity)
    return max(sum(lengths[i] for i in group) for group in groups)


def _lengths(rows: Sequence[Row]) -> list[int]:
    return [len(row["input_ids"]) for row in rows]


def _even_groups(lengths: Sequence[int], capacity: int, processes: int) -> list[list[int]]:
    """Indices of the rows of each pack: as few for each process as the capacity allows."""
    count = processes * -(-sum(lengths) // (processes * capacity))
    most = max(capacity, *lengths)
    groups = spread(lengths, count)
    while max(sum(lengths[i] for i in group) for group in groups) > most:
        count += processes
        groups = spread(lengths, count)
    return groups


def answer_tokens(rows: Sequence[Row]) -> int:
    """Tokens that the loss of these rows is the mean of; a row's first token has nothing before it."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def empty_like(full: Pack) -> Pack:
    """A pack of the same shape without an answer: a process without rows computes along with the others."""
    return full._replace(answers=torch.full_like(full.answers, IGNORED))


def _join(rows: Sequence[Row], multiple: int, *, places: int, tokens: int = 0, answers: int = 0) -> Pack:
    """One pack, with room for so many `tokens` and `answers` at least."""
    ids = [token for row in rows for token in row["input_ids"]]
    tokens = -(-max(len(ids), tokens) // multiple) * multiple
    ends = torch.tensor([0, *(len(row["input_ids"]) for row in rows)]).cumsum(0)
    positions = torch.cat(
        [torch.arange(len(row["input_ids"])) for row in rows] + [torch.arange(tokens - len(ids))]
    )
    offsets = torch.full((places + 2,) if multiple > 1 else (len(rows) + 1,), tokens, dtype=torch.int32)
    offsets[: len(ends)] = ends
    labels = [label for row in rows for label in (IGNORED, *row["labels"][1:])]
    # Half of the tokens, or all: one number of slots for each number of tokens, nearly always.
    slots = [size for size in (tokens // 2, tokens) if multiple > 1 and size >= answers]
    filled = torch.zeros(1, tokens, dtype=torch.int64)
    filled[0, : len(ids)] = torch.tensor(ids)
    return Pack(filled, positions[None], offsets, *_answers(labels, slots=slots))


def _answers(labels: Sequence[int], *, slots: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    every = torch.tensor(labels)
    places = (every != IGNORED).nonzero()[:, 0]
    size = next((size for size in slots if size >= len(places)), len(places))
    where, answers = torch.zeros(size, dtype=torch.int64), torch.full((size,), IGNORED)
    # The token before says it.
    where[: len(places)], answers[: len(places)] = places - 1, every[places]
    return where, answers
