"""The processes of a run: stopping all that this one started, and noticing that `mlflow run` is gone."""

import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from steps.text2sql import ranks

# A stopped run is over within 30 seconds; the rest is for its statuses.
GRACE_SECONDS = 25.0
POLL_SECONDS = 0.2
WATCH_SECONDS = 1.0


def is_mlflow_run(process: psutil.Process) -> bool:
    """Whether a process is the command `mlflow run`; one that cannot be looked at is not."""
    with suppress(psutil.Error):
        words = process.cmdline()
        return "run" in words and any(
            Path(word).name == "mlflow" for word in words[: words.index("run")][-3:]
        )
    return False


def users_command() -> list[str]:
    """Words of the nearest `mlflow run` above this process, as the user typed them; none without one."""
    for process in mlflow_runs():
        with suppress(psutil.Error):
            return process.cmdline()
    return []


def users_folder() -> Path:
    """Folder where the user typed `mlflow run`: the steps themselves run in the project's folder."""
    for process in mlflow_runs():
        with suppress(psutil.Error):  # processes of other users cannot be looked at everywhere
            return Path(process.cwd())
    return Path.cwd()


def mlflow_runs() -> Iterator[psutil.Process]:
    """The commands `mlflow run` above this process, the nearest first."""
    return filter(is_mlflow_run, psutil.Process().parents())


def launchers() -> list[psutil.Process]:
    """The processes above this one up to the topmost `mlflow run`; none where there is no such command."""
    above = psutil.Process().parents()
    commands = [i for i, process in enumerate(above) if is_mlflow_run(process)]
    return above[: commands[-1] + 1] if commands else []


@functools.cache  # once a process
def stop_with_launchers() -> None:
    """Send this process SIGTERM when one of its launchers ends first: a killed one passes nothing on."""
    above = launchers() or ([psutil.Process(os.getppid())] if ranks.is_launched() else [])
    threading.Thread(target=_watch, args=(above,), daemon=True).start()


def _watch(above: list[psutil.Process]) -> None:
    while all(_is_alive(process) for process in above):
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def on_signals(handler: Any) -> Iterator[None]:
    """Call `handler` for SIGINT and SIGTERM inside the block."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def held_signals() -> Iterator[list[str]]:
    """Keep the first SIGINT or SIGTERM back inside the block; its name is found in what comes back."""
    held: list[str] = []

    def hold(number: int, frame: Any) -> None:
        if held and number == signal.SIGINT:
            raise KeyboardInterrupt(held[0])
        held.append(signal.Signals(number).name)

    with on_signals(hold):
        yield held


def raise_interrupt(number: int, _: Any) -> None:
    """Signal handler: KeyboardInterrupt with the signal's name. From then on SIGTERM is not heard.

    Launchers and process groups send SIGTERM again; only a second Ctrl-C is a second wish.
    """
    ignore_terminations()
    raise KeyboardInterrupt(signal.Signals(number).name)


def ignore_terminations() -> None:
    """Hear no further SIGTERM, with what a stopped process still has to do."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Stopper:
    """Passes the first SIGINT or SIGTERM on, as SIGTERM, to every process that this one has started.

    They have `grace_seconds` to end and are killed then, or by a second SIGINT at once. A process that gave
    itself another parent, as daemons do, is not reached if it did so before the signal.
    """

    def __init__(self, grace_seconds: float = GRACE_SECONDS, *, announce: bool = True) -> None:
        self.grace_seconds, self.announce = grace_seconds, announce
        self.stopped_by, self._has_heard = "", False
        self._known: set[psutil.Process] = set()
        self._kill, self._over = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen inside the block; after a signal, no process is left at its end."""
        with on_signals(self._stop):
            try:
                yield
            finally:
                self._over.set()
                if self._thread:
                    self._thread.join()

    def _stop(self, number: int, _: Any) -> None:
        if self._has_heard:
            if number == signal.SIGINT:
                self._kill.set()
            return
        self._has_heard, self.stopped_by = True, signal.Signals(number).name
        self._begin()
        if self.announce:
            print(
                f"\n{self.stopped_by}: stopping the running step; Ctrl-C once more ends it at once.",
                flush=True,
            )

    def stop(self, reason: str) -> None:
        """Do, for another reason, what a signal would; where one comes too, that is the reason."""
        self.stopped_by = self.stopped_by or reason
        self._begin()

    def _begin(self) -> None:
        if not self._thread:
            self._thread = threading.Thread(target=self._end_all)
            self._thread.start()

    def _end_all(self) -> None:
        end = time.monotonic() + self.grace_seconds
        while (alive := self._find()) or not self._over.is_set():
            if time.monotonic() > end or self._kill.is_set():
                for process in alive:
                    _send(process, signal.SIGKILL)
            time.sleep(POLL_SECONDS)

    def _find(self) -> list[psutil.Process]:
        """Those alive; one that is new, perhaps started after the signal, gets SIGTERM."""
        found = set(psutil.Process().children(recursive=True))
        for process in found - self._known:
            _send(process, signal.SIGTERM)
        self._known |= found
        return [process for process in self._known if _is_alive(process)]


def _send(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
