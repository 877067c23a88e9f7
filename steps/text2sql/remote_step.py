"""A step sent elsewhere by one of MLflow's project backends, which must take projects with a python_env."""

import json
from collections.abc import Mapping

import mlflow
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from steps.text2sql import active_run, child_runs, processes, project_source, store_names
from steps.text2sql.errors import UserError


def run(step: str, values: Mapping[str, str], *, backend: str, config: str, fingerprint: str) -> Run:
    """Run a step there as a child of this run, and wait for its end.

    `config` is JSON text, or the path of a JSON file. The place must reach the tracking store.

    Raises:
        UserError: the backend did not take it, or it failed there.
        KeyboardInterrupt: a signal came, and the run there is cancelled.
    """
    problem, submitted = f"project_backend={backend}: {step}", None
    try:
        with processes.held_signals() as held:  # a run that is just being sent could not be cancelled
            submitted = _send(step, values, backend, config, problem)
        if held:
            raise KeyboardInterrupt(held[0])
        _mark(submitted.run_id, fingerprint)
        print(f"  runs as {submitted.run_id} on {backend}", flush=True)
        succeeded = submitted.wait()
    except KeyboardInterrupt as error:
        if submitted:
            submitted.cancel()
            child_runs.end_other(
                submitted.run_id, "KILLED", {store_names.TAG_STOPPED_BY: str(error) or "SIGINT"}
            )
        raise
    if not succeeded:
        reason = mlflow.get_run(submitted.run_id).data.tags.get(store_names.TAG_FAILURE, "see its log there")
        child_runs.end_other(submitted.run_id, "FAILED", {store_names.TAG_FAILURE: reason})
        raise UserError(f"{problem} failed, run {submitted.run_id}: {reason}")
    child_runs.end_other(submitted.run_id, "FINISHED", {})
    return mlflow.get_run(submitted.run_id)


def _send(
    step: str, values: Mapping[str, str], backend: str, config: str, problem: str
) -> mlflow.projects.SubmittedRun:
    try:
        return mlflow.projects.run(
            uri=str(project_source.PROJECT),
            entry_point=step,
            parameters=dict(values),
            backend=backend,
            backend_config=json.loads(config) if config.startswith("{") else config or {},
            run_name=step,
            synchronous=False,
        )
    except Exception as error:  # whatever a plugin raises
        raise UserError(f"{problem} could not be sent: {error}") from error


def _mark(run_id: str, fingerprint: str) -> None:
    client = mlflow.MlflowClient()
    client.set_tag(run_id, MLFLOW_PARENT_RUN_ID, active_run.run_id())
    client.set_tag(run_id, store_names.TAG_FINGERPRINT, fingerprint)
