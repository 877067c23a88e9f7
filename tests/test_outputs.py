"""Faults while a training runs: full disks, a store that refuses, a server that goes away, changed files."""

import errno
import hashlib
import json
import shutil
import threading
import time
from pathlib import Path

import mlflow
import mlflow.cli
import pytest
from mlflow.artifacts import download_artifacts

from steps.text2sql import adapter, artifacts, outputs, run_log
from steps.text2sql.outputs import Outputs
from steps.text2sql.run_folder import is_whole, run_folder, saved_in
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

# For what another thread or process does.
LIMIT_SECONDS = 600


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, for the processes that it starts too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def dataset_uri(store, tiny_base, tmp_path):
    """A prepared dataset of plain rows in a fresh store."""
    return prepared_uri(tiny_base, write_jsonl(tmp_path / "rows.jsonl", plain_rows(60)))


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def refuses(*_, **__):
    raise PermissionError("the store refuses")


def test_a_full_disk_costs_the_checkpoints_and_not_the_training(dataset_uri, monkeypatch, capsys):
    save, made = adapter.save, []

    def save_the_last(model, tokenizer, described, folder):
        made.append(described.global_step)
        if described.global_step < QUICK["max_steps"]:
            full_disk()
        save(model, tokenizer, described, folder)

    monkeypatch.setattr(adapter, "save", save_the_last)
    run = call_step("train", dataset_uri=dataset_uri, **QUICK)
    assert made == [2, 4, 6]
    assert run.info.status == "FINISHED"
    assert {found.path for found in mlflow.MlflowClient().list_artifacts(run.info.run_id)} >= {"adapter"}
    printed = capsys.readouterr().out
    assert "No checkpoint of step 2, training goes on: [Errno 28] No space left on device" in printed
    assert "Checkpoint: " not in printed


@pytest.mark.parametrize("store_is_slow", [False, True])
def test_a_disk_too_full_for_the_adapter_is_said_and_a_checkpoint_kept(
    dataset_uri, monkeypatch, store_is_slow
):
    save, log_folder, failed, tried_again = adapter.save, artifacts.log_folder, [], threading.Event()

    def save_all_but_the_last(model, tokenizer, described, folder):
        if described.global_step == QUICK["max_steps"]:
            if failed:
                tried_again.set()
            failed.append(folder)
            full_disk()
        save(model, tokenizer, described, folder)

    def log_late(*given):
        assert not store_is_slow or tried_again.wait(LIMIT_SECONDS)
        log_folder(*given)

    monkeypatch.setattr(adapter, "save", save_all_but_the_last)
    monkeypatch.setattr(artifacts, "log_folder", log_late)
    monkeypatch.setattr(outputs, "STOPPED_SECONDS", LIMIT_SECONDS)
    message, run = failure("train", dataset_uri=dataset_uri, **QUICK)
    assert "the adapter could not be written to" in message
    assert (
        f"checkpoint-4 is kept. Make room, then go on from it with resume_from={run.info.run_id}." in message
    )
    [kept] = saved_in(run_folder(run.info.run_id))
    assert (kept.name, is_whole(kept)) == ("checkpoint-4", True)


def test_a_disk_that_takes_nothing_at_all_is_said(dataset_uri, monkeypatch):
    monkeypatch.setattr(adapter, "save", full_disk)
    message, run = failure("train", dataset_uri=dataset_uri, **QUICK)
    assert "no checkpoint could be written either. Make room, then train again." in message
    assert run.info.status == "FAILED"


def test_a_store_that_refuses_leaves_the_adapter_on_the_disk_and_says_how_to_log_it(
    dataset_uri, monkeypatch, capsys
):
    monkeypatch.setattr(artifacts, "log_folder", refuses)
    monkeypatch.setattr(outputs, "STOPPED_SECONDS", 0.1)
    message, run = failure("train", dataset_uri=dataset_uri, **QUICK)
    folder = run_folder(run.info.run_id) / "adapter"
    assert is_whole(folder)
    assert "the store did not take it: the store refuses" in message
    command = message.splitlines()[-1].split()
    assert command[:3] == ["mlflow", "artifacts", "log-artifacts"]
    assert "Checkpoint: " not in capsys.readouterr().out
    names = [found.path for found in mlflow.MlflowClient().list_artifacts(run.info.run_id)]
    assert not {"adapter", "checkpoints"} & set(names)
    mlflow.cli.cli(command[1:], standalone_mode=False)
    assert is_whole(Path(download_artifacts(f"runs:/{run.info.run_id}/adapter")))


