"""What a run's page says: description, name, tags, and how busy the machine was."""

import mlflow
import pytest

from steps.text2sql import run_page, step_run
from tests.conftest import failure


def test_a_finished_step_is_described_with_links_and_what_it_chose(chain):
    note = chain.train.data.tags["mlflow.note.content"]
    assert "* steps: 6" in note.splitlines()
    evaluated = chain.evaluate.data.tags["mlflow.note.content"]
    assert evaluated.startswith("* model: [text2sql version 1](#/models/text2sql/versions/1)")


def test_a_failed_run_says_on_top_of_its_page_why(store):
    _, run = failure("train", dataset_uri="runs:/0123abc/dataset")
    assert run.data.tags["mlflow.note.content"].startswith("FAILED: dataset_uri=runs:/0123abc/dataset")


def test_runs_can_be_found_by_their_base_and_dataset(chain, tiny_base):
    filter_string = f"tags.base_model = '{tiny_base}' and tags.dataset = 'sample'"
    found = mlflow.search_runs(filter_string=filter_string, output_format="list")
    ids = {run.info.run_id for run in found}
    steps = (chain.prepare_data, chain.train, chain.register, chain.evaluate)
    assert {run.info.run_id for run in steps} <= ids


@pytest.mark.parametrize("typed", [[], ["--run-name", "mine"], ["--run-name=mine"]])
def test_a_run_gets_the_name_of_its_step_unless_the_user_named_it(store, monkeypatch, typed):
    monkeypatch.setattr(run_page.processes, "users_command", lambda: ["mlflow", "run", ".", *typed])
    with mlflow.start_run(run_name="mine") as run:
        run_page.name_run("train")
    assert mlflow.get_run(run.info.run_id).info.run_name == ("mine" if typed else "train")


def test_a_step_logs_how_busy_the_machine_was_unless_the_user_forbids_it(store, monkeypatch):
    asked = []
    start_run = mlflow.start_run
    monkeypatch.setattr(mlflow, "start_run", lambda **named: asked.append(named) or start_run())
    monkeypatch.delenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", raising=False)
    step_run.run_in_run(lambda: None, measure=True)
    step_run.run_in_run(lambda: None)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    step_run.run_in_run(lambda: None, measure=True)
    assert [named["log_system_metrics"] for named in asked] == [True, False, None]
