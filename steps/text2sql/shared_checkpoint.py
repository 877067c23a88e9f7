"""The checkpoint from which all processes of a training go on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from steps.text2sql import collectives, resume
from steps.text2sql.errors import UserError
from steps.text2sql.run_folder import run_folder, step_of


@contextmanager
def found(run_id: str, recipe: Mapping[str, str]) -> Iterator[Path | None]:
    """As `resume.checkpoint`, looked for once a machine.

    Raises:
        UserError: as there, or the machines found different ones.
    """
    with collectives.once_a_machine(lambda: resume.checkpoint(run_id, recipe)) as folder:
        step = step_of(folder) if folder else 0
        if collectives.largest(step) != collectives.smallest(step):
            raise UserError(
                f"resume_from={run_id}: the machines found checkpoints of different steps, {step} on this "
                f"one; copy the newest in {run_folder(run_id)} to all, or wait until the store has it."
            )
        yield folder
