"""Promotions against a real store: what is read, decided, moved and recorded, also by several at once."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas
import pytest
from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST
from mlflow.utils.file_utils import local_file_uri_to_path

from steps import promote
from steps.text2sql import (
    artifacts,
    child_runs,
    promotion_lock,
    promotions,
    reuse,
    scored_rows,
    training_rows,
)
from tests.conftest import PROJECT, call_step, defaults, failure, tracking_at, words

NO_RUN = "0" * 32
MODEL = "text2sql"


def row(i):
    return (f"question {i}", f"CREATE TABLE t{i} (a INT)", f"SELECT a FROM t{i}")


def table(tuned, base=None, first=0):
    """A table of predictions as evaluate logs it; a verdict a letter, for the rows from `first` on."""
    mean = {"1": True, "0": False, "?": None}
    columns = zip(*(row(first + i) for i in range(len(tuned))), strict=True)
    found = pandas.DataFrame(dict(zip(("question", "context", "gold"), columns, strict=True)))
    for prefix, verdicts in (("", tuned), ("base_", base or "0" * len(tuned))):
        found[f"{prefix}prediction"] = "SELECT 1"
        found[f"{prefix}execution_accuracy"] = [mean[letter] for letter in verdicts]
    return found


def log_evaluation(version, rows, *, digest="rows", code="", limit="2.5", metrics=None):
    """What an evaluate run leaves in the active run."""
    tags = {
        "registered_model_name": MODEL,
        "model_version": str(version),
        "code_digest": code or reuse.code_digest(),
    }
    mlflow.set_tags(tags | {"evaluated_rows_digest": digest})
    mlflow.log_param("query_timeout_seconds", limit)
    shares = {name: rows[name].mean() for name in ("execution_accuracy", "base_execution_accuracy")}
    mlflow.log_metrics(metrics if metrics is not None else shares)
    mlflow.log_table(rows, "predictions.json")


@pytest.fixture
def new_version(store, tmp_path):
    """Makes a version that says which rows it has seen; its number comes back."""
    client = mlflow.MlflowClient()
    client.create_registered_model(MODEL)

    def make(seen=()):
        with mlflow.start_run() as run:
            training_rows.write(training_rows.hashes(row(i)[:2] for i in (*seen, 10**6)), tmp_path)
            mlflow.log_text("", "model/MLmodel")
            mlflow.log_artifact(tmp_path / training_rows.FILE, "model/training_rows")
        return int(client.create_model_version(MODEL, f"runs:/{run.info.run_id}/model").version)

    return make


@pytest.fixture
def scored(new_version):
    """Makes a version with an evaluation; version and id of the run come back."""

    def make(tuned, base=None, *, first=0, seen=(), **options):
        version = new_version(seen)
        with mlflow.start_run() as run:
            log_evaluation(version, table(tuned, base, first), **options)
        return version, run.info.run_id

    return make


def promoted(made, **options):
    """Promote a version by its evaluation; the promote run comes back."""
    return call_step("promote", version=made[0], evaluation_run_id=made[1], **options)


def refused(**options):
    """Message of a promotion that must fail: its run is FAILED and nothing moved."""
    before = champion(), promotions.chain(MODEL)
    message, run = failure("promote", **options)
    assert run.info.status == "FAILED"
    assert (champion(), promotions.chain(MODEL)) == before
    assert locks() == []
    return message


def champion():
    """Number of the champion, None where there is none."""
    return promotions.number_of(promotions.champion(MODEL))


def tags_of(version):
    return mlflow.MlflowClient().get_model_version(MODEL, str(version)).tags


def moves():
    """The chain of records as (replaced, version)."""
    return [(record.replaced, record.version) for record in promotions.chain(MODEL)]


def locks():
    """Names of registered models that are, or began as, a lock of the model."""
    names = [model.name for model in mlflow.MlflowClient().search_registered_models()]
    return [name for name in names if name.startswith(f"{MODEL}.") or name.endswith(".lock")]


# The gate on a store


def test_the_first_version_becomes_champion_by_the_floor(scored):
    made = scored("110", base="111")
    run = promoted(made, min_execution_accuracy=0.6)
    assert run.info.status == "FINISHED"
    assert champion() == 1
    assert tags_of(1)["promoted"] == run.data.tags["promoted"] == "yes"
    assert tags_of(1)["gate_reason"] == run.data.tags["gate_reason"]
    assert tags_of(1)["gate_reason"] == "first champion, execution_accuracy 0.6667"


def test_the_floor_holds_for_the_first_version(scored):
    run = promoted(scored("110"), min_execution_accuracy=0.7)
    assert run.info.status == "FINISHED"
    assert champion() is None
    assert tags_of(1)["promoted"] == "no"
    assert tags_of(1)["gate_reason"] == "execution_accuracy 0.6667 is under min_execution_accuracy 0.7000"
    assert moves() == []


def test_a_better_version_replaces_the_champion_and_its_tags_say_all(scored, capsys):
    promoted(scored("0" * 40))
    made = scored("1" * 8 + "0" * 32)
    run = promoted(made)
    assert champion() == 2
    assert tags_of(1)["replaced_by_version"] == "2"
    assert "replaced_version" not in tags_of(1)
    found = tags_of(2)
    assert found.pop("gate_reason") == (
        "execution_accuracy 0.2000 is above the champion's 0.0000 and its base's 0.0000 "
        "(8 against 0 of 40 rows that only one has right, p 0.0039)"
    )
    assert found == {
        "promoted": "yes",
        "replaced_version": "1",
        "gate_execution_accuracy": "0.2",
        "gate_base_execution_accuracy": "0",
        "gate_champion_execution_accuracy": "0",
        "gate_champion_version": "1",
        "gate_rows": "40",
        "gate_rows_left_out": "0",
        "gate_only_candidate_right": "8",
        "gate_only_champion_right": "0",
        "gate_p_value": "0.00390625",
        "gate_alpha": "0.05",
        "gate_min_execution_accuracy": "0",
    }
    assert "text2sql version 2 is champion: execution_accuracy 0.2000 is above" in capsys.readouterr().out
    assert run.data.tags["gate_p_value"] == "0.00390625"


def test_a_version_that_may_be_better_by_chance_leaves_the_champion(scored, capsys):
    promoted(scored("0" * 40))
    made = scored("1" * 4 + "0" * 36)
    run = promoted(made)
    assert run.info.status == "FINISHED"
    assert champion() == 1
    assert tags_of(2)["promoted"] == "no"
    assert "p 0.0625 is not under gate_alpha 0.05" in tags_of(2)["gate_reason"]
    assert "text2sql version 2 is not promoted: " in capsys.readouterr().out
    assert moves() == [(None, 1)]
    promoted(made, gate_alpha=0.1)
    assert champion() == 2


@pytest.mark.parametrize("verdicts", ["1" * 39 + "?", "?" * 40])
def test_a_missing_verdict_promotes_nothing(scored, verdicts):
    run = promoted(scored(verdicts, metrics={"execution_accuracy": 1.0, "base_execution_accuracy": 0.0}))
    assert champion() is None
    assert "execution_accuracy is missing for" in run.data.tags["gate_reason"]


@pytest.mark.parametrize("metrics", [{}, {"execution_accuracy": float("nan")}, {"exact_match": 1.0}])
def test_a_missing_metric_promotes_nothing(scored, metrics):
    run = promoted(scored("1" * 40, metrics=metrics))
    assert run.info.status == "FINISHED"
    assert champion() is None
    assert run.data.tags["gate_reason"] == "execution_accuracy is missing or NaN"


def test_the_champion_promoted_again_stays_as_it_is(scored):
    made = scored("1" * 40)
    promoted(made)
    before = tags_of(1)
    run = promoted(made)
    assert (champion(), moves(), tags_of(1)) == (1, [(None, 1)], before)
    assert run.data.tags["promoted"] == "yes"
    assert run.data.tags["gate_reason"] == "is the champion already"


def test_numbers_of_an_earlier_decision_do_not_stay(scored):
    promoted(scored("0" * 40))
    made = scored("1" * 4 + "0" * 36)
    promoted(made)
    assert "gate_p_value" in tags_of(2)
    call_step("promote", version=2)
    assert {name for name in tags_of(2) if name.startswith("gate_")} == {
        "gate_reason",
        "gate_champion_version",
    }


# Rows that were seen in training


def test_rows_that_candidate_or_champion_has_seen_are_left_out(scored):
    promoted(scored("0" * 40, seen=range(3)))
    promoted(scored("1" * 20 + "0" * 20, seen=[2, 3, 4, 100]))
    assert champion() == 2
    assert tags_of(2)["gate_rows"] == "35"
    assert tags_of(2)["gate_rows_left_out"] == "5"
    assert tags_of(2)["gate_execution_accuracy"] == "0.428571"
    assert tags_of(2)["gate_reason"].endswith("; 5 rows are left out that a model was trained on")


@pytest.mark.parametrize("who", [0, 1])
def test_fewer_than_thirty_unseen_rows_promote_nothing(scored, who):
    seen = [(), ()]
    seen[who] = range(11)
    promoted(scored("1" * 11 + "0" * 29, seen=seen[0]))
    promoted(scored("1" * 40, seen=seen[1]))
    assert champion() == 1
    assert tags_of(2)["gate_reason"].startswith("only 29 rows can be compared and 30 are needed")


def test_a_version_that_does_not_say_what_it_has_seen_leaves_no_rows_out(scored, capsys):
    version, run = scored("1" * 3)
    mlflow.MlflowClient().log_text(run, "", "none/MLmodel")
    other = mlflow.MlflowClient().create_model_version(MODEL, f"runs:/{run}/none").version
    with mlflow.start_run() as active:
        log_evaluation(other, table("111"))
    promoted((other, active.info.run_id))
    assert champion() == int(other)
    assert "models:/text2sql/2 does not say which rows it was trained on" in capsys.readouterr().out


# The champion is scored again


@pytest.fixture
def evaluate_step(monkeypatch):
    """Stands in for the evaluate step, which answers with these verdicts; the values that it got."""
    calls = []

    def run_child(step, values, verdicts="0" * 40, first=100, status="FINISHED"):
        rows = [json.loads(line) for line in Path(values["dataset"]).read_text().splitlines()]
        calls.append((step, dict(values), len(rows)))
        with mlflow.start_run(nested=True) as run:
            log_evaluation(values["model_uri"].rsplit("/", 1)[1], table(verdicts, first=first), digest="new")
        mlflow.MlflowClient().set_terminated(run.info.run_id, status)
        return run

    monkeypatch.setattr(child_runs, "run", run_child)
    return calls


def with_rows(made, first, count):
    """Let an evaluate run have its rows as a file."""
    names = ("question", "context", "answer")
    lines = [json.dumps(dict(zip(names, row(first + i), strict=True))) for i in range(count)]
    mlflow.MlflowClient().log_text(made[1], "".join(f"{line}\n" for line in lines), "rows/rows.jsonl")
    return made


def test_a_champion_with_other_rows_is_scored_again_on_the_candidates(scored, evaluate_step):
    promoted(scored("1" * 40))
    made = with_rows(scored("1" * 20 + "0" * 20, first=100, digest="new"), 100, 40)
    mlflow.MlflowClient().log_param(made[1], "dataset_uri", "runs:/1/dataset")
    promoted(made)
    [(step, values, rows)] = evaluate_step
    file = Path(values.pop("dataset"))
    assert (step, rows, file.name) == ("evaluate", 40, "rows.jsonl")
    assert file.is_absolute()
    assert not file.exists()
    assert values == {"model_uri": "models:/text2sql/1", "eval_rows": "40", "query_timeout_seconds": "2.5"}
    assert champion() == 2
    assert tags_of(2)["gate_champion_execution_accuracy"] == "0"


def test_the_scores_of_the_second_time_are_found_the_next_time(scored, evaluate_step):
    promoted(scored("1" * 40))
    made = with_rows(scored("1" * 3 + "0" * 37, first=100, digest="new"), 100, 40)
    promoted(made)
    promoted(made)
    assert len(evaluate_step) == 1
    assert champion() == 1


@pytest.mark.parametrize("other", [{"code": "older"}, {"limit": "9.0"}])
def test_scores_by_other_code_or_another_limit_are_made_again(scored, evaluate_step, other):
    promoted(scored("1" * 20 + "0" * 20, **other))
    promoted(with_rows(scored("1" * 40), 0, 40))
    assert len(evaluate_step) == 1


def test_no_champion_is_scored_again_beside_scores_by_other_code(scored, evaluate_step):
    promoted(scored("1" * 40))
    made = with_rows(scored("1" * 40, first=100, digest="new", code="older"), 100, 40)
    message = refused(version=2, evaluation_run_id=made[1])
    assert f"evaluation_run_id={made[1]}: was scored by another version of this project" in message
    assert f"mlflow run . -e evaluate -P model_uri=models:/{MODEL}/2" in message
    assert evaluate_step == []


def test_a_candidate_that_is_refused_alone_costs_no_second_scoring(scored, evaluate_step):
    promoted(scored("1" * 40))
    promoted(with_rows(scored("1" * 20, first=100, digest="new"), 100, 20))
    assert evaluate_step == []


def test_scores_under_the_same_digest_but_for_other_rows_are_made_again(scored, evaluate_step):
    promoted(scored("1" * 40, digest="new"))
    promoted(with_rows(scored("1" * 40, first=100, digest="new"), 100, 40))
    assert len(evaluate_step) == 1
    assert champion() == 2


def test_a_second_scoring_on_other_rows_promotes_nothing(scored, monkeypatch, evaluate_step):
    promoted(scored("1" * 40))
    made = with_rows(scored("1" * 40, first=101, digest="new"), 101, 40)
    run = promoted(made)
    assert champion() == 1
    assert "verdicts for 39 of the candidate's 40 rows and for 1 others" in run.data.tags["gate_reason"]


def test_a_run_without_its_rows_cannot_be_compared(scored):
    promoted(scored("1" * 40))
    made = scored("1" * 40, first=100, digest="new")
    message = refused(version=2, evaluation_run_id=made[1])
    assert f"evaluation_run_id=runs:/{made[1]}/rows: " in message


@pytest.fixture
def second_version(finished_chain, tmp_path, monkeypatch):
    """A version 2 that was right on 40 test rows, beside a champion 1 that was scored on 6; its run's id."""
    # MLflow takes the `python` of PATH for a step.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    file = shutil.copy(finished_chain.store.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    with tracking_at(f"sqlite:///{file}"):
        source = mlflow.MlflowClient().get_model_version(MODEL, "1").source
        mlflow.register_model(source, MODEL)
        prepared = Path(mlflow.artifacts.download_artifacts(finished_chain.dataset_uri, dst_path=tmp_path))
        chosen = scored_rows.choose(scored_rows.of_prepared(prepared, source=""), 40)
        with mlflow.start_run() as run, artifacts.logged_folder("rows") as folder:
            rows = scored_rows.write(chosen, folder, seed=42).rename(columns={"answer": "gold"})
            log_evaluation(2, rows.assign(execution_accuracy=True, base_execution_accuracy=False))
        yield run.info.run_id


