"""What several training processes tell each other. A process alone gets back what it gave."""

import atexit
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from steps.text2sql import ranks
from steps.text2sql.errors import Interrupted


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes inside the block, with a GPU of its own where there are any.

    Tensors on GPUs go by NCCL, those on the CPU by gloo: what is agreed on waits for no GPU.
    """
    if not ranks.is_launched() or dist.is_initialized():
        yield
        return
    if not ranks.is_first():
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(ranks.index_here())
    # Buffers of recorded collectives are not registered with NCCL: the recordings' memory is reused.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield
    except BaseException as error:
        if isinstance(error, Interrupted):  # for which all end together
            _release()
        else:
            atexit.register(_leave)
        raise
    _release()
    smallest(0)  # until all have
    dist.destroy_process_group()


_releases: list[Callable[[], None]] = []


def before_leaving(release: Callable[[], None]) -> None:
    """Call something in every process at the end of `joined`, before any of them frees what it has."""
    _releases.append(release)


def _release() -> None:
    while _releases:
        _releases.pop()()


def _leave() -> None:
    """End this process, and free nothing on its GPU: that would wait for others, which may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def largest(value: float) -> float:
    """The largest of all processes' values."""
    return _reduced(value, dist.ReduceOp.MAX)


def smallest(value: float) -> float:
    """The smallest of all processes' values."""
    return _reduced(value, dist.ReduceOp.MIN)


def _reduced(value: float, operation: dist.ReduceOp) -> float:
    if not dist.is_initialized():
        return value
    held = torch.tensor(value, dtype=torch.float64)
    with _others():
        dist.all_reduce(held, operation)
    return held.item()


@contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's, when a connection ends
        raise ranks.LeftAlone(f"another process is gone: {error}") from error


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in place."""
    if dist.is_initialized():
        with _others():
            dist.all_reduce(tensor)
    return tensor


def copy_from_first(tensors: Iterable[torch.Tensor]) -> None:
    """Give all processes the values of the first, in place."""
    if dist.is_initialized():
        with _others():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


@contextmanager
def once_a_machine(get: Callable[[], AbstractContextManager[Path | None]]) -> Iterator[Path | None]:
    """The folder that `get` opens in one process of each machine, for all of the machine; kept for all."""
    is_mine = ranks.index_here() == 0
    with get() if is_mine else nullcontext() as folder:
        if not dist.is_initialized():
            yield folder
            return
        folders: list[Path | None] = [None] * dist.get_world_size()
        with _others():
            dist.all_gather_object(folders, folder)
        yield folders[dist.get_rank() - ranks.index_here()]
        smallest(0)  # by gloo: until all have done with it
