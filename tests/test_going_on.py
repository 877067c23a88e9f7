"""The same pipeline started again, after it was killed and after it failed: nothing is done twice."""

import os
import signal
from types import SimpleNamespace

import mlflow
import pytest

from steps import main
from steps.text2sql import command_line, lost_runs, packaging, training
from steps.text2sql.errors import UserError
from tests import conftest
from tests.conftest import QUICK, Forked, defaults, plain_rows, tracking_at, words, write_jsonl

STEPS = ["prepare_data", "train", "register", "evaluate", "promote"]
KILLED_AFTER = 5


def kill_all_in_training(values):
    """A pipeline of which every process is killed at once after a step of the training."""
    report = training.Reporter.on_log

    def on_log(self, args, state, *rest, **named):
        report(self, args, state, *rest, **named)
        if state.global_step == KILLED_AFTER:
            os.killpg(0, signal.SIGKILL)

    training.Reporter.on_log = on_log
    os.setpgid(0, 0)
    conftest.run_main(**values)


def fail_in_register(values):
    """A pipeline whose register step fails before it registers."""

    def fails(*_, **__):
        raise UserError("no room for the package")

    packaging.log_model = fails
    conftest.run_main(**values)


def printed_by(body, *, status):
    """What a pipeline prints that ends so."""
    with Forked(body) as process:
        text = process.stdout.read()
        assert process.wait(60) == status, text
    return text


@pytest.fixture(scope="module")
def story(new_store, tiny_base, tmp_path_factory):
    """The same pipeline three times: killed in training, failing in register, whole; in this order."""
    folder = tmp_path_factory.mktemp("story")
    values = QUICK | {"base_model": tiny_base, "eval_rows": 2}
    values["dataset"] = write_jsonl(folder / "rows.jsonl", plain_rows(60))
    with pytest.MonkeyPatch.context() as patch, tracking_at(new_store()) as uri:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        printed = [
            printed_by(lambda: kill_all_in_training(values), status=-signal.SIGKILL),
            printed_by(lambda: fail_in_register(values), status=1),
            printed_by(lambda: conftest.run_main(**values), status=0),
        ]
        runs = mlflow.search_runs(output_format="list", order_by=["attributes.start_time"])
    mains = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    steps = [
        {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == one.info.run_id}
        for one in mains
    ]
    return SimpleNamespace(store=uri, values=values, printed=printed, mains=mains, steps=steps)


def test_a_pipeline_that_was_killed_is_failed_when_the_next_one_begins(story):
    for run in (story.mains[0], story.steps[0]["train"]):
        assert (run.info.status, run.data.tags["failure_reason"]) == ("FAILED", lost_runs.LOST)
        assert f"Run {run.info.run_id} " in story.printed[1]
    assert story.steps[0]["prepare_data"].info.status == "FINISHED"


def test_the_next_one_prepares_nothing_and_goes_on_with_the_training(story):
    assert [*story.steps[1]] == ["train", "register"]
    assert story.mains[1].data.tags["reused_prepare_data"] == story.steps[0]["prepare_data"].info.run_id
    train = story.steps[1]["train"]
    assert train.data.tags["resumed_from"] == story.steps[0]["train"].info.run_id
    assert train.data.tags["resumed_step"] == str(KILLED_AFTER - 1)


def test_one_that_failed_in_register_says_why_and_how_to_go_on(story):
    assert [run.info.status for run in story.steps[1].values()] == ["FINISHED", "FAILED"]
    reason = "register failed: no room for the package"
    assert (story.mains[1].info.status, story.mains[1].data.tags["failure_reason"]) == ("FAILED", reason)
    command = story.printed[1].split(reason)[-1].split("To go on:\n")[1].splitlines()[0]
    assert command.startswith("  mlflow run ")
    assert f"-P base_model={story.values['base_model']}" in command
    assert "promotion=auto" not in command


def test_one_that_failed_in_register_does_not_train_again(story):
    assert [*story.steps[2]] == STEPS[2:]
    tags = story.mains[2].data.tags
    assert tags["reused_prepare_data"] == story.steps[0]["prepare_data"].info.run_id
    assert tags["reused_train"] == story.steps[1]["train"].info.run_id
    assert f"reused: run {tags['reused_train']}" in story.printed[2]
    assert {run.info.status for run in (story.mains[2], *story.steps[2].values())} == {"FINISHED"}


def started(story, monkeypatch, step, **values):
    """What a further pipeline starts for a step: its values, or None where it reuses the step."""
    monkeypatch.setattr(main.reuse, "device_kind", lambda: "cpu")
    monkeypatch.setattr(main, "start_step", lambda step, values, *_: values)
    given = command_line.parse_main(words(defaults("main") | story.values | values))
    with tracking_at(story.store), mlflow.start_run():
        dataset = f"runs:/{story.steps[0]['prepare_data'].info.run_id}/dataset"
        found = main.run_step(step, given, **({"dataset_uri": dataset} if step == "train" else {}))
    return found if isinstance(found, dict) else None


def test_with_reuse_never_every_step_runs_again(story, monkeypatch):
    assert started(story, monkeypatch, "prepare_data") is None
    assert started(story, monkeypatch, "train") is None
    assert started(story, monkeypatch, "prepare_data", reuse="never")
    assert started(story, monkeypatch, "train", reuse="never")


def test_with_resume_never_a_training_starts_anew(story, monkeypatch):
    again = started(story, monkeypatch, "train", reuse="never")
    assert again["resume_from"] == story.steps[0]["train"].info.run_id
    assert "resume_from" not in started(story, monkeypatch, "train", reuse="never", resume="never")


def test_another_recipe_goes_on_with_nothing(story, monkeypatch):
    assert "resume_from" not in started(story, monkeypatch, "train", seed=1)
