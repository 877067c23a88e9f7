"""evaluate on a tiny base: any rows, batches that fit, and what shows up in MLflow."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import mlflow
import pandas
import pytest
import torch
from mlflow.artifacts import download_artifacts, load_dict, load_text
from mlflow.exceptions import MlflowException
from transformers import LlamaConfig

from steps.text2sql import evaluation, manifest, packaging, sql_model
from steps.text2sql.manifest import DatasetManifest
from tests.conftest import call_step, failure, plain_rows, tracking_at, write_jsonl

NAMES = ("execution_accuracy", "exact_match", "valid_sql")


@pytest.fixture(scope="module")
def sample_again(finished_chain, tmp_path_factory):
    """The version scored on the rows that its evaluation kept, as promote asks for it."""
    with tracking_at(finished_chain.store):
        rows = f"runs:/{finished_chain.evaluate.info.run_id}/rows"
        folder = Path(download_artifacts(rows, dst_path=str(tmp_path_factory.mktemp("rows"))))
        run = call_step("evaluate", model_uri="models:/text2sql/1", dataset=folder / "rows.jsonl")
    return SimpleNamespace(run=run, folder=folder)


def test_the_kept_rows_are_those_of_the_predictions(chain):
    lines = load_text(f"runs:/{chain.evaluate.info.run_id}/rows/rows.jsonl").splitlines()
    table = load_dict(f"runs:/{chain.evaluate.info.run_id}/predictions.json")
    places = [table["columns"].index(name) for name in ("question", "context", "gold")]
    rows = [json.loads(line) for line in lines]
    assert [[row[i] for i in places] for row in table["data"]] == [
        [row["question"], row["context"], row["answer"]] for row in rows
    ]
    assert {row["database"].split("/")[0] for row in rows} == {"databases"}


def of_rows(metrics):
    """Without those of the machine, which a run gets when it takes long enough."""
    return {name: value for name, value in metrics.items() if not name.startswith("system/")}


def test_the_kept_rows_scored_again_are_the_same_evaluation(chain, sample_again):
    first, again = chain.evaluate.data, sample_again.run.data
    assert again.tags["evaluated_rows_digest"] == first.tags["evaluated_rows_digest"]
    assert of_rows(again.metrics) == of_rows(first.metrics)
    tables = [
        load_dict(f"runs:/{run.info.run_id}/predictions.json") for run in (chain.evaluate, sample_again.run)
    ]
    assert tables[0] == tables[1]


def test_any_rows_are_scored_with_an_alias(chain, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", plain_rows(5))
    run = call_step("evaluate", model_uri="models:/text2sql@champion", dataset=file, eval_rows=3)
    assert run.data.metrics["evaluated_rows"] == 3
    assert run.data.tags["model_version"] == "1"


def test_every_slice_and_every_reason_is_a_metric_of_both_models(chain):
    metrics = chain.evaluate.data.metrics
    for prefix in ("", "base_"):
        counted = sum(v for name, v in metrics.items() if name.startswith(f"{prefix}failures/"))
        assert counted == 6 * (1 - metrics[f"{prefix}execution_accuracy"])
        shares = {n.split("/")[1] for n in metrics if n.startswith(f"{prefix}execution_accuracy/")}
        assert shares == {"hardness", "tables", "joins", "aggregates", "conditions", "nesting"}
    assert sum(value for name, value in metrics.items() if name.startswith("rows/hardness/")) == 6


def test_evaluate_logs_a_page_a_picture_and_the_table_of_slices(chain):
    found = {artifact.path for artifact in mlflow.MlflowClient().list_artifacts(chain.evaluate.info.run_id)}
    assert found == {"predictions.json", "report.html", "rows", "slices.json", "slices.png"}
    assert "text2sql version 1" in load_text(f"runs:/{chain.evaluate.info.run_id}/report.html")


def test_the_metrics_belong_to_the_registered_model_and_its_rows(chain):
    version = mlflow.MlflowClient().get_model_version("text2sql", "1")
    model = mlflow.get_logged_model(version.source.removeprefix("models:/"))
    of_run = [metric for metric in model.metrics if metric.run_id == chain.evaluate.info.run_id]
    assert {metric.key: metric.value for metric in of_run} == of_rows(chain.evaluate.data.metrics)
    digest = chain.evaluate.data.tags["evaluated_rows_digest"][:36]
    assert {(metric.dataset_name, metric.dataset_digest) for metric in of_run} == {("evaluated_rows", digest)}


def test_every_row_and_its_verdicts_are_in_mlflows_evaluation_view(chain):
    run = chain.evaluate.info
    traces = mlflow.search_traces(locations=[run.experiment_id], run_id=run.run_id, return_type="list")
    table = load_dict(f"runs:/{run.run_id}/predictions.json")
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    expected = {row["question"]: {name: row[name] for name in NAMES} for row in rows}
    found = {}
    for trace in traces:
        values = {a.name: a.feedback.value for a in trace.info.assessments if a.feedback}
        found[json.loads(trace.data.request)["question"]] = values
    assert found == expected


def test_evaluating_prints_nothing_of_mlflows_own(chain, capfd, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", plain_rows(2))
    call_step("evaluate", model_uri="models:/text2sql/1", dataset=file)
    assert "Evaluation completed" not in "".join(capfd.readouterr())


# Batches


def test_memory_of_a_row_by_hand():
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    found = evaluation.bytes_per_row(LlamaConfig(**shape, vocab_size=100), tokens=10, value_bytes=4)
    # Keys and values: 2 x 2 layers x 2 heads x 16 x 10 tokens; 10 tokens x (16 x 64 + 4 heads x 10); logits.
    assert found == (1280 + 10640) * 4 + 3 * 100 * 4


def test_the_answers_are_judged_as_served_and_as_generated(tmp_path):
    contexts = ["CREATE TABLE t (mascot TEXT)"] * 3
    gold = ["SELECT mascot FROM t"] * 3
    rows = pandas.DataFrame({"question": "Which?", "context": contexts, "answer": gold})
    texts = ["SELECT masc FROM t", "SELECT mascot FROM t", "SELECT 1 FROM t"]
    answers = [sql_model.Generated(text, True) for text in texts]
    limits = {"databases": tmp_path, "timeout_seconds": 5.0}
    queries = evaluation.served(rows, answers)
    served = evaluation.judge(rows, answers, queries, **limits)
    generated = evaluation.unrepaired(rows, answers, queries, served, **limits)
    assert [one.execution_accuracy for one in served] == [True, True, False]
    assert [one.execution_accuracy for one in generated] == [False, True, False]
    assert [one.reason for one in generated][0] == "unknown column"


@pytest.mark.parametrize(("free", "expected"), [(0, 1), (10**12, evaluation.MAX_BATCH_SIZE["cpu"])])
def test_a_batch_has_at_least_one_row_and_is_bounded(chain, free, expected):
    model = packaging.load(Path(download_artifacts("models:/text2sql/1")), source="")
    rows = pandas.DataFrame(plain_rows(3))
    assert evaluation.find_batch_size(model, rows, max_new_tokens=8, free=free) == expected


def test_a_row_that_the_model_cannot_read_makes_no_smaller_batches(chain):
    model = packaging.load(Path(download_artifacts("models:/text2sql/1")), source="")
    rows = pandas.DataFrame(plain_rows(3))
    needed = evaluation.find_batch_size(model, rows, max_new_tokens=8, free=40_000_000)
    assert 1 < needed < evaluation.MAX_BATCH_SIZE["cpu"]
    rows.loc[0, "question"] = "farms " * 10_000
    assert evaluation.find_batch_size(model, rows, max_new_tokens=8, free=40_000_000) == needed


def test_an_enormous_gold_asks_for_no_more_tokens_than_are_ever_served(tiny_base):
    tokenizer = sql_model.load_base_tokenizer(str(tiny_base))
    assert evaluation.token_budget(tokenizer, ["SELECT 1"]) < 40
    assert evaluation.token_budget(tokenizer, ["SELECT 1", "x " * 10_000]) == sql_model.MAX_NEW_TOKENS


def test_a_version_whose_logged_model_was_deleted_is_refused_before_any_work(chain, monkeypatch):
    def gone(model_id):
        raise MlflowException(f"Logged model with ID '{model_id}' not found.")

    monkeypatch.setattr(mlflow, "get_logged_model", gone)
    monkeypatch.setattr(packaging, "load", lambda *_, **__: pytest.fail("loaded"))
    message, _ = failure("evaluate", model_uri="models:/text2sql/1", dataset_uri=chain.dataset_uri)
    assert "model_uri=models:/text2sql/1: its logged model is gone: Logged model with ID 'm-" in message


@pytest.fixture
def base(tiny_base):
    return sql_model.load_base(str(tiny_base), "none"), sql_model.load_base_tokenizer(str(tiny_base))


def short_of_memory(monkeypatch, model, *, fits: int, error: Exception) -> list[int]:
    """Generation of more than so many rows fails; sizes of all attempts are noted."""
    generate, sizes = model.generate, []

    def limited(input_ids: torch.Tensor, **rest: object) -> torch.Tensor:
        sizes.append(len(input_ids))
        if len(input_ids) > fits:
            raise error
        return generate(input_ids=input_ids, **rest)

    monkeypatch.setattr(model, "generate", limited)
    return sizes


def test_a_batch_that_is_too_large_is_halved_and_every_row_answered(base, monkeypatch):
    prompts = [f"List {i} farms " * (i + 1) for i in range(7)]
    [expected] = sql_model.generate(*base, prompts, max_new_tokens=4)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    sizes = short_of_memory(monkeypatch, base[0], fits=2, error=error)
    batches = list(sql_model.generate(*base, prompts, max_new_tokens=4))
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert {i: answer for batch in batches for i, answer in batch.items()} == expected


def test_one_row_too_large_for_the_memory_is_the_error_it_is(base, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    short_of_memory(monkeypatch, base[0], fits=0, error=error)
    with pytest.raises(torch.OutOfMemoryError):
        list(sql_model.generate(*base, ["a", "b"], max_new_tokens=4))


def test_another_error_is_not_taken_for_a_lack_of_memory(base, monkeypatch):
    sizes = short_of_memory(monkeypatch, base[0], fits=0, error=ValueError("of the model"))
    with pytest.raises(ValueError, match="of the model"):
        list(sql_model.generate(*base, ["a", "b"], max_new_tokens=4))
    assert sizes == [2]


# Bad input


def refused(**values: object) -> str:
    """Message of a failed evaluate, after which the champion is who it was and no run runs."""
    champion = mlflow.MlflowClient().get_model_version_by_alias("text2sql", "champion").version
    message, run = failure("evaluate", **values)
    assert run.info.status == "FAILED"
    assert mlflow.MlflowClient().get_model_version_by_alias("text2sql", "champion").version == champion
    assert mlflow.search_runs(search_all_experiments=True, filter_string="status = 'RUNNING'").empty
    return message


@pytest.mark.parametrize("uri", ["models:/text2sql/99", "models:/nobody/1", "models:/nobody@champion"])
def test_a_model_that_does_not_exist_is_named(chain, uri):
    assert f"model_uri={uri}: " in refused(model_uri=uri, dataset="sample")


class Echo(mlflow.pyfunc.PythonModel):
    """Some other model."""

    def predict(self, context, model_input, params=None):
        return model_input


@pytest.mark.parametrize(("signed", "words"), [(False, "has no signature"), (True, "no text-to-SQL package")])
def test_a_version_that_is_no_package_of_this_project_is_refused(chain, signed, words):
    signature = packaging.SIGNATURE if signed else None
    with mlflow.start_run():
        logged = mlflow.pyfunc.log_model(
            name="m", python_model=Echo(), signature=signature, pip_requirements=["mlflow"]
        )
    version = mlflow.register_model(logged.model_uri, f"other-{signed}").version
    uri = f"models:/other-{signed}/{version}"
    message = refused(model_uri=uri, dataset="sample")
    assert f"model_uri={uri}: " in message
    assert words in message


def test_rows_without_gold_are_refused(chain, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [row | {"answer": " "} for row in plain_rows(2)])
    message = refused(model_uri="models:/text2sql/1", dataset=file)
    assert f"dataset={file}: 2 of 2 rows cannot be scored" in message


def test_an_empty_test_split_is_refused(chain, tmp_path):

    folder = Path(download_artifacts(chain.dataset_uri, dst_path=str(tmp_path)))
    found = datasets.load_from_disk(folder, keep_in_memory=True)
    found["test"] = found["test"].select([])
    emptied = tmp_path / "emptied"
    found.save_to_disk(emptied)
    manifest.write(manifest.read(DatasetManifest, folder, source="dataset"), emptied)
    message = refused(model_uri="models:/text2sql/1", dataset_uri=emptied)
    assert f"dataset_uri={emptied}: its test split has no rows" in message


def test_a_base_that_is_gone_is_named(chain, tiny_base):
    hidden = tiny_base.rename(tiny_base.parent / "hidden")
    try:
        message = refused(model_uri="models:/text2sql/1", dataset="sample")
    finally:
        hidden.rename(tiny_base)
    assert f"model_uri=models:/text2sql/1: does not load: base model {tiny_base}" in message
