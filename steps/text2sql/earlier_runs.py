"""Runs of a step with a given fingerprint that began before this run."""

import mlflow
from mlflow.entities import Run

from steps.text2sql import artifacts, liveness
from steps.text2sql.errors import UserError
from steps.text2sql.model_versions import model_version
from steps.text2sql.store_names import (
    ADAPTER,
    DATASET,
    PREDICTIONS,
    TAG_FINGERPRINT,
    TAG_MODEL_NAME,
    TAG_MODEL_VERSION,
)


def finished_before(step: str, fingerprint: str) -> Run | None:
    """The newest run with this fingerprint that had finished when this one began, if its results remain."""
    found = _with_fingerprint(fingerprint, "attributes.status = 'FINISHED'")
    began = mlflow.active_run().info.start_time
    return next((run for run in found if run.info.end_time < began and remains(step, run)), None)


def unfinished_before(fingerprint: str) -> list[str]:
    """Ids of runs with this fingerprint that began before this run and did not finish, newest first.

    A run whose process is at work on this machine is not among them.
    """
    found = _with_fingerprint(fingerprint, "attributes.status != 'FINISHED'")
    began = mlflow.active_run().info.start_time
    earlier = [run.info.run_id for run in found if run.info.start_time < began]
    return [run_id for run_id in earlier if liveness.state(run_id) != "alive"]


def _with_fingerprint(fingerprint: str, status: str) -> list[Run]:
    return mlflow.MlflowClient().search_runs(
        [mlflow.active_run().info.experiment_id],
        f"tags.{TAG_FINGERPRINT} = '{fingerprint}' and {status}",
        order_by=["attributes.start_time DESC"],
    )


def remains(step: str, run: Run) -> bool:
    """Whether what a finished run made is still there, by a look at names and sizes."""
    run_id = run.info.run_id
    if step == "register":
        return _is_registered(run)
    if step == "evaluate":
        return PREDICTIONS in artifacts.listed(run_id)
    return artifacts.is_complete(run_id, {"prepare_data": DATASET, "train": ADAPTER}[step])


def _is_registered(run: Run) -> bool:
    """Whether the version that a run registered is still that very one; a name can be made anew."""
    try:
        version = model_version(run.data.tags[TAG_MODEL_NAME], run.data.tags[TAG_MODEL_VERSION])
    except (UserError, KeyError):
        return False
    return version.run_id == run.info.run_id
