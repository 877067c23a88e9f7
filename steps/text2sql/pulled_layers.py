"""A frozen base divided among the GPUs of a machine, whose layers are put together one ahead."""

import inspect
import logging
from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import reduce_tensor

from steps.text2sql import collectives

logger = logging.getLogger(__name__)

# Bytes at whose multiples a layer's parameters begin.
ALIGNED = 256


class PulledLayers:
    """Keeps a part of every layer's frozen parameters; puts a layer together while the one before it runs.

    All but those of `whole` are divided. The parts never change, so each process reads those of the others
    when it likes: processes wait for each other for nothing, and GPUs copy beside their computing. Layer i is
    put together in place i % 2, of which its parameters are views. It is what fully sharded data parallelism
    does by collectives, which take processors of the GPU, for parameters that are trained.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], *, whole: Set[torch.nn.Parameter]) -> None:
        self.last = len(layers) - 1
        held = [[one for one in layer.parameters() if one not in whole] for layer in layers]
        device = held[0][0].device
        self.side = torch.cuda.Stream() if device.type == "cuda" else None
        unit = dist.get_world_size() * ALIGNED
        size = -(-max(sum(map(_room, group)) for group in held) // unit) * unit
        self.places = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.views: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        # Layer by layer, of which each is let go of: the base is never held one and a half times.
        mine = [self._part(group, self.places[i % 2]) for i, group in enumerate(held)]
        self.parts = read_by_all(mine)
        if self.parts is None:
            raise RuntimeError("GPUs that read each other's memory do not any more")
        collectives.before_leaving(self.parts.clear)
        for i, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._before(i), prepend=True)
            layer.register_forward_hook(self._after(i))

    def _part(self, group: Sequence[torch.nn.Parameter], place: torch.Tensor) -> torch.Tensor:
        return self._moved(group, place).chunk(dist.get_world_size())[dist.get_rank()].clone()

    def _moved(self, group: Sequence[torch.nn.Parameter], place: torch.Tensor) -> torch.Tensor:
        """Bytes of a layer, whose parameters are views of its place from now on."""
        whole, start = torch.zeros_like(place), 0
        for one in group:
            raw = one.data.contiguous().view(-1).view(torch.uint8)
            whole[start : start + raw.numel()] = raw
            one.data = place[start : start + raw.numel()].view(one.dtype).view(one.shape)
            self.views.append((one, one.data))
            start += _room(one)
        return whole

    def _pull(self, i: int) -> None:
        """Begin to put layer i together; its place is free once all that was launched before is done."""
        if self.side:
            self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):  # of no effect without one
            for part, theirs in zip(self.places[i % 2].chunk(len(self.parts)), self.parts, strict=True):
                part.copy_(theirs[i], non_blocking=True)

    def _wait(self) -> None:
        if self.side:
            torch.cuda.current_stream().wait_stream(self.side)

    def _before(self, i: int) -> Callable[..., None]:
        @torch._dynamo.disable
        def forward(*_: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return  # computed again in a backward pass, which pulled it
            if i == 0:
                self._keep_views()
                self._pull(0)
            self._wait()
            if i < self.last:
                self._pull(i + 1)

        return forward

    def _keep_views(self) -> None:
        # Trainer's model.to copies them on a CPU.
        for parameter, view in self.views:
            if parameter.data_ptr() != view.data_ptr():
                parameter.data = view

    def _after(self, i: int) -> Callable[..., None]:
        @torch._dynamo.disable
        def backward(_: torch.Tensor) -> None:
            if i < self.last - 1:
                self._wait()
            if 0 < i < self.last:
                self._pull(i - 1)

        @torch._dynamo.disable
        def forward(module: torch.nn.Module, given: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad and torch._C._current_graph_task_id() == -1:
                hidden.register_hook(backward)

        return forward


def _room(parameter: torch.Tensor) -> int:
    return -(-parameter.nbytes // ALIGNED) * ALIGNED


def can_pull() -> bool:
    """Whether all processes can read each other's GPU; a container or the machine may forbid it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return read_by_all([torch.empty(ALIGNED, dtype=torch.uint8, device=device)]) is not None


def read_by_all(mine: Sequence[torch.Tensor]) -> list[Sequence[torch.Tensor]] | None:
    """The tensors of all processes in order, of the same shapes; None where they cannot be read.

    On GPUs each is where it is, in the memory of another GPU, and is read without help of its process (CUDA's
    inter-process memory, https://docs.pytorch.org/docs/stable/multiprocessing.html); it has to be kept there.
    On the CPU they are copies.
    """
    if not mine[0].is_cuda:
        return list(zip(*map(_copies, mine), strict=True))
    handles: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(handles, _tried(lambda: [reduce_tensor(one) for one in mine]))
    found = [
        mine if i == dist.get_rank() else given and _tried(partial(_opened, given, mine[0].device))
        for i, given in enumerate(handles)
    ]
    torch.cuda.synchronize()  # all have written theirs when all are here
    return found if collectives.smallest(all(one is not None for one in found)) else None


def _copies(mine: torch.Tensor) -> list[torch.Tensor]:
    copies = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, mine)
    return copies


def _tried(share: Callable[[], Any]) -> Any:
    try:
        return share()
    except RuntimeError as error:
        logger.warning("GPUs cannot read each other's memory: %s", str(error).splitlines()[0])
        return None


def _opened(
    given: Sequence[tuple[Callable[..., torch.Tensor], tuple]], here: torch.device
) -> list[torch.Tensor]:
    """Tensors of another process, as those of the device that reads: copies are then this device's work."""
    opened = []
    for rebuild, values in given:
        bound = inspect.signature(rebuild).bind(*values)
        bound.arguments["storage_device"] = here.index
        opened.append(rebuild(*bound.args))
    return opened
