"""The prompt template in MLflow's prompt registry."""

import json

import mlflow
import pytest

from steps.text2sql import prompt_registry
from steps.text2sql.errors import UserError
from steps.text2sql.sql_model import PROMPT_TEMPLATE

pytestmark = pytest.mark.usefixtures("store")


def publish(template=PROMPT_TEMPLATE, *, name="text2sql", style="plain"):
    """URI of the published prompt, the logged model and the run that it was linked to."""
    with mlflow.start_run() as run:
        model = mlflow.initialize_logged_model(name="model")
        uri = prompt_registry.publish(
            template, style=style, model_name=name, model_id=model.model_id, run_id=run.info.run_id
        )
    return uri, mlflow.get_logged_model(model.model_id), mlflow.get_run(run.info.run_id)


def test_the_registered_prompt_is_filled_like_the_template():
    uri = publish("{{keep}} {context}|{question}\n")[0]
    prompt = mlflow.genai.load_prompt(uri)
    assert prompt.template == "{keep} {{context}}|{{question}}\n"
    assert sorted(prompt.variables) == ["context", "question"]
    assert prompt.format(context="C", question="Q") == "{keep} C|Q\n"


def test_an_old_text_keeps_its_version_and_a_new_one_gets_the_next():
    other = "{context}\n{question}\n"
    uris = [publish(text)[0] for text in (PROMPT_TEMPLATE, PROMPT_TEMPLATE, other, PROMPT_TEMPLATE, other)]
    assert [uri.rpartition("/")[2] for uri in uris] == ["1", "1", "2", "1", "2"]


def test_a_prompt_is_linked_to_the_logged_model_and_to_the_run():
    _, model, run = publish()
    expected = [{"name": "text2sql-prompt", "version": "1"}]
    assert json.loads(model.tags["mlflow.linkedPrompts"]) == expected
    assert json.loads(run.data.tags["mlflow.linkedPrompts"]) == expected


def test_the_name_of_a_model_may_have_spaces():
    assert publish(name="Text to SQL")[0] == "prompts:/Text-to-SQL-prompt/1"


def test_a_name_that_a_model_has_already_is_the_users_error():
    mlflow.MlflowClient().create_registered_model("text2sql-prompt")
    with pytest.raises(UserError, match="registered_model_name=text2sql: .*text2sql-prompt"):
        publish()


def test_a_model_whose_prompt_would_have_a_models_name_is_refused():
    mlflow.MlflowClient().create_registered_model("sql-prompt")
    with pytest.raises(UserError, match="registered_model_name=sql: its prompt would be called sql-prompt"):
        prompt_registry.check_model_name("sql")
    prompt_registry.check_model_name("text2sql")


def test_a_prompts_name_cannot_be_a_models():
    publish()
    prompt_registry.check_model_name("text2sql")
    with pytest.raises(UserError, match="registered_model_name=text2sql-prompt: is the name of a prompt"):
        prompt_registry.check_model_name("text2sql-prompt")


def test_an_old_version_is_found_beyond_the_first_page(monkeypatch):
    client = mlflow.MlflowClient
    search = client.search_prompt_versions
    monkeypatch.setattr(
        client,
        "search_prompt_versions",
        lambda self, name, page_token=None: search(self, name, 2, page_token),
    )
    for i in range(5):
        publish(f"{i} {{context}} {{question}}\n")
    assert publish("0 {context} {question}\n")[0] == "prompts:/text2sql-prompt/1"
