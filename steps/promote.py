"""Make a model version the champion: by its scores, or by hand."""

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from steps.text2sql import tracking
from steps.text2sql.errors import UserError
from steps.text2sql.gate import Decision, Evaluation, decide
from steps.text2sql.params import PromoteParams


def main(params: PromoteParams) -> None:
    """Decide, move the alias or leave it, and keep the reason."""
    version = tracking.model_version(params.registered_model_name, params.version)
    champion = current_champion(params.registered_model_name)
    if params.evaluation_run_id:
        decision = judge(params, champion)
    else:
        decision = Decision(True, "moved by hand, without the gate")
    if decision.promote:
        mlflow.MlflowClient().set_registered_model_alias(version.name, tracking.CHAMPION, version.version)
    keep(decision, version, replaced=champion)


def current_champion(name: str) -> ModelVersion | None:
    """The version that has the alias now."""
    aliases = mlflow.MlflowClient().get_registered_model(name).aliases
    return tracking.model_version(name, aliases[tracking.CHAMPION]) if tracking.CHAMPION in aliases else None


def judge(params: PromoteParams, champion: ModelVersion | None) -> Decision:
    """Decide by the version's evaluation and the champion's newest one."""
    candidate = evaluation(
        "evaluation_run_id", params.evaluation_run_id, params.registered_model_name, params.version
    )
    if champion is None:
        return decide(candidate, None, floor=params.min_execution_accuracy)
    if str(champion.version) == str(params.version):
        return Decision(True, "is the champion already")
    scored = champion.tags.get(tracking.TAG_EVALUATION_RUN)
    if not scored:
        return Decision(
            False, f"the champion, version {champion.version}, has no evaluation; evaluate it first"
        )
    return decide(
        candidate,
        evaluation("evaluation run of the champion", scored, champion.name, champion.version),
        floor=params.min_execution_accuracy,
    )


def evaluation(what: str, run_id: str, name: str, version: int | str) -> Evaluation:
    """Read an evaluate run, which must be of that very version."""
    try:
        data = mlflow.get_run(run_id).data
    except MlflowException as error:
        raise UserError(f"{what}={run_id}: {error.message}") from error
    found = (data.tags.get(tracking.TAG_MODEL_NAME), data.tags.get(tracking.TAG_MODEL_VERSION))
    if found != (name, str(version)):
        raise UserError(
            f"{what}={run_id}: is no evaluation of {name} version {version}; run: "
            f"mlflow run . -e evaluate -P model_uri=models:/{name}/{version} -P dataset_uri=…"
        )
    return Evaluation(data.metrics, data.tags.get(tracking.TAG_EVALUATED_ROWS, ""))


def keep(decision: Decision, version: ModelVersion, *, replaced: ModelVersion | None) -> None:
    """Keep decision and reason as tags of the version and the run, and say them."""
    said = {
        tracking.TAG_PROMOTED: "yes" if decision.promote else "no",
        tracking.TAG_GATE_REASON: decision.reason,
    }
    if decision.promote and replaced and replaced.version != version.version:
        said[tracking.TAG_REPLACED] = replaced.version
    for name, value in said.items():
        mlflow.MlflowClient().set_model_version_tag(version.name, version.version, name, value)
    mlflow.set_tags(said)
    verb = "is champion" if decision.promote else "is not promoted"
    print(f"\n  {version.name} version {version.version} {verb}: {decision.reason}\n")


if __name__ == "__main__":
    tracking.run_step(PromoteParams, main)
