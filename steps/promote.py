"""Make a model version the champion: by its scores, or by hand."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.models.model import MLMODEL_FILE_NAME

from steps.text2sql import (
    active_run,
    artifacts,
    child_runs,
    evaluation_run,
    gate,
    model_versions,
    promotion_lock,
    promotions,
    step_run,
    store_names,
    training_rows,
)
from steps.text2sql.errors import UserError
from steps.text2sql.gate import Decision, Evaluation, Row
from steps.text2sql.params import PromoteParams

Judge = Callable[[ModelVersion | None], Decision]


def main(params: PromoteParams) -> None:
    """Decide, move the alias or leave it, and keep the reason."""
    version = model_versions.model_version(params.registered_model_name, params.version)
    judge: Judge = by_hand
    if params.evaluation_run_id:
        check_package(version)
        judge = partial(by_scores, params, version, evaluation_run.read(params.evaluation_run_id, version))
    champion = promotions.champion(version.name)
    decision = decide(judge, version, champion)
    # Judging can take long. If another promotion came first, this one is judged against the new champion.
    while not settle(decision, version, champion):
        champion = promotions.champion(version.name)
        decision = decide(judge, version, champion)
    show(decision, version)


def check_package(version: ModelVersion) -> None:
    """Refuse a version whose package is not in the store any more."""
    uri = model_versions.uri_of(version)
    if not holds(uri, MLMODEL_FILE_NAME):
        raise UserError(
            f"version={version.version}: the package of {uri} is gone; register the adapter again."
        )


def holds(uri: str, name: str) -> bool:
    """Whether a package has a file or folder of this name."""
    return name in {found.path for found in mlflow.artifacts.list_artifacts(uri)}


def decide(judge: Judge, version: ModelVersion, champion: ModelVersion | None) -> Decision:
    """What to do with a version while that one is champion, if any is."""
    if promotions.number_of(champion) == promotions.number_of(version):
        return Decision(True, "is the champion already")
    decision = judge(champion)
    against = {"champion_version": promotions.number_of(champion)} if champion else {}
    return replace(decision, numbers={**decision.numbers, **against})


def by_hand(_: ModelVersion | None) -> Decision:
    """The way back: whatever the user says."""
    return Decision(True, "moved by hand, without the gate")


def by_scores(
    params: PromoteParams, version: ModelVersion, candidate: Evaluation, champion: ModelVersion | None
) -> Decision:
    """The gate, without the rows that one of the models was trained on."""
    seen = {row for model in filter(None, (version, champion)) for row in trained_on(model, candidate)}
    floor = params.min_execution_accuracy
    decision = gate.decide_alone(candidate, seen=seen, floor=floor, is_first=champion is None)
    if champion is None or not decision.promote:
        return decision
    known = evaluation_run.same_rows(champion, params.evaluation_run_id, candidate)
    of_champion = known or score_again(champion, params.evaluation_run_id)
    return gate.decide(candidate, of_champion, seen=seen, floor=floor, alpha=params.gate_alpha)


def trained_on(version: ModelVersion, evaluation: Evaluation) -> set[Row]:
    """Rows of an evaluation that a version was trained on; none for one that does not say."""
    uri = model_versions.uri_of(version)
    if not holds(uri, store_names.TRAINING_ROWS):
        print(f"  {uri} does not say which rows it was trained on: none are left out for it.")
        return set()
    with artifacts.downloaded(
        f"{uri}/{store_names.TRAINING_ROWS}", parameter="version", needs=training_rows.FILE
    ) as folder:
        hashes = training_rows.read(folder, source=uri)
    return {row for row in evaluation.tuned if training_rows.row_hash(*row[:2]) in hashes}


def score_again(champion: ModelVersion, run_id: str) -> Evaluation:
    """Score the champion on the very rows of an evaluate run, as a child of this run.

    Raises:
        UserError: that run was scored by another version of this code, which might judge otherwise.
    """
    evaluation_run.check_code(run_id)
    uri = f"runs:/{run_id}/{store_names.ROWS}"
    with artifacts.downloaded(uri, parameter="evaluation_run_id", needs=store_names.ROWS_FILE) as folder:
        file = folder / store_names.ROWS_FILE
        values = evaluation_run.settings(run_id) | {
            "model_uri": model_versions.uri_of(champion),
            "dataset": str(file),
            "eval_rows": str(len(file.read_text(encoding="utf-8").splitlines())),
        }
        print(f"\n  The champion, version {champion.version}, is scored on the same rows.\n", flush=True)
        child = child_runs.run("evaluate", values)
    return evaluation_run.read(child.info.run_id, champion)


def settle(decision: Decision, version: ModelVersion, champion: ModelVersion | None) -> bool:
    """Carry a decision out; False if the champion is no longer the one that it was taken against."""
    if promotions.number_of(champion) == promotions.number_of(version):
        return True
    if decision.promote:
        with promotion_lock.held(version.name, run_id=active_run.run_id()) as lock:
            now = promotions.champion(version.name)
            if promotions.number_of(now) != promotions.number_of(champion):
                return False
            lock.check()
            promotions.promote(version, replaced=champion, reason=decision.reason)
    promotions.keep(decision, version)
    return True


def show(decision: Decision, version: ModelVersion) -> None:
    """Say the decision, and keep it on the run."""
    mlflow.set_tags(promotions.as_tags(decision))
    verb = "is champion" if decision.promote else "is not promoted"
    print(f"\n  {version.name} version {version.version} {verb}: {decision.reason}\n")


if __name__ == "__main__":
    step_run.run_step(PromoteParams, main)
