"""Who is champion, and who replaced whom: a chain of records on the registered model, one tag a promotion.

A record is JSON under `promotion/<number>`. Its `replaced` is the `version` of the record before it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.utils.mlflow_tags import MLFLOW_USER

from steps.text2sql import active_run, model_versions, store_names
from steps.text2sql.gate import Decision

OUTSIDE = "found as champion: the alias was moved without the promote step"


@dataclass(frozen=True)
class Promotion:
    """One move of the alias champion. Versions are None where there was no champion."""

    version: int | None
    replaced: int | None
    reason: str
    run_id: str
    user: str
    time: str


def champion(name: str) -> ModelVersion | None:
    """The version that has the alias now."""
    number = mlflow.MlflowClient().get_registered_model(name).aliases.get(store_names.CHAMPION)
    return model_versions.model_version(name, number) if number else None


def number_of(version: ModelVersion | None) -> int | None:
    """Number of a version, None for none: MLflow gives it as text or as a number."""
    return int(version.version) if version else None


def chain(name: str) -> list[Promotion]:
    """All promotions of a model, the oldest first."""
    tags = mlflow.MlflowClient().get_registered_model(name).tags
    keys = [key for key in tags if key.startswith(store_names.PROMOTION)]
    return [Promotion(**json.loads(tags[key])) for key in sorted(keys, key=_position)]


def _position(key: str) -> int:
    return int(key.removeprefix(store_names.PROMOTION))


def promote(version: ModelVersion, *, replaced: ModelVersion | None, reason: str) -> None:
    """Move the alias and record it; whoever calls this holds the promotion lock.

    The alias goes first, since it is what users load: what ends a process between the two leaves a move that
    the next promotion records as one from outside.
    """
    client = mlflow.MlflowClient()
    records = chain(version.name)
    before = number_of(replaced)
    client.set_registered_model_alias(version.name, store_names.CHAMPION, version.version)
    known = records[-1].version if records else None
    if before != known:
        records.append(_append(version.name, len(records), Promotion(before, known, OUTSIDE, "", "", _now())))
    run = mlflow.get_run(active_run.run_id())
    user = run.data.tags.get(MLFLOW_USER, "")
    move = Promotion(number_of(version), before, reason, run.info.run_id, user, _now())
    _append(version.name, len(records), move)
    _link(version, replaced)


def _append(name: str, position: int, record: Promotion) -> Promotion:
    key = f"{store_names.PROMOTION}{position + 1:04d}"
    mlflow.MlflowClient().set_registered_model_tag(name, key, json.dumps(asdict(record)))
    return record


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _link(version: ModelVersion, replaced: ModelVersion | None) -> None:
    """Let both versions name each other; the champion itself is replaced by none."""
    _set_tags(
        version, {store_names.TAG_REPLACED: replaced and replaced.version, store_names.TAG_REPLACED_BY: None}
    )
    if replaced:
        _set_tags(replaced, {store_names.TAG_REPLACED_BY: version.version})


def keep(decision: Decision, version: ModelVersion) -> None:
    """Keep a decision, its numbers and its reason as tags of the version; those of an earlier one go."""
    earlier = [name for name in version.tags if name.startswith(store_names.GATE)]
    _set_tags(version, dict.fromkeys(earlier) | as_tags(decision))


def as_tags(decision: Decision) -> dict[str, str]:
    """Decision, reason and numbers by name of the tag."""
    numbers = {f"{store_names.GATE}{name}": _text(value) for name, value in decision.numbers.items()}
    return {
        store_names.TAG_PROMOTED: "yes" if decision.promote else "no",
        store_names.TAG_GATE_REASON: decision.reason,
        **numbers,
    }


def _text(value: float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _set_tags(version: ModelVersion, tags: Mapping[str, object]) -> None:
    """Set tags of a version; None takes one off."""
    client = mlflow.MlflowClient()
    there = model_versions.model_version(version.name, version.version).tags
    for name, value in tags.items():
        if value is not None:
            client.set_model_version_tag(version.name, version.version, name, str(value))
        elif name in there:
            client.delete_model_version_tag(version.name, version.version, name)
