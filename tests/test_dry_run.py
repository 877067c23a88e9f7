"""A plan without a training: what it says, and that nothing comes of it."""

import shlex

import mlflow
import pytest

from steps import main, train
from steps.text2sql import (
    artifacts,
    base_model,
    earlier_runs,
    hub,
    resume,
    reuse,
    run_log,
    screen,
    store_names,
)
from steps.text2sql.command_line import parse_main
from tests.conftest import QUICK, call_step, defaults, tracking_at, words

QUICK_TEXT = {name: str(value) for name, value in QUICK.items()}


@pytest.fixture(scope="module")
def planned(finished_chain):
    """Run of a dry training of the chain's dataset, in which no weights could be loaded."""
    with pytest.MonkeyPatch.context() as patch, tracking_at(finished_chain.store):
        patch.setattr(train, "load_base", lambda *_: pytest.fail("weights were loaded"))
        return call_step("train", dataset_uri=finished_chain.dataset_uri, dry_run="yes", **QUICK)


def test_it_ends_well_tagged_and_leaves_nothing(planned, chain):
    assert planned.info.status == "FINISHED"
    assert planned.data.tags[store_names.TAG_DRY_RUN] == "yes"
    assert artifacts.listed(planned.info.run_id) == []
    assert store_names.TAG_DRY_RUN not in chain.train.data.tags


def test_it_says_what_the_training_chose(planned, chain):
    dry, real = run_log.choices(planned), run_log.choices(chain.train)
    same = ("device", "base_model", "trainable", "learning_rate", "warmup_steps", "optim", "steps")
    assert {name: dry[name] for name in same} == {name: real[name] for name in same}
    assert dry["torch_compile"] == real["torch_compile"]


def test_it_says_rows_memory_download_and_time(planned, chain):
    rows = int(chain.prepare_data.data.metrics["rows_train"])
    chosen = run_log.choices(planned)
    assert chosen["rows"] == f"24 in all, out of {rows} ({24 / rows:.2g} epochs)"
    assert chosen["peak_memory"].startswith("about ")
    assert chosen["download"] == "none"
    assert chosen["time"].startswith("about ")


def test_it_is_never_taken_for_a_training(planned, chain):
    values = {"dataset_uri": chain.dataset_uri, **QUICK_TEXT}
    named = {"upstream": {}, "device": "cpu", "code": "c"}
    dry = reuse.fingerprint("train", values | {"dry_run": "yes"}, **named)
    assert dry != reuse.fingerprint("train", values, **named)
    assert not earlier_runs.remains("train", planned)
    assert not resume.can_go_on(planned.info.run_id)


@pytest.fixture
def main_on(chain, monkeypatch):
    """Calls main's chain on the steps of the finished chain; which it asked for, and its run."""
    asked = []

    def run_step(step, params, **found):
        asked.append(step)
        return (
            chain.planned
            if step == "train" and params.steps["train"].get("dry_run")
            else getattr(chain, step)
        )

    def call(planned, **values):
        chain.planned = planned
        with mlflow.start_run():
            main.chain(parse_main(words(defaults("main") | values)))
        return asked, mlflow.get_run(mlflow.last_active_run().info.run_id)

    monkeypatch.setattr(main, "run_step", run_step)
    return call


def test_main_prepares_plans_and_stops_there(planned, main_on, capsys):
    asked, run = main_on(planned, dry_run="yes", max_steps=7)
    assert asked == ["prepare_data", "train"]
    assert run.data.tags[store_names.TAG_DRY_RUN] == "yes"
    assert store_names.TAG_MODEL_VERSION not in run.data.tags
    printed = capsys.readouterr().out
    assert "Dry run" in printed
    assert printed.count("\n") < 15
    [command] = [line for line in printed.splitlines() if " -e main " in line]
    # What the user gave, without the defaults and without dry_run.
    assert command.endswith(" -e main -P max_steps=7")


def test_main_without_it_runs_all_and_describes_the_run_with_links(planned, main_on, chain):
    asked, run = main_on(planned)
    assert asked == ["prepare_data", "train", "register", "evaluate", "promote"]
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("[text2sql version 1](#/models/text2sql/versions/1) is champion: first champion")
    for step in asked:
        assert f"[{step}](#/experiments/0/runs/{getattr(chain, step).info.run_id}) (" in note
    assert run.info.run_name == "text2sql v1"
    assert run.data.tags[store_names.TAG_DATASET] == "sample"
    assert run.data.tags[store_names.TAG_PROMOTED] == "yes"


def test_weights_that_this_machine_has_are_not_to_be_downloaded(monkeypatch):
    files = {"a.safetensors": 300, "b.safetensors": 40, "pytorch_model.bin": 340}
    repository = hub.HubRepository("owner/name", "a" * 40, files, "mit")
    monkeypatch.setattr(hub, "resolve", lambda *_, **__: repository)
    monkeypatch.setattr(
        hub, "try_to_load_from_cache", lambda _, name, **__: "/cache/a" if name == "a.safetensors" else None
    )
    assert base_model.to_download(f"owner/name@{'a' * 40}") == 40


def test_nothing_is_downloaded_for_a_folder_or_the_embedded_base(tmp_path):
    assert base_model.to_download(str(tmp_path)) == base_model.to_download("smollm2-135m") == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.2, "5 s"), (89, "89 s"), (90, "2 min"), (3000, "50 min"), (9000, "2.5 h")]
)
def test_times_are_said_as_roughly_as_they_are_known(seconds, text):
    assert screen.duration(seconds) == text


def test_a_printed_command_names_the_experiment_that_earlier_runs_are_in(store):
    with mlflow.start_run():
        assert "--experiment-id" not in screen.step_command("main", {})
    found = mlflow.create_experiment("another one")
    with mlflow.start_run(experiment_id=found):
        command = shlex.split(screen.step_command("main", {}))
    assert command[command.index("--experiment-id") + 1] == found
