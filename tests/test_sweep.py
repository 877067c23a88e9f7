"""The step sweep: what it hands on, how it stops a training, and the command of the best."""

import json
import shlex
import sqlite3
import threading
import time
from types import SimpleNamespace

import mlflow
import optuna
import pytest
from mlflow.exceptions import MlflowException

from steps import main, sweep
from steps.text2sql import child_runs, reuse
from steps.text2sql.command_line import parse_main, parse_sweep
from steps.text2sql.errors import UserError
from steps.text2sql.processes import Stopper
from steps.text2sql.run_folder import run_folder
from steps.text2sql.watcher import Watcher
from tests.conftest import QUICK, defaults, words

FIXED = {name: value for name, value in QUICK.items() if name not in ("max_steps", "lora_r", "lora_alpha")}
LIMITS = {"learning_rate_range": "1e-4,1e-3", "lora_r_range": "2,4", "max_steps_range": "2,3"}


def call(tmp_path, **values):
    """Parameters of a sweep whose file is in this test's folder."""
    return parse_sweep(words(defaults("sweep") | {"storage": tmp_path / "sweep.db"} | values))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", "1e-3", "learning_rate: sweep searches it; give learning_rate_range"),
        ("learning_rate_range", "1e-3", "must be two numbers"),
        ("learning_rate_range", "1e-3,1e-4", "must have the lowest first"),
        ("learning_rate_range", "0,1e-4", "greater than 0"),
        ("max_steps_range", "5,x", "valid integer"),
        ("lora_r_range", "8,4096", "less than or equal to 1024"),
        ("trials", "0", "greater than or equal to 1"),
        ("trial", "3", "did you mean trials?"),
        ("storage", "sweep.db", "give the absolute form"),
        ("storage", "/no/such/folder/sweep.db", "there is no folder /no/such/folder"),
        ("registered_model_name", "x", "no such parameter"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_the_way_out(tmp_path, name, value, message):
    with pytest.raises(UserError, match=name) as caught:
        call(tmp_path, **{name: value})
    assert message in str(caught.value)


def test_values_that_prepared_data_cannot_follow_any_more_are_refused(tmp_path):
    with pytest.raises(UserError, match="is prepared already, so max_length would change nothing"):
        call(tmp_path, dataset_uri="runs:/a/dataset", max_length=100)


def test_the_search_is_kept_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_sweep(words(defaults("sweep"))).own.storage.endswith("/text2sql_sweep.db")


@pytest.fixture
def swept(chain, tmp_path, monkeypatch):
    """Runs a sweep whose trainings log a loss and train nothing; its run and what each was told."""
    told = []

    def run_step(step, params, *, title, watch=None, **found):
        told.append(params.steps[step] | found)
        with mlflow.start_run(nested=True, run_name=step) as run:
            mlflow.log_metric("eval_loss", float(found["learning_rate"]) * 1000)
        return mlflow.get_run(run.info.run_id)

    def run(**values):
        values = {"trials": 3, "dataset_uri": chain.dataset_uri} | LIMITS | FIXED | values
        with mlflow.start_run():
            sweep.main(call(tmp_path, **values))
        return mlflow.get_run(mlflow.last_active_run().info.run_id), told

    monkeypatch.setattr(sweep, "run_step", run_step)
    return SimpleNamespace(run=run, told=told)


def test_every_trial_gets_the_same_data_and_fixed_values(swept, chain):
    _, told = swept.run()
    assert len(told) == 3
    for values in told:
        assert values["dataset_uri"] == chain.dataset_uri
        assert values["batch_size"] == str(FIXED["batch_size"])
        assert "lora_alpha" not in values  # rsLoRA's fits every rank
        assert values["validation_rows"] == "64"  # or losses of short and long trials were no comparison


def test_validations_have_the_rows_that_the_user_says(swept):
    _, told = swept.run(validation_rows=7)
    assert {values["validation_rows"] for values in told} == {"7"}
    assert sweep.validation_rows(parse_sweep(words(defaults("sweep") | {"validation_rows": "auto"}))) == {
        "validation_rows": "64"
    }


def test_a_failure_says_how_to_go_on(swept, monkeypatch):
    def fail(*args, **named):
        raise UserError("train failed: for a reason")

    monkeypatch.setattr(sweep, "run_step", fail)
    with pytest.raises(UserError, match="for a reason") as caught:
        swept.run(trials=2)
    assert "mlflow run" in caught.value.go_on
    assert "-e sweep" in caught.value.go_on


def test_a_file_that_keeps_no_searches_is_refused_before_any_step(swept, tmp_path):
    (tmp_path / "sweep.db").write_text("this is text, and no database at all" * 10)
    with pytest.raises(UserError, match=r"storage=.*sweep\.db: keeps no searches: .*give a file"):
        swept.run()
    (tmp_path / "sweep.db").unlink()
    with sqlite3.connect(tmp_path / "sweep.db") as other:
        other.execute("CREATE TABLE studies (something INTEGER)")
    with pytest.raises(UserError, match=r"storage=.*sweep\.db: keeps no searches: .*give a file"):
        swept.run()
    assert swept.told == []


def test_without_rslora_alpha_follows_the_rank(tmp_path):
    of_sweep = call(tmp_path, use_rslora="no")
    assert sweep.recipe(of_sweep, {"lora_r": "8"}) == {"lora_r": "8", "lora_alpha": "16"}
    assert sweep.recipe(call(tmp_path, use_rslora="no", lora_alpha=5), {"lora_r": "8"}) == {"lora_r": "8"}


def test_an_alpha_that_the_user_gives_is_every_trials(swept):
    _, told = swept.run(lora_alpha=5)
    assert {values["lora_alpha"] for values in told} == {"5"}


def test_it_logs_all_trials_and_shows_the_command_of_the_best(swept, capsys):
    run, told = swept.run()
    best = min(told, key=lambda values: float(values["learning_rate"]))
    assert run.data.params["best/learning_rate"] == best["learning_rate"]
    assert run.data.metrics["best_eval_loss"] == float(best["learning_rate"]) * 1000
    table = json.loads(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/trials.json"))
    assert len(table["data"]) == 3
    printed = capsys.readouterr().out
    assert run.data.tags["mlflow.note.content"] in printed
    [command] = [shlex.split(line) for line in printed.splitlines() if "mlflow run" in line]
    assert command[:2] == ["mlflow", "run"]
    for name in ("learning_rate", "lora_r", "max_steps", "dataset_uri"):
        assert f"{name}={best[name]}" in command


def test_a_sweep_typed_again_goes_on(swept, capsys):
    swept.run(trials=2)
    _, told = swept.run(trials=3)
    assert len(told) == 3
    assert "Goes on after 2 trials" in capsys.readouterr().out


def test_other_data_or_fixed_values_are_another_search(swept):
    swept.run(trials=2)
    _, told = swept.run(trials=2, weight_decay=0.5)
    assert len(told) == 4


def test_the_command_of_the_best_makes_main_take_its_training_as_it_is(tmp_path):
    given = {"base_model": "smollm2-135m", "dataset": "sample"} | FIXED
    found = call(tmp_path, **given)
    values = {"learning_rate": "0.00123", "lora_r": "4", "max_steps": "3"}
    step, typed = sweep.next_command(found, sweep.recipe(found, values), "runs:/a/dataset")
    assert step == "main"
    of_main = parse_main(words(defaults("main") | typed)).steps
    named = {"upstream": {}, "device": "cpu", "code": "c"}
    trial = found.steps["train"] | sweep.recipe(found, values) | sweep.validation_rows(found)
    trial |= {"dataset_uri": "runs:/a/dataset"}
    assert reuse.fingerprint("train", trial, **named) == reuse.fingerprint(
        "train", of_main["train"] | {"dataset_uri": "runs:/a/dataset"}, **named
    )
    assert reuse.fingerprint("prepare_data", found.steps["prepare_data"], **named) == reuse.fingerprint(
        "prepare_data", of_main["prepare_data"], **named
    )


@pytest.mark.slow
def test_trainings_are_processes_of_their_own_and_a_bad_one_is_stopped(chain, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda trial: trial.number == 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Long enough that the second training is still going on when its first validation is seen.
    values = LIMITS | {"batch_size": 1, "max_steps_range": "300,300", "logging_steps": 100, "trials": 2}
    with mlflow.start_run() as run:
        sweep.main(call(tmp_path, dataset_uri=chain.dataset_uri, **values))
    children = mlflow.search_runs(
        filter_string=f"tags.`mlflow.parentRunId` = '{run.info.run_id}'",
        order_by=["attributes.start_time"],
        output_format="list",
    )
    assert [one.info.run_name for one in children] == ["trial 1", "trial 2"]
    assert [one.info.status for one in children] == ["FINISHED", "KILLED"]
    finished, stopped = children
    assert len(child_runs.curve(finished.info.run_id, "eval_loss")) == 3
    assert stopped.data.tags["stopped_by"] == "stopped early"
    assert len(child_runs.curve(stopped.info.run_id, "eval_loss")) in (1, 2)
    assert list((tmp_path / "cache" / "text2sql-qlora" / "runs").iterdir()) == []
    printed = capfd.readouterr().out
    assert "| 2 | " in printed
    assert "Best is trial 1." in printed


class Stopped(Stopper):
    """Notes why it was asked to stop."""

    def stop(self, reason):
        self.stopped_by = reason


def child_of(parent, start_time):
    """A train run that a run has started."""
    tags = {"mlflow.parentRunId": parent, "mlflow.project.entryPoint": "train"}
    return mlflow.MlflowClient().create_run("0", start_time=start_time, tags=tags).info.run_id


def wait_until(holds):
    """Wait until something holds, at most 30 seconds."""
    end = time.monotonic() + 30
    while not holds() and time.monotonic() < end:
        threading.Event().wait(0.05)
    assert holds()


def test_the_data_are_prepared_by_the_defaults_of_prepare_data(store, tmp_path, monkeypatch):
    started = []

    def start_step(step, values, *_):
        started.append((step, values))
        return mlflow.active_run()

    monkeypatch.setattr(main.reuse, "device_kind", lambda: "cpu")
    monkeypatch.setattr(main, "start_step", start_step)
    with mlflow.start_run() as run:
        assert sweep.prepare(call(tmp_path, **LIMITS)) == f"runs:/{run.info.run_id}/dataset"
    assert started == [("prepare_data", {"seed": "42"})]


def test_a_trial_that_diverged_leaves_nothing_on_the_disk(store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def diverges(*_, **__):
        with mlflow.start_run(nested=True, tags={"mlflow.project.entryPoint": "train"}) as run:
            mlflow.log_metric("train_loss", float("nan"))
        run_folder(run.info.run_id).mkdir(parents=True)
        raise UserError("diverged")

    monkeypatch.setattr(sweep, "run_step", diverges)
    with mlflow.start_run():
        values = {"learning_rate": "1", "lora_r": "4", "max_steps": "3"}
        assert sweep.train(call(tmp_path), "runs:/a/dataset", 1, values, lambda *_: False) is None
    assert list(run_folder("x").parent.iterdir()) == []


@pytest.mark.parametrize(("loss", "diverged"), [(float("nan"), True), (float("inf"), True), (0.5, False)])
def test_a_trial_whose_loss_is_no_number_does_not_end_the_sweep(store, loss, diverged):
    with mlflow.start_run() as run:
        mlflow.log_metric("train_loss", loss)
    assert sweep.has_diverged(run.info.run_id) is diverged
    with mlflow.start_run() as run:
        mlflow.log_metrics({"train_loss": 1.0, "eval_loss": loss})
    assert sweep.has_diverged(run.info.run_id) is diverged
    assert not sweep.has_diverged("")


def test_the_watcher_asks_once_for_each_validation_and_stops_a_bad_training(store):
    parent = mlflow.MlflowClient().create_run("0").info.run_id
    child_of(parent, 1)  # of the trial before
    asked, stopper = [], Stopped()
    watcher = Watcher(parent, lambda *point: asked.append(point) or point[1] > 5, name="trial 2")
    assert not watcher.look()
    child = child_of(parent, 2)
    client = mlflow.MlflowClient()
    client.log_metric(child, "eval_loss", 4.0, step=10)
    assert not watcher.look()
    assert not watcher.look()
    assert asked == [(1, 4.0)]
    with watcher.watching(stopper):
        client.log_metric(child, "eval_loss", 6.0, step=20)
        wait_until(lambda: stopper.stopped_by)
    assert asked == [(1, 4.0), (2, 6.0)]
    assert stopper.stopped_by == "stopped early"
    assert client.get_run(child).info.run_name == "trial 2"
    assert child_runs.newest_child(parent, "train") == watcher.child == child


def test_a_store_that_is_busy_ends_no_watch(store, monkeypatch):
    parent = mlflow.MlflowClient().create_run("0").info.run_id
    watcher, stopper, curve = Watcher(parent, lambda *_: True, name="trial 1"), Stopped(), child_runs.curve
    child = child_of(parent, 1)
    mlflow.MlflowClient().log_metric(child, "eval_loss", 4.0)
    busy = iter([True])

    def look(*given):
        if next(busy, False):
            raise MlflowException("database is locked")
        return curve(*given)

    monkeypatch.setattr(child_runs, "curve", look)
    with watcher.watching(stopper):
        wait_until(lambda: stopper.stopped_by)
    assert stopper.stopped_by == "stopped early"
