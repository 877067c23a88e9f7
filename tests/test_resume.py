"""A training that was killed goes on in a new run and ends with the adapter of one that never stopped."""

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from mlflow.artifacts import download_artifacts

from steps.text2sql import resume, run_folder, training
from tests.conftest import (
    QUICK,
    Forked,
    call_step,
    failure,
    plain_rows,
    prepared_uri,
    tracking_at,
    write_jsonl,
)

VALUES = QUICK | {
    "lora_dropout": 0.2,
    "max_steps": 9,
    "save_steps": 2,
    "quantization": "nf4",
    "quantization_correction": "yes",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, for the processes that it starts too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def whole(new_store, tiny_base, tmp_path_factory):
    """A store with a prepared dataset, 17 rows a training epoch, and a training that never stopped."""
    file = write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", plain_rows(28))
    with tracking_at(new_store()) as uri:
        dataset_uri = prepared_uri(tiny_base, file)
        run = call_step("train", dataset_uri=dataset_uri, **VALUES)
    return SimpleNamespace(store=uri, dataset_uri=dataset_uri, run=run)


@pytest.fixture
def dataset_uri(whole):
    """The prepared dataset, with MLflow on its store."""
    with tracking_at(whole.store):
        yield whole.dataset_uri


def newest():
    return mlflow.search_runs(output_format="list", max_results=1)[0]


def die():
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(dataset_uri, where, at):
    """Train until after a step, or until amid the files of a checkpoint."""
    report, sync, synced = training.Reporter.on_log, run_folder._sync, []

    def on_log(self, args, state, *rest, **named):
        report(self, args, state, *rest, **named)
        if where == "step" and state.global_step == at:
            die()

    def sync_or_die(path):
        synced.extend([path] if f"checkpoint-{at}." in str(path) else [])
        if where == "checkpoint" and len(synced) == 4:
            die()
        sync(path)

    training.Reporter.on_log, run_folder._sync = on_log, sync_or_die
    call_step("train", dataset_uri=dataset_uri, **VALUES)


def killed(dataset_uri, where, at):
    """A training that was killed there."""
    with Forked(lambda: train_and_die(dataset_uri, where, at)) as process:
        assert process.wait(120) == -signal.SIGKILL, process.stdout.read()
    return newest()


def adapter_bytes(run):
    folder = download_artifacts(f"runs:/{run.info.run_id}/adapter")
    with open(f"{folder}/adapter_model.safetensors", "rb") as file:
        return file.read()


@pytest.mark.parametrize(("where", "at", "from_step"), [("step", 3, 2), ("step", 8, 6), ("checkpoint", 6, 4)])
def test_a_killed_training_goes_on_to_the_adapter_of_one_that_never_stopped(
    whole, dataset_uri, where, at, from_step
):
    dead = killed(dataset_uri, where, at)
    assert dead.info.status == "RUNNING"
    rest = call_step("train", dataset_uri=dataset_uri, **VALUES | {"resume_from": dead.info.run_id})
    assert adapter_bytes(rest) == adapter_bytes(whole.run)
    assert mlflow.get_run(dead.info.run_id).info.status == "FAILED"
    assert rest.data.tags["resumed_from"] == dead.info.run_id
    assert rest.data.tags["resumed_step"] == str(from_step)
    assert rest.data.metrics["train_loss_mean"] == whole.run.data.metrics["train_loss_mean"]
    client = mlflow.MlflowClient()
    curves = [client.get_metric_history(run.info.run_id, "train_loss") for run in (whole.run, rest)]
    assert [(p.step, p.value) for p in curves[0]] == [(p.step, p.value) for p in curves[1]]


@pytest.fixture
def stopped(dataset_uri, monkeypatch):
    """A run of 5 steps with the checkpoints 2 and 4 in the store and still on the disk."""
    monkeypatch.setattr("steps.text2sql.outputs.Outputs.remove", lambda self: None)
    run = call_step("train", dataset_uri=dataset_uri, **VALUES | {"max_steps": 5})
    assert sorted(path.name for path in run_folder.run_folder(run.info.run_id).iterdir()) == [
        "adapter",
        "checkpoint-2",
        "checkpoint-4",
    ]
    return run


def resumed(dataset_uri, run, **values):
    return call_step(
        "train", dataset_uri=dataset_uri, **VALUES | {"max_steps": 5, "resume_from": run.info.run_id} | values
    )


def test_another_seed_is_refused_though_the_data_have_that_one(dataset_uri, stopped):
    values = VALUES | {"max_steps": 5, "resume_from": stopped.info.run_id, "seed": 7}
    message, _ = failure("train", dataset_uri=dataset_uri, **values)
    assert "seed=7 (it was 42)" in message


def test_the_newest_checkpoint_of_the_store_is_used_where_the_disk_is_gone(dataset_uri, stopped):
    shutil.rmtree(run_folder.run_folder(stopped.info.run_id))
    assert resumed(dataset_uri, stopped).data.tags["resumed_step"] == "4"


def test_a_torn_checkpoint_is_said_and_the_one_before_it_is_used(dataset_uri, stopped, capsys):
    shutil.rmtree(run_folder.run_folder(stopped.info.run_id))
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
    assert f"resume_from={'0' * 32}: is no run of this tracking store" in message
    run = dataset_uri.split("/")[1]
    message, _ = failure("train", dataset_uri=dataset_uri, **VALUES | {"resume_from": run})
    assert f"resume_from={run}: has no whole checkpoint" in message


def test_no_more_than_keep_checkpoints_stay_on_the_disk_and_in_the_store(dataset_uri, monkeypatch):
    monkeypatch.setattr("steps.text2sql.outputs.Outputs.remove", lambda self: None)
    run = call_step("train", dataset_uri=dataset_uri, **VALUES | {"save_steps": 1, "keep_checkpoints": 1})
    [logged] = mlflow.MlflowClient().list_artifacts(run.info.run_id, "checkpoints")
    [kept] = run_folder.run_folder(run.info.run_id).glob("checkpoint-*")
    assert logged.path == "checkpoints/checkpoint-8"
    assert kept.name == "checkpoint-8"


def test_a_finished_training_leaves_nothing_on_the_disk(dataset_uri):
    run = call_step("train", dataset_uri=dataset_uri, **VALUES)
    assert not run_folder.run_folder(run.info.run_id).exists()


def test_what_all_trainings_before_left_on_this_machine_is_removed_at_the_end(store, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    client, before, runs = mlflow.MlflowClient(), "0" * 32, []  # the first is gone from the store
    for _ in range(2):
        run = client.create_run("0", tags={"resumed_from": before}).info.run_id
        runs, before = [*runs, before], run
    for run in (*runs, before, "another"):
        run_folder.run_folder(run).mkdir(parents=True)
    resume.forget(before)
    assert [path.name for path in run_folder.run_folder("another").parent.iterdir()] == ["another"]
