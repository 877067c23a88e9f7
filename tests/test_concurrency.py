"""Several pipelines at once in one store."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pandas
import pytest
from mlflow.tracking._model_registry.client import ModelRegistryClient

from steps import register
from steps.text2sql import (
    assessments,
    model_versions,
    project_source,
    prompt_registry,
    retries,
    run_log,
)
from steps.text2sql.manifest import AdapterManifest, DatasetManifest
from steps.text2sql.params import RegisterParams
from tests.conftest import QUICK, Forked, plain_rows, run_main, tracking_at, write_jsonl

AT_ONCE = 4


def echo(model_input: list[str]) -> list[str]:
    """The smallest model."""
    return model_input


def register_at_once(source, described):
    """Register the model AT_ONCE times at the same time, each in a run of its own; the versions come back."""

    def one(_):
        with mlflow.start_run():
            params = RegisterParams("runs:/a/adapter", "runs:/a/dataset", "together")
            card = "A card of version {version}".format
            return register.register(source, described, params, card=card, prompt="prompts:/p/1")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, range(AT_ONCE)))


def collides_once(monkeypatch, owner, name):
    """Let the first call of a method fail as if another had been first; the calls come back."""
    call, calls = getattr(owner, name), []

    def collide(*given, **named):
        calls.append(given)
        if len(calls) == 1:
            raise mlflow.MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name")
        return call(*given, **named)

    monkeypatch.setattr(owner, name, collide)
    monkeypatch.setattr(retries.random, "uniform", lambda *_: 0)
    return calls


@pytest.fixture(params=["sqlite", "server"])
def shared_store(request, new_store):
    """A store of its own that several use."""
    return request.getfixturevalue("server").url if request.param == "server" else new_store()


@pytest.fixture
def model(shared_store):
    """A logged model in it."""
    with tracking_at(shared_store):
        logged = mlflow.pyfunc.log_model(name="model", python_model=echo, pip_requirements=[])
        mlflow.end_run()
        yield logged.model_uri


def test_four_registrations_at_once_get_versions_of_their_own_and_the_newest_is_challenger(
    model, monkeypatch
):
    monkeypatch.setattr(project_source, "git_commit", lambda: "")
    names = [field.name for field in dataclasses.fields(DatasetManifest)]
    described = AdapterManifest("nf4", 6, 6, dict.fromkeys(names, ""))
    versions = register_at_once(model, described)
    assert sorted(int(version.version) for version in versions) == [1, 2, 3, 4]
    challenger = mlflow.MlflowClient().get_model_version_by_alias("together", "challenger")
    assert int(challenger.version) == AT_ONCE


def test_a_registration_that_never_gets_a_number_is_an_error(store, monkeypatch):
    def taken(*_, **__):
        raise mlflow.MlflowException("Model Version creation error. Giving up after 3 attempts.")

    monkeypatch.setattr(mlflow, "register_model", taken)
    monkeypatch.setattr(retries.random, "uniform", lambda *_: 0)
    with pytest.raises(mlflow.MlflowException, match="Giving up"):
        model_versions.register_version("models:/m-1", "together", {})


def test_two_that_set_an_alias_for_the_first_time_both_succeed(store, monkeypatch):
    mlflow.MlflowClient().create_registered_model("text2sql")
    mlflow.MlflowClient().create_model_version("text2sql", "/a")
    calls = collides_once(monkeypatch, mlflow.MlflowClient, "set_registered_model_alias")
    model_versions.point_to_newest("text2sql", "newest")
    assert len(calls) == 2
    newest = mlflow.MlflowClient().get_model_version_by_alias("text2sql", "newest")
    assert str(newest.version) == calls[1][-1]


def test_two_that_publish_a_prompt_for_the_first_time_share_its_version(store, monkeypatch):
    create, calls = ModelRegistryClient.create_registered_model, []

    def taken_before(*given, **named):
        calls.append(create(*given, **named))
        assert published() == "prompts:/text2sql-prompt/1"
        return create(*given, **named)

    def published():
        with mlflow.start_run(nested=True) as run:
            model_id = mlflow.initialize_logged_model(name="model").model_id
            return prompt_registry.publish(
                "{context} {question}",
                style="plain",
                model_name="text2sql",
                model_id=model_id,
                run_id=run.info.run_id,
            )

    monkeypatch.setattr(ModelRegistryClient, "create_registered_model", taken_before)
    monkeypatch.setattr(retries.random, "uniform", lambda *_: 0)
    assert published() == "prompts:/text2sql-prompt/1"
    assert len(calls) == 1


def test_two_that_log_a_dataset_for_the_first_time_both_succeed(store, monkeypatch):
    calls = collides_once(monkeypatch, mlflow, "log_input")
    with mlflow.start_run() as run:
        run_log.log_input(mlflow.data.from_pandas(pandas.DataFrame({"a": [1]}), name="rows"), "training")
    [found] = mlflow.get_run(run.info.run_id).inputs.dataset_inputs
    assert (found.dataset.name, len(calls)) == ("rows", 2)


def test_two_that_assess_the_same_rows_for_the_first_time_both_succeed(store, monkeypatch):
    calls = collides_once(monkeypatch, mlflow.MlflowClient, "log_inputs")
    texts = {"question": "q", "context": "c", "gold": "SELECT 1", "prediction": "SELECT 1", "detail": ""}
    with mlflow.start_run() as run:
        assessments.log(pandas.DataFrame([texts | dict.fromkeys(assessments.VERDICTS, True)]), model_id=None)
    [trace] = mlflow.search_traces(run_id=run.info.run_id, return_type="list")
    assert len(calls) == 2
    assert {one.name for one in trace.info.assessments} >= set(assessments.VERDICTS)


def test_an_error_that_is_no_collision_is_not_tried_again():
    calls = []

    def fail():
        calls.append(1)
        raise mlflow.MlflowException("API request to http://127.0.0.1 failed")

    with pytest.raises(mlflow.MlflowException, match="API request"):
        retries.tried_again(fail)
    assert len(calls) == 1


def test_two_pipelines_at_once_both_finish_with_a_version_each(
    shared_store, tiny_base, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = write_jsonl(tmp_path / "rows.jsonl", plain_rows(60))
    values = QUICK | {"max_steps": 2, "base_model": tiny_base, "dataset": rows, "eval_rows": 2}
    with tracking_at(shared_store):
        with Forked(lambda: run_main(**values)) as one, Forked(lambda: run_main(**values)) as other:
            with ThreadPoolExecutor() as pool:
                printed = list(pool.map(lambda process: process.stdout.read(), (one, other)))
            codes = [process.wait(60) for process in (one, other)]
        failed = [text[-3000:] for text, code in zip(printed, codes, strict=True) if code]
        assert not failed, "\n".join(failed)
        runs = mlflow.search_runs(output_format="list")
        assert {run.info.status for run in runs} == {"FINISHED"}
        assert len(runs) == 12
        versions = mlflow.MlflowClient().search_model_versions('name = "text2sql"')
        assert sorted(int(version.version) for version in versions) == [1, 2]
        assert len({version.run_id for version in versions}) == 2
