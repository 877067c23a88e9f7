"""How runs end, what is logged, and artifact URIs."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import mlflow
import pytest
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from pydantic import Field

from steps import train
from steps.text2sql import (
    active_run,
    artifacts,
    command_line,
    liveness,
    processes,
    project_source,
    run_log,
    step_run,
)
from steps.text2sql.artifacts import downloaded
from steps.text2sql.errors import Interrupted, UserError
from steps.text2sql.model_versions import model_version
from steps.text2sql.params import TrainParams
from steps.text2sql.run_log import log_settings
from steps.text2sql.step_run import run_in_run
from tests.conftest import PROJECT, defaults, words

NO_FILES = '{"files": {}}'


@dataclass(frozen=True)
class OneNumber:
    """Parameters of a step for these tests."""

    number: Annotated[int, Field(ge=1)]


class OwnError(Exception):
    """An error of a library that a step counts as the user's."""


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Put back the handler that a step installs."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which temporary folders are made."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def ends_with(error: BaseException) -> Callable[[], None]:
    """A body that ends like this."""

    def body() -> None:
        raise error

    return body


def last_run() -> Run:
    """The only run of the store, which must have ended."""
    (run,) = mlflow.search_runs(output_format="list", search_all_experiments=True)
    assert mlflow.active_run() is None
    assert run.info.status != "RUNNING"
    assert run.info.end_time is not None
    return run


def exit_text(body: Callable[[], None], **kwargs: object) -> str:
    """What Python prints when this body ends the process; text means exit status 1 and no traceback."""
    with pytest.raises(SystemExit) as caught:
        run_in_run(body, **kwargs)
    assert isinstance(caught.value.code, str)
    return caught.value.code


@pytest.fixture
def run_with_files(store: str) -> str:
    """Id of a run with the artifacts `dataset/manifest.json` and `notes.txt`."""
    with mlflow.start_run() as run:
        mlflow.log_text(NO_FILES, "dataset/manifest.json")
        mlflow.log_text("hello", "notes.txt")
    return run.info.run_id


@pytest.mark.parametrize("location", ["s3://no-client/x", "file:///proc/nope", "mlflow-artifacts:/1"])
def test_an_artifact_location_that_cannot_be_written_is_said_before_any_work(store, monkeypatch, location):
    elsewhere = mlflow.create_experiment("elsewhere", artifact_location=location)
    monkeypatch.setenv("MLFLOW_RUN_ID", mlflow.MlflowClient().create_run(elsewhere).info.run_id)
    text = exit_text(lambda: pytest.fail("worked"))
    assert text.startswith(f"\nError: the artifact location {location}")
    assert "cannot be used: " in text
    assert last_run().info.status == "FAILED"


# --- ends


@pytest.mark.usefixtures("store")
def test_a_step_that_returns_is_finished():
    run_in_run(lambda: mlflow.log_metric("a", 1))
    assert last_run().info.status == "FINISHED"
    assert last_run().data.metrics == {"a": 1}


@pytest.mark.usefixtures("store")
def test_a_step_gets_the_parameters_of_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["step", "--number", "7"])
    got = []
    step_run.run_step(OneNumber, got.append)
    assert got == [OneNumber(7)]


@pytest.mark.usefixtures("store")
def test_a_bad_command_line_is_a_failed_run_with_the_reason(monkeypatch):
    monkeypatch.setattr("sys.argv", ["step", "--number", "0"])
    with pytest.raises(SystemExit, match="Error: number=0: must be greater than or equal to 1"):
        step_run.run_step(OneNumber, lambda _: pytest.fail("the step was called"))
    assert last_run().info.status == "FAILED"
    assert last_run().data.tags["failure_reason"].startswith("number=0")


@pytest.mark.usefixtures("store")
def test_a_users_error_is_its_message_alone_and_a_failed_run():
    assert exit_text(ends_with(UserError("lora_r=0: too small"))) == "\nError: lora_r=0: too small"
    assert last_run().info.status == "FAILED"
    assert last_run().data.tags["failure_reason"] == "lora_r=0: too small"


@pytest.mark.usefixtures("store")
def test_an_error_that_the_step_names_is_a_users_error():
    assert exit_text(ends_with(OwnError("no wheel")), user_errors=(OwnError,)) == "\nError: no wheel"
    assert last_run().data.tags["failure_reason"] == "no wheel"


