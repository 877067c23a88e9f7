"""Stopping the chain from outside, as people and machines do it, through a real `mlflow run`."""

import os
import shlex
import signal
import subprocess
import time
from types import SimpleNamespace

import mlflow
import psutil
import pytest

from tests.conftest import PROJECT, QUICK, plain_rows, tracking_at, write_jsonl
from tests.test_mlflow_run import environment

pytestmark = pytest.mark.slow

END_LIMIT_SECONDS = 30


@pytest.fixture(scope="module")
def shared(new_store, tmp_path_factory):
    """Store, rows and cache of all these pipelines: each one goes on where another was stopped."""
    folder = tmp_path_factory.mktemp("stopped")
    rows = write_jsonl(folder / "rows.jsonl", plain_rows(200))
    return SimpleNamespace(store=new_store(), rows=rows, cache=folder / "cache")


@pytest.fixture
def pipeline(shared, tiny_base, tmp_path):
    """A chain whose training would take hours, in a process group of its own, after its first checkpoint."""
    values = QUICK | {"max_steps": 1_000_000, "base_model": tiny_base, "eval_rows": 4, "dataset": shared.rows}
    words = [word for name, value in values.items() for word in ("-P", f"{name}={value}")]
    process = subprocess.Popen(
        ["mlflow", "run", str(PROJECT), "--env-manager", "local", *words],
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


def statuses():
    """Status and `stopped_by` of the newest pipeline's main, and of its train."""
    found = mlflow.search_runs(output_format="list", order_by=["attributes.start_time DESC"])
    steps = [
        next(run for run in found if run.data.tags["mlflow.project.entryPoint"] == name)
        for name in ("main", "train")
    ]
    assert steps[1].data.tags["mlflow.parentRunId"] == steps[0].info.run_id
    assert not [run for run in found if run.info.status == "RUNNING"]
    return [(run.info.status, run.data.tags.get("stopped_by")) for run in steps]


def test_sigterm_to_main_alone_ends_all_and_keeps_a_checkpoint(pipeline, shared):
    process, family = pipeline
    member(family, "main").terminate()
    output = ended(process, family)
    with tracking_at(shared.store):
        # `mlflow run` itself was not stopped, and writes FAILED last.
        assert statuses() == [("FAILED", "SIGTERM"), ("KILLED", "SIGTERM")]
    assert "To go on:" in output


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
        assert statuses() == [("FAILED", "SIGINT"), ("KILLED", "SIGINT")]
    command = shlex.split(output.split("To go on:")[-1])
    assert command[:2] == ["mlflow", "run"]
    assert "max_steps=1000000" in command
