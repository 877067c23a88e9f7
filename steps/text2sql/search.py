"""The search for a recipe: what is tried, which trials are stopped early, and how a search goes on.

Optuna keeps the trials in a SQLite file. One process at a time: a trial that is there unfinished is taken for
one that was interrupted.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from steps.text2sql import validations
from steps.text2sql.errors import UserError

# So many trials end before others are measured by them.
UNSTOPPED_TRIALS = 3
VALUES, FAILED = "values", "failed"
STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped early", TrialState.FAIL: "failed"}
# (position of a validation in its training, loss) to whether the training should stop.
ShouldStop = Callable[[int, float], bool]
# (number, values, should_stop) to the last validation's loss, or None if it was stopped.
Train = Callable[[int, dict[str, str], ShouldStop], float | None]


class Space(NamedTuple):
    """What is searched: lowest and highest value of each, both among those that are tried."""

    learning_rate: tuple[float, float]
    lora_r: tuple[int, int]
    max_steps: tuple[int, int]

    def suggest(self, trial: Trial) -> dict[str, str]:
        """The next values, as text for a command: rates of three digits, ranks that are powers of two."""
        rate = trial.suggest_float("learning_rate", *self.learning_rate, log=True)
        return {
            "learning_rate": f"{rate:.3g}",
            "lora_r": str(trial.suggest_categorical("lora_r", ranks(*self.lora_r))),
            "max_steps": str(trial.suggest_int("max_steps", *self.max_steps, log=True)),
        }


def ranks(low: int, high: int) -> list[int]:
    """Powers of two from low to high, and both ends."""
    powers = {2**n for n in range(11)}
    return sorted({low, high} | {power for power in powers if low <= power <= high})


class Best(NamedTuple):
    """The trial of lowest loss: its values, as text for a command."""

    number: int
    values: dict[str, str]
    loss: float


def open_storage(file: Path) -> optuna.storages.RDBStorage:
    """The SQLite file that keeps searches, made where there is none.

    Raises:
        UserError: it is something else, or of another version of Optuna.
    """
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{quote(str(file))}")
        storage.get_all_studies()  # what only has tables of the same names fails here
        return storage
    except Exception as error:  # whatever Optuna and the library below it raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"storage={file}: keeps no searches: {reason}; give a file that is not there yet."
        ) from error


class Search:
    """A search that a file keeps; with the same file and name it goes on where it was."""

    def __init__(self, storage: Path, name: str, space: Space, *, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.seed = space, seed
        self.study = optuna.create_study(
            storage=open_storage(storage),
            study_name=name,
            load_if_exists=True,
            direction="minimize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=UNSTOPPED_TRIALS),
        )

    def run(self, trials: int, train: Train) -> None:
        """Try values until so many trials are done, earlier ones among them.

        A training that fails is a trial that was done, once another has shown that trainings can succeed.

        Raises:
            UserError: that of the first training.
        """
        self._give_up_interrupted()
        while len(self.done()) < trials:
            # A seed for each trial: a search that was interrupted tries again what it was trying, and then
            # what it would have tried.
            self.study.sampler = optuna.samplers.TPESampler(
                seed=(self.seed + len(self.done())) % 2**32, n_startup_trials=UNSTOPPED_TRIALS
            )
            self._try(self.study.ask(), train)

    def _give_up_interrupted(self) -> None:
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            self.study.tell(trial.number, state=TrialState.FAIL)

    def _try(self, trial: Trial, train: Train) -> None:
        values = self.space.suggest(trial)
        trial.set_user_attr(VALUES, values)

        def should_stop(position: int, loss: float) -> bool:
            trial.report(loss, position)
            is_last = position >= validations.count(int(values["max_steps"]))  # nothing is left to save
            return not math.isfinite(loss) or (not is_last and trial.should_prune())

        try:
            loss = train(len(self.done()) + 1, values, should_stop)
        except UserError as error:
            if not self.study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED]):
                raise
            trial.set_user_attr(FAILED, str(error))
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            stopped = loss is None or not math.isfinite(loss)
            self.study.tell(
                trial, None if stopped else loss, state=TrialState.PRUNED if stopped else TrialState.COMPLETE
            )

    def done(self) -> list[FrozenTrial]:
        """Trials that ended, stopped early and failed ones among them, in the order of their start."""
        return [
            trial
            for trial in self.study.get_trials()
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or FAILED in trial.user_attrs
        ]

    def table(self) -> list[dict[str, Any]]:
        """A row for each trial that is done: its number from 1, values, state and last loss."""
        return [
            {
                "trial": number,
                **trial.user_attrs[VALUES],
                "state": STATES[trial.state],
                "loss": trial.value if trial.value is not None else math.nan,
            }
            for number, trial in enumerate(self.done(), start=1)
        ]

    def best(self) -> Best:
        """The trial of lowest loss.

        Raises:
            UserError: no trial has one.
        """
        if not self.study.get_trials(states=[TrialState.COMPLETE]):
            raise UserError("no trial ended with a finite validation loss; give lower learning rates.")
        best = self.study.best_trial
        number = [trial.number for trial in self.done()].index(best.number) + 1
        return Best(number, best.user_attrs[VALUES], best.value)
