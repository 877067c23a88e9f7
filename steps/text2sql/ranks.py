"""This process as one of several that train together, as the environment says that their launcher made.

Nothing here loads torch. A process that was not launched so is the first of one.
"""

import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

# Where processes say how they ended, for the one that launched them and owns their run.
ENDINGS_VARIABLE = "TEXT2SQL_ENDINGS"


def is_launched() -> bool:
    """Whether this process was started as one of several."""
    return "LOCAL_RANK" in os.environ


def index() -> int:
    """Number of this process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes there are on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def index_here() -> int:
    """Number of this process among those of this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count_here() -> int:
    """How many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that talks to MLflow and to the user."""
    return index() == 0


def of_first_process(log: Callable[..., None]) -> Callable[..., None]:
    """Do nothing in all but the first of several processes: it alone talks to MLflow and to the user."""

    @functools.wraps(log)
    def logged(*given: Any, **named: Any) -> None:
        if is_first():
            log(*given, **named)

    return logged


def is_sharded() -> bool:
    """Whether the base is to be divided among the processes, as accelerate says it."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def describe() -> str:
    """How many train, and what is divided among them."""
    if count() == 1:
        return "1"
    divided = "rows and base (FSDP)" if is_sharded() else "rows"
    return f"{count()}, {count_here()} on this machine, {divided} divided among them"


def has_launcher() -> bool:
    """Whether a step of this project launched this process, and owns the run."""
    return ENDINGS_VARIABLE in os.environ


def be_silent() -> None:
    """Print nothing from here on; errors are no prints."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    warnings.simplefilter("ignore")


# Endings

Kind = Literal["failed", "stopped", "left"]


class LeftAlone(RuntimeError):
    """Another process is gone; why, that one or its launcher knows."""


@dataclass(frozen=True)
class Ending:
    """How a process ended, if not well: `text` is the reason, or the name of the signal that stopped it.

    One that was `left` alone by another could only end too.
    """

    kind: Kind
    text: str
    go_on: str
    time: float
    process: int


def tell_ending(kind: Kind, text: str, go_on: str = "") -> bool:
    """Say how this process ends; False when another failed before, which explains this one too."""
    if not has_launcher():
        print(f"\nProcess {index()} of {count()}: {kind}: {text}", file=sys.stderr, flush=True)
        return True
    folder = Path(os.environ[ENDINGS_VARIABLE])
    is_news = not any(ending.kind == "failed" for ending in endings(folder))
    written = folder / f".{index()}"
    ending = Ending(kind, text, go_on, time.time(), index())
    written.write_text(json.dumps(asdict(ending)), encoding="utf-8")
    written.rename(folder / f"{index()}.json")
    return is_news


def endings(folder: Path) -> list[Ending]:
    """What the processes of this machine told, in the order of time."""
    found = (Ending(**json.loads(file.read_text(encoding="utf-8"))) for file in folder.glob("*.json"))
    return sorted(found, key=lambda ending: ending.time)
