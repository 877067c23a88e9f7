"""A frozen base divided among the GPUs of a machine, whose layers are put together one ahead."""

import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import reduce_tensor

from steps.text2sql import collectives

logger = logging.getLogger(__name__)

# Bytes at whose multiples parameters begin.
ALIGNED = 256


class PulledLayers:
    """Keeps some of the frozen matrices of every layer; gets the others while the layer before it runs.

    The parts never change, so each process reads those of the others when it likes: processes wait for each
    other for nothing, and GPUs copy beside their computing. Matrices are divided whole, so that those that
    are here stay where they are; those of `whole` and vectors are not. Others of layer i come to place i % 2,
    of which its parameters are views. It is what fully sharded data parallelism does by collectives, which
    take processors of the GPU, for parameters that are trained.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], *, whole: Set[torch.nn.Parameter]) -> None:
        self.last = len(layers) - 1
        held = [[p for p in layer.parameters() if p not in whole and p.dim() > 1] for layer in layers]
        shares = divided(held)
        size = max(sum(map(_room, share)) - _room(share[dist.get_rank()]) for share in shares)
        device = held[0][0].device
        self.side = torch.cuda.Stream() if device.type == "cuda" else None
        places = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.views: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        # Layer by layer, of which each is let go of: the base is never held one and a half times.
        mine, self.gets = [], []
        for i, share in enumerate(shares):
            mine.append(self._kept(share[dist.get_rank()], device))
            self.gets.append(self._come_to(places[i % 2], share))
        self.parts = read_by_all(mine)
        if self.parts is None:
            raise RuntimeError("GPUs that read each other's memory do not any more")
        collectives.before_leaving(self.parts.clear)
        for i, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._before(i), prepend=True)
            layer.register_forward_hook(self._after(i))

    def _kept(self, parameters: Sequence[torch.nn.Parameter], device: torch.device) -> torch.Tensor:
        """Move parameters into one block of memory, for others to read."""
        block = torch.empty(_room(parameters), dtype=torch.uint8, device=device)
        for one, view in zip(parameters, _views(parameters, block), strict=True):
            self._show(one, view.copy_(one.data))
        return block

    def _come_to(
        self, place: torch.Tensor, share: Sequence[Sequence[torch.nn.Parameter]]
    ) -> list[tuple[int, torch.Tensor]]:
        """Make parameters of others views of a place; ranks, with the room there for what is theirs."""
        rooms, start = [], 0
        for rank, parameters in enumerate(share):
            if rank == dist.get_rank():
                continue
            rooms.append((rank, place[start : start + _room(parameters)]))
            start += _room(parameters)
            for one, view in zip(parameters, _views(parameters, rooms[-1][1]), strict=True):
                self._show(one, view)
        return rooms

    def _show(self, parameter: torch.nn.Parameter, view: torch.Tensor) -> None:
        parameter.data = view
        self.views.append((parameter, view))

    def _pull(self, i: int) -> None:
        """Begin to get layer i; its place is free once all that was launched before is done."""
        if self.side:
            self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):  # of no effect without one
            for rank, room in self.gets[i]:
                room.copy_(self.parts[rank][i], non_blocking=True)

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


def divided(held: Sequence[Sequence[torch.nn.Parameter]]) -> list[list[list[torch.nn.Parameter]]]:
    """For each layer's parameters those that each process keeps, in their order; bytes are as even as whole
    parameters allow: each, the largest of a layer first, goes to the process that has the least."""
    kept = [0] * dist.get_world_size()
    shares = []
    for group in held:
        keepers = {}
        for one in sorted(group, key=lambda one: one.nbytes, reverse=True):
            keepers[one] = kept.index(min(kept))
            kept[keepers[one]] += one.nbytes
        shares.append([[one for one in group if keepers[one] == rank] for rank in range(len(kept))])
    return shares


def _views(parameters: Sequence[torch.nn.Parameter], block: torch.Tensor) -> Iterator[torch.Tensor]:
    """Where in a block each is, as it is."""
    starts = itertools.accumulate((_aligned(one) for one in parameters), initial=0)
    for one, start in zip(parameters, starts, strict=False):
        yield block[start : start + one.nbytes].view(one.dtype).view(one.shape)


def _room(parameters: Sequence[torch.nn.Parameter]) -> int:
    """Bytes of a block; not none, which could not be shared."""
    return sum(map(_aligned, parameters)) or ALIGNED


def _aligned(parameter: torch.nn.Parameter) -> int:
    return -(-parameter.nbytes // ALIGNED) * ALIGNED


def can_pull() -> bool:
    """Whether all processes can read each other's GPU; a container or the machine may forbid it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return read_by_all([torch.empty(ALIGNED, dtype=torch.uint8, device=device)]) is not None


def read_by_all(mine: Sequence[torch.Tensor]) -> list[Sequence[torch.Tensor]] | None:
    """The tensors of all processes in order; None where they cannot be read.

    On GPUs each is where it is, in the memory of another GPU, and is read without help of its process (CUDA's
    inter-process memory, https://docs.pytorch.org/docs/stable/multiprocessing.html); it has to be kept there.
    On the CPU they are copies.
    """
    given: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        given, _tried(lambda: [reduce_tensor(one) for one in mine]) if mine[0].is_cuda else mine
    )
    if not mine[0].is_cuda:
        return given
    found = [
        mine if i == dist.get_rank() else handles and _tried(partial(_opened, handles, mine[0].device))
        for i, handles in enumerate(given)
    ]
    torch.cuda.synchronize()  # all have written theirs when all are here
    return found if collectives.smallest(all(one is not None for one in found)) else None


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
