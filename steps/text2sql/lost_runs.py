"""Runs whose process was killed before it could end them."""

import mlflow
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_PROJECT_BACKEND

from steps.text2sql import liveness
from steps.text2sql.store_names import TAG_FAILURE

LOST = "its process ended without a word: it was killed, or the machine went down"


def end_lost_runs() -> None:
    """Set runs of this experiment to FAILED whose process on this machine was killed before it could.

    With them the steps that they had just started. Runs of living processes, or of processes of which this
    machine does not know, stay as they are.
    """
    client = mlflow.MlflowClient()
    experiment = mlflow.active_run().info.experiment_id
    found = client.search_runs([experiment], "attributes.status = 'RUNNING'")
    for run in filter(_is_lost, found):
        run_id = run.info.run_id
        if client.get_run(run_id).info.status == "RUNNING":  # else it has ended meanwhile
            client.set_tag(run_id, TAG_FAILURE, LOST)
            client.set_terminated(run_id, "FAILED")
            print(f"\nRun {run_id} ({run.info.run_name}) is FAILED now: {LOST}.", flush=True)
    for run in found:
        if liveness.state(run.info.run_id) == "gone":
            liveness.forget(run.info.run_id)


def _is_lost(run: Run) -> bool:
    """Whether nobody is left to end a run: neither its own process nor, if main started it, main's."""
    own = liveness.state(run.info.run_id)
    main = liveness.state(run.data.tags.get(MLFLOW_PARENT_RUN_ID, ""))
    if own == "gone":
        return main != "alive"
    is_here = run.data.tags.get(MLFLOW_PROJECT_BACKEND) == "local"  # else main may have sent it elsewhere
    return own == "unknown" and main == "gone" and is_here
