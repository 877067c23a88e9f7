"""Gradients of packs: computed as usual, or replayed as one CUDA graph for each shape of pack."""

import contextlib
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from steps.text2sql import packed_attention
from steps.text2sql.packed_attention import summed_loss
from steps.text2sql.packing import Pack

# Frequencies that change with the length ask the GPU for it, which a recording cannot wait for.
CHANGING_ROPE = frozenset({"dynamic", "longrope"})


def can_record(config: PreTrainedConfig) -> bool:
    """Whether this process can record the launches of such a model."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = {one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, dict)}
    return packed_attention.has_flash() and not kinds & CHANGING_ROPE


class Gradients:
    """Sums gradients of packs into one flat fp32 buffer, which every trainable parameter's `.grad` views.

    With `replay` the launches of forward and backward are recorded at the first pack of a shape, and later
    ones cost one launch: a step of a few thousand tokens is bound by launches otherwise (CUDA graphs,
    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). That needs a model without dropout.
    Recording takes a moment, and waits for the GPU; `before_recording` is called first.
    """

    def __init__(self, model: PreTrainedModel, *, longest: int, dtype: torch.dtype, replay: bool) -> None:
        self.model, self.longest, self.replay = model, longest, replay
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        self.autocast = dtype if dtype != torch.float32 else None
        self.flat = torch.zeros(sum(one.numel() for one in self.parameters), device=self.device)
        self.views = [
            part.view_as(one)
            for part, one in zip(
                self.flat.split([one.numel() for one in self.parameters]), self.parameters, strict=True
            )
        ]
        self.before_recording: Callable[[], None] = lambda: None
        self.graphs: dict[tuple[int, ...], Callable[[Pack, torch.Tensor], torch.Tensor]] = {}
        self.forget_graphs()

    def clear(self) -> None:
        """Start a step: all gradients are zero."""
        self.flat.zero_()
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view

    def add(self, pack: Pack, scale: torch.Tensor) -> torch.Tensor:
        """Add the gradient of `scale` (a scalar) times the pack's summed loss; that product comes back."""
        if not self.replay:
            return self._compute(pack.to(self.device), scale)
        shape = (pack.input_ids.shape[1], pack.answers.shape[0], pack.offsets.shape[0])
        if shape in self.graphs:
            return self.graphs[shape](pack, scale)
        self.before_recording()
        held, held_scale = pack.to(self.device), scale.clone()
        loss = self._warm_up(held, held_scale)
        self.graphs[shape] = self._record(held, held_scale)
        return loss

    def forget_graphs(self) -> None:
        """Drop all recordings with their memory, which is free once the device's cache is cleared.

        That waits for all that the GPU has to do.
        """
        self.graphs.clear()
        if self.replay:
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.MemPool()

    def _compute(self, pack: Pack, scale: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext():
            loss = summed_loss(self.model, pack, longest=self.longest) * scale
        loss.backward()
        return loss.detach()

    def _warm_up(self, pack: Pack, scale: torch.Tensor) -> torch.Tensor:
        """Compute the first pack of a shape as usual: what may not be set up while recording is set up here.

        Its activations are in the recordings' memory, on their stream, so that no second set of them is held
        (as in torch's own https://github.com/pytorch/pytorch/pull/96433).
        """
        torch.cuda.empty_cache()  # what other pools keep is not taken from them in this one
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
            loss = self._compute(pack, scale)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss.clone()

    def _record(self, held: Pack, held_scale: torch.Tensor) -> Callable[[Pack, torch.Tensor], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Not "global": with several processes a thread of NCCL asks about events meanwhile.
        mode = {"capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, pool=self.pool.id, stream=self.stream, **mode):
            loss = self._compute(held, held_scale)

        def replay(pack: Pack, scale: torch.Tensor) -> torch.Tensor:
            for place, part in zip(held, pack, strict=True):
                place.copy_(part, non_blocking=True)
            held_scale.copy_(scale)
            graph.replay()
            return loss.clone()

        return replay
