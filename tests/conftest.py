"""A tiny random base model, a store of its own for each test, and one chain of steps that many tests read."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import mlflow
import mlflow.cli
import mlflow.server
import pytest
import torch
import uvicorn
from mlflow.entities import Run
from mlflow.exceptions import ExecutionException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_PROJECT_ENTRY_POINT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steps import evaluate, export, main, prepare_data, promote, register, train
from steps.text2sql import command_line, packaging, params, reuse, sample_data, step_run
from steps.text2sql.mlproject import defaults
from steps.text2sql.sql_model import BaseModelError

# By default progress bars lock out forked processes too, and one that is killed meanwhile locks for ever.
tqdm.set_lock(threading.RLock())

PROJECT = Path(__file__).parents[1]
STEPS = {
    "prepare_data": prepare_data,
    "train": train,
    "register": register,
    "evaluate": evaluate,
    "promote": promote,
    "export": export,
}
# The tiny base's matrices are so small that a second thread only waits: 50 times slower on shared cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # and in the processes that tests start
# A connection that waits in a pool would be shared by the processes that tests fork.
os.environ["MLFLOW_SQLALCHEMYSTORE_POOLCLASS"] = "NullPool"
# Turns as ChatML writes them, with a system turn of its own, as several instruct models have.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# For what a test starts: two processes in a row that load torch, on a machine with much else to do.
START_LIMIT_SECONDS = 600
# Small enough for seconds on one core, large enough that a loss can fall.
QUICK = {"max_steps": 6, "batch_size": 4, "lora_r": 4, "lora_alpha": 8, "logging_steps": 1, "save_steps": 2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that at the end no worker waits long for another."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def words(values: dict[str, object]) -> list[str]:
    """Values as the words of a command line."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def call_step(step: str, **values: object) -> Run:
    """Call a step as its command line does, in this process; its run comes back.

    A failing step raises SystemExit, and `mlflow.last_active_run()` is its run.
    """
    argv, sys.argv = sys.argv, [step, *words(defaults(step) | values)]
    try:
        step_run.run_step(params.STEPS[step], STEPS[step].main, user_errors=(BaseModelError,))
    finally:
        sys.argv = argv
    return mlflow.get_run(mlflow.last_active_run().info.run_id)


def failure(step: str, **values: object) -> tuple[str, Run]:
    """Message and run of a step that must fail with a message for the user, and exit status 1."""
    with pytest.raises(SystemExit) as caught:
        call_step(step, **values)
    # Python prints a SystemExit's text and exits with status 1.
    assert isinstance(caught.value.code, str)
    return caught.value.code, mlflow.get_run(mlflow.last_active_run().info.run_id)


class Forked:
    """A process that calls a function, with all that this one has loaded: that takes 14 seconds otherwise.

    It has signal handlers and a lock for progress bars as a new process has. What it prints can be read from
    `stdout`, line by line.
    """

    def __init__(self, body: Callable[[], object]) -> None:
        reading, writing = os.pipe()
        self.stdout = os.fdopen(reading)
        self._process = multiprocessing.get_context("fork").Process(target=self._call, args=(body, writing))
        self._process.start()
        os.close(writing)
        self.pid = self._process.pid

    def _call(self, body: Callable[[], object], writing: int) -> None:
        for number in (1, 2):
            os.dup2(writing, number)
        os.close(writing)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        tqdm.set_lock(threading.RLock())
        body()

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None as long as it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Exit status, as soon as there is one."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"not ended after {timeout} s"
        return self._process.exitcode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill it, if it still runs."""
        self._process.kill()
        self._process.join()
        self.stdout.close()


class Server:
    """The command `mlflow server` on SQLite, which can go away and come back at its address."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.process = Forked(self._serve)
        wait_for(f"{self.url}/health", self.process, self.log)

    def _serve(self) -> None:
        with self.log.open("a") as log:
            for number in (1, 2):
                os.dup2(log.fileno(), number)
        os.chdir(self.folder)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # further processes, for other work
        mlflow.server._exec_cmd = self._go_on_here
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        options += ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        options += ["--artifacts-destination", str(self.folder / "artifacts")]
        mlflow.cli.cli(["server", *options])

    @staticmethod
    def _go_on_here(command: list[str], *, extra_env: dict[str, str], **_: object) -> None:
        """Do what `python -m uvicorn …` does, without loading all of MLflow once more."""
        os.environ.update(extra_env)
        uvicorn.main(command[command.index("uvicorn") + 1 :])

    def stop(self) -> None:
        """End it as a power cut would."""
        self.process.end()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that runs."""
    found = Server(tmp_path)
    found.start()
    yield found
    found.stop()


def run_main(**values: object) -> None:
    """Run main in this process, as its command line does, and each of its steps in a forked one.

    The parts that load torch in a process of their own are left out: they have tests of their own.
    """
    mlflow.projects.run = fork_step
    reuse.device_kind = lambda: "cpu"
    packaging.ask_in_fresh_process = lambda *_: "SELECT 1"
    given = command_line.parse_main(words(defaults("main") | values))
    step_run.run_in_run(lambda: main.main(given))


def fork_step(
    *, uri: str, entry_point: str, parameters: dict[str, str], env_manager: str, run_name: str
) -> SimpleNamespace:
    """What `mlflow.projects.run` does, with a forked process."""
    parent, client = mlflow.active_run().info, mlflow.MlflowClient()
    tags = {MLFLOW_PARENT_RUN_ID: parent.run_id, MLFLOW_PROJECT_ENTRY_POINT: entry_point}
    run_id = client.create_run(parent.experiment_id, run_name=run_name, tags=tags).info.run_id

    def body() -> None:
        os.environ["MLFLOW_RUN_ID"] = run_id
        call_step(entry_point, **parameters)

    with Forked(body) as process:
        print(process.stdout.read(), flush=True)
        if process.wait(60):
            client.set_terminated(run_id, "FAILED")
            raise ExecutionException(f"Run (ID '{run_id}') failed")
    return SimpleNamespace(run_id=run_id)


@contextmanager
def tracking_at(uri: str) -> Iterator[str]:
    """Point MLflow, and the processes that a test starts, to a store."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        yield uri
        mlflow.end_run("KILLED")
        mlflow.set_tracking_uri(None)


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], str]:
    """Makes fresh SQLite stores; their tables are made once and copied, which takes seconds otherwise."""
    template = tmp_path_factory.mktemp("store") / "mlflow.db"
    with tracking_at(f"sqlite:///{template}"), pytest.MonkeyPatch.context() as patch:
        patch.chdir(template.parent)
        mlflow.search_experiments()

    def make() -> str:
        return f"sqlite:///{shutil.copy(template, tmp_path_factory.mktemp('store') / 'mlflow.db')}"

    return make


