"""What evaluate runs left: reading one, and finding that of a version on given rows."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

import mlflow
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from steps.text2sql import model_versions, reuse, store_names
from steps.text2sql.errors import UserError
from steps.text2sql.gate import Evaluation, Row, Verdicts
from steps.text2sql.params import EvaluateParams
from steps.text2sql.scoring import BASE_PREFIX, EXECUTION_ACCURACY

ROW_COLUMNS = ("question", "context", "gold")
TIMEOUT = "query_timeout_seconds"
WHAT_IS_SCORED = {"model_uri", "dataset_uri", "dataset", "eval_rows"}


def read(run_id: str, version: ModelVersion) -> Evaluation:
    """Read a finished evaluate run, which must be of that very version.

    Raises:
        UserError: there is no such run, it is of something else or not finished, or has no usable table.
    """
    run = _get(run_id)
    found = (run.data.tags.get(store_names.TAG_MODEL_NAME), run.data.tags.get(store_names.TAG_MODEL_VERSION))
    if found != (version.name, str(version.version)):
        raise _unusable(run_id, version, f"is no evaluation of {version.name} version {version.version}")
    if run.info.status != "FINISHED":
        raise _unusable(run_id, version, f"is {run.info.status}, not FINISHED")
    return _evaluation(run, version)


def same_rows(version: ModelVersion, run_id: str, evaluation: Evaluation) -> Evaluation | None:
    """The newest finished evaluation of a version as that run's, if there is one.

    On the same rows, with the same limit on queries, and by the same code: another might judge otherwise.
    """
    own = _get(run_id)
    tags = {store_names.TAG_MODEL_NAME: version.name, store_names.TAG_MODEL_VERSION: version.version}
    tags |= {
        name: own.data.tags.get(name, "") for name in (store_names.TAG_EVALUATED_ROWS, store_names.TAG_CODE)
    }
    wanted = ["attributes.status = 'FINISHED'", *(f"tags.`{name}` = '{tags[name]}'" for name in tags)]
    wanted.append(f"params.{TIMEOUT} = '{own.data.params.get(TIMEOUT, '')}'")
    runs = mlflow.search_runs(
        search_all_experiments=True,
        filter_string=" and ".join(wanted),
        order_by=["attributes.start_time DESC"],
        max_results=1,
        output_format="list",
    )
    try:
        found = read(runs[0].info.run_id, version) if runs else None
    except UserError:  # its artifacts are gone
        return None
    return found if found and found.tuned.keys() == evaluation.tuned.keys() else None


def check_code(run_id: str) -> None:
    """Refuse an evaluation that other code than this scored, where another is to be compared with it.

    Raises:
        UserError: it did.
    """
    tags = _get(run_id).data.tags
    if tags.get(store_names.TAG_CODE) != reuse.code_digest():
        name, number = tags[store_names.TAG_MODEL_NAME], tags[store_names.TAG_MODEL_VERSION]
        raise UserError(
            f"evaluation_run_id={run_id}: was scored by another version of this project than the champion "
            f"would be now; {_again(f'models:/{name}/{number}')}"
        )


def settings(run_id: str) -> dict[str, str]:
    """How that run scored, as parameters of evaluate: all but the model and the rows."""
    names = {field.name for field in dataclasses.fields(EvaluateParams)} - WHAT_IS_SCORED
    logged = _get(run_id).data.params
    # MLflow logs a project's parameters as the words that the shell gets.
    return {name: "".join(shlex.split(logged[name])) for name in names & logged.keys()}


def _get(run_id: str) -> Run:
    try:
        return mlflow.get_run(run_id)
    except MlflowException as error:
        raise UserError(f"evaluation_run_id={run_id}: {error.message}") from error


def _evaluation(run: Run, version: ModelVersion) -> Evaluation:
    run_id = run.info.run_id
    try:
        table = mlflow.artifacts.load_dict(f"runs:/{run_id}/{store_names.PREDICTIONS}")
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        evaluation = Evaluation(run.data.metrics, _verdicts(rows), _verdicts(rows, BASE_PREFIX))
    except (MlflowException, OSError, ValueError, TypeError, KeyError) as error:
        problem = f"has no table of predictions ({store_names.PREDICTIONS}) that can be read: {error!r}"
        raise _unusable(run_id, version, problem) from error
    if not rows:
        raise _unusable(run_id, version, f"has an empty table of predictions ({store_names.PREDICTIONS})")
    return evaluation


def _verdicts(rows: list[Mapping[str, Any]], prefix: str = "") -> Verdicts:
    """Verdicts by row; of a row that occurs several times, whether all of them are right."""
    found: dict[Row, bool | None] = {}
    for row in rows:
        key = tuple(str(row[name]) for name in ROW_COLUMNS)
        verdict = row.get(prefix + EXECUTION_ACCURACY)
        # After MLflow's round trip a column with gaps is 1.0, 0.0 and NaN.
        verdict = bool(verdict) if verdict in (True, False) else None
        before = found.get(key, True)
        found[key] = None if None in (verdict, before) else verdict and before
    return found


def _unusable(run_id: str, version: ModelVersion, problem: str) -> UserError:
    return UserError(f"evaluation_run_id={run_id}: {problem}; {_again(model_versions.uri_of(version))}")


def _again(model_uri: str) -> str:
    return f"run: mlflow run . -e evaluate -P {shlex.quote(f'model_uri={model_uri}')} -P dataset_uri=…"
