"""Stopping the processes of a run, and noticing that its launcher is gone."""

import os
import signal
import subprocess
import sys
import time

import mlflow
import psutil
import pytest

from steps.text2sql import child_runs, processes, step_run
from tests.conftest import Forked

DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
)
# A process with a child of its own, as a step may have one.
FAMILY = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {DEAF!r}])"
# Ends when SIGTERM comes from its watch, which looks at the process above it.
WATCHER = """\
import os, sys, time
import psutil
from steps.text2sql import processes
processes.launchers = lambda: [psutil.Process(os.getppid())]
processes.stop_with_launchers()
print(os.getpid(), flush=True)
time.sleep(600)
"""
# A project whose step would take long, and says when it has begun.
SLEEPING = "name: sleeping\nentry_points:\n  evaluate:\n    command: touch begun; exec sleep 600\n"
# One whose step says that a signal stopped it.
STOPPED_ALONE = """\
name: stopped
entry_points:
  evaluate:
    command: >-
      python -c "import mlflow, sys; mlflow.start_run(); mlflow.set_tag('stopped_by', 'SIGTERM'); sys.exit(1)"
"""
LIMIT_SECONDS = 60


@pytest.fixture
def family():
    """A process and its child, which both take no SIGTERM; the child is ready."""
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + FAMILY
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    found = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    assert len(found) == 2
    yield process, found
    for one in found:
        if one.is_running():
            one.kill()
    process.communicate()


def test_what_does_not_end_in_time_is_killed_with_its_children(family):
    process, members = family
    stopper = processes.Stopper(grace_seconds=0.2)
    with stopper.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        process.wait(timeout=LIMIT_SECONDS)
    assert stopper.stopped_by == "SIGTERM"
    assert not any(processes._is_alive(one) for one in members)


def test_a_second_ctrl_c_kills_at_once_and_a_second_sigterm_does_not(family):
    process, members = family
    stopper = processes.Stopper(grace_seconds=10_000)
    with stopper.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        os.kill(os.getpid(), signal.SIGINT)
        process.wait(timeout=LIMIT_SECONDS)
    assert stopper.stopped_by == "SIGINT"
    assert not any(processes._is_alive(one) for one in members)


@pytest.mark.parametrize("first", ["signal", "reason"])
def test_a_signal_is_the_reason_whether_it_comes_before_another_or_after(family, first):
    process, _ = family
    stopper = processes.Stopper(grace_seconds=0.2)
    with stopper.listening():
        if first == "reason":
            stopper.stop("stopped early")
        os.kill(os.getpid(), signal.SIGTERM)
        stopper.stop("stopped early")
        process.wait(timeout=LIMIT_SECONDS)
    assert stopper.stopped_by == "SIGTERM"


def test_without_a_signal_nothing_is_touched_and_handlers_go_back(family):
    process, members = family
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with processes.Stopper().listening():
        pass
    assert process.poll() is None
    assert all(one.is_running() for one in members)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_ends_the_step_that_a_step_started_and_kills_both_runs(store, tmp_path, monkeypatch):
    (tmp_path / "MLproject").write_text(SLEEPING)
    monkeypatch.setattr(child_runs, "PROJECT", tmp_path)
    with Forked(lambda: step_run.run_in_run(lambda: child_runs.run("evaluate", {}))) as process:
        end = time.monotonic() + LIMIT_SECONDS
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(LIMIT_SECONDS) == 1
    assert not any(processes._is_alive(one) for one in family)
    runs = mlflow.search_runs(output_format="list")
    assert [(run.info.status, run.data.tags["stopped_by"]) for run in runs] == [("KILLED", "SIGTERM")] * 2


def test_a_step_that_was_stopped_alone_stops_the_one_that_started_it(store, tmp_path, monkeypatch):
    (tmp_path / "MLproject").write_text(STOPPED_ALONE)
    monkeypatch.setattr(child_runs, "PROJECT", tmp_path)
    with pytest.raises(SystemExit, match="^\nStopped by SIGTERM.$"):
        step_run.run_in_run(lambda: child_runs.run("evaluate", {}))
    runs = mlflow.search_runs(output_format="list")
    assert [(run.info.status, run.data.tags["stopped_by"]) for run in runs] == [("KILLED", "SIGTERM")] * 2
    assert not any("failure_reason" in run.data.tags for run in runs)


def test_a_step_ends_when_its_launcher_is_killed(tmp_path):
    launch = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WATCHER!r}])"
    launcher = subprocess.Popen(
        [sys.executable, "-c", launch],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    step = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()
    launcher.communicate()
    gone, _ = psutil.wait_procs([step], timeout=LIMIT_SECONDS)
    assert gone == [step]


def test_only_the_command_mlflow_run_is_one(monkeypatch):
    process = psutil.Process()
    for words, expected in (
        (["/usr/bin/python", "/usr/bin/mlflow", "run", "."], True),
        (["python", "-m", "mlflow", "run", "."], True),
        (["mlflow", "server"], False),
        (["python", "run", "mlflow"], False),
    ):
        monkeypatch.setattr(process, "cmdline", lambda words=words: words)
        assert processes.is_mlflow_run(process) == expected
