"""The prompt template in MLflow's prompt registry, linked to the model that was trained with it."""

import re
import string

import mlflow
from mlflow.entities.model_registry import PromptVersion
from mlflow.exceptions import MlflowException

from steps.text2sql.errors import UserError
from steps.text2sql.retries import tried_again


def registry_text(template: str) -> str:
    """Template in the registry's form: `{{field}}`, and other braces as they are.

    A template whose own text is `{{name}}` cannot be told from a field there; the manifest has it exactly.
    """
    parts = string.Formatter().parse(template)
    return "".join(text + (f"{{{{{field}}}}}" if field is not None else "") for text, field, _, _ in parts)


def prompt_name(model_name: str) -> str:
    """Name of a model's prompt: it must differ from the model's, and fewer characters are allowed in it."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", model_name) + "-prompt"


def check_model_name(name: str) -> None:
    """Refuse a model's name that a prompt has, or whose prompt a model: registries keep both in one place.

    Raises:
        UserError: naming the parameter.
    """
    if mlflow.MlflowClient().get_prompt(name) is not None:
        raise UserError(f"registered_model_name={name}: is the name of a prompt there; give another.")
    prompt = prompt_name(name)
    if mlflow.MlflowClient().search_registered_models(f"name = '{prompt}'", max_results=1):
        raise UserError(
            f"registered_model_name={name}: its prompt would be called {prompt}, as a registered model is; "
            "give another."
        )


def publish(template: str, *, style: str, model_name: str, model_id: str, run_id: str) -> str:
    """URI of a template in the registry, linked to a logged model and a run; a known text keeps its version.

    Raises:
        UserError: the name is taken by a model.
    """
    name, text = prompt_name(model_name), registry_text(template)
    client = mlflow.MlflowClient()
    try:
        # Two that publish the first version collide; the later one finds it when it looks again.
        prompt = tried_again(lambda: _find(name, text) or _register(name, text, style))
    except MlflowException as error:
        raise UserError(
            f"registered_model_name={model_name}: its prompt cannot be registered as {name}: {error.message}"
        ) from error
    client.link_prompt_version_to_model(name, str(prompt.version), model_id)
    client.link_prompt_version_to_run(run_id, prompt)
    return prompt.uri


def _register(name: str, text: str, style: str) -> PromptVersion:
    return mlflow.genai.register_prompt(
        name, text, commit_message=f"prompt_style={style}", tags={"style": style}
    )


def _find(name: str, text: str) -> PromptVersion | None:
    """Newest version with this very text."""
    client = mlflow.MlflowClient()
    if client.get_prompt(name) is None:
        return None
    token = None
    while True:
        page = client.search_prompt_versions(name, page_token=token)
        for version in page:
            if version.template == text:
                return version
        token = page.token
        if not token:
            return None
