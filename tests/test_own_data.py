"""A user's own CSV, databases, validation rows and prompt, through every step on a tiny instruct model."""

import csv
import json
import sqlite3
from types import SimpleNamespace

import datasets
import mlflow
import pytest
from mlflow.artifacts import download_artifacts, load_dict, load_text

from steps.text2sql import prompt_template, sql_model
from tests.conftest import (
    QUICK,
    call_step,
    chat_tokenizer,
    failure,
    plain_rows,
    tracking_at,
    write_jsonl,
    write_tiny_base,
)

pytestmark = pytest.mark.slow

TEMPLATE = "Schema {{SQLite}}:\n{context}\nAsked:\n{question}\n"
COLUMNS = {"question_column": "Frage", "context_column": "ddl", "answer_column": "sql query"}


def write_csv(path, rows, columns):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def shop(folder):
    """Rows over 20 tables with a database each, as a user would keep them; the CSV comes back."""
    rows = []
    for i, row in enumerate(plain_rows()):
        file = folder / "db" / f"{i % 20}.sqlite"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            with sqlite3.connect(file) as connection:
                connection.execute(row["context"])
                connection.execute(f"INSERT INTO items_{i % 20} VALUES ('pen', 7), ('desk', 40)")
            connection.close()
        named = {"Frage": row["question"], "ddl": row["context"], "sql query": row["answer"]}
        rows.append({"id": i, **named, "file": f"db/{i % 20}.sqlite"})
    return write_csv(folder / "shop.csv", rows, list(rows[0]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def instruct_base(folder):
    return write_tiny_base(folder / "base", chat_tokenizer())


@pytest.fixture(scope="module")
def given(folder, instruct_base):
    """Parameters of prepare_data as a user gives them."""
    (folder / "prompt.txt").write_text(TEMPLATE)
    first = plain_rows(1)[0]
    rows = [
        {"Frage": f"Question {i}?", "ddl": "CREATE TABLE v (a INT)", "sql query": "SELECT 1"}
        for i in range(4)
    ]
    rows += [
        {"Frage": first["question"], "ddl": first["context"], "sql query": first["answer"]},
        {"Frage": ""},
    ]
    return COLUMNS | {
        "base_model": instruct_base,
        "dataset": shop(folder),
        "database_column": "file",
        "validation_dataset": write_csv(folder / "validation.csv", rows, list(COLUMNS.values())),
        "prompt_template": folder / "prompt.txt",
        "prompt_style": "chat",
    }


@pytest.fixture(scope="module")
def own_chain(new_store, given, folder):
    """Runs of prepare_data, train, register and evaluate, and the folder of the dataset."""
    with tracking_at(new_store()) as uri:
        prepared = call_step("prepare_data", **given)
        dataset_uri = f"runs:/{prepared.info.run_id}/dataset"
        trained = call_step("train", dataset_uri=dataset_uri, **QUICK | {"max_steps": 2})
        adapter_uri = f"runs:/{trained.info.run_id}/adapter"
        registered = call_step("register", adapter_uri=adapter_uri, dataset_uri=dataset_uri)
        evaluated = call_step(
            "evaluate", model_uri="models:/text2sql/1", dataset_uri=dataset_uri, eval_rows=4
        )
        dataset = download_artifacts(dataset_uri, dst_path=str(folder / "downloaded"))
    return SimpleNamespace(
        store=uri, dataset=dataset, prepared=prepared, registered=registered, evaluated=evaluated
    )


@pytest.fixture
def own(own_chain):
    with tracking_at(own_chain.store):
        yield own_chain


def test_the_users_validation_rows_are_checked_and_none_is_taken_out_of_train(own):
    metrics = own.prepared.data.metrics
    assert (metrics["rows_validation_raw"], metrics["rows_validation"]) == (6, 5)
    assert metrics["rows_train"] + metrics["rows_test"] == 60
    assert metrics["rejected_incomplete"] == 1
    rejected = [
        json.loads(line)
        for line in load_text(f"{own.prepared.info.artifact_uri}/rejected.jsonl").splitlines()
    ]
    assert [(row["split"], row["row"]) for row in rejected] == [("validation", 5)]


def test_overlap_of_the_users_validation_rows_is_said(own):
    metrics = own.prepared.data.metrics
    assert metrics["overlap_validation_train"] + metrics["overlap_validation_test"] == 1


def test_the_artifact_has_the_users_rows_under_the_projects_names_and_copies_of_their_databases(own):
    data = datasets.load_from_disk(own.dataset, keep_in_memory=True)
    text = ["question", "context", "answer"]
    assert data["train"].column_names == data["validation"].column_names == [*text, "input_ids", "labels"]
    assert data["test"].column_names == [*text, "database"]
    for row in data["test"]:
        number = row["context"].split()[2].removeprefix("items_")
        assert row["database"].startswith(f"databases/{number}-")
        with sqlite3.connect(f"file:{own.dataset}/{row['database']}?mode=ro", uri=True) as connection:
            assert connection.execute(f"SELECT COUNT(*) FROM items_{number}").fetchone() == (2,)
        connection.close()


def test_the_template_in_its_chat_form_is_in_manifest_run_and_package(own, instruct_base):
    tokenizer = sql_model.load_base_tokenizer(str(instruct_base))
    chat = prompt_template.as_chat(TEMPLATE, tokenizer, base_model="tiny")
    manifest = load_dict(f"{own.prepared.info.artifact_uri}/dataset/manifest.json")
    assert (manifest["prompt_template"], manifest["prompt_style"]) == (chat, "chat")
    assert load_text(f"{own.prepared.info.artifact_uri}/prompt_template.txt") == chat
    metadata = mlflow.models.get_model_info("models:/text2sql/1").metadata
    assert (metadata["prompt_template"], metadata["prompt_style"]) == (chat, "chat")


def test_the_version_names_its_prompt_in_the_registry(own):
    version = mlflow.MlflowClient().get_model_version("text2sql", "1")
    prompt = mlflow.genai.load_prompt(version.tags["prompt"])
    row = {"question": "Q {x}", "context": "C"}
    template = mlflow.models.get_model_info("models:/text2sql/1").metadata["prompt_template"]
    assert prompt.format(**row) == sql_model.render_prompt(template, **row)
    linked = mlflow.get_logged_model(version.source.removeprefix("models:/")).tags["mlflow.linkedPrompts"]
    assert json.loads(linked) == [{"name": "text2sql-prompt", "version": "1"}]


def test_the_served_package_encodes_rows_as_they_were_trained(own):
    data = datasets.load_from_disk(own.dataset, keep_in_memory=True)["train"]
    model = mlflow.pyfunc.load_model("models:/text2sql/1").unwrap_python_model()
    encode_prompts = model.prompts.__globals__["encode_prompts"]  # of the package's own copy of sql_model
    served = encode_prompts(model.tokenizer, model.prompts(data.to_pandas()))
    for row, prompt in zip(data, served, strict=True):
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][: len(prompt)] == [-100] * len(prompt)
        assert row["labels"][len(prompt)] == row["input_ids"][len(prompt)]


def test_a_full_text_shows_the_chat_with_its_control_tokens(own):
    model = mlflow.pyfunc.load_model("models:/text2sql/1")
    settings = {"max_new_tokens": 1, "return_full_text": True}
    (text,) = model.predict([{"question": "How many?", "context": "C"}], params=settings)
    assert "<|im_start|>user\nSchema {SQLite}:\nC\nAsked:\nHow many?<|im_end|>" in text


def test_rows_with_databases_have_an_execution_accuracy(own):
    assert {"execution_accuracy", "base_execution_accuracy"} <= set(own.evaluated.data.metrics)


# What a user can get wrong


def test_a_missing_database_is_named_with_its_row(store, given, folder):
    text = given["dataset"].read_text().replace("db/3.sqlite", "db/x.sqlite")
    (folder / "broken.csv").write_text(text)
    message, _ = failure("prepare_data", **given | {"dataset": folder / "broken.csv"})
    assert (
        f"dataset={folder}/broken.csv, database_column=file: row 3: {folder}/db/x.sqlite is no file"
        in message
    )


def test_two_sets_of_validation_rows_are_refused(store, given, tmp_path):
    for name in ("train", "dev"):
        write_jsonl(tmp_path / f"{name}.jsonl", plain_rows())
    values = given | {"dataset": tmp_path, "database_column": ""}
    values |= {f"{name}_column": name for name in ("question", "context", "answer")}
    message, _ = failure("prepare_data", **values)
    assert (
        f"validation_dataset={given['validation_dataset']}: dataset={tmp_path} has a validation file"
        in message
    )


def test_a_base_without_a_chat_template_is_refused_before_the_rows_are_read(store, given, tiny_base, folder):
    values = given | {"base_model": tiny_base, "validation_dataset": given["validation_dataset"]}
    message, run = failure("prepare_data", **values)
    assert f"prompt_style=chat: the tokenizer of base_model={tiny_base} has no chat template" in message
    assert run.info.status == "FAILED"
