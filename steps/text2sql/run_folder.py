"""The folder of a run on this machine: checkpoints and adapter, whole or not there, until they are logged."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from steps.text2sql import manifest
from steps.text2sql.errors import UserError

PREFIX = "checkpoint-"
# What a full or failing disk raises.
DiskError = (OSError, SafetensorError)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/text2sql-qlora`, below `~/.cache` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "text2sql-qlora"


def run_folder(run_id: str) -> Path:
    """Folder of a run in the cache: it outlives the process."""
    return cache_folder() / "runs" / run_id


def check_cache(folder: Path) -> None:
    """See that a folder of a run can be made in the cache.

    Raises:
        UserError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"XDG_CACHE_HOME={cache_folder().parent}: checkpoints and adapter are kept there until they are "
            f"logged, but nothing can be written: {error}; set XDG_CACHE_HOME to a folder of yours."
        ) from error
    if not any(folder.iterdir()):
        folder.rmdir()


def step_of(checkpoint: Path | str) -> int:
    """Optimizer steps after which a checkpoint was saved."""
    return int(Path(checkpoint).name.removeprefix(PREFIX))


def saved_in(folder: Path) -> list[Path]:
    """Checkpoints of a folder, newest first; nothing of those that were never finished."""
    found = (path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal())
    return sorted(found, key=step_of, reverse=True)


def is_whole(checkpoint: Path) -> bool:
    """Whether each file of a checkpoint is as its manifest says."""
    try:
        manifest.check(checkpoint, source=checkpoint.name)
    except UserError:
        return False
    return True


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder that is there whole or, whenever the machine stops, not at all.

    Raises:
        OSError, SafetensorError: the disk is full or fails; nothing is left of it.
    """
    work = target.with_name(f".{target.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        fill(work)
        for path in (*work.rglob("*"), work):
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
        _sync(target.parent)
    except DiskError:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
