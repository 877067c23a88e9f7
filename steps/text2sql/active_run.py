"""The run that this process is a part of."""

import os

import mlflow
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID


def run_id() -> str:
    """Id of this step's run."""
    return mlflow.active_run().info.run_id


def experiment_id() -> str:
    """Id of the experiment of this step's run."""
    return mlflow.active_run().info.experiment_id


def tags() -> dict[str, str]:
    """Tags of this run as they are now."""
    return mlflow.get_run(run_id()).data.tags


def is_chained() -> bool:
    """Whether main started this step."""
    return MLFLOW_PARENT_RUN_ID in tags()


def artifact_uri(path: str) -> str:
    """`runs:/` URI of an artifact of this run."""
    return f"runs:/{run_id()}/{path}"


def store_uri() -> str:
    """Where runs go."""
    return mlflow.get_tracking_uri()


def clear_run_id() -> dict[str, str]:
    """Environment for a process that must not find this run."""
    return {name: value for name, value in os.environ.items() if name != "MLFLOW_RUN_ID"}
