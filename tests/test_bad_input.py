"""What a user can get wrong: a message that names it, a FAILED run, nothing left running or registered."""

import json
import shutil
from pathlib import Path

import mlflow
import pandas
import pytest

from steps import prepare_data, register
from steps.text2sql import artifacts, base_model, packaging
from steps.text2sql.errors import UserError
from tests.conftest import QUICK, call_step, failure, plain_rows, tiny_tokenizer, write_jsonl

NO_RUN = "0" * 32


def fails(step, **values):
    """Message of a step that fails; its run says so, nothing runs on and no version is added."""
    before = mlflow.MlflowClient().search_model_versions()
    message, run = failure(step, **values)
    assert run.info.status == "FAILED"
    assert run.data.tags["failure_reason"] == message.removeprefix("\nError: ")
    assert mlflow.active_run() is None
    running = mlflow.search_runs(search_all_experiments=True, filter_string="attributes.status = 'RUNNING'")
    assert running.empty
    assert mlflow.MlflowClient().search_model_versions() == before
    return message


@pytest.fixture
def rows_file(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", plain_rows())


@pytest.fixture
def prepared(store, tiny_base, rows_file):
    """URI of a dataset of plain rows, whose base is a copy that a test may change; and that copy."""
    base = shutil.copytree(tiny_base, rows_file.parent / "base")
    run = call_step("prepare_data", base_model=base, dataset=rows_file)
    return f"runs:/{run.info.run_id}/dataset", base


# prepare_data


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", "has no rows"),
        ("empty.csv", b"", "has no rows"),
        ("empty.json", b"[]", "has no rows"),
        ("header.csv", b"question,context,answer\n", "has no rows"),
        (
            "other.jsonl",
            b'{"question": "q", "sql": "s"}\n',
            "lacks the columns context, answer; found: question, sql",
        ),
        ("latin1.jsonl", '{"question": "caf\u00e9"}\n'.encode("latin-1"), "is not UTF-8 at byte 17"),
        ("latin1.csv", "question\ncaf\u00e9\n".encode("latin-1"), "is not UTF-8 at byte 12"),
        ("broken.jsonl", b'{"question": "q"}\n\n{"question": \n', "line 3: "),
        ("list.jsonl", b'{"question": "q"}\n["q"]\n', "line 2: not an object"),
        ("object.json", b'{"question": "q"}', "is not valid JSON"),
        ("broken.json", b'[{"question": ', "is not valid JSON"),
        ("text.parquet", b"no parquet", "is not valid PARQUET"),
        ("quote.csv", b'question,context,answer\n"q,c,a\n', "is not valid CSV"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(store, tiny_base, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    message = fails("prepare_data", base_model=tiny_base, dataset=tmp_path / name)
    assert f"dataset={tmp_path / name}: " in message
    assert words in message


def test_every_row_rejected_says_why(store, tiny_base, tmp_path):
    empty = [row | {"answer": ""} for row in plain_rows()]
    message = fails("prepare_data", base_model=tiny_base, dataset=write_jsonl(tmp_path / "r.jsonl", empty))
    assert "no sound row is left for train" in message
    assert "answer is missing, empty or not text" in message


def test_cells_that_are_no_text_are_rejected_rows_whatever_they_are(store, tiny_base, tmp_path):
    rows = plain_rows()
    lines = [json.dumps(row) for row in rows]
    lines.append(json.dumps(rows[0] | {"question": "half a pair \ud83d"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    run = call_step("prepare_data", base_model=tiny_base, dataset=tmp_path / "rows.jsonl")
    logged = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/rejected.jsonl")
    [rejected] = map(json.loads, logged.splitlines())
    assert (rejected["row"], rejected["question"]) == (len(rows), "half a pair \ud83d")
    assert run.data.metrics["rejected_incomplete"] == 1


def test_a_rejected_row_is_logged_whatever_its_cells_are(store):
    cells = [b"\xff", None, float("nan"), 7, ["SELECT", 1], pandas.Timestamp("2026-01-02")]
    rows = pandas.DataFrame({"row": range(6), "answer": pandas.Series(cells, dtype=object)})
    with mlflow.start_run() as run:
        prepare_data.log_rejected(rows)
    logged = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/rejected.jsonl")
    found = [json.loads(line) for line in logged.splitlines()]
    assert [row["row"] for row in found] == list(range(6))
    assert [row["answer"] for row in found] == [
        "b'\\xff'", None, None, 7, ["SELECT", 1], "2026-01-02 00:00:00",
    ]  # fmt: skip


def test_a_folder_without_rows_to_train_on_is_refused(store, tiny_base, tmp_path):
    write_jsonl(tmp_path / "test.jsonl", plain_rows())
    message = fails("prepare_data", base_model=tiny_base, dataset=tmp_path)
    assert f"dataset={tmp_path}: has files of test alone; it needs rows to train on." in message


def test_few_rows_train_without_any_to_validate_with(store, tiny_base, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", plain_rows(15))
    run = call_step("prepare_data", base_model=tiny_base, dataset=rows, split_by="random")
    assert run.data.metrics["rows_validation"] == 0
    dataset_uri = f"runs:/{run.info.run_id}/dataset"
    trained = call_step("train", dataset_uri=dataset_uri, **QUICK | {"max_steps": 1})
    assert "eval_loss" not in trained.data.metrics
    dataset = Path(mlflow.artifacts.download_artifacts(dataset_uri, dst_path=str(tmp_path)))
    assert len(register.hashes_of_training(dataset)) == run.data.metrics["rows_train"] == 12


def test_rows_longer_than_the_base_can_read_are_refused(store, tiny_base, rows_file):
    folder = shutil.copytree(tiny_base, rows_file.parent / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 400}))
    message = fails("prepare_data", base_model=folder, dataset=rows_file, max_length=401)
    assert f"max_length=401: base_model={folder} reads 400 tokens at most; give max_length=400" in message
    call_step("prepare_data", base_model=folder, dataset=rows_file, max_length=400)


def test_every_row_too_long_says_why(store, tiny_base, rows_file):
    message = fails("prepare_data", base_model=tiny_base, dataset=rows_file, max_length=16)
    assert "no sound row is left for train" in message
    assert "more than max_length=16" in message


def test_one_table_cannot_be_split_by_schema(store, tiny_base, tmp_path):
    file = write_jsonl(tmp_path / "one.jsonl", plain_rows(50, tables=1))
    message = fails("prepare_data", base_model=tiny_base, dataset=file)
    assert "split_by=schema, test_size=0.2: leaves no rows for test out of 50 rows" in message
    assert "split_by=random" in message


def test_a_base_without_safetensors_is_refused(store, tiny_base, rows_file, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    message = fails("prepare_data", base_model=base, dataset=rows_file)
    assert f"base_model={base}: has no .safetensors weights" in message


def test_a_base_without_a_tokenizer_is_refused(store, tiny_base, rows_file, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    for file in base.glob("tokenizer*"):
        file.unlink()
    message = fails("prepare_data", base_model=base, dataset=rows_file)
    assert f"tokenizer of base model {base}" in message


# train


def test_a_base_whose_tokenizer_changed_since_prepare_data_is_refused(prepared):
    uri, base = prepared
    tiny_tokenizer(vocab_size=500).save_pretrained(base)
    message = fails("train", dataset_uri=uri, **QUICK)
    assert (
        f"dataset_uri={uri}: was tokenized with another tokenizer than base model {base} has now" in message
    )
    assert "run prepare_data again" in message


def test_a_base_that_is_gone_since_prepare_data_is_named(prepared):
    uri, base = prepared
    shutil.rmtree(base)
    assert str(base) in fails("train", dataset_uri=uri, **QUICK)


@pytest.mark.parametrize("logging_steps", [1, 5])
def test_a_training_that_diverges_fails_and_leaves_no_adapter(prepared, logging_steps):
    recipe = QUICK | {"learning_rate": "1e30", "logging_steps": logging_steps}
    message, run = failure("train", dataset_uri=prepared[0], **recipe)
    assert "the loss is nan by step" in message
    assert "give a lower learning_rate" in message
    assert run.info.status == "FAILED"
    assert "adapter" not in artifacts.listed(run.info.run_id, "")


def test_a_cache_that_cannot_be_written_is_named_before_anything_is_trained(prepared, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    message, run = failure("train", dataset_uri=prepared[0], **QUICK)
    assert "XDG_CACHE_HOME=/dev/null/cache: " in message
    assert "train_loss" not in run.data.metrics


def test_a_name_that_is_not_utf_8_is_told_as_any_other(store, tiny_base):
    message, run = failure("prepare_data", base_model=tiny_base, dataset="/tmp/\udcff.jsonl")
    assert "is no file" in message
    assert "is no file" in run.data.tags["failure_reason"]


def test_a_uri_that_mlflow_does_not_take_apart_is_named(store):
    uri = "http://127.0.0.1:9/x"
    assert f"dataset_uri={uri}: " in fails("train", dataset_uri=uri, **QUICK)


def test_unknown_target_modules_are_refused_naming_those_there_are(prepared):
    message = fails("train", dataset_uri=prepared[0], **QUICK | {"target_modules": "q_proj,c_attn"})
    assert "target_modules=c_attn,q_proj: this base has no linear layers c_attn; it has: down_proj" in message


def test_a_run_without_dataset_is_named_with_what_it_has(chain):
    uri = f"runs:/{chain.train.info.run_id}/dataset"
    message = fails("train", dataset_uri=uri, **QUICK)
    assert f"dataset_uri={uri}: " in message
    assert f"Run {chain.train.info.run_id} has: adapter, checkpoints, loss_curve.png" in message


def test_an_adapter_given_as_dataset_is_refused(chain):
    message = fails("train", dataset_uri=chain.adapter_uri, **QUICK)
    assert f"dataset_uri={chain.adapter_uri}: " in message


@pytest.mark.parametrize("step", ["train", "register", "evaluate"])
def test_a_run_that_does_not_exist_is_named(chain, step):
    uri = f"runs:/{NO_RUN}/dataset"
    others = {"train": QUICK, "register": {"adapter_uri": chain.adapter_uri}}
    others["evaluate"] = {"model_uri": "models:/text2sql/1"}
    message = fails(step, dataset_uri=uri, **others[step])
    assert f"dataset_uri={uri}: " in message
    assert "not found" in message


# register


def test_a_run_without_adapter_is_named_with_what_it_has(chain):
    uri = f"runs:/{chain.prepare_data.info.run_id}/adapter"
    message = fails("register", adapter_uri=uri, dataset_uri=chain.dataset_uri)
    assert f"adapter_uri={uri}: " in message
    assert f"Run {chain.prepare_data.info.run_id} has: dataset, examples.json" in message


def test_a_dataset_given_as_adapter_is_refused(chain):
    message = fails("register", adapter_uri=chain.dataset_uri, dataset_uri=chain.dataset_uri)
    assert f"adapter_uri={chain.dataset_uri}: has no adapter_model.safetensors" in message


def test_an_adapter_with_the_dataset_of_another_training_is_refused(chain, tiny_base, rows_file):
    run = call_step("prepare_data", base_model=tiny_base, dataset=rows_file)
    other = f"runs:/{run.info.run_id}/dataset"
    message = fails("register", adapter_uri=chain.adapter_uri, dataset_uri=other)
    assert f"adapter_uri={chain.adapter_uri}: was trained with dataset_digest " in message
    assert f"dataset_uri={other} has" in message


def test_the_same_rows_split_otherwise_are_another_dataset(store, tiny_base, rows_file, monkeypatch):
    monkeypatch.setattr(packaging, "ask_in_fresh_process", lambda *_: "SELECT 1")
    # Rows that one split trains on are test rows of the other.
    uris = []
    for seed in (1, 2):
        values = {"base_model": tiny_base, "dataset": rows_file, "split_by": "random", "seed": seed}
        uris.append(f"runs:/{call_step('prepare_data', **values).info.run_id}/dataset")
    trained = call_step("train", dataset_uri=uris[0], **QUICK | {"max_steps": 1})
    fails("register", adapter_uri=f"runs:/{trained.info.run_id}/adapter", dataset_uri=uris[1])


def test_a_package_that_fails_in_a_fresh_process_is_not_registered(chain, monkeypatch):
    monkeypatch.setattr(packaging, "ASK", "raise SystemExit('no such base')")
    message = fails("register", adapter_uri=chain.adapter_uri, dataset_uri=chain.dataset_uri)
    assert "the package does not load and answer in a fresh process, so it is not registered" in message
    assert "no such base" in message


@pytest.mark.slow
def test_a_package_whose_base_is_gone_is_not_registered(prepared):
    uri, base = prepared
    trained = call_step("train", dataset_uri=uri, **QUICK | {"max_steps": 1})
    shutil.rmtree(base)
    message = fails("register", adapter_uri=f"runs:/{trained.info.run_id}/adapter", dataset_uri=uri)
    assert "so it is not registered" in message
    assert f"base model {base}" in message


# evaluate and promote


def test_evaluating_a_version_that_does_not_exist_names_those_there_are(chain):
    message = fails("evaluate", model_uri="models:/text2sql/7", dataset_uri=chain.dataset_uri)
    assert "has no version 7; there are: 1" in message


def test_promoting_a_version_that_does_not_exist_names_those_there_are(chain):
    message = fails("promote", version=7, evaluation_run_id=chain.evaluate.info.run_id)
    assert "has no version 7; there are: 1" in message
    assert int(mlflow.MlflowClient().get_model_version_by_alias("text2sql", "champion").version) == 1


def test_a_model_that_does_not_exist_is_named(store):
    assert "registered_model_name=other: " in fails("promote", version=1, registered_model_name="other")


def test_an_alias_that_does_not_exist_is_named(chain):
    message = fails("evaluate", model_uri="models:/text2sql@other", dataset_uri=chain.dataset_uri)
    assert "model_uri=models:/text2sql@other: " in message


def test_an_evaluation_run_that_does_not_exist_is_named(chain):
    assert f"evaluation_run_id={NO_RUN}: " in fails("promote", version=1, evaluation_run_id=NO_RUN)


def test_a_run_of_another_step_is_no_evaluation(chain):
    run_id = chain.train.info.run_id
    assert f"evaluation_run_id={run_id}: is no evaluation" in fails(
        "promote", version=1, evaluation_run_id=run_id
    )


@pytest.mark.parametrize("step", ["prepare_data", "train"])
def test_a_base_with_other_layers_than_attention_is_refused_by_both_steps(
    chain, tiny_base, monkeypatch, step
):
    def refuse(reference, model=None):
        raise UserError(f"base_model={reference}: no")

    monkeypatch.setattr(base_model, "check_layers", refuse)
    values = {"prepare_data": {"base_model": tiny_base}, "train": {"dataset_uri": chain.dataset_uri}}[step]
    message, _ = failure(step, **values)
    assert message == f"\nError: base_model={tiny_base}: no"
