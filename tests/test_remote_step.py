"""Train sent elsewhere by a project backend: waited for, failing and cancelled with main."""

import json
import os
import signal
import threading

import mlflow
import pytest

from steps import main
from steps.text2sql import artifacts, processes, step_run, store_names
from steps.text2sql.command_line import parse, parse_main
from steps.text2sql.errors import UserError
from steps.text2sql.params import CHAIN
from tests import plugin_backend
from tests.conftest import QUICK, defaults, words

LIMIT_SECONDS = 60


@pytest.fixture(autouse=True)
def plugin(tmp_path, monkeypatch):
    """The plugin `elsewhere`, installed."""
    plugin_backend.install(tmp_path, monkeypatch)
    monkeypatch.delenv(step_run.FINGERPRINT_VARIABLE, raising=False)


def sent(dataset_uri="/tmp", **config):
    """Train as main starts it, with a configuration of the plugin."""
    values = {name: str(value) for name, value in QUICK.items()} | {"dataset_uri": dataset_uri}
    elsewhere = {"project_backend": "elsewhere", "backend_config": json.dumps(config)}
    return main.start_step("train", values | elsewhere, "the fingerprint")


def the_run():
    """Run of the only job."""
    [job] = plugin_backend.submitted
    return mlflow.get_run(job.run_id)


def test_train_alone_is_sent_elsewhere():
    given = defaults("main") | {"project_backend": "elsewhere", "backend_config": '{"a": 1}'}
    found = parse_main(words(given)).steps
    assert [step for step in CHAIN if "project_backend" in found[step]] == ["train"]
    assert found["train"]["backend_config"] == '{"a": 1}'


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"project_backend": "kubernetes"}, "project_backend=kubernetes: needs a project with docker_env"),
        (
            {"project_backend": "nowhere"},
            "project_backend=nowhere: is not installed; there are: databricks, elsewhere, local",
        ),
        ({"backend_config": "{a"}, "backend_config={a: Expecting property name"),
        ({"backend_config": "/no/such.json"}, "must be JSON text, .* or the absolute path of a file"),
    ],
)
def test_a_backend_that_cannot_be_used_is_refused(values, reason):
    with pytest.raises(UserError, match=reason):
        parse(CHAIN["train"], words(defaults("train") | {"dataset_uri": "/tmp"} | values))


def test_a_run_elsewhere_is_waited_for_and_is_a_child_with_its_fingerprint(store):
    with mlflow.start_run() as parent:
        run = sent(exit_status=0)
    assert run.info.run_id == the_run().info.run_id
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.data.tags[store_names.TAG_FINGERPRINT] == "the fingerprint"
    assert (run.info.run_name, run.data.tags["mlflow.project.backend"]) == ("train", "elsewhere")
    # What is for main alone stays here, and train has its defaults.
    assert run.data.params["project_backend"] == "local"


def test_a_failure_elsewhere_is_a_failure_here_and_no_run_is_left_running(store):
    with mlflow.start_run(), pytest.raises(UserError, match="project_backend=elsewhere: train failed, run"):
        sent(exit_status=3)
    assert the_run().info.status == "FAILED"


def test_a_backend_that_does_not_take_the_run_is_named(store, monkeypatch):
    def refuses(*_, **__):
        raise ConnectionError("no cluster")

    monkeypatch.setattr(plugin_backend.Elsewhere, "run", refuses)
    with mlflow.start_run(), pytest.raises(UserError, match="train could not be sent: no cluster"):
        sent()


@pytest.mark.parametrize(
    ("number", "when"),
    [(signal.SIGINT, "waiting"), (signal.SIGTERM, "waiting"), (signal.SIGINT, "submitting")],
)
def test_a_signal_cancels_the_run_elsewhere(store, number, when):
    def interrupt():
        assert plugin_backend.happened[when].wait(LIMIT_SECONDS)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with (
        mlflow.start_run(),
        processes.on_signals(processes.raise_interrupt),
        pytest.raises(KeyboardInterrupt, match=number.name),
    ):
        sent(exit_status=0, seconds=600)
    [job] = plugin_backend.submitted
    assert job.process.poll() == -signal.SIGTERM
    assert (the_run().info.status, the_run().data.tags["stopped_by"]) == ("KILLED", number.name)


@pytest.mark.slow
def test_train_elsewhere_leaves_an_adapter_that_the_next_step_finds(chain):
    with mlflow.start_run():
        run = sent(chain.dataset_uri)
    assert run.info.status == "FINISHED"
    assert "adapter/adapter_model.safetensors" in artifacts.listed(run.info.run_id, "adapter")
    assert run.data.params["lora_r"] == "4"