@pytest.fixture
def made(store, monkeypatch):
    """Outputs of a run, one checkpoint at a time, that an adapter costs nothing to save."""
    monkeypatch.setattr(adapter, "save", lambda *_: None)
    with mlflow.start_run():
        yield Outputs(None, None, lambda step: None, recipe={}, keep=1)


def save_checkpoint(made, step):
    made.save_checkpoint(step, lambda folder: None)


def test_a_checkpoint_has_its_turn_while_points_come_faster_than_the_store_takes_them(made, monkeypatch):
    hold, logged = threading.Event(), []

    def log_points(run, points):
        logged.append("points")
        if "checkpoint" not in logged and len(logged) < 1000:
            made.log_metrics({"loss": 1.0}, len(logged))

    monkeypatch.setattr(run_log, "log_points", log_points)
    monkeypatch.setattr(artifacts, "log_folder", lambda *_: logged.append("checkpoint"))
    with made:
        made.background.submit("first", lambda: hold.wait(LIMIT_SECONDS))
        made.log_metrics({"loss": 1.0}, 0)
        save_checkpoint(made, 1)
        hold.set()
    assert logged == ["points", "checkpoint", "points"]


def test_all_points_are_logged_in_order_and_at_most_a_hundred_a_request(made, monkeypatch):
    asked = []
    monkeypatch.setattr(run_log, "log_points", lambda run, points: asked.append([p.step for p in points]))
    hold = threading.Event()
    with made:
        made.background.submit("first", lambda: hold.wait(LIMIT_SECONDS))
        for step in range(250):
            made.log_metrics({"loss": 1.0}, step)
        hold.set()
    assert asked == [list(range(100)), list(range(100, 200)), list(range(200, 250))]


def test_a_checkpoint_that_is_old_when_it_was_logged_is_removed_then(made, monkeypatch):
    begun, hold = threading.Event(), threading.Event()

    def log_folder(run, folder, path):
        begun.set()
        hold.wait(LIMIT_SECONDS)
        assert folder.is_dir()

    monkeypatch.setattr(artifacts, "log_folder", log_folder)
    save_checkpoint(made, 1)
    assert begun.wait(LIMIT_SECONDS)
    save_checkpoint(made, 2)
    assert [path.name for path in saved_in(made.folder)] == ["checkpoint-2", "checkpoint-1"]
    hold.set()
    assert made.background.close(LIMIT_SECONDS) == []
    assert [path.name for path in saved_in(made.folder)] == ["checkpoint-2"]


def test_a_checkpoint_is_not_begun_to_be_logged_while_it_is_removed(made, monkeypatch):
    remove, hold, begun, logged = shutil.rmtree, threading.Event(), threading.Event(), []

    def log_folder(run, folder, path):
        logged.append(folder.name)
        begun.set()

    def remove_slowly(folder, **named):
        if folder.name == "checkpoint-1" and folder.exists():
            hold.set()
            begun.wait(0.5)  # it does not begin
        remove(folder, **named)

    monkeypatch.setattr(artifacts, "log_folder", log_folder)
    monkeypatch.setattr(shutil, "rmtree", remove_slowly)
    made.background.submit("first", lambda: hold.wait(LIMIT_SECONDS))
    save_checkpoint(made, 1)
    save_checkpoint(made, 2)
    assert made.background.close(LIMIT_SECONDS) == []
    assert logged == ["checkpoint-2"]


@pytest.fixture
def copied(chain, tmp_path):
    """Copies of dataset and adapter that a test may change, by the parameter that names them."""
    return {
        name: Path(download_artifacts(uri, dst_path=tmp_path / name))
        for name, uri in (("dataset_uri", chain.dataset_uri), ("adapter_uri", chain.adapter_uri))
    }


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("step", "name", "file"),
    [
        ("train", "dataset_uri", "train/data-00000-of-00001.arrow"),
        ("evaluate", "dataset_uri", "test/data-00000-of-00001.arrow"),
        ("register", "adapter_uri", "adapter_model.safetensors"),
        ("register", "adapter_uri", "tokenizer.json"),
        ("register", "dataset_uri", "validation/dataset_info.json"),
    ],
)
def test_a_changed_byte_is_an_error_that_names_the_file(copied, step, name, file):
    flip(copied[name] / file)
    values = {"dataset_uri": copied["dataset_uri"]}
    values |= {
        "register": {"adapter_uri": copied["adapter_uri"]},
        "evaluate": {"model_uri": "models:/text2sql/1"},
    }.get(step, {})
    message, run = failure(step, **values)
    assert f"{name}={copied[name]}: {file} was changed" in message
    assert run.info.status == "FAILED"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "more/adapter_model.pkl", "__init__.py"])
