"""A training that was killed goes on in a new run and ends with the adapter of one that never stopped."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from mlflow.artifacts import download_artifacts

from steps.text2sql.run_folder import run_folder
from tests.conftest import PROJECT, QUICK, call_step, defaults, failure, plain_rows, words, write_jsonl

# Ends itself as a power cut would: after a step, or amid the files of a checkpoint.
KILLED = """\
import os, signal, sys
from steps import train
from steps.text2sql import run_folder, tracking, training
from steps.text2sql.params import TrainParams

where, at = sys.argv.pop(1), int(sys.argv.pop(1))
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
report, sync, count = training.Reporter.on_log, run_folder._sync, 0

def on_log(self, args, state, *rest, **named):
    report(self, args, state, *rest, **named)
    if where == "step" and state.global_step == at:
        die()

def _sync(path):
    global count
    count += f"checkpoint-{at}." in str(path)
    if where == "checkpoint" and count == 4:
        die()
    sync(path)

training.Reporter.on_log, run_folder._sync = on_log, _sync
tracking.run_step(TrainParams, train.main)
"""
VALUES = QUICK | {"lora_dropout": 0.2, "max_steps": 9, "save_steps": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, for the processes that it starts too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def dataset_uri(store, tiny_base, tmp_path):
    """A prepared dataset of plain rows, 17 a training epoch, in a fresh store."""
    file = write_jsonl(tmp_path / "rows.jsonl", plain_rows(28))
    return f"runs:/{call_step('prepare_data', base_model=tiny_base, dataset=file).info.run_id}/dataset"


def newest():
    return mlflow.search_runs(output_format="list", max_results=1)[0]


def killed(dataset_uri, where, at):
    """A training that is killed there."""
    argv = [where, str(at), *words(defaults("train") | VALUES | {"dataset_uri": dataset_uri})]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *argv], cwd=PROJECT, capture_output=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    return newest()


def adapter_bytes(run):
    folder = download_artifacts(f"runs:/{run.info.run_id}/adapter")
    with open(f"{folder}/adapter_model.safetensors", "rb") as file:
        return file.read()


@pytest.mark.slow
@pytest.mark.parametrize(("where", "at", "from_step"), [("step", 3, 2), ("step", 8, 6), ("checkpoint", 6, 4)])
def test_a_killed_training_goes_on_to_the_adapter_of_one_that_never_stopped(
    dataset_uri, where, at, from_step
):
    whole = call_step("train", dataset_uri=dataset_uri, **VALUES)
    dead = killed(dataset_uri, where, at)
    rest = call_step("train", dataset_uri=dataset_uri, **VALUES | {"resume_from": dead.info.run_id})
    assert adapter_bytes(rest) == adapter_bytes(whole)
    assert rest.data.tags["resumed_from"] == dead.info.run_id
    assert rest.data.tags["resumed_step"] == str(from_step)
    assert rest.data.metrics["train_loss_mean"] == whole.data.metrics["train_loss_mean"]
    client = mlflow.MlflowClient()
    curves = [client.get_metric_history(run.info.run_id, "train_loss") for run in (whole, rest)]
    assert [(p.step, p.value) for p in curves[0]] == [(p.step, p.value) for p in curves[1]]


@pytest.fixture
def stopped(dataset_uri, monkeypatch):
    """A run of 5 steps with the checkpoints 2 and 4 in the store and still on the disk."""
    monkeypatch.setattr("steps.text2sql.outputs.Outputs.remove", lambda self: None)
    run = call_step("train", dataset_uri=dataset_uri, **VALUES | {"max_steps": 5})
    assert sorted(path.name for path in run_folder(run.info.run_id).iterdir()) == [
        "adapter",
        "checkpoint-2",
        "checkpoint-4",
    ]
    return run


def resumed(dataset_uri, run, **values):
    return call_step(
        "train", dataset_uri=dataset_uri, **VALUES | {"max_steps": 5, "resume_from": run.info.run_id} | values
    )


def test_the_newest_checkpoint_of_the_store_is_used_where_the_disk_is_gone(dataset_uri, stopped):
    shutil.rmtree(run_folder(stopped.info.run_id))
    assert resumed(dataset_uri, stopped).data.tags["resumed_step"] == "4"


def test_a_torn_checkpoint_is_said_and_the_one_before_it_is_used(dataset_uri, stopped, capsys):
    shutil.rmtree(run_folder(stopped.info.run_id))
    logged = Path(stopped.info.artifact_uri.removeprefix("file://")) / "checkpoints"
    with (logged / "checkpoint-4" / "training_state.safetensors").open("r+b") as file:
        file.truncate(1000)
    rest = resumed(dataset_uri, stopped)
    assert rest.data.tags["resumed_step"] == "2"
    assert "checkpoint-4 of run" in capsys.readouterr().out
    assert adapter_bytes(rest) == adapter_bytes(stopped)


def test_other_values_are_refused_by_name(dataset_uri, stopped):
    message, _ = failure(
        "train", dataset_uri=dataset_uri, **VALUES | {"resume_from": stopped.info.run_id, "batch_size": 2}
    )
    assert "batch_size=2 (it was 4), max_steps=9 (it was 5)" in message


def test_a_run_without_checkpoints_is_named(dataset_uri):
    message, _ = failure("train", dataset_uri=dataset_uri, **VALUES | {"resume_from": "0" * 32})
    assert f"resume_from={'0' * 32}: has no whole checkpoint" in message


def test_no_more_than_keep_checkpoints_stay_on_the_disk_and_in_the_store(dataset_uri, monkeypatch):
    monkeypatch.setattr("steps.text2sql.outputs.Outputs.remove", lambda self: None)
    run = call_step("train", dataset_uri=dataset_uri, **VALUES | {"save_steps": 1, "keep_checkpoints": 1})
    [logged] = mlflow.MlflowClient().list_artifacts(run.info.run_id, "checkpoints")
    [kept] = run_folder(run.info.run_id).glob("checkpoint-*")
    assert logged.path == "checkpoints/checkpoint-8"
    assert kept.name == "checkpoint-8"


def test_a_finished_training_leaves_nothing_on_the_disk(dataset_uri):
    run = call_step("train", dataset_uri=dataset_uri, **VALUES)
    assert not run_folder(run.info.run_id).exists()
