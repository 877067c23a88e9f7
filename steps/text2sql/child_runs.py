"""Runs of steps that this run starts: starting, finding, watching and ending them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import mlflow
from mlflow.entities import Run, RunStatus
from mlflow.exceptions import ExecutionException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_PROJECT_ENTRY_POINT

from steps.text2sql import processes
from steps.text2sql.active_run import is_chained, run_id
from steps.text2sql.errors import Interrupted, UserError
from steps.text2sql.project_source import PROJECT
from steps.text2sql.store_names import TAG_FAILURE, TAG_STOPPED_BY

Watch = Callable[[processes.Stopper], AbstractContextManager]


def run(step: str, values: Mapping[str, str], watch: Watch = nullcontext) -> Run:
    """Run a step as a child of this run, in this environment, a process of its own.

    A signal is passed on to all its processes. `watch` runs around it, and may stop it.

    Raises:
        UserError: it failed; its own message stands above on the screen.
        Interrupted: a signal came, and no process of the step is left.
    """
    stopper = processes.Stopper(announce=not is_chained())  # else main has said it
    try:
        with stopper.listening(), watch(stopper):
            submitted = mlflow.projects.run(
                uri=str(PROJECT),
                entry_point=step,
                parameters=dict(values),
                env_manager="local",
                run_name=step,
            )
    except ExecutionException as error:
        # One that was asked to stop itself, or noticed first that `mlflow run` is gone, has said so.
        stopped_by = stopper.stopped_by or _tag(step, TAG_STOPPED_BY)
        reason = end_child(step, stopped_by=stopped_by)
        if not stopped_by:
            raise UserError(f"{step} failed: {reason}") from error
        raise Interrupted(stopped_by) from error
    if stopper.stopped_by:
        raise Interrupted(stopper.stopped_by)
    return mlflow.get_run(submitted.run_id)


def newest_child(parent: str, step: str) -> str:
    """Id of the run `step` that a run started last, from any thread; empty if there is none."""
    client = mlflow.MlflowClient()
    found = client.search_runs(
        [client.get_run(parent).info.experiment_id],
        f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}' and tags.`{MLFLOW_PROJECT_ENTRY_POINT}` = '{step}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return found[0].info.run_id if found else ""


def _tag(step: str, tag: str) -> str:
    """A tag of this run's newest child `step`; empty where it has none, or there is no such child."""
    found = newest_child(run_id(), step)
    return mlflow.get_run(found).data.tags.get(tag, "") if found else ""


def curve(run: str, metric: str) -> list[float]:
    """All values of a metric that a run has logged so far, by step, from any thread."""
    history = mlflow.MlflowClient().get_metric_history(run, metric)
    return [point.value for point in sorted(history, key=lambda point: point.step)]


def rename(run: str, name: str) -> None:
    """Give a run another name, from any thread."""
    mlflow.MlflowClient().update_run(run, name=name)


def end_child(step: str, *, stopped_by: str = "") -> str:
    """Set the end of this run's newest child `step`, whose process has ended without success.

    MLflow wrote FAILED, whatever the step itself had written; with `stopped_by` it becomes KILLED. The reason
    of the child's failure comes back.
    """
    client, found = mlflow.MlflowClient(), newest_child(run_id(), step)
    if not found:  # it was stopped before its run was made
        return ""
    child = client.get_run(found)
    if stopped_by:
        client.set_tag(child.info.run_id, TAG_STOPPED_BY, stopped_by)
        client.set_terminated(child.info.run_id, "KILLED")
        return ""
    reason = child.data.tags.get(TAG_FAILURE, "")
    if not reason:
        reason = "its process ended without saying why; the system kills one when memory runs out"
        client.set_tag(child.info.run_id, TAG_FAILURE, reason)
    return reason


def end_other(run: str, status: str, tags: Mapping[str, str]) -> None:
    """Set the end of a run whose process is elsewhere, unless it has set one itself and well."""
    client = mlflow.MlflowClient()
    for name, value in tags.items():
        client.set_tag(run, name, value)
    if status == "KILLED" or not RunStatus.is_terminated(
        RunStatus.from_string(client.get_run(run).info.status)
    ):
        client.set_terminated(run, status)