@pytest.fixture
def store(new_store: Callable[[], str]) -> Iterator[str]:
    """A fresh store that MLflow uses during one test."""
    with tracking_at(new_store()) as uri:
        yield uri


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a Llama of two layers with random weights, whose tokenizer knows the built-in rows."""
    return write_tiny_base(tmp_path_factory.mktemp("tiny_base"), tiny_tokenizer())


def write_tiny_base(folder: Path, tokenizer: PreTrainedTokenizerFast, **config: object) -> Path:
    """Write a random Llama with this tokenizer into a folder."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **(shape | ids | config))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("Licence of the tiny base\n")
    return folder


def tiny_tokenizer(vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on some built-in rows."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((" ".join(row.values()) for row in sample_data.generate(0)[:300]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with the control tokens and the chat template of an instruct model."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_rows(count: int = 60, *, tables: int = 20) -> list[dict[str, object]]:
    """Sound rows over so many tables that share nothing."""
    return [
        {
            "question": f"How many items of table {i % tables} cost more than {i}?",
            "context": f"CREATE TABLE items_{i % tables} (name TEXT, price_{i % tables} INTEGER)",
            "answer": f"SELECT COUNT(*) FROM items_{i % tables} WHERE price_{i % tables} > {i}",
        }
        for i in range(count)
    ]


def prepared_uri(base: Path, file: Path) -> str:
    """URI of the dataset that prepare_data makes of a file of rows."""
    run = call_step("prepare_data", base_model=base, dataset=file)
    return f"runs:/{run.info.run_id}/dataset"


@pytest.fixture(scope="session")
def finished_chain(new_store: Callable[[], str], tiny_base: Path) -> SimpleNamespace:
    """All steps on the tiny base and the built-in rows: the store, each step's run, the URIs between them."""
    with tracking_at(new_store()) as uri:
        prepared = call_step("prepare_data", base_model=tiny_base, dataset="sample", max_length=1024)
        dataset_uri = f"runs:/{prepared.info.run_id}/dataset"
        trained = call_step("train", dataset_uri=dataset_uri, **QUICK)
        adapter_uri = f"runs:/{trained.info.run_id}/adapter"
        registered = call_step("register", adapter_uri=adapter_uri, dataset_uri=dataset_uri)
        evaluated = call_step(
            "evaluate", model_uri="models:/text2sql/1", dataset_uri=dataset_uri, eval_rows=6
        )
        promoted = call_step("promote", version=1, evaluation_run_id=evaluated.info.run_id)
    return SimpleNamespace(
        store=uri,
        dataset_uri=dataset_uri,
        adapter_uri=adapter_uri,
        prepare_data=prepared,
        train=trained,
        register=registered,
        evaluate=evaluated,
        promote=promoted,
    )


@pytest.fixture
def chain(finished_chain: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """The finished chain, with MLflow on its store."""
    with tracking_at(finished_chain.store):
        yield finished_chain


def wait_for(url, process, log):
    """Wait until a URL answers, at most START_LIMIT_SECONDS."""
    end = time.monotonic() + START_LIMIT_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    pytest.fail(f"{url} did not answer:\n{log.read_text()[-3000:]}")
