"""How fast a training goes on this device, and whether compiling its layers wins its time back."""

import os
import shutil
import sysconfig
from pathlib import Path
from typing import NamedTuple

from steps.text2sql import collectives, ranks
from steps.text2sql.device import operations_per_second
from steps.text2sql.sql_model import pick_device

# Compiling takes this long (32 layers of Mistral-7B on an H200, nothing cached: 12 and 19) and then saves
# this share of the time (0.055 at 8 rows a step, 0.1 at 32).
COMPILE_SECONDS = 16
COMPILE_SAVES = 0.08
# Share of the device's product rate that a training reaches without being compiled: Mistral-7B on an H200
# (0.5 to 0.55; H100s were a fifth slower), and the embedded base on two cores (0.3 to 0.6, which other
# programs shared).
USUAL_SHARE_OF_PEAK = {"cuda": 0.45, "cpu": 0.5}


def rows_seen(steps: int, *, rows: int, batch_size: int) -> int:
    """Rows of the first steps: the last one of an epoch over `rows` may have fewer than `batch_size`."""
    epochs, rest = divmod(steps, -(-rows // batch_size))
    return epochs * rows + min(rest * batch_size, rows)


class Speed(NamedTuple):
    """What times are estimated and measured by: the size of the base, and what the devices reach together in
    a large matrix product."""

    frozen_parameters: int
    operations_per_second: float

    def seconds(self, *, tokens: float, device: str, recompute: bool = False) -> float:
        """About how long so many tokens take, not compiled; recomputing is one more forward pass."""
        operations = tokens * operations_per_token(self.frozen_parameters) * (1.5 if recompute else 1)
        return operations / (USUAL_SHARE_OF_PEAK[device] * self.operations_per_second)

    def compiling_pays(self, *, tokens: float) -> bool:
        """`auto` of torch_compile: whether so many tokens take long enough to win its time back."""
        return self.seconds(tokens=tokens, device="cuda") * COMPILE_SAVES > COMPILE_SECONDS


def of_devices(frozen_parameters: int) -> Speed:
    """Speed of all processes that train together."""
    return Speed(frozen_parameters, operations_per_second() * ranks.count())


def operations_per_token(frozen_parameters: int) -> int:
    """Floating point operations of one token's forward and backward pass: 2 a parameter each.

    Frozen weights need no gradient of their own, which would be 2 more (Kaplan et al., arXiv 2001.08361,
    section 2.1, counts 6 in all). Attention scores and the adapter are left out, as is recomputation.
    """
    return 4 * frozen_parameters


def choose_compile(torch_compile: str, speed: Speed, *, tokens: float) -> str:
    """`yes` or `no`; `auto` by whether so many tokens take long enough, and can be compiled here.

    With a divided base it is `no`: compiling wins a seventh of the time there, and each process compiles.
    All processes choose the same.
    """
    pays = pick_device()[0] == "cuda" and speed.compiling_pays(tokens=tokens) and not ranks.is_sharded()
    agreed = bool(collectives.smallest(pays and can_compile()))
    return {"auto": "yes" if agreed else "no"}.get(torch_compile, torch_compile)


def can_compile() -> bool:
    """Whether there are a C compiler and Python's headers, with which Triton builds what launches kernels."""
    compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    return compiler and (Path(sysconfig.get_path("include")) / "Python.h").exists()