@pytest.mark.slow
def test_the_champion_is_scored_by_the_evaluate_step_in_a_run_below(second_version):
    run = call_step("promote", version=2, evaluation_run_id=second_version)
    assert champion() == 2
    assert run.data.tags["gate_champion_version"] == "1"
    assert (run.data.tags["gate_rows"], run.data.tags["gate_rows_left_out"]) == ("40", "0")
    [child] = mlflow.search_runs(
        filter_string=f"tags.`mlflow.parentRunId` = '{run.info.run_id}'", output_format="list"
    )
    assert child.info.status == "FINISHED"
    assert child.data.tags["mlflow.project.entryPoint"] == "evaluate"
    assert child.data.tags["model_version"] == "1"
    assert child.data.metrics["evaluated_rows"] == 40
    share = float(run.data.tags["gate_champion_execution_accuracy"])
    assert share == pytest.approx(child.data.metrics["execution_accuracy"], abs=1e-5)


@pytest.mark.slow
def test_a_champion_that_cannot_be_scored_is_an_error_and_stays(second_version, capfd):
    mlflow.MlflowClient().log_text(second_version, "broken", "rows/rows.jsonl")
    message, run = failure("promote", version=2, evaluation_run_id=second_version)
    assert message.startswith("\nError: evaluate failed: ")
    assert "rows.jsonl: is not valid JSONL" in message
    assert "broken JSON at line 1" in capfd.readouterr().err
    assert run.info.status == "FAILED"
    assert (champion(), locks()) == (1, [])
    [child] = mlflow.search_runs(
        filter_string=f"tags.`mlflow.parentRunId` = '{run.info.run_id}'", output_format="list"
    )
    assert child.info.status == "FAILED"
    assert "promoted" not in tags_of(2)


