"""Runs whose process was killed before it could say so."""

import os
import signal
from contextlib import ExitStack, contextmanager, suppress

import mlflow
import pytest

from steps.text2sql import earlier_runs, liveness, lost_runs, resume, step_run, store_names
from steps.text2sql.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@contextmanager
def living(*run_ids):
    """The id of a process that announces these runs and then waits."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        with suppress(BaseException), ExitStack() as stack:
            for run_id in run_ids:
                stack.enter_context(liveness.announced(run_id))
            os.write(writing, b"x")
            signal.pause()
        os._exit(0)
    os.read(reading, 1)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            end(process)


def end(process):
    """End a process as a power cut would."""
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_process_that_was_killed_is_told_from_one_that_lives_and_from_one_that_ended_itself():
    with living("a") as process:
        assert liveness.state("a") == "alive"
        end(process)
        assert liveness.state("a") == "gone"
    with liveness.announced("b"):
        assert liveness.state("b") == "alive"
    assert liveness.state("b") == "unknown"


def test_a_process_that_replaces_itself_by_another_program_lives():
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        with liveness.announced("a"):
            os.dup2(writing, 1)
            os.execvp("sh", ["sh", "-c", "echo; exec sleep 600"])
    os.read(reading, 1)
    try:
        assert liveness.state("a") == "alive"
    finally:
        end(process)
    assert liveness.state("a") == "gone"


def test_another_machines_file_says_nothing_here(monkeypatch):
    with living("a") as process:
        end(process)
    monkeypatch.setattr(liveness.platform, "node", lambda: "another")
    assert liveness.state("a") == "unknown"


def test_a_disk_that_takes_no_file_costs_nothing_but_the_knowledge(tmp_path):
    (tmp_path / "cache").write_text("")
    with liveness.announced("a"):
        assert liveness.state("a") == "unknown"


def begun(name, parent=None, backend="local"):
    """Id of a run that says RUNNING."""
    tags = {"mlflow.project.backend": backend} | ({"mlflow.parentRunId": parent} if parent else {})
    return mlflow.MlflowClient().create_run("0", run_name=name, tags=tags).info.run_id


def statuses(*run_ids):
    """Status and reason of runs."""
    found = [mlflow.get_run(run_id) for run_id in run_ids]
    return [(run.info.status, run.data.tags.get("failure_reason")) for run in found]


LOST = ("FAILED", lost_runs.LOST)
LEFT = ("RUNNING", None)


def test_the_next_run_ends_those_whose_process_was_killed_and_no_others(store, capsys):
    main = begun("main")
    train, register = begun("train", main), begun("register", main)
    sent = begun("train", main, backend="slurm")
    elsewhere, at_work = begun("elsewhere"), begun("main")
    its_train = begun("train", at_work)
    with living(main, train) as killed, living(at_work):
        end(killed)
        step_run.run_in_run(lambda: None)
        # register had begun, but its process had not yet.
        assert statuses(main, train, register) == [LOST, LOST, LOST]
        assert statuses(sent, elsewhere, at_work, its_train) == [LEFT, LEFT, LEFT, LEFT]
    assert f"Run {train} (train) is FAILED now: its process ended without a word" in capsys.readouterr().out


def test_a_step_whose_main_is_at_work_is_left_to_it(store):
    main = begun("main")
    train = begun("train", main)
    with living(main), living(train) as killed:
        end(killed)
        step_run.run_in_run(lambda: None)
        assert statuses(main, train) == [LEFT, LEFT]


def test_a_step_whose_main_was_killed_meanwhile_does_not_begin(store, monkeypatch):
    main = begun("main")
    train = begun("train", main)
    with living(main) as killed:
        end(killed)
    monkeypatch.setenv("MLFLOW_RUN_ID", train)
    with pytest.raises(SystemExit, match="Stopped by the end of main"):
        step_run.run_in_run(lambda: pytest.fail("it began"))
    run = mlflow.get_run(train)
    assert (run.info.status, run.data.tags["stopped_by"]) == ("KILLED", "the end of main")


def test_the_training_that_was_killed_is_gone_on_with_and_one_at_work_is_not(store):
    client = mlflow.MlflowClient()
    killed, at_work, elsewhere = (begun("train") for _ in range(3))
    for run_id in (killed, at_work, elsewhere):
        client.set_tag(run_id, store_names.TAG_FINGERPRINT, "f")
    found = []
    with living(killed) as process, living(at_work):
        end(process)
        step_run.run_in_run(lambda: found.extend(earlier_runs.unfinished_before("f")))
    assert sorted(found) == sorted([killed, elsewhere])


def test_a_training_at_work_is_not_gone_on_with(store):
    run_id = begun("train")
    with living(run_id), pytest.raises(UserError, match=f"resume_from={run_id}: is still at work"):
        resume.checkpoint(run_id, {}).__enter__()
