"""Whether the process of a run still lives: as long as it does, it holds a lock on a file of its own.

The kernel frees the lock however the process ends, with the whole machine too. A file says on which machine
it was made, since a home can be shared by several, and its locks need not be.

Not covered: machines of one name that share a cache folder without its locks.
"""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from steps.text2sql.run_folder import cache_folder


def _file(run_id: str) -> Path:
    return cache_folder() / "alive" / run_id


@contextmanager
def announced(run_id: str) -> Iterator[None]:
    """Hold the lock of a run during the block; without one where the disk takes no file or no lock."""
    try:
        lock = _lock(_file(run_id))
    except OSError:
        yield
        return
    try:
        yield
    finally:
        forget(run_id)
        os.close(lock)


def _lock(file: Path) -> int:
    """Make a file that is locked from its first moment on; its descriptor comes back."""
    file.parent.mkdir(parents=True, exist_ok=True)
    work = file.with_name(f".{file.name}.{os.getpid()}")
    lock = os.open(work, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.write(lock, platform.node().encode())
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock, True)  # a process that replaces itself by another program lives on
        work.rename(file)
    except OSError:
        os.close(lock)
        work.unlink()
        raise
    return lock


def state(run_id: str) -> Literal["alive", "gone", "unknown"]:
    """What this machine knows of the process of a run: nothing where the run was never announced here."""
    try:
        with _file(run_id).open(encoding="utf-8") as file:
            if file.read() != platform.node():
                return "unknown"
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "alive"
    except OSError:
        return "unknown"
    return "gone"


def forget(run_id: str) -> None:
    """Remove what says that a run was on this machine."""
    _file(run_id).unlink(missing_ok=True)