def test_a_file_that_the_manifest_does_not_name_is_refused(copied, name):
    extra = copied["adapter_uri"] / name
    extra.parent.mkdir(exist_ok=True)
    extra.write_bytes(b"x")
    message, _ = failure("register", **copied)
    assert f"{name} is not named by its manifest.json" in message


@pytest.mark.parametrize("target", ["/etc/passwd", "../../secret", "tokenizer.json", "/"])
def test_a_symbolic_link_is_refused(copied, target):
    (copied["adapter_uri"] / "link").symlink_to(target)
    message, _ = failure("register", **copied)
    assert "has symbolic links, which are not followed: link" in message


def test_a_pickle_that_the_manifest_names_is_refused_too(copied):
    folder = copied["adapter_uri"]
    (folder / "pytorch_model.bin").write_bytes(b"x")
    described = json.loads((folder / "manifest.json").read_text())
    described["files"]["pytorch_model.bin"] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(described))
    message, _ = failure("register", **copied)
    assert "pytorch_model.bin is a pickle, which can run any code" in message


def test_a_manifest_without_digests_is_refused(copied):
    (copied["adapter_uri"] / "manifest.json").write_text("{}")
    message, _ = failure("register", **copied)
    assert "its manifest.json has no digests" in message


def train_until(away, back, values):
    """Train in this process; its last checkpoint and its adapter wait for files, else it would be over."""
    save_checkpoint, keep_adapter = Outputs.save_checkpoint, Outputs.keep_adapter

    def wait_and_save(self, step, write_state):
        if step == values["max_steps"] - values["save_steps"]:
            wait_for_file(away)
        save_checkpoint(self, step, write_state)

    def wait_and_keep(self, step):
        wait_for_file(back)
        keep_adapter(self, step)

    Outputs.save_checkpoint, Outputs.keep_adapter = wait_and_save, wait_and_keep
    call_step("train", **values)


def wait_for_file(path):
    end = time.monotonic() + LIMIT_SECONDS
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)


@pytest.mark.slow
def test_a_training_goes_on_while_the_server_is_away_and_all_of_it_is_logged_then(
    server, tiny_base, tmp_path, monkeypatch
):
    # MLflow's own retries would bridge the time, sleeping twice as long each time.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    rows = write_jsonl(tmp_path / "rows.jsonl", plain_rows(60))
    with tracking_at(server.url):
        values = QUICK | {"dataset_uri": prepared_uri(tiny_base, rows), "max_steps": 250, "save_steps": 25}
        away, back = tmp_path / "away", tmp_path / "back"
        with Forked(lambda: train_until(away, back, values)) as process:
            first = next((line for line in process.stdout if line.startswith("Checkpoint: ")), "")
            assert first, "the training ended without a checkpoint"
            server.stop()
            run_id = first.split("/")[1]
            # Five seconds, and as long as it takes to see that training goes on without the server.
            seen, stopped = set(saved_in(run_folder(run_id))), time.monotonic()
            away.touch()
            while time.monotonic() < stopped + 5 or not set(saved_in(run_folder(run_id))) - seen:
                assert time.monotonic() < stopped + LIMIT_SECONDS, "no checkpoint while the server was away"
                time.sleep(0.1)
            server.start()
            back.touch()
            rest = process.stdout.read()
            assert process.wait(60) == 0, rest
        run = mlflow.get_run(run_id)
        assert run.info.status == "FINISHED"
        points = mlflow.MlflowClient().get_metric_history(run_id, "train_loss")
        assert [point.step for point in points] == list(range(1, 251))
        names = {found.path for found in mlflow.MlflowClient().list_artifacts(run_id)}
        assert names == {"adapter", "checkpoints", "loss_curve.png"}
        assert is_whole(Path(download_artifacts(f"runs:/{run_id}/adapter", dst_path=tmp_path)))
