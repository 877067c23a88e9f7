"""The package behind `mlflow models serve` and `mlflow models predict`, as users call them."""

import json
import socket
import subprocess
import urllib.error
import urllib.request

import mlflow
import pandas
import pytest

from steps.text2sql import sample_data
from tests.conftest import wait_for
from tests.test_mlflow_run import environment

pytestmark = pytest.mark.slow

LIMIT = {"max_new_tokens": 8}
ROWS = [
    {
        "question": "How many heads are older than 56?",
        "context": "CREATE TABLE head (name TEXT, age INTEGER)",
    },
    {"question": "List farms.", "context": "CREATE TABLE farm (name TEXT)"},
]
QUESTIONS = [{"question": row["question"]} for row in ROWS]
SPLIT = {"columns": ["question", "context"], "data": [list(row.values()) for row in ROWS]}
COLUMNS = {name: [row[name] for row in ROWS] for name in ("question", "context")}


@pytest.fixture(scope="module")
def answers(finished_chain):
    """Asks the package in this process."""
    mlflow.set_tracking_uri(finished_chain.store)
    return mlflow.pyfunc.load_model("models:/text2sql@champion").predict


@pytest.fixture(scope="module")
def server(finished_chain, tmp_path_factory):
    """URL of a scoring server of the champion."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("serve")
    log = folder / "server.log"
    command = ["mlflow", "models", "serve", "-m", "models:/text2sql@champion", "--env-manager", "local"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=environment(MLFLOW_TRACKING_URI=finished_chain.store),
            stdout=output,
            stderr=output,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/ping", process, log)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def post(server, body):
    """Status and decoded answer to a body, which is sent as it is or as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{server}/invocations", data, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize(
    "form", [{"dataframe_records": ROWS}, {"dataframe_split": SPLIT}, {"inputs": COLUMNS}, {"inputs": ROWS}]
)
def test_every_form_of_json_is_answered_as_in_process_and_params_are_kept(server, answers, form):
    expected = answers(ROWS, params=LIMIT)
    assert post(server, form | {"params": LIMIT}) == (200, {"predictions": expected})
    assert expected != answers(ROWS, params={"max_new_tokens": 2})


def test_return_full_text_begins_with_the_prompt(server):
    status, body = post(server, {"dataframe_records": ROWS, "params": LIMIT | {"return_full_text": True}})
    assert status == 200
    assert all(text.startswith("You are a powerful text-to-SQL model.") for text in body["predictions"])


@pytest.mark.parametrize("rows", [QUESTIONS, [row | {"context": None} for row in QUESTIONS]])
def test_a_question_without_a_context_is_answered_as_with_an_empty_one(server, answers, rows):
    expected = answers([row | {"context": ""} for row in QUESTIONS], params=LIMIT)
    assert post(server, {"dataframe_records": rows, "params": LIMIT}) == (200, {"predictions": expected})


def test_64_rows_of_one_request_are_answered(server, answers):
    rows = [{k: row[k] for k in ("question", "context")} for row in sample_data.generate(1)[:64]]
    status, body = post(server, {"dataframe_records": rows, "params": LIMIT})
    assert status == 200
    assert body["predictions"] == answers(rows, params=LIMIT)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"dataframe_records": [{"query": "How many?"}]}, "missing inputs ['question']"),
        (
            {"dataframe_records": [{"context": "CREATE TABLE head (age INTEGER)"}]},
            "missing inputs ['question']",
        ),
        ({"dataframe_records": [{"question": 5}]}, "question: null, empty or no text in row 0"),
        (
            {"dataframe_records": [{"question": {"text": "How many?"}}]},
            "question: null, empty or no text in row 0",
        ),
        (
            {"dataframe_records": [*QUESTIONS, {"question": None}]},
            "question: null, empty or no text in row 2",
        ),
        ({"dataframe_records": [{"question": None}]}, "question: null, empty or no text in row 0"),
        ({"dataframe_records": [{"question": " "}]}, "question: null, empty or no text in row 0"),
        ({"dataframe_records": [{"question": "Who?", "context": 5}]}, "context: no text in row 0"),
        ({"dataframe_records": []}, "missing inputs ['question']"),
        ({"rows": ROWS}, "exactly one of the input fields"),
        (ROWS, "Received a list"),
        (b'{"dataframe_records": [', "valid JSON"),
        (b"\xff\xfe", "valid JSON"),
        ({"dataframe_records": ROWS, "params": {"max_new_tokens": "many"}}, "max_new_tokens"),
        ({"dataframe_records": ROWS, "params": {"max_new_tokens": 0}}, "max_new_tokens=0: must be 1 to 4096"),
        ({"dataframe_records": ROWS, "params": {"max_new_tokens": 10**9}}, "must be 1 to 4096"),
        ({"dataframe_records": ROWS, "params": {"repetition_penalty": -1.0}}, "repetition_penalty=-1.0"),
        ({"dataframe_records": ROWS, "params": [1]}, "Parameters must be a dictionary"),
    ],
)
def test_a_bad_request_is_400_with_the_reason(server, body, reason):
    status, error = post(server, body)
    assert (status, error["error_code"]) == (400, error["error_code"])
    assert reason in error["message"]


def test_a_param_that_is_null_is_as_if_it_was_not_given(server, answers):
    given = {"dataframe_records": ROWS, "params": LIMIT | {"repetition_penalty": None}}
    assert post(server, given) == (200, {"predictions": answers(ROWS, params=LIMIT)})


def test_an_unknown_param_is_left_out_by_mlflow_before_the_model_could_refuse_it(server, answers):
    given = {"dataframe_records": ROWS, "params": LIMIT | {"max_tokens": 1}}
    assert post(server, given) == (200, {"predictions": answers(ROWS, params=LIMIT)})


def test_mlflow_models_predict_answers_a_csv_with_an_empty_cell(finished_chain, answers, tmp_path):
    rows = [ROWS[0], QUESTIONS[1]]
    pandas.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    command = ["mlflow", "models", "predict", "-m", "models:/text2sql@champion", "--env-manager", "local"]
    done = subprocess.run(
        [*command, "-t", "csv", "-i", "rows.csv", "-o", "sql.json"],
        cwd=tmp_path,
        env=environment(MLFLOW_TRACKING_URI=finished_chain.store),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = answers([ROWS[0], QUESTIONS[1] | {"context": ""}])
    assert json.loads((tmp_path / "sql.json").read_text()) == {"predictions": expected}
