"""What is run again, and what is not."""

import shutil
import subprocess
import sys

import pytest

from steps.text2sql import artifacts, reuse
from tests.conftest import PROJECT, plain_rows, prepared_uri, write_jsonl

VALUES = {"dataset_uri": "runs:/a/dataset", "max_steps": "7"}


def fingerprint(step="train", values=VALUES, *, upstream=(("dataset_uri", "d"),), device="cpu", code="c"):
    return reuse.fingerprint(step, values, upstream=dict(upstream), device=device, code=code)


def test_the_same_values_written_otherwise_are_the_same():
    assert fingerprint(values=VALUES | {"learning_rate": "2e-4"}) == fingerprint(
        values=VALUES | {"learning_rate": "0.0002"}
    )


def test_a_default_given_in_words_is_the_same():
    assert fingerprint(values=VALUES | {"lora_r": "32"}) == fingerprint()


def test_another_run_with_the_same_artifact_is_the_same():
    assert fingerprint(values=VALUES | {"dataset_uri": "runs:/b/dataset"}) == fingerprint()


@pytest.mark.parametrize(("name", "value"), [("resume_from", "ab12"), ("launch", "ddp")])
def test_where_a_training_goes_on_and_in_how_many_processes_does_not_count(name, value):
    assert fingerprint(values=VALUES | {name: value}) == fingerprint()


@pytest.mark.parametrize(
    "changed",
    [
        {"values": VALUES | {"max_steps": "8"}},
        {"values": VALUES | {"seed": "1"}},
        {"upstream": (("dataset_uri", "e"),)},
        {"device": "NVIDIA H100"},
        {"code": "other"},
    ],
)
def test_other_values_artifacts_devices_or_code_are_not_the_same(changed):
    assert fingerprint(**changed) != fingerprint()


def test_a_changed_row_in_the_file_is_not_the_same(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", plain_rows(3))
    values = {"base_model": "smollm2-135m", "dataset": str(file)}
    before = fingerprint("prepare_data", values, upstream=())
    assert fingerprint("prepare_data", values, upstream=()) == before
    write_jsonl(file, plain_rows(4))
    assert fingerprint("prepare_data", values, upstream=()) != before


def test_another_base_in_the_folder_is_not_the_same(tmp_path, tiny_base):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    values = {"base_model": str(base), "dataset": "sample"}
    before = fingerprint("prepare_data", values, upstream=())
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    assert fingerprint("prepare_data", values, upstream=()) != before


@pytest.fixture
def project(tmp_path):
    """A copy of what the digest of the code reads."""
    shutil.copytree(PROJECT / "steps", tmp_path / "steps")
    for name in ("python_env.yaml", "README.md"):
        shutil.copy(PROJECT / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("README.md", False),
        ("steps/__pycache__/x.pyc", False),
        ("steps/text2sql/tokenization.py", True),
        ("steps/new.py", True),
        ("python_env.yaml", True),
    ],
)
def test_a_changed_line_of_the_code_counts_and_of_the_readme_does_not(project, name, counts):
    before = reuse.code_digest(project)
    (project / name).parent.mkdir(exist_ok=True)
    with (project / name).open("a") as file:
        file.write("# changed\n")
    assert (reuse.code_digest(project) != before) == counts


@pytest.mark.parametrize(
    ("base_model", "dataset", "device", "moved"),
    [
        ("auto", "auto", "cpu", False),
        ("auto", "sample", "NVIDIA H100", True),
        ("smollm2-135m", "sample", "NVIDIA H100", False),
        ("/models/base", "/data/rows.csv", "cpu", False),
        ("owner/name", "sample", "cpu", True),
        (f"owner/name@{'a' * 40}", "sample", "cpu", False),
        ("smollm2-135m", "owner/rows@main", "cpu", True),
    ],
)
def test_a_name_on_the_hub_without_a_commit_is_looked_up_again(base_model, dataset, device, moved):
    values = {"base_model": base_model, "dataset": dataset}
    assert reuse.may_have_moved("prepare_data", values, device=device) == moved
    assert not reuse.may_have_moved("train", values, device=device)


def test_databases_of_rows_may_have_changed():
    values = {"base_model": "smollm2-135m", "dataset": "/rows.csv"}
    assert not reuse.may_have_moved("prepare_data", values, device="cpu")
    assert reuse.may_have_moved("prepare_data", values | {"database_column": "file"}, device="cpu")


def test_a_value_that_is_not_given_counts_as_its_default():
    assert not reuse.may_have_moved("prepare_data", {}, device="cpu")
    assert reuse.may_have_moved("prepare_data", {}, device="a GPU")  # base_model=auto asks the hub there


def test_the_kind_of_device_is_asked_without_loading_torch_here():
    code = "import sys; from steps.text2sql import reuse; print(reuse.device_kind(), 'torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=reuse.PROJECT, capture_output=True, text=True)
    assert printed.stdout.split() == [reuse.device_kind(), "False"]


def test_a_dataset_made_again_has_the_very_bytes(store, tiny_base, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", plain_rows(60))
    digests = {artifacts.digest_of(prepared_uri(tiny_base, file)) for _ in range(2)}
    assert len(digests) == 1
