"""A run's page in MLflow's user interface: its name, its description, its address."""

from collections.abc import Mapping
from urllib.parse import quote

import mlflow
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

from steps.text2sql import processes
from steps.text2sql.active_run import is_chained, run_id
from steps.text2sql.child_runs import rename
from steps.text2sql.ranks import of_first_process
from steps.text2sql.run_log import choices
from steps.text2sql.store_names import TAG_MODEL_NAME, TAG_MODEL_VERSION


def address() -> tuple[str, str]:
    """The tracking URI, and this run in its user interface: that of `mlflow ui` for a local store."""
    store = mlflow.get_tracking_uri()
    host = store.rstrip("/") if store.startswith("http") else "http://127.0.0.1:5000"
    return store, f"{host}/#/experiments/{mlflow.active_run().info.experiment_id}/runs/{run_id()}"


def name_run(name: str) -> None:
    """Name this run in the place of MLflow's random words; a name that the user or main gave it stays."""
    is_given = any(word.split("=")[0] == "--run-name" for word in processes.users_command())
    if name and not is_chained() and not is_given:
        rename(run_id(), name)


def describe(text: str) -> None:
    """Set what the run's page shows as its description, Markdown."""
    mlflow.set_tag(MLFLOW_RUN_NOTE, text)


@of_first_process
def describe_step() -> None:
    """Describe a step by the model version that it is about, the run that started it, and what it chose.

    Links come first: the page shows five lines before "Show more".
    """
    run = mlflow.get_run(run_id())
    tags, lines = run.data.tags, []
    if TAG_MODEL_VERSION in tags:
        lines.append(f"* model: {version_link(tags[TAG_MODEL_NAME], tags[TAG_MODEL_VERSION])}")
    if MLFLOW_PARENT_RUN_ID in tags:
        lines.append(f"* started by {run_link(mlflow.get_run(tags[MLFLOW_PARENT_RUN_ID]))}")
    lines += [f"* {name}: {text}" for name, text in sorted(choices(run).items())]
    if lines:
        describe("\n".join(lines))


def describe_steps(headline: str, runs: Mapping[str, Run]) -> None:
    """Describe main's run by what came of it, and by links to its steps with their times."""
    steps = [
        f"{run_link(run, step)} ({(run.info.end_time - run.info.start_time) / 1000:.0f} s)"
        for step, run in runs.items()
    ]
    describe(f"{headline}\n\n{' → '.join(steps)}")


def run_link(run: Run, text: str = "") -> str:
    """Markdown link to a run's page, from any page of MLflow's user interface."""
    return f"[{text or run.info.run_name}](#/experiments/{run.info.experiment_id}/runs/{run.info.run_id})"


def version_link(name: str, version: str) -> str:
    """Markdown link to a model version's page."""
    return f"[{name} version {version}](#/models/{quote(name, safe='')}/versions/{version})"