# By hand


def test_the_way_back_skips_the_gate_and_records_who_replaced_whom(scored):
    promoted(scored("0" * 40))
    promoted(scored("1" * 40))
    run = call_step("promote", version=1)
    assert champion() == 1
    assert tags_of(1)["gate_reason"] == "moved by hand, without the gate"
    assert (tags_of(1)["replaced_version"], tags_of(2)["replaced_by_version"]) == ("2", "1")
    assert "replaced_by_version" not in tags_of(1)
    assert moves() == [(None, 1), (1, 2), (2, 1)]
    last = promotions.chain(MODEL)[-1]
    assert (last.run_id, last.reason) == (run.info.run_id, "moved by hand, without the gate")
    assert last.user == run.data.tags["mlflow.user"]
    assert last.time.endswith("+00:00")


def test_a_move_from_outside_becomes_a_record_of_its_own(scored):
    promoted(scored("0" * 40))
    scored("0" * 40)
    third = scored("1" * 40)
    mlflow.MlflowClient().set_registered_model_alias(MODEL, "champion", "2")
    promoted(third)
    assert moves() == [(None, 1), (1, 2), (2, 3)]
    outside = promotions.chain(MODEL)[1]
    assert (outside.reason, outside.run_id) == (promotions.OUTSIDE, "")


