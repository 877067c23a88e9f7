"""Several pipelines at once in one store."""

import subprocess
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pytest

from steps import register
from steps.text2sql import tracking
from steps.text2sql.manifest import AdapterManifest
from steps.text2sql.params import RegisterParams
from tests.conftest import PROJECT, QUICK, plain_rows, tracking_at, write_jsonl
from tests.test_mlflow_run import environment

AT_ONCE = 4


def register_at_once(source, described):
    """Register the model AT_ONCE times at the same time, each in a run of its own; the versions come back."""

    def one(_):
        with mlflow.start_run():
            params = RegisterParams("runs:/a/adapter", "runs:/a/dataset", "together")
            return register.register(source, described, params, card="A card", prompt="prompts:/p/1")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, range(AT_ONCE)))


def test_four_registrations_at_once_get_versions_of_their_own_and_the_newest_is_challenger(
    chain, monkeypatch
):
    monkeypatch.setattr(tracking, "git_commit", lambda: "")
    source = mlflow.MlflowClient().get_model_version("text2sql", "1").source
    prepared = mlflow.artifacts.load_dict(f"runs:/{chain.train.info.run_id}/adapter/manifest.json")["dataset"]
    described = AdapterManifest("nf4", 6, 6, prepared)
    versions = register_at_once(source, described)
    assert sorted(int(version.version) for version in versions) == [1, 2, 3, 4]
    challenger = mlflow.MlflowClient().get_model_version_by_alias("together", "challenger")
    assert int(challenger.version) == AT_ONCE


def test_a_registration_that_never_gets_a_number_is_an_error(store, monkeypatch):
    def taken(*_, **__):
        raise mlflow.MlflowException("Model Version creation error. Giving up after 3 attempts.")

    monkeypatch.setattr(mlflow, "register_model", taken)
    monkeypatch.setattr(tracking.random, "uniform", lambda *_: 0)
    with pytest.raises(mlflow.MlflowException, match="Giving up"):
        tracking.register_version("models:/m-1", "together", {})


def test_two_that_set_an_alias_for_the_first_time_both_succeed(chain, monkeypatch):
    set_alias, calls = mlflow.MlflowClient.set_registered_model_alias, []

    def collide(client, name, alias, version):
        calls.append(version)
        if len(calls) == 1:
            raise mlflow.MlflowException("UNIQUE constraint failed")
        set_alias(client, name, alias, version)

    monkeypatch.setattr(mlflow.MlflowClient, "set_registered_model_alias", collide)
    monkeypatch.setattr(tracking.random, "uniform", lambda *_: 0)
    tracking.point_to_newest("text2sql", "newest")
    assert len(calls) == 2
    newest = mlflow.MlflowClient().get_model_version_by_alias("text2sql", "newest")
    assert str(newest.version) == calls[1]
    mlflow.MlflowClient().delete_registered_model_alias("text2sql", "newest")


@pytest.mark.slow
def test_two_pipelines_at_once_both_finish_with_a_version_each(new_store, tiny_base, tmp_path):
    uri = new_store()
    rows = write_jsonl(tmp_path / "rows.jsonl", plain_rows(60))
    values = QUICK | {"max_steps": 2, "base_model": tiny_base, "dataset": rows, "eval_rows": 2}
    words = [word for name, value in values.items() for word in ("-P", f"{name}={value}")]
    logs = [tmp_path / f"{name}.log" for name in "ab"]
    processes = []
    for log in logs:
        with log.open("w") as output:
            processes.append(
                subprocess.Popen(
                    ["mlflow", "run", str(PROJECT), "--env-manager", "local", *words],
                    cwd=tmp_path,
                    env=environment(MLFLOW_TRACKING_URI=uri, OMP_NUM_THREADS="1"),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    codes = [process.wait(timeout=1200) for process in processes]
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    with tracking_at(uri):
        runs = mlflow.search_runs(output_format="list")
        assert {run.info.status for run in runs} == {"FINISHED"}
        versions = mlflow.MlflowClient().search_model_versions('name = "text2sql"')
        assert sorted(int(version.version) for version in versions) == [1, 2]
        assert len({version.run_id for version in versions}) == 2
