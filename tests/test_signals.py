"""Stopping the chain from outside, as people and machines do it."""

import os
import shlex
import signal
import subprocess
import time
from types import SimpleNamespace

import mlflow
import psutil
import pytest

from steps.text2sql import artifacts, command_line, reuse, step_run, store_names
from tests.conftest import (
    PROJECT,
    QUICK,
    START_LIMIT_SECONDS,
    Forked,
    call_step,
    defaults,
    plain_rows,
    run_main,
    tracking_at,
    words,
    write_jsonl,
)
from tests.test_mlflow_run import environment

pytestmark = pytest.mark.slow

# Four times what is promised: the machine may be busy.
END_LIMIT_SECONDS = 120


@pytest.fixture(scope="module")
def shared(new_store, tiny_base, tmp_path_factory):
    """Store, values and cache of all these pipelines: each one goes on where another was stopped."""
    folder = tmp_path_factory.mktemp("stopped")
    values = QUICK | {"max_steps": 1_000_000, "base_model": tiny_base, "eval_rows": 4}
    values["dataset"] = write_jsonl(folder / "rows.jsonl", plain_rows(200))
    with tracking_at(new_store()) as store, pytest.MonkeyPatch.context() as patch:
        prepare(values, patch)
    return SimpleNamespace(store=store, values=values, cache=folder / "cache")


def prepare(values, patch):
    """Prepare the dataset as main would, which then has it already."""
    of_step = command_line.parse_main(words(defaults("main") | values)).steps["prepare_data"]
    found = reuse.fingerprint("prepare_data", of_step, upstream={}, device="cpu", code=reuse.code_digest())
    patch.setenv(step_run.FINGERPRINT_VARIABLE, found)
    call_step("prepare_data", **of_step)


@pytest.fixture
def pipeline(shared, tmp_path):
    """A chain whose training would take hours, in a process group of its own, after its first checkpoint."""
    options = [word for name, value in shared.values.items() for word in ("-P", f"{name}={value}")]
    process = subprocess.Popen(
        ["mlflow", "run", str(PROJECT), "--env-manager", "local", *options],
        cwd=tmp_path,
        env=environment(
            MLFLOW_TRACKING_URI=shared.store, OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(shared.cache)
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("Checkpoint: "):
            break
    else:
        pytest.fail("".join(printed))
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    yield process, family
    for member in family:
        if member.is_running():
            member.kill()
    process.communicate()


def member(family, module):
    """The process of a step."""
    [found] = [p for p in family if f"steps.{module}" in p.cmdline() and "bash" not in p.name()]
    return found


def ended(process, family):
    """What was printed until no process was left, in time."""
    start = time.monotonic()
    output = process.communicate(timeout=END_LIMIT_SECONDS)[0]
    gone, alive = psutil.wait_procs(family, timeout=END_LIMIT_SECONDS - (time.monotonic() - start))
    assert alive == []
    assert "Traceback" not in output
    return output


def newest_train():
    """The run of the newest training, if there is one."""
    runs = mlflow.search_runs(
        output_format="list",
        filter_string="attributes.run_name = 'train'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return runs[0] if runs else None


def statuses():
    """Status and `stopped_by` of the newest pipeline's main, and of its train."""
    train = newest_train()
    steps = [mlflow.get_run(train.data.tags["mlflow.parentRunId"]), train]
    assert not mlflow.search_runs(output_format="list", filter_string="attributes.status = 'RUNNING'")
    return [(run.info.status, run.data.tags.get("stopped_by")) for run in steps]


def wait_for_checkpoint(main, earlier):
    """Wait until main has started a training, other than an earlier one, with a checkpoint in the store."""
    end = time.monotonic() + START_LIMIT_SECONDS
    while time.monotonic() < end and main.poll() is None:
        run = newest_train()
        if run and run.info.run_id != earlier and artifacts.listed(run.info.run_id, store_names.CHECKPOINTS):
            return
        time.sleep(0.1)
    pytest.fail("no checkpoint was logged")


def test_sigterm_to_main_alone_ends_all_and_keeps_a_checkpoint(shared, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared.cache))
    with tracking_at(shared.store):
        earlier = newest_train()
        with Forked(lambda: run_main(**shared.values)) as main:
            wait_for_checkpoint(main, earlier and earlier.info.run_id)
            family = psutil.Process(main.pid).children(recursive=True)
            assert family
            os.kill(main.pid, signal.SIGTERM)
            assert main.wait(END_LIMIT_SECONDS) == 1
            assert psutil.wait_procs(family, timeout=0)[1] == []
            assert "To go on:" in main.stdout.read()
        assert statuses() == [("KILLED", "SIGTERM"), ("KILLED", "SIGTERM")]


def test_sigterm_to_mlflow_run_ends_all_and_main_is_killed(pipeline, shared):
    process, family = pipeline
    process.terminate()
    output = ended(process, family)
    with tracking_at(shared.store):
        assert statuses() == [("KILLED", "SIGTERM"), ("KILLED", "SIGTERM")]
    assert "To go on:" in output


def test_ctrl_c_ends_all_and_says_how_to_go_on(pipeline, shared):
    process, family = pipeline
    os.killpg(process.pid, signal.SIGINT)
    output = ended(process, family)
    with tracking_at(shared.store):
        # `mlflow run` lives to see its process end, and writes FAILED last.
        assert statuses() == [("FAILED", "SIGINT"), ("KILLED", "SIGINT")]
    command = shlex.split(output.split("To go on:")[-1])
    assert command[:2] == ["mlflow", "run"]
    assert "max_steps=1000000" in command