def test_a_champion_that_was_deleted_leaves_a_chain_without_gaps(scored):
    promoted(scored("1" * 40))
    second = scored("0" * 40)
    mlflow.MlflowClient().delete_model_version(MODEL, "1")
    promoted(second)
    assert champion() == 2
    assert moves() == [(None, 1), (1, None), (None, 2)]


# Bad input


def test_a_run_that_does_not_exist_is_named(scored):
    promoted(scored("0" * 40))
    assert f"evaluation_run_id={NO_RUN}: " in refused(version=1, evaluation_run_id=NO_RUN)


def test_a_version_whose_package_is_gone_is_refused(scored):
    version, run_id = scored("1" * 40)
    shutil.rmtree(artifacts_of(version))
    message, _ = failure("promote", version=version, evaluation_run_id=run_id)
    assert f"version={version}: the package of models:/{MODEL}/{version} is gone" in message
    assert "champion" not in mlflow.MlflowClient().get_registered_model(MODEL).aliases


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"all of them\n"])
def test_a_version_whose_training_rows_are_garbled_is_refused(scored, text):
    version, run_id = scored("1" * 40)
    (artifacts_of(version) / "training_rows" / training_rows.FILE).write_bytes(text)
    message, _ = failure("promote", version=version, evaluation_run_id=run_id)
    assert f"models:/{MODEL}/{version}: its hashes.txt has no hashes of training rows" in message


