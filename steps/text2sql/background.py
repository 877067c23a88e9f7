"""Work for a store that may be slow or away, done beside the training by one thread, and tried until done."""

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
# Enough for the longest pause; a thousand failures in a row would double it beyond what a float holds.
MAX_DOUBLINGS = 10


class Background:
    """Runs named tasks one after the other; one that fails is tried again until `close` gives up.

    Bounded: a task that waits is replaced by a newer one of its name. Tasks must bear to be repeated.
    """

    def __init__(self, first_pause_seconds: float = FIRST_PAUSE_SECONDS) -> None:
        self._first_pause = first_pause_seconds
        self._tasks: dict[str, Callable[[], None]] = {}
        self._running = ""
        self._closing = threading.Event()
        self._gave_up = False
        self._changed = threading.Condition()
        # A daemon: a store that never answers must not keep the process alive.
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, name: str, task: Callable[[], None]) -> None:
        """Do this soon."""
        with self._changed:
            self._tasks[name] = task
            self._changed.notify_all()

    def close(self, timeout_seconds: float) -> list[str]:
        """Wait for all tasks, at most so long; the names of those that are not done come back."""
        self._closing.set()
        with self._changed:
            self._changed.wait_for(lambda: not self._left(), timeout=timeout_seconds)
            left = self._left()
            self._tasks.clear()
            self._gave_up = True  # also on the one that runs
        return left

    def _left(self) -> list[str]:
        return sorted({*self._tasks, self._running} - {""})

    def _work(self) -> None:
        failures = 0
        while True:
            name, task = self._take()
            try:
                task()
            except Exception as error:  # whatever a store raises
                if not failures:
                    logger.warning(
                        "\n%s could not be logged and is tried again; work goes on: %s", name, error
                    )
                self._end(name, again=task)
                self._pause(failures)
                failures += 1
            else:
                if failures:
                    logger.warning("\n%s is logged now", name)
                failures = 0
                self._end(name)

    def _take(self) -> tuple[str, Callable[[], None]]:
        with self._changed:
            self._changed.wait_for(lambda: self._tasks)
            self._running = next(iter(self._tasks))
            return self._running, self._tasks.pop(self._running)

    def _end(self, name: str, *, again: Callable[[], None] | None = None) -> None:
        with self._changed:
            self._running = ""
            if again and not self._gave_up:
                self._tasks.setdefault(name, again)
            self._changed.notify_all()

    def _pause(self, failures: int) -> None:
        pause = self._first_pause * 2 ** min(failures, MAX_DOUBLINGS)
        if self._closing.wait(min(pause, LONGEST_PAUSE_SECONDS)):
            time.sleep(self._first_pause)