@pytest.mark.usefixtures("store")
def test_another_error_keeps_its_traceback_and_fails_the_run():
    with pytest.raises(OwnError, match="^a bug$"):
        run_in_run(ends_with(OwnError("a bug")))
    assert last_run().info.status == "FAILED"
    assert last_run().data.tags["failure_reason"] == "OwnError: a bug"


@pytest.mark.usefixtures("store")
def test_a_step_that_exits_is_a_failed_run_with_its_own_status():
    with pytest.raises(SystemExit) as caught:
        run_in_run(ends_with(SystemExit(3)))
    assert caught.value.code == 3
    assert last_run().info.status == "FAILED"


@pytest.mark.usefixtures("store")
def test_a_long_reason_is_kept_as_far_as_a_tag_goes():
    message = "x" * 20_000
    assert exit_text(ends_with(UserError(message))) == f"\nError: {message}"
    assert last_run().data.tags["failure_reason"] == "x" * 5000


@pytest.mark.usefixtures("store")
def test_ctrl_c_kills_the_run():
    assert exit_text(ends_with(KeyboardInterrupt())) == "\nStopped by SIGINT."
    assert last_run().info.status == "KILLED"
    assert last_run().data.tags["stopped_by"] == "SIGINT"


@pytest.mark.usefixtures("store")
def test_sigterm_kills_the_run():
    assert exit_text(lambda: os.kill(os.getpid(), signal.SIGTERM)) == "\nStopped by SIGTERM."
    assert last_run().info.status == "KILLED"
    assert last_run().data.tags["stopped_by"] == "SIGTERM"
    assert "failure_reason" not in last_run().data.tags


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_run_is_made_kills_the_run(monkeypatch, number):
    start_run = mlflow.start_run

    def interrupted(**named):
        os.kill(os.getpid(), number)
        return start_run(**named)

    monkeypatch.setattr(mlflow, "start_run", interrupted)
    message = exit_text(lambda: pytest.fail("the body was called"))
    assert message == f"\nStopped by {number.name}."
    assert (last_run().info.status, last_run().data.tags["stopped_by"]) == ("KILLED", number.name)


@pytest.mark.usefixtures("store")
def test_a_signal_while_the_run_is_announced_kills_the_run(monkeypatch):
    announced = liveness.announced

    @contextmanager
    def interrupted(run_id):
        os.kill(os.getpid(), signal.SIGTERM)
        with announced(run_id):
            yield

    monkeypatch.setattr(liveness, "announced", interrupted)
    assert exit_text(lambda: pytest.fail("the body was called")) == "\nStopped by SIGTERM."
    assert (last_run().info.status, last_run().data.tags["stopped_by"]) == ("KILLED", "SIGTERM")


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("body", "status"), [(lambda: None, "FINISHED"), (ends_with(UserError("no")), "FAILED")]
)
def test_a_signal_while_the_run_ends_changes_nothing(monkeypatch, body, status):
    end_run = mlflow.end_run

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGINT)
        end_run(*given)

    monkeypatch.setattr(mlflow, "end_run", interrupted)
    with nullcontext() if status == "FINISHED" else pytest.raises(SystemExit, match="Error: no"):
        run_in_run(body)
    assert last_run().info.status == status


