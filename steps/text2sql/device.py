"""The device that a step computes on, in words and numbers."""

import os
import resource
import sys
import time

import pynvml
import torch

from steps.text2sql.sql_model import pick_device


def describe_device() -> str:
    """Name, memory and compute dtype of the device, and why it was taken."""
    device, dtype = pick_device()
    name = str(dtype).removeprefix("torch.")
    if device == "cpu":
        return f"cpu, {os.cpu_count()} cores, {name} (no CUDA GPU here)"
    gpu = torch.cuda.get_device_properties(0)
    return (
        f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {name} (compute capability {gpu.major}.{gpu.minor})"
    )


def has_nvlink() -> bool:
    """Whether NVLink joins this process's GPU to others: several times as fast as PCI Express."""
    if not torch.cuda.is_available():
        return False
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        return bool(pynvml.nvmlDeviceGetNvLinkState(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"), 0))
    except pynvml.NVMLError:
        return False


class Moment:
    """When the device is done with all that it was given so far: a GPU may be a step behind its process."""

    def __init__(self) -> None:
        self.time = time.monotonic()
        self.event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else None
        if self.event:
            self.event.record()

    def seconds_since(self, earlier: "Moment") -> float:
        """Seconds between two moments; waits until the GPU is there."""
        if not self.event:
            return self.time - earlier.time
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


def peak_memory_gib() -> float:
    """Most memory held so far, in GiB: PyTorch's on the GPU, the resident set of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def operations_per_second() -> float:
    """What this device reaches in a matrix product of the dtype that is computed in, measured in a moment.

    A product of two n x n matrices takes 2 n^3 floating point operations.
    """
    device, dtype = pick_device()
    n, repeats = (4096, 10) if device == "cuda" else (1024, 4)
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = min(_seconds(left, right, device) for _ in range(repeats))
    return 2 * n**3 / seconds


def _seconds(left: torch.Tensor, right: torch.Tensor, device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    left @ right
    wait()
    return time.perf_counter() - start
