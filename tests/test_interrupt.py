"""Stopping a training from outside: what was learned is kept, and can be registered."""

import os
import re
import signal

import mlflow
import pytest

from steps import train
from steps.text2sql import packaging
from steps.text2sql.command_line import parse
from steps.text2sql.params import TrainParams
from tests.conftest import QUICK, Forked, call_step, defaults, plain_rows, prepared_uri, words, write_jsonl


@pytest.fixture
def dataset_uri(store, tiny_base, tmp_path):
    """A prepared dataset of plain rows in a fresh store."""
    return prepared_uri(tiny_base, write_jsonl(tmp_path / "rows.jsonl", plain_rows(200)))


@pytest.fixture
def training(dataset_uri, tmp_path, monkeypatch):
    """A training that would take hours, as a process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    values = QUICK | {"dataset_uri": dataset_uri, "max_steps": 1_000_000}
    with Forked(lambda: call_step("train", **values)) as process:
        yield process


def next_checkpoint(process):
    """URI of the next checkpoint that a training says it saved; None when it ends without one."""
    lines = (line for line in process.stdout if line.startswith("Checkpoint: "))
    return next(lines, "").removeprefix("Checkpoint: ").strip() or None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_training_is_killed_and_its_last_checkpoint_can_be_registered(
    training, dataset_uri, number, monkeypatch
):
    first = next_checkpoint(training)
    # Where the store is slow, newer ones have taken the place of the very first.
    assert re.fullmatch(r"runs:/\w+/checkpoints/checkpoint-\d+", first or "")
    os.kill(training.pid, number)
    last = first
    while found := next_checkpoint(training):
        last = found
    assert training.wait(60) == 1
    run = mlflow.get_run(first.removeprefix("runs:/").split("/")[0])
    assert (run.info.status, run.data.tags["stopped_by"]) == ("KILLED", number.name)
    assert "failure_reason" not in run.data.tags
    names = [artifact.path for artifact in mlflow.MlflowClient().list_artifacts(run.info.run_id)]
    assert "adapter" not in names
    step = int(last.rsplit("-", 1)[1])
    assert step == max(point.step for point in history(run, "train_loss"))

    # In this process: loading all of it in another one takes long, and is what every registration does.
    monkeypatch.setattr(
        packaging,
        "ask_in_fresh_process",
        lambda uri, _: mlflow.pyfunc.load_model(uri).predict([packaging.EXAMPLE])[0],
    )
    registered = call_step("register", adapter_uri=last, dataset_uri=dataset_uri)
    assert registered.info.status == "FINISHED"
    assert mlflow.MlflowClient().get_model_version("text2sql", "1").tags["global_step"] == str(step)


@pytest.mark.parametrize("has_one", [True, False])
def test_a_training_that_is_stopped_before_its_first_checkpoint_begins_again(store, monkeypatch, has_one):
    monkeypatch.setattr(train.resume, "can_go_on", lambda run: has_one)
    params = parse(TrainParams, words(defaults("train") | {"dataset_uri": "runs:/a/dataset"}))
    with mlflow.start_run() as run:
        assert (f"resume_from={run.info.run_id}" in train.how_to_go_on(params)) is has_one


def history(run, metric):
    return mlflow.MlflowClient().get_metric_history(run.info.run_id, metric)
