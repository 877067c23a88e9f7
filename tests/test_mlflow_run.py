"""The commands that users type, in processes of their own."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest

from tests.conftest import PROJECT, START_LIMIT_SECONDS, plain_rows, tracking_at, write_jsonl

pytestmark = pytest.mark.slow

STEPS = ["prepare_data", "train", "register", "evaluate", "promote"]


def environment(**changed):
    """This environment with this Python's `mlflow` and `python` first on PATH, without MLflow's variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    kept.pop("OMP_NUM_THREADS", None)  # the embedded base is large enough for all cores
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | changed


def mlflow_run(folder, *, uri=None, experiment=None, **parameters):
    """`mlflow run` of main, typed in a folder."""
    store = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_EXPERIMENT_NAME": experiment}
    options = [word for name, value in parameters.items() for word in ("-P", f"{name}={value}")]
    return subprocess.run(
        ["mlflow", "run", str(PROJECT), "--env-manager", "local", *options],
        cwd=folder,
        env=environment(**{name: value for name, value in store.items() if value}),
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )


def runs():
    """The only run without a parent, and its children by start."""
    found = mlflow.search_runs(
        output_format="list", order_by=["attributes.start_time"], search_all_experiments=True
    )
    [parent] = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(found) - 1
    return parent, children


