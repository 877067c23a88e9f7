"""Recordings that are made up, for machines without a GPU: what is computed when, and in which order."""

import math

import torch

from steps.text2sql.gradients import Gradients


class Recorded(Gradients):
    """Takes each new shape for recorded; memory runs out above `room` tokens.

    `computed` has the tokens of the packs, and None where recordings were dropped, as before the first.
    """

    computed: list[int | None] = []
    room = math.inf

    def __init__(self, *given, replay, **named):
        type(self).computed = []
        super().__init__(*given, replay=False, **named)
        self.replay = replay

    def forget_graphs(self):
        """Drop what was recorded."""
        self.graphs.clear()
        self.computed.append(None)

    def add(self, pack, scale):
        """Compute as usual, and note it."""
        tokens = pack.input_ids.shape[1]
        if pack.input_ids.shape not in self.graphs:
            self.before_recording()
        self.computed.append(tokens)
        if tokens > self.room:
            raise torch.cuda.OutOfMemoryError
        self.graphs[pack.input_ids.shape] = self.add
        return self._compute(pack, scale)
