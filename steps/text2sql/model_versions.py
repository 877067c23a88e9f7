"""Versions in the model registry: registering, looking up, pointing an alias to the newest."""

import functools
from collections.abc import Mapping
from contextlib import suppress

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from steps.text2sql.errors import UserError
from steps.text2sql.retries import tried_again


def register_version(model_uri: str, name: str, tags: Mapping[str, str]) -> ModelVersion:
    """Register a logged model, also while others register versions of the same name.

    MLflow takes the next free number and, where others take it first, gives up after three tries of its own.

    Raises:
        MlflowException: it failed `TRIES` times.
    """
    return tried_again(lambda: mlflow.register_model(model_uri, name, tags=dict(tags)))


def uri_of(version: ModelVersion) -> str:
    """URI of a version's package."""
    return f"models:/{version.name}/{version.version}"


def point_to_newest(name: str, alias: str) -> None:
    """Set an alias to the newest version; looking again afterwards, so that the last of several is right.

    Raises:
        MlflowException: it failed `TRIES` times; two that set an alias for the first time collide.
    """
    client = mlflow.MlflowClient()
    pointed, newest = 0, _newest(name)
    while pointed != newest:
        tried_again(functools.partial(client.set_registered_model_alias, name, alias, str(newest)))
        pointed, newest = newest, _newest(name)


def _newest(name: str) -> int:
    return max(int(one.version) for one in mlflow.MlflowClient().search_model_versions(f'name = "{name}"'))


def model_version(name: str, version: int | str) -> ModelVersion:
    """Look up a version of a registered model.

    Raises:
        UserError: naming the versions that exist.
    """
    try:
        return mlflow.MlflowClient().get_model_version(name, str(version))
    except MlflowException as error:
        found = _versions(name)
        if str(version) in found:
            raise
        raise UserError(
            f"registered_model_name={name}: has no version {version}; there are: "
            f"{', '.join(found) or 'none'}."
        ) from error


def _versions(name: str) -> list[str]:
    found = []
    with suppress(MlflowException):  # a name that MLflow does not allow
        found = mlflow.MlflowClient().search_model_versions(f'name = "{name}"')
    return [str(number) for number in sorted(int(one.version) for one in found)]


def find_version(model_uri: str) -> ModelVersion:
    """The registered version behind `models:/name/version` or `models:/name@alias`.

    Raises:
        UserError: there is no such model, version or alias.
    """
    name, _, alias = model_uri.removeprefix("models:/").partition("@")
    if not alias:
        try:
            return model_version(*name.split("/"))
        except UserError as error:
            raise UserError(f"model_uri={model_uri}: {error}") from error
    try:
        return mlflow.MlflowClient().get_model_version_by_alias(name, alias)
    except MlflowException as error:
        raise UserError(f"model_uri={model_uri}: {error.message}") from error