def artifacts_of(version):
    """Folder of a version's package."""
    source = mlflow.MlflowClient().get_model_version(MODEL, str(version)).source
    run_id, path = source.removeprefix("runs:/").split("/")
    return Path(local_file_uri_to_path(mlflow.get_run(run_id).info.artifact_uri)) / path


def test_an_evaluation_of_another_version_is_refused(scored):
    promoted(scored("0" * 40))
    other = scored("1" * 40)
    scored("1" * 40)
    message = refused(version=3, evaluation_run_id=other[1])
    assert f"evaluation_run_id={other[1]}: is no evaluation of text2sql version 3; run: mlflow run" in message


@pytest.mark.parametrize("status", ["RUNNING", "FAILED", "KILLED"])
def test_an_evaluation_that_is_not_finished_is_refused(scored, status):
    made = scored("1" * 40)
    mlflow.MlflowClient().update_run(made[1], status=status)
    message = refused(version=1, evaluation_run_id=made[1])
    assert f"evaluation_run_id={made[1]}: is {status}, not FINISHED" in message


def test_an_evaluation_without_a_table_is_refused(new_version):
    version = new_version()
    with mlflow.start_run() as run:
        mlflow.set_tags({"registered_model_name": MODEL, "model_version": str(version)})
        mlflow.log_metric("execution_accuracy", 1.0)
    message = refused(version=version, evaluation_run_id=run.info.run_id)
    assert f"evaluation_run_id={run.info.run_id}: has no table of predictions (predictions.json)" in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            '{"columns": ["question", "context", "gold", "execution_accuracy"], "data": []}',
            "has an empty table",
        ),
        ('{"columns": ["question"], "data": [["a"]]}', "has no table of predictions"),
        ('{"columns": ["question"], "data": [["a", "b"]]}', "has no table of predictions"),
        ("[1]", "has no table of predictions"),
        ("not JSON", "has no table of predictions"),
    ],
)
def test_a_table_that_says_nothing_is_refused(new_version, text, problem):
    version = new_version()
    with mlflow.start_run() as run:
        mlflow.set_tags({"registered_model_name": MODEL, "model_version": str(version)})
        mlflow.log_metric("execution_accuracy", 1.0)
        mlflow.log_text(text, "predictions.json")
    assert problem in refused(version=version, evaluation_run_id=run.info.run_id)


