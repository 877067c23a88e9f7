"""From which checkpoint of which run a training goes on."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from steps.text2sql import artifacts, liveness, run_log, store_names
from steps.text2sql.errors import UserError
from steps.text2sql.run_folder import is_whole, run_folder, saved_in, step_of

RECIPE = "recipe.json"
# Where a training comes from, how often it reports, in how many processes and where: that does not change
# what it learns.
NO_RECIPE = frozenset(
    {
        "dataset_uri",
        "resume_from",
        "keep_checkpoints",
        "save_steps",
        "logging_steps",
        "validation_rows",
        "launch",
        "project_backend",
        "backend_config",
        "dry_run",
    }
)


def recipe_of(*values: Mapping[str, object]) -> dict[str, str]:
    """All that decides what a training learns, later values in place of earlier; it goes on with the same."""
    found = {name: value for one in values for name, value in one.items()}
    return {name: str(value) for name, value in found.items() if name not in NO_RECIPE}


@contextmanager
def checkpoint(run_id: str, recipe: Mapping[str, str]) -> Iterator[Path | None]:
    """Folder of the newest whole checkpoint of a run, on this machine or in the store; None without a run.

    Raises:
        UserError: there is none, its training had another recipe, or is at work on this machine.
    """
    if not run_id:
        yield None
        return
    if liveness.state(run_id) == "alive":
        raise UserError(f"resume_from={run_id}: is still at work on this machine; stop it first.")
    with tempfile.TemporaryDirectory() as scratch:
        found = newest_whole(run_id, Path(scratch))
        if found is None:
            if not run_log.exists(run_id):
                raise UserError(
                    f"resume_from={run_id}: is no run of this tracking store; give the id of a train run."
                )
            raise UserError(
                f"resume_from={run_id}: has no whole checkpoint, neither in the store nor in "
                f"{run_folder(run_id)}; give the id of a run of train that has, or leave resume_from out."
            )
        check_recipe(read_recipe(found), recipe, run_id)
        run_log.note_resumed(run_id, step_of(found))
        yield found


def can_go_on(run_id: str) -> bool:
    """Whether a run has a checkpoint that looks whole; those of the store are judged by names and sizes."""
    return any(map(is_whole, saved_in(run_folder(run_id)))) or any(
        artifacts.is_complete(run_id, path) for path in artifacts.listed(run_id, store_names.CHECKPOINTS)
    )


def forget(run_id: str) -> None:
    """Remove what is left on this machine of a training that another has ended, and of those before it."""
    while run_id:
        shutil.rmtree(run_folder(run_id), ignore_errors=True)
        run_id = run_log.resumed_from(run_id)


def newest_whole(run_id: str, scratch: Path) -> Path | None:
    """The newest checkpoint that is as its manifest says; torn ones are said and passed over."""
    local = {path.name: path for path in saved_in(run_folder(run_id))}
    logged = {Path(path).name for path in artifacts.listed(run_id, store_names.CHECKPOINTS)}
    for name in sorted(local.keys() | logged, key=step_of, reverse=True):
        if name in local and is_whole(local[name]):
            return local[name]
        if name in logged:
            folder = artifacts.download(f"runs:/{run_id}/{store_names.CHECKPOINTS}/{name}", scratch)
            if is_whole(folder):
                return folder
        print(f"\n{name} of run {run_id} is torn; the one before it is used.", flush=True)
    return None


def check_recipe(saved: Mapping[str, str], recipe: Mapping[str, str], run_id: str) -> None:
    """Refuse to go on with other values than those that the training began with.

    Raises:
        UserError: naming each.
    """
    changed = [
        f"{name}={recipe.get(name)} (it was {saved.get(name)})"
        for name in sorted(saved.keys() | recipe.keys())
        if saved.get(name) != recipe.get(name)
    ]
    if changed:
        raise UserError(
            f"resume_from={run_id}: was trained with other values: {', '.join(changed)}. Give the same "
            "ones, or train from the start, without resume_from."
        )


def write_recipe(recipe: Mapping[str, str], folder: Path) -> None:
    """Write into a checkpoint what its training was told."""
    (folder / RECIPE).write_text(json.dumps(dict(recipe), indent=2), encoding="utf-8")


def read_recipe(folder: Path) -> dict[str, str]:
    """What `write_recipe` wrote.

    Raises:
        UserError: it is something else.
    """
    try:
        return dict(json.loads((folder / RECIPE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder.name}: is no checkpoint of train, its {RECIPE} says: {error}.") from error
