"""Where this project came from, as MLflow noted it: a folder, or a commit of a git URL."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path

import mlflow
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_BRANCH,
    MLFLOW_GIT_COMMIT,
    MLFLOW_GIT_REPO_URL,
    MLFLOW_PROJECT_ENV,
    MLFLOW_SOURCE_NAME,
)

from steps.text2sql import active_run

PROJECT = Path(__file__).parents[2]
SOURCE_TAGS = (MLFLOW_SOURCE_NAME, MLFLOW_GIT_COMMIT, MLFLOW_GIT_BRANCH, MLFLOW_GIT_REPO_URL)


@functools.cache
def _tags(run: str) -> Mapping[str, str]:
    return mlflow.get_run(run).data.tags


def read() -> None:
    """Read from this run all that is said here of the project: the store may be away when it is asked for."""
    _tags(active_run.run_id())


def _tag(name: str, otherwise: str = "") -> str:
    return _tags(active_run.run_id()).get(name, otherwise)


def uri() -> str:
    """What `mlflow run` takes to run this project again: the git URL it came from, or this folder."""
    source = _tag(MLFLOW_SOURCE_NAME)
    return source if re.match(r"(https?|ssh|git)://|git@", source) else str(PROJECT)


def version() -> list[str]:
    """`-v <commit>` for a git URL, nothing for a folder, where it would check that commit out."""
    return ["-v", git_commit()] if uri() != str(PROJECT) else []


def git_commit() -> str:
    """Commit of the project as MLflow noted it on this run; empty outside a git checkout."""
    return _tag(MLFLOW_GIT_COMMIT)


def env_manager() -> str:
    """Environment manager that `mlflow run` was given for this run."""
    return _tag(MLFLOW_PROJECT_ENV, "local")


def take_source_of(parent: str) -> None:
    """Note on a step's run where the project came from: main starts it from a folder, perhaps a clone."""
    tags = mlflow.get_run(parent).data.tags
    mlflow.set_tags({name: tags[name] for name in SOURCE_TAGS if name in tags})
