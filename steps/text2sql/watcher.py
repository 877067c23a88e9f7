"""Follows a training's validation losses from another process, and stops it when it is not worth its time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from steps.text2sql import child_runs, store_names
from steps.text2sql.processes import Stopper
from steps.text2sql.search import ShouldStop

POLL_SECONDS = 1.0
STOPPED_EARLY = "stopped early"


class Watcher:
    """Watches the training that a run starts next as its child; `child` is its run then.

    `should_stop` is asked once for every validation: its position, from 1, and its loss.
    """

    def __init__(self, parent: str, should_stop: ShouldStop, *, name: str) -> None:
        self.parent, self.should_stop, self.name = parent, should_stop, name
        self.child = ""
        self._before = child_runs.newest_child(parent, "train")
        self._seen = 0

    @contextmanager
    def watching(self, stopper: Stopper) -> Iterator[None]:
        """Watch inside the block, and have `stopper` stop the training."""
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(stopper, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _watch(self, stopper: Stopper, over: threading.Event) -> None:
        while not over.wait(POLL_SECONDS):
            if self.look():
                stopper.stop(STOPPED_EARLY)
                return

    def look(self) -> bool:
        """Whether the training should stop, by what it has logged since the last look."""
        losses: list[float] = []
        with suppress(Exception):  # whatever a store raises that is busy or away: they are seen next time
            losses = self._losses()
        new = list(enumerate(losses, start=1))[self._seen :]
        self._seen = max(self._seen, len(losses))
        return any([self.should_stop(position, loss) for position, loss in new])

    def _losses(self) -> list[float]:
        if not self.child:
            self.child = self._find()
        return child_runs.curve(self.child, store_names.EVAL_LOSS) if self.child else []

    def _find(self) -> str:
        found = child_runs.newest_child(self.parent, "train")
        if not found or found == self._before:
            return ""
        child_runs.rename(found, self.name)
        return found