def test_ctrl_c_during_the_imports_ends_a_step_without_a_traceback(tmp_path):
    (tmp_path / "datasets.py").write_text("import time\nprint('imports', flush=True)\ntime.sleep(600)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "steps.train"],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # As in a shell; what runs in the background of a script is started deaf to it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "imports\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == -signal.SIGINT


@pytest.mark.usefixtures("store")
def test_a_step_that_stopped_itself_after_a_signal_is_killed():
    assert exit_text(ends_with(Interrupted("SIGINT"))) == "\nStopped by SIGINT."
    assert last_run().info.status == "KILLED"


@pytest.mark.usefixtures("store")
def test_a_run_ends_and_says_why_even_if_its_reason_cannot_be_kept(monkeypatch, caplog):
    monkeypatch.setattr(mlflow, "set_tags", lambda *_: (_ for _ in ()).throw(OSError("store is full")))
    assert exit_text(ends_with(UserError("no", "Type this."))) == "\nError: no\n\nType this."
    assert last_run().info.status == "FAILED"
    assert "does not take the end of this run, FAILED: store is full" in caplog.text


@pytest.mark.usefixtures("store")
def test_a_stopped_training_says_how_to_go_on_though_the_store_is_away(monkeypatch):
    def body():
        def away(*_):
            raise MlflowException("no connection")

        monkeypatch.setattr(mlflow, "get_run", away)
        monkeypatch.setattr(train.resume, "can_go_on", lambda run: True)
        values = defaults("train") | {"dataset_uri": "runs:/a/dataset", "lora_alpha": "32.0"}
        raise Interrupted("SIGINT", train.how_to_go_on(command_line.parse(TrainParams, words(values))))

    text = exit_text(body)
    assert text.startswith("\nStopped by SIGINT.\n\nTo go on:\n  mlflow run ")
    assert text.endswith(f"-P resume_from={mlflow.MlflowClient().search_runs(['0'])[0].info.run_id}")
    assert "-P lora_alpha=32.0 " in text
    assert text.count(" -P ") == 3  # dataset_uri too, no defaults: 0.0 is 0


@pytest.mark.usefixtures("store")
def test_a_users_setting_of_progress_bars_is_theirs_after_a_manifest_was_read(monkeypatch, run_with_files):
    name = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
    for given in ("false", None):
        monkeypatch.setenv(name, given) if given else monkeypatch.delenv(name)
        artifacts.digest_of(f"runs:/{run_with_files}/dataset")
        assert os.environ.get(name) == given


def test_a_run_that_mlflow_opened_is_taken_up_and_not_a_second_one(store, monkeypatch):
    given = mlflow.MlflowClient().create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    run_in_run(lambda: None)
    assert last_run().info.run_id == given
    assert last_run().info.status == "FINISHED"


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"])
@pytest.mark.parametrize("file", ["runs.db", "./db/runs.db"])
def test_a_relative_store_is_refused_with_its_absolute_form_and_not_made(
    name, file, store, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "users_folder", lambda: Path("/home/me"))
    monkeypatch.setenv(name, f"sqlite:///{file}")
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    message = exit_text(lambda: pytest.fail("the body was called"))
    assert message.startswith(f"\nError: {name}=sqlite:///{file}: is a relative path")
    assert message.endswith(f"give the absolute form: sqlite:////home/me/{Path(file)}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("store")
def test_a_step_notes_where_the_project_of_its_parent_came_from():
    source = {
        "mlflow.source.name": "https://example.invalid/text2sql.git",
        "mlflow.source.git.commit": "c0ffee",
        "mlflow.source.git.branch": "main",
        "mlflow.source.git.repoURL": "https://example.invalid/text2sql.git",
    }
    with mlflow.start_run() as parent:
        mlflow.set_tags(source | {"mlflow.project.entryPoint": "main"})
    own = {"mlflow.parentRunId": parent.info.run_id, "mlflow.project.entryPoint": "train"}
    child = mlflow.MlflowClient().create_run("0", tags=own | {"mlflow.source.name": "file:///tmp/clone"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_RUN_ID", child.info.run_id)
        run_in_run(lambda: None)
    tags = mlflow.get_run(child.info.run_id).data.tags
    assert {name: tags[name] for name in (*source, *own)} == source | own


# --- settings


@pytest.mark.usefixtures("store")
def test_more_than_a_hundred_settings_arrive():
    with mlflow.start_run() as run:
        log_settings("trainer", {f"setting_{i}": i for i in range(250)})
    params = mlflow.get_run(run.info.run_id).data.params
    assert params == {f"trainer/setting_{i}": str(i) for i in range(250)}


@pytest.mark.usefixtures("store")
def test_a_setting_that_mlflow_drops_is_an_error_that_names_it(monkeypatch):
    log_params = mlflow.log_params
    monkeypatch.setattr(
        mlflow, "log_params", lambda sent: log_params({n: v for n, v in sent.items() if n != "lora/r"})
    )
    with mlflow.start_run(), pytest.raises(RuntimeError, match="did not keep these parameters: lora/r$"):
        log_settings("lora", {"r": 32, "alpha": 64})


@pytest.mark.usefixtures("store")
def test_a_setting_that_mlflow_changes_is_an_error_that_names_it(monkeypatch):
    log_params = mlflow.log_params
    monkeypatch.setattr(mlflow, "log_params", lambda sent: log_params({n: v[:3] for n, v in sent.items()}))
    with (
        mlflow.start_run(),
        pytest.raises(RuntimeError, match="did not keep these parameters: lora/modules$"),
    ):
        log_settings("lora", {"modules": "q_proj", "r": 32})


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("value", [None, True, "", 2e-4, {"a": [1]}, "é\n"])
def test_a_setting_of_any_kind_arrives_as_its_text(value):
    with mlflow.start_run() as run:
        log_settings("trainer", {"setting": value})
    assert mlflow.get_run(run.info.run_id).data.params == {"trainer/setting": str(value)}


@pytest.mark.usefixtures("store")
def test_choices_are_shown_and_can_be_read_back(capsys):
    with mlflow.start_run() as run:
        mlflow.log_param("other", 1)
        run_log.log_choices(device="CPU, 2 cores", base_model="/b (as given)")
    assert capsys.readouterr().out == "\n  device      CPU, 2 cores\n  base_model  /b (as given)\n\n"
    found = run_log.choices(mlflow.get_run(run.info.run_id))
    assert found == {"device": "CPU, 2 cores", "base_model": "/b (as given)"}


# --- artifacts


def refusal(uri: str, needs: str = "manifest.json") -> str:
    """The message with which an artifact is refused."""
    with pytest.raises(UserError) as caught, downloaded(uri, parameter="dataset_uri", needs=needs):
        pytest.fail("the block was entered")
    message = str(caught.value)
    assert message.startswith(f"dataset_uri={uri}: ")
    return message


def test_an_artifact_folder_is_there_inside_the_block_and_gone_after_it(run_with_files, scratch):
    uri = f"runs:/{run_with_files}/dataset"
    with downloaded(uri, parameter="dataset_uri", needs="manifest.json") as folder:
        assert (folder / "manifest.json").read_text() == NO_FILES
        assert folder.is_relative_to(scratch)
    assert list(scratch.iterdir()) == []


def test_an_error_inside_the_block_stays_what_it_is_and_nothing_is_left(run_with_files, scratch):
    uri = f"runs:/{run_with_files}/dataset"
    with (
        pytest.raises(OSError, match="^disk$"),
        downloaded(uri, parameter="dataset_uri", needs="manifest.json"),
    ):
        raise OSError("disk")
    assert list(scratch.iterdir()) == []


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("name", ["data", "my data", "50%", "Käse"])
def test_a_folder_of_the_users_is_copied_and_stays(name, tmp_path, scratch):
    source = tmp_path / name
    source.mkdir()
    (source / "manifest.json").write_text(NO_FILES)
    with downloaded(str(source), parameter="dataset_uri", needs="manifest.json") as folder:
        (folder / "manifest.json").unlink()
    assert (source / "manifest.json").read_text() == NO_FILES


@pytest.mark.usefixtures("store")
def test_an_unknown_run_is_named(scratch):
    assert "a" * 32 in refusal(f"runs:/{'a' * 32}/dataset")
    assert list(scratch.iterdir()) == []


def test_an_unknown_artifact_is_refused_with_those_of_the_run(run_with_files, scratch):
    message = refusal(f"runs:/{run_with_files}/datasett")
    assert message.endswith(f"Run {run_with_files} has: dataset, notes.txt.")
    assert list(scratch.iterdir()) == []


def test_a_folder_without_the_needed_file_is_refused_with_what_the_run_has(run_with_files, scratch):
    message = refusal(f"runs:/{run_with_files}/dataset", needs="adapter_model.safetensors")
    assert "has no adapter_model.safetensors" in message
    assert message.endswith(f"Run {run_with_files} has: dataset, notes.txt.")
    assert list(scratch.iterdir()) == []


def test_a_file_in_the_place_of_a_folder_is_refused(run_with_files):
    assert "has no manifest.json" in refusal(f"runs:/{run_with_files}/notes.txt")


@pytest.mark.usefixtures("store")
def test_a_run_without_artifacts_is_said_to_have_none():
    with mlflow.start_run() as run:
        pass
    assert refusal(f"runs:/{run.info.run_id}/dataset").endswith(f"Run {run.info.run_id} has: no artifacts.")


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    "uri",
    [
        "/nowhere/at/all",
        "runs:/",
        "runs:/short",
        "nosuch:/x",
        "s3://bucket/x",
        "models:/none/1",
        "file:///nowhere",
    ],
)
def test_a_uri_that_leads_nowhere_is_the_users_error(uri, scratch):
    refusal(uri)
    assert list(scratch.iterdir()) == []


@pytest.mark.usefixtures("store")
def test_a_logged_folder_becomes_an_artifact_of_the_run(scratch):
    with mlflow.start_run() as run, artifacts.logged_folder("adapter") as folder:
        (folder / "a.json").write_text("{}")
    assert [f.path for f in mlflow.MlflowClient().list_artifacts(run.info.run_id, "adapter")] == [
        "adapter/a.json"
    ]
    assert list(scratch.iterdir()) == []


@pytest.mark.usefixtures("store")
def test_a_folder_that_was_not_completed_is_not_logged(scratch):
    with mlflow.start_run() as run, pytest.raises(OwnError):
        fail_while_writing()
    assert mlflow.MlflowClient().list_artifacts(run.info.run_id) == []
    assert list(scratch.iterdir()) == []


def fail_while_writing() -> None:
    """Write one file of an artifact folder and fail."""
    with artifacts.logged_folder("adapter") as folder:
        (folder / "a.json").write_text("{}")
        raise OwnError


# --- versions


@pytest.fixture
def three_versions(store: str) -> None:
    """Model `text2sql` with versions 1 to 3, and `other` with one."""
    client = mlflow.MlflowClient()
    for name, count in {"text2sql": 3, "other": 1}.items():
        client.create_registered_model(name)
        for _ in range(count):
            client.create_model_version(name, source="/nowhere")


@pytest.mark.usefixtures("three_versions")
@pytest.mark.parametrize("version", [2, "2"])
def test_a_version_is_found_by_its_number(version):
    assert str(model_version("text2sql", version).version) == "2"


@pytest.mark.usefixtures("three_versions")
def test_an_unknown_version_is_refused_with_those_that_exist():
    with pytest.raises(UserError, match=r"text2sql: has no version 9; there are: 1, 2, 3\.$"):
        model_version("text2sql", 9)


@pytest.mark.usefixtures("store")
def test_versions_are_listed_in_the_order_of_their_numbers():
    mlflow.MlflowClient().create_registered_model("text2sql")
    for _ in range(11):
        mlflow.MlflowClient().create_model_version("text2sql", source="/nowhere")
    with pytest.raises(UserError, match=r"there are: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11\.$"):
        model_version("text2sql", 99)


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("name", ["nobody", "it's", 'say "x"'])
def test_a_version_of_an_unknown_model_is_the_users_error(name):
    with pytest.raises(UserError, match="has no version 1; there are: none"):
        model_version(name, 1)


# --- where the project came from


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    "source",
    ["https://host/me/project", "ssh://git@host/project", "git@host:me/project", "https://host/p#sub"],
)
def test_a_project_from_git_is_run_again_by_its_url_and_commit(source):
    tags = {"mlflow.source.name": source, "mlflow.source.git.commit": "c" * 40}
    with mlflow.start_run(tags=tags):
        assert project_source.uri() == source
        assert project_source.version() == ["-v", "c" * 40]


@pytest.mark.usefixtures("store")
def test_a_project_in_a_folder_is_run_again_from_there_without_a_commit():
    tags = {"mlflow.source.name": "file:///elsewhere", "mlflow.source.git.commit": "c" * 40}
    with mlflow.start_run(tags=tags):
        assert project_source.uri() == str(Path(project_source.__file__).parents[2])
        assert project_source.version() == []


@pytest.mark.usefixtures("store")
def test_the_run_id_is_kept_from_a_fresh_process(monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "a" * 32)
    monkeypatch.setenv("OTHER", "kept")
    environment = active_run.clear_run_id()
    assert "MLFLOW_RUN_ID" not in environment
    assert environment["OTHER"] == "kept"
