"""The project run from a git URL: nothing depends on the clone that MLflow makes, now or later."""

import json
import os
import shutil
import subprocess
import sys

import mlflow
import pytest

from tests.conftest import PROJECT, plain_rows, tracking_at, write_jsonl
from tests.test_mlflow_run import STEPS, environment, runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("git"), reason="git is not installed"),
]

URL = "https://example.invalid/text2sql-qlora.git"
# Loads the champion where neither the project nor its clone is, as a user would.
ASK = """\
import json, mlflow
model = mlflow.pyfunc.load_model("models:/text2sql@challenger")
print("ANSWER " + json.dumps(model.predict([{"question": "How many?"}], params={"max_new_tokens": 4})))
"""


def git(*words, cwd, environ):
    done = subprocess.run(["git", *words], cwd=cwd, env=environ, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """Environment in which git finds the project, committed and tagged v0.1.0, behind URL; and the commit."""
    folder = tmp_path_factory.mktemp("remote")
    settings = f'[url "{folder}/project.git"]\n\tinsteadOf = {URL}\n[user]\n\tname = a\n\temail = a@b\n'
    (folder / "gitconfig").write_text(settings + "[init]\n\tdefaultBranch = main\n")
    environ = {"GIT_CONFIG_GLOBAL": str(folder / "gitconfig"), "GIT_CONFIG_NOSYSTEM": "1"}
    inside = os.environ | environ
    work = folder / "work"
    shutil.copytree(PROJECT / "steps", work / "steps", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("MLproject", "python_env.yaml"):
        shutil.copy(PROJECT / name, work)
    git("init", "-q", cwd=work, environ=inside)
    git("add", "-A", cwd=work, environ=inside)
    git("commit", "-qm", "A version", cwd=work, environ=inside)
    git("tag", "v0.1.0", cwd=work, environ=inside)
    git("clone", "-q", "--bare", str(work), str(folder / "project.git"), cwd=folder, environ=inside)
    return environ, git("rev-parse", "HEAD", cwd=work, environ=inside)


def run_from_url(folder, environ, *options, **parameters):
    """`mlflow run URL`, typed in a folder; clones go to `scratch` in it."""
    (folder / "scratch").mkdir(exist_ok=True)
    words = [word for name, value in parameters.items() for word in ("-P", f"{name}={value}")]
    return subprocess.run(
        ["mlflow", "run", URL, *options, "--env-manager", "local", *words],
        cwd=folder,
        env=environment(**environ, TMPDIR=str(folder / "scratch")),
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )


def test_a_tagged_version_behind_a_url_does_what_the_local_command_does(remote, tiny_base, tmp_path):
    environ, commit = remote
    rows = write_jsonl(tmp_path / "rows.jsonl", plain_rows(200))
    small = {"max_steps": 3, "batch_size": 2, "eval_rows": 4, "lora_r": 4}
    done = run_from_url(tmp_path, environ, "-v", "v0.1.0", base_model=tiny_base, dataset=rows, **small)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    # The store stays where the user stands, and the printed commands name the URL and the commit.
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "scratch", "mlflow.db", "mlruns"}
    for step in STEPS:
        assert f"mlflow run {URL} -v {commit} --env-manager local -e {step} " in done.stdout
    with tracking_at(f"sqlite:///{tmp_path / 'mlflow.db'}"):
        parent, children = runs()
        assert [run.info.run_name for run in children] == STEPS
        for run in (parent, *children):
            assert run.info.status == "FINISHED"
            assert str(tmp_path / "mlruns") in run.info.artifact_uri
            assert run.data.tags["mlflow.source.name"] == URL
            assert run.data.tags["mlflow.source.git.repoURL"] == URL
            assert run.data.tags["mlflow.source.git.commit"] == commit
        version = mlflow.MlflowClient().get_model_version("text2sql", "1")
        assert version.tags["git_commit"] == commit
        [project] = (tmp_path / "scratch").glob("*/MLproject")
        for run in (parent, *children):
            assert str(project.parent) not in json.dumps(run.data.to_dictionary())

    # The clone goes, and the model answers.
    shutil.rmtree(tmp_path / "scratch")
    (tmp_path / "elsewhere").mkdir()
    asked = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=tmp_path / "elsewhere",
        env=environment(MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path / 'mlflow.db'}"),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert "ANSWER [" in asked.stdout, asked.stderr[-3000:]


def test_a_relative_path_is_refused_with_the_form_that_means_the_users_folder(remote, tiny_base, tmp_path):
    environ, commit = remote
    write_jsonl(tmp_path / "rows.jsonl", plain_rows(5))
    done = run_from_url(tmp_path, environ, "-v", "main", base_model=tiny_base, dataset="rows.jsonl")
    assert done.returncode == 1
    printed = done.stdout + done.stderr
    assert "dataset=rows.jsonl: is a relative path, but steps run in the project's folder" in printed
    assert f"give the absolute form: {tmp_path}/rows.jsonl" in printed
    with tracking_at(f"sqlite:///{tmp_path / 'mlflow.db'}"):
        parent, children = runs()
        assert (parent.info.status, children) == ("FAILED", [])
        assert parent.data.tags["mlflow.source.git.branch"] == "main"