def test_a_version_that_does_not_exist_is_refused(scored):
    promoted(scored("0" * 40))
    assert "has no version 7; there are: 1" in refused(version=7)


# Two promotions at once

# One process that imports once and then forks: the promotions start together.
AT_ONCE = """\
import json, os, sys
from steps import promote
from steps.text2sql import params, step_run
for argv in json.loads(sys.argv[1]):
    if not os.fork():
        sys.argv = ["promote", *argv]
        step_run.run_step(params.PromoteParams, promote.main)
        os._exit(0)
codes = [os.wait()[1] for _ in json.loads(sys.argv[1])]
sys.exit(any(codes))
"""
HOLD = """\
import sys, time
import mlflow
from steps.text2sql import promotion_lock
mlflow.start_run()
with promotion_lock.held("text2sql", run_id=mlflow.active_run().info.run_id):
    print(mlflow.active_run().info.run_id, flush=True)
    time.sleep(600)
"""


def python(script, *args):
    return subprocess.Popen(
        [sys.executable, "-c", script, *args],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def killed_holder(scored):
    """Id of the run whose process held the lock when it was killed: nobody set its status."""
    process = python(HOLD)
    lines = []
    while not lines or len(lines[-1]) != 32:
        line = process.stdout.readline()
        assert line, lines
        lines.append(line.strip())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert locks() == ["text2sql.lock"]
    assert mlflow.get_run(lines[-1]).info.status == "RUNNING"
    return lines[-1]


def test_a_lock_that_is_removed_while_it_is_read_is_nobody_elses_model(store, monkeypatch):
    client, read = mlflow.MlflowClient(), mlflow.MlflowClient.get_registered_model
    with promotion_lock.held(MODEL, run_id="run") as lock:
        whole = client.get_registered_model(lock.name)
        torn = RegisteredModel(lock.name, creation_timestamp=whole.creation_timestamp - 1)
        answers = [torn]
        monkeypatch.setattr(
            mlflow.MlflowClient,
            "get_registered_model",
            lambda self, name: answers.pop() if answers else read(self, name),
        )
        assert promotion_lock.holder(lock) == lock
    assert promotion_lock.holder(lock) is None


@pytest.mark.slow
def test_promotions_at_once_form_one_chain_each_judged_against_the_one_that_it_replaced(
    scored, killed_holder
):
    mlflow.MlflowClient().set_terminated(killed_holder, "FAILED")
    made = [scored("1" * 10 * i + "0" * 10 * (6 - i)) for i in range(1, 6)]
    promoted(made[0])
    jobs = [
        words(defaults("promote") | {"version": version, "evaluation_run_id": run})
        for version, run in made[1:]
    ]
    process = python(AT_ONCE, json.dumps(jobs))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    found = moves()
    assert found[0] == (None, 1)
    assert champion() == found[-1][1] == 5
    assert [replaced for replaced, _ in found[1:]] == [version for _, version in found[:-1]]
    for replaced, version in found[1:]:
        assert tags_of(version)["gate_champion_version"] == str(replaced)
        assert float(tags_of(version)["gate_champion_execution_accuracy"]) == pytest.approx(
            replaced / 6, abs=1e-5
        )
    moved = {version for _, version in found}
    for version in {2, 3, 4} - moved:
        assert tags_of(version)["promoted"] == "no"
        assert int(tags_of(version)["gate_champion_version"]) > version
    assert locks() == []


def test_a_lock_whose_run_has_ended_is_taken_over_at_once(scored, killed_holder, monkeypatch):
    monkeypatch.setattr(promotion_lock.time, "sleep", lambda _: pytest.fail("waited"))
    mlflow.MlflowClient().set_terminated(killed_holder, "FAILED")
    promoted(scored("1"))
    assert champion() == 1
    assert locks() == []


@pytest.fixture
def left(scored):
    """Leaves a lock, held by a run."""

    def leave(run_id):
        assert promotion_lock._create(promotion_lock.Lock(MODEL, run_id))

    return leave


def running():
    """Id of a run that says it runs."""
    return mlflow.MlflowClient().create_run("0").info.run_id


def test_a_lock_whose_run_is_gone_or_deleted_is_taken_over(scored, left):
    made = scored("1")
    left(NO_RUN)
    promoted(made)
    assert (champion(), locks()) == (1, [])
    deleted = running()
    mlflow.MlflowClient().delete_run(deleted)
    left(deleted)
    call_step("promote", version=scored("1")[0])
    assert (champion(), locks()) == (2, [])


def test_a_lock_whose_run_says_it_runs_is_taken_over_after_the_lease(scored, left, monkeypatch):
    left(running())
    monkeypatch.setattr(promotion_lock, "LEASE_SECONDS", 0.05)
    monkeypatch.setattr(promotion_lock, "POLL_SECONDS", 0.01)
    promoted(scored("1"))
    assert (champion(), locks()) == (1, [])


def test_a_lock_that_is_not_given_back_ends_in_an_error_that_names_its_run(scored, left, monkeypatch):
    monkeypatch.setattr(promotion_lock, "WAIT_SECONDS", 0.05)
    holder = running()
    made = scored("1")
    left(holder)
    message, run = failure("promote", version=1, evaluation_run_id=made[1])
    assert f"now run {holder}; nothing was moved" in message
    assert run.info.status == "FAILED"
    assert (champion(), moves(), locks()) == (None, [], ["text2sql.lock"])


def test_the_lock_says_what_it_is_and_is_there_only_inside_the_block(store):
    with promotion_lock.held(MODEL, run_id="abc"):
        found = mlflow.MlflowClient().get_registered_model("text2sql.lock")
        assert "Lock of the promote step of text2sql, held by run abc" in found.description
    assert locks() == []


def test_the_lock_is_given_back_after_an_error(store):
    with pytest.raises(ZeroDivisionError), promotion_lock.held(MODEL, run_id="abc"):
        raise ZeroDivisionError
    assert locks() == []


def test_a_holder_whose_lock_was_taken_moves_nothing_and_removes_no_other_lock(store, left):
    with promotion_lock.held(MODEL, run_id="abc") as lock:
        promotion_lock._take_away(lock)
        left("other")
        with pytest.raises(promotion_lock.UserError, match="took the lock over"):
            lock.check()
    assert locks() == ["text2sql.lock"]


def test_a_lock_that_was_renewed_meanwhile_is_given_back(store, left):
    left("alive")
    promotion_lock._take_away(promotion_lock.Lock(MODEL, "dead"))
    assert locks() == ["text2sql.lock"]
    assert promotion_lock.holder(promotion_lock.Lock(MODEL, "")).run_id == "alive"


@pytest.mark.parametrize("code", [RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST])
def test_a_lock_that_was_given_back_while_asking_for_it_is_asked_for_again(store, monkeypatch, code):
    create, answers = mlflow.MlflowClient.create_registered_model, [MlflowException("raced", code)]

    def late(*args, **options):
        if answers:
            raise answers.pop()
        return create(*args, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "create_registered_model", late)
    with promotion_lock.held(MODEL, run_id="abc"):
        assert locks() == ["text2sql.lock"]
    assert locks() == []


def test_a_lock_whose_answer_was_lost_is_held(store, monkeypatch):
    create = mlflow.MlflowClient.create_registered_model

    def lost(*args, **options):
        create(*args, **options)
        raise MlflowException("asked twice", RESOURCE_ALREADY_EXISTS)

    monkeypatch.setattr(mlflow.MlflowClient, "create_registered_model", lost)
    with promotion_lock.held(MODEL, run_id="abc") as lock:
        lock.check()
    assert locks() == []


def test_a_users_model_with_the_locks_name_is_left_alone(scored):
    mlflow.MlflowClient().create_registered_model("text2sql.lock")
    made = scored("1")
    message, run = failure("promote", version=1, evaluation_run_id=made[1])
    assert "its lock would be the registered model text2sql.lock, which is another one" in message
    assert run.info.status == "FAILED"
    assert (champion(), locks()) == (None, ["text2sql.lock"])


def test_a_champion_that_changes_while_judging_is_judged_against(scored, monkeypatch):
    promoted(scored("0" * 40))
    second, third = scored("1" * 40), scored("1" * 20 + "0" * 20)
    decided = promote.decide
    seen = []

    def decide_late(judge, version, champion):
        decision = decided(judge, version, champion)
        seen.append((int(champion.version), decision.promote))
        if len(seen) == 1:  # another promotion comes first
            mlflow.MlflowClient().set_registered_model_alias(MODEL, "champion", str(second[0]))
        return decision

    monkeypatch.setattr(promote, "decide", decide_late)
    promoted(third)
    assert seen == [(1, True), (2, False)]
    assert champion() == 2
    assert tags_of(3)["gate_champion_version"] == "2"
