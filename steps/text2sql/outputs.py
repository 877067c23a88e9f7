"""What a training leaves: whole on this machine's disk first, then logged, with the store slow or away."""

import math
import shlex
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from peft import PeftModel
from transformers import PreTrainedTokenizerFast

from steps.text2sql import active_run, adapter, artifacts, resume, run_log, store_names
from steps.text2sql.background import Background
from steps.text2sql.errors import UserError
from steps.text2sql.manifest import AdapterManifest
from steps.text2sql.run_folder import (
    PREFIX,
    DiskError,
    check_cache,
    run_folder,
    saved_in,
    step_of,
    write_folder,
)
from steps.text2sql.run_log import Point

FINISHED_SECONDS = 300.0
# A stopped step has 25 seconds in all.
STOPPED_SECONDS = 10.0
POINTS_A_REQUEST = 100


class NoOutputs:
    """What `Outputs` is to all but the first of several processes: nothing is kept."""

    def __init__(self, model: PeftModel, recipe: dict[str, str]) -> None:
        self.model, self.recipe = model, recipe

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log nothing."""

    def save_checkpoint(self, step: int, write_state: Callable[[Path], None]) -> None:
        """Save nothing."""

    def keep_adapter(self, step: int) -> None:
        """Keep nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for nothing."""


class Outputs:
    """Adapter, checkpoints and curves of one run.

    `describe` gives the manifest of the adapter after so many steps; `keep` bounds the checkpoints, on the
    disk and in the store. Nothing is said to be logged before the store took it. A context manager: its end
    waits for the store.

    Raises:
        UserError: this machine has no place for them, before anything is trained.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerFast,
        describe: Callable[[int], AdapterManifest],
        *,
        recipe: dict[str, str],
        keep: int,
    ) -> None:
        self.model, self.tokenizer, self.describe = model, tokenizer, describe
        self.recipe, self.keep, self._keep_on_disk = recipe, keep, keep
        self.run_id = active_run.run_id()
        self.folder = run_folder(self.run_id)
        check_cache(self.folder)
        self.background = Background()
        self._points: list[Point] = []
        # Nothing begins to be logged while it is being removed.
        self._removing = threading.Lock()
        self._uploading: Path | None = None

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Log points of curves soon, all of them and in order."""
        self._points.append(Point(metrics, step, time.time_ns() // 1_000_000))
        self.background.submit("metrics", self._send_points)

    def _send_points(self) -> None:
        # Not as long as there are any: a training faster than the store would keep checkpoints waiting.
        for _ in range(math.ceil(len(self._points) / POINTS_A_REQUEST)):
            batch = self._points[:POINTS_A_REQUEST]
            run_log.log_points(self.run_id, batch)
            del self._points[: len(batch)]

    def save_checkpoint(self, step: int, write_state: Callable[[Path], None]) -> None:
        """Keep a checkpoint, which register accepts as an adapter; a full disk does not end the training."""

        def fill(folder: Path) -> None:
            write_state(folder)
            resume.write_recipe(self.recipe, folder)
            adapter.save(self.model, self.tokenizer, self.describe(step), folder)

        target = self.folder / f"{PREFIX}{step}"
        try:
            write_folder(target, fill)
        except DiskError as error:
            print(f"\nNo checkpoint of step {step}, training goes on: {error}", flush=True)
            return
        self._remove_old()
        self.background.submit("checkpoint", lambda: self._log_checkpoint(target))

    def _remove_old(self) -> None:
        with self._removing:
            for old in saved_in(self.folder)[self._keep_on_disk :]:
                if old != self._uploading:
                    shutil.rmtree(old, ignore_errors=True)

    def _log_checkpoint(self, folder: Path) -> None:
        with self._removing:
            if not folder.exists():  # a newer one has taken its place
                return
            self._uploading = folder
        path = f"{store_names.CHECKPOINTS}/{folder.name}"
        artifacts.log_folder(self.run_id, folder, path)
        # In one piece: the training prints from another thread.
        print(f"\nCheckpoint: runs:/{self.run_id}/{path}\n", end="", flush=True)
        artifacts.keep_newest(self.run_id, store_names.CHECKPOINTS, self.keep, age=step_of)
        self._uploading = None
        self._remove_old()

    def keep_adapter(self, step: int) -> None:
        """Write the adapter to the disk, and log it.

        Raises:
            UserError: the disk or the store does not take it; naming the folder and the command to log it.
        """
        target = self.folder / store_names.ADAPTER
        try:
            self._write_adapter(target, step)
        except DiskError as error:
            kept = saved_in(self.folder)
            rest = f"{kept[0].name} is kept" if kept else "no checkpoint could be written either"
            way = f"go on from it with resume_from={self.run_id}" if kept else "train again"
            raise UserError(
                f"the adapter could not be written to {target}: {error}; {rest}. Make room, then {way}."
            ) from error
        try:
            artifacts.log_folder(self.run_id, target, store_names.ADAPTER)
        except Exception as error:  # whatever a store raises
            words = ["mlflow", "artifacts", "log-artifacts", "--local-dir", str(target)]
            words += ["--run-id", self.run_id, "--artifact-path", store_names.ADAPTER]
            raise UserError(
                f"the adapter is trained, but the store did not take it: {error}. It is whole in {target}; "
                f"log it with:\n  {shlex.join(words)}"
            ) from error

    def _write_adapter(self, target: Path, step: int) -> None:
        def fill(folder: Path) -> None:
            adapter.save(self.model, self.tokenizer, self.describe(step), folder)

        try:
            write_folder(target, fill)
        except DiskError:
            self._keep_on_disk = 1  # the room of older checkpoints is worth less than the adapter
            self._remove_old()
            write_folder(target, fill)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until all is logged; what the store does not take in time is said, and stays on the disk."""
        left = self.background.close(STOPPED_SECONDS if kind else FINISHED_SECONDS)
        if left:
            kept = ", ".join(path.name for path in saved_in(self.folder)) or "no checkpoint"
            print(f"\nNot logged: {', '.join(left)}. On the disk in {self.folder}: {kept}.", flush=True)
        elif kind is None:
            self.remove()

    def remove(self) -> None:
        """Remove what is on this machine's disk, once it is logged."""
        shutil.rmtree(self.folder, ignore_errors=True)