def test_main_on_the_embedded_base_with_the_default_store(tmp_path):
    parameters = {"max_steps": 3, "batch_size": 2, "eval_rows": 4}
    done = mlflow_run(tmp_path, base_model="smollm2-135m", dataset="sample", **parameters)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "mlflow.db").is_file()

    with tracking_at(f"sqlite:///{tmp_path / 'mlflow.db'}"):
        parent, children = runs()
        assert [run.info.run_name for run in children] == STEPS
        assert [run.info.status for run in (parent, *children)] == ["FINISHED"] * 6
        assert str(tmp_path) in children[0].info.artifact_uri
        champion = mlflow.MlflowClient().get_model_version_by_alias("text2sql", "champion")
        assert int(champion.version) == 1
        evaluated = children[3].data.metrics
        assert parent.data.metrics == {name: value for name, value in evaluated.items() if "/" not in name}
        assert {"execution_accuracy", "base_execution_accuracy"} <= set(parent.data.metrics)

    screen = done.stdout[done.stdout.index("text2sql version 1 is champion") :]
    for words in ("Scores on 4 test rows", "execution_accuracy", "models:/text2sql/1", "base_model"):
        assert words in screen
    for words in ("mlflow ui ", "mlflow models predict ", "mlflow models serve "):
        assert words in screen

    [command] = [line.strip() for line in done.stdout.splitlines() if " -e promote " in line]
    again = subprocess.run(
        shlex.split(command),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    with tracking_at(f"sqlite:///{tmp_path / 'mlflow.db'}"):
        newest = mlflow.search_runs(output_format="list", max_results=1)[0]
        assert newest.data.tags["mlflow.project.entryPoint"] == "promote"
        assert newest.info.status == "FINISHED"
        assert int(mlflow.MlflowClient().get_model_version_by_alias("text2sql", "champion").version) == 1


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def sqlite_database(folder):
    """URI of a database in a file."""
    yield f"sqlite:///{folder / 'server.db'}"


@contextmanager
def postgresql_database(_):
    """URI of an empty database of a PostgreSQL of the test's own."""
    if not shutil.which("initdb"):
        pytest.skip("PostgreSQL's initdb is not on the PATH")
    pytest.importorskip("psycopg2", reason="MLflow needs psycopg2 for PostgreSQL, which is not installed")
    programs, port = Path(shutil.which("initdb")).resolve().parent, str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        as_user = {"cwd": "/", "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            try:
                shutil.chown(folder, "postgres")
            except LookupError:
                pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
            as_user |= {"user": "postgres", "extra_groups": []}
        initdb = [programs / "initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "mlflow", "--no-sync"]
        subprocess.run(initdb, check=True, **as_user)
        listen = ["-p", port, "-k", folder, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        process = subprocess.Popen([programs / "postgres", "-D", f"{folder}/data", *listen], **as_user)
        try:
            ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", port, "-U", "mlflow"]
            assert wait_until(lambda: subprocess.run(ready, check=False).returncode == 0, process)
            # SQLAlchemy's own choice of a driver differs from version to version.
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # its fast shutdown
            process.wait(timeout=60)


@pytest.fixture(params=[sqlite_database, postgresql_database], ids=["sqlite", "postgresql"])
def server(request, tmp_path):
    """URL of an MLflow server of the test's own, which proxies artifacts."""
    with request.param(tmp_path) as database, running_server(database, tmp_path) as url:
        yield url


@contextmanager
def running_server(database, tmp_path):
    """Start a server on a database, and stop it; its URL."""
    port = free_port()
    store = ["--backend-store-uri", database]
    store += ["--artifacts-destination", str(tmp_path / "artifacts")]
    log = tmp_path / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *store],
            cwd=tmp_path,
            env=environment(),
            stdout=output,
            stderr=output,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        assert wait_until(lambda: answers(f"{url}/health"), process), log.read_text()[-3000:]
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_until(holds, process):
    """Whether something holds while a process lives, within START_LIMIT_SECONDS."""
    end = time.monotonic() + START_LIMIT_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if holds():
            return True
        time.sleep(0.2)
    return False


def answers(url):
    """Whether a server answers at a URL."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def test_main_against_a_tracking_server(server, tiny_base, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", plain_rows(200))
    parameters = {"max_steps": 3, "batch_size": 2, "eval_rows": 4, "lora_r": 4}
    parameters |= {"base_model": tiny_base, "dataset": rows}
    done = mlflow_run(tmp_path, uri=server, experiment="My team", **parameters)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not (tmp_path / "mlflow.db").exists()
    with tracking_at(server):
        parent, children = runs()
        assert [run.info.run_name for run in children] == STEPS
        assert [run.info.status for run in (parent, *children)] == ["FINISHED"] * 6
        experiment = mlflow.get_experiment_by_name("My team").experiment_id
        assert {run.info.experiment_id for run in (parent, *children)} == {experiment}
        for run, path in ((children[0], "dataset/manifest.json"), (children[1], "adapter/manifest.json")):
            assert run.info.artifact_uri.startswith("mlflow-artifacts:")
            assert str(tiny_base) in mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{path}")
        package = Path(mlflow.artifacts.download_artifacts("models:/text2sql@challenger"))
        assert (package / "artifacts" / "adapter" / "adapter_model.safetensors").is_file()
        # Rows of a file have no database; some are made for them.
        assert children[3].data.metrics["execution_accuracy"] == 0
        assert children[4].data.tags["promoted"] == "yes"
        assert mlflow.MlflowClient().get_registered_model("text2sql").aliases["champion"] == "1"
    reason = "first champion, execution_accuracy 0.0000"
    assert reason in done.stdout[done.stdout.index("text2sql version 1 is champion") :]


def test_a_relative_store_ends_main_with_its_absolute_form(tmp_path):
    done = mlflow_run(tmp_path, uri="sqlite:///relative.db")
    assert done.returncode == 1
    printed = done.stdout + done.stderr
    assert "MLFLOW_TRACKING_URI=sqlite:///relative.db: is a relative path" in printed
    assert f"give the absolute form: sqlite:///{tmp_path}/relative.db" in printed
    assert "Traceback" not in printed
    assert not (PROJECT / "relative.db").exists()
    with tracking_at(f"sqlite:///{tmp_path / 'relative.db'}"):
        assert runs()[0].info.status == "FAILED"


def test_a_mistyped_parameter_ends_main_before_its_first_step(tmp_path):
    done = mlflow_run(tmp_path, max_step=7)
    assert done.returncode == 1
    printed = done.stdout + done.stderr
    assert "max_step=7: no such parameter; did you mean max_steps?" in printed
    assert "Traceback" not in printed
    with tracking_at(f"sqlite:///{tmp_path / 'mlflow.db'}"):
        parent, children = runs()
        assert (parent.info.status, children) == ("FAILED", [])
        assert "max_step=7" in parent.data.tags["failure_reason"]
