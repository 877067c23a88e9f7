"""Training on all GPUs of a machine against training on one: losses, speed, memory, checkpoints, adapter.

    python -m benchmarks.several_gpus --architecture mistral-7b --rows 32 --steps 50

Weights are random, made once in --models, with the embedded base's tokenizer; --dataset is a file of rows as
prepare_data takes it, or the built-in ones. All trainings are runs of the project's own step `train`. Losses
and norms of gradients are means of `--logging-steps` steps; rows a second are the median of the last points:
before them shapes are recorded, and a checkpoint is written in half of the steps. Where there is no GPU, two
processes share the processors: that shows that it works, and nothing of speed.

Each table is printed as soon as its runs are done; a run that fails is named, and the others go on. --scratch
keeps store and runs, so that --parts can be measured one after the other.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlflow
import torch
from mlflow.artifacts import download_artifacts
from peft import PeftModel

from benchmarks.markdown import Table, print_table
from benchmarks.train_throughput import ARCHITECTURES, versions, write_weights
from steps.text2sql.device import describe_device
from steps.text2sql.sql_model import EMBEDDED_BASE, load_base, load_base_tokenizer

PROJECT = Path(__file__).parents[1]
TWO_ON_CPU = "distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"
SENTENCE = "SELECT COUNT(*) FROM singer"
# After half of the steps, of which there is a checkpoint, so many more are not timed.
UNTIMED_STEPS = 10
PARTS = ("train", "resume", "load")


def base(architecture: str, models: Path) -> Path:
    """Folder with random weights of an architecture and a tokenizer that knows all tokens of SQL."""
    folder = models / f"{architecture}-tokenized"
    if not (folder / "config.json").exists():
        tokenizer = load_base_tokenizer(EMBEDDED_BASE)
        config = copy.deepcopy(ARCHITECTURES[architecture])
        config.vocab_size = len(tokenizer)
        write_weights(config, folder)
        tokenizer.save_pretrained(folder)
    return folder


class Runs:
    """Runs of the project's steps with their values, by what they are called here; kept in a folder."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "runs.json"
        self.made: dict[str, dict[str, str]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def get(self, called: str, step: str, **values: object) -> str:
        """Id of a run, which is made where there is none with the same values; empty if it fails."""
        start = time.monotonic()
        named = {name: str(value) for name, value in values.items()}
        if (known := self.made.get(called)) and known.items() >= named.items():
            return known["run_id"]
        try:
            made = mlflow.projects.run(str(PROJECT), step, env_manager="local", parameters=named)
        except mlflow.exceptions.ExecutionException as error:
            print(f"FAILED: {called}: {error}", flush=True)
            return ""
        self.made[called] = named | {"run_id": made.run_id}
        self.file.write_text(json.dumps(self.made), encoding="utf-8")
        print(f"{called}: {made.run_id}, {time.monotonic() - start:.0f} s", flush=True)
        return made.run_id


def ways(scratch: Path) -> dict[str, str]:
    """Values of `launch` by name, one process first."""
    if torch.cuda.is_available():
        return {"one GPU": "single", "DDP": "ddp", "FSDP": "fsdp"}
    file = scratch / "two.yaml"
    file.write_text(TWO_ON_CPU, encoding="utf-8")
    return {"one process": "single", "two processes": str(file)}


def points(run_id: str, metric: str) -> dict[int, float]:
    """Values of a run's metric by step."""
    found = mlflow.MlflowClient().get_metric_history(run_id, metric)
    return {point.step: point.value for point in found}


def apart(run_id: str, other: str, metric: str = "train_loss", *, after: int = 0) -> float:
    """Furthest relative difference of two runs' values of a metric, over the steps after one."""
    found, others = points(run_id, metric), points(other, metric)
    return max(abs(found[step] / others[step] - 1) for step in found if step > after)


def speed(run_id: str, *, after: int) -> float:
    """Rows a second in the steps after one."""
    return statistics.median(
        value for step, value in points(run_id, "samples_per_second").items() if step > after
    )


def peak(run_id: str) -> float:
    """GiB that the first process held at most."""
    return max(points(run_id, "peak_memory_gib").values())


def trained(runs: Mapping[str, str], *, after: int) -> Table:
    """Each way against the first; speeds are those after a step."""
    yield "training", "losses apart", "norms apart", "rows/s", "to one", "peak GiB of the first", "to one"
    one = next(iter(runs.values()))
    for name, run_id in runs.items():
        rows, memory = speed(run_id, after=after), peak(run_id)
        losses, norms = apart(run_id, one), apart(run_id, one, "grad_norm")
        times, share = f"{rows / speed(one, after=after):.2f} x", f"{memory / peak(one):.0%}"
        yield name, f"{losses:.2%}", f"{norms:.1%}", f"{rows:.2f}", times, f"{memory:.1f}", share


def curves(runs: Mapping[str, str]) -> Table:
    """Loss and rows a second of all ways, point by point: what to look at where a table surprises."""
    yield "step", *(f"{name}, {what}" for name in runs for what in ("loss", "rows/s"))
    found = [
        points(run_id, metric) for run_id in runs.values() for metric in ("train_loss", "samples_per_second")
    ]
    for step in found[0]:
        yield step, *(f"{values.get(step, float('nan')):.5g}" for values in found)


def gone_on(runs: Mapping[tuple[str, str], str], whole: Mapping[str, str], *, after: int) -> Table:
    """Losses after a checkpoint against those of the training that it is of."""
    yield "checkpoint of", "goes on as", "losses apart"
    for (first, second), run_id in runs.items():
        yield first, second, f"{apart(run_id, whole[first], after=after):.2%}"


def losses_of(folder: str, adapters: list[str]) -> list[float]:
    """Loss of one sentence without and with each adapter, on the device of this process."""
    tokenizer, base = load_base_tokenizer(folder), load_base(folder, "nf4")
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids.to(base.device)

    def loss(model: torch.nn.Module) -> float:
        with torch.inference_mode():
            return model.eval()(input_ids=ids, labels=ids).loss.item()

    found = [loss(base)]
    for adapter in adapters:
        model = PeftModel.from_pretrained(base, adapter)
        found.append(loss(model))
        base = model.unload()
    return found


def loaded(runs: Mapping[str, str], folder: Path) -> Table:
    """Each adapter on one GPU and on the CPU, each device a process of its own; both at once."""
    yield "device", "loss of a sentence without adapter", *(f"with that of {name}" for name in runs)
    devices = {"CPU": {"CUDA_VISIBLE_DEVICES": ""}}
    if torch.cuda.is_available():
        devices = {"one GPU": {"CUDA_VISIBLE_DEVICES": "0"}} | devices
    adapters = [download_artifacts(f"runs:/{run_id}/adapter") for run_id in runs.values()]
    words = [sys.executable, "-m", "benchmarks.several_gpus", "--losses-of", str(folder), *adapters]
    started = {
        device: subprocess.Popen(words, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
        for device, variables in devices.items()
    }
    for device, process in started.items():
        yield device, *process.communicate()[0].splitlines()[-1].split()


@contextmanager
def scratch_folder(given: Path | None) -> Iterator[Path]:
    """The folder that was given, or one that is removed afterwards."""
    if given:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="tiny")
    parser.add_argument("--rows", type=int, default=32, help="of an optimizer step")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dataset", default="sample", help="an absolute path")
    parser.add_argument("--torch-compile", choices=("auto", "yes", "no"), default="auto")
    parser.add_argument("--logging-steps", type=int, default=5)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "text2sql-weights")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--scratch", type=Path, help="folder to keep store and runs in")
    parser.add_argument("--losses-of", nargs="+", metavar="BASE ADAPTER", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.losses_of:
        folder, *adapters = given.losses_of
        print(*(f"{loss:.4f}" for loss in losses_of(folder, adapters)))
        return
    with scratch_folder(given.scratch) as scratch:
        measure(given, scratch)


def use_store(scratch: Path) -> None:
    """Track runs in a store in the folder."""
    mlflow.set_tracking_uri(f"sqlite:///{scratch}/mlflow.db")
    if not mlflow.get_experiment_by_name("several"):
        mlflow.create_experiment("several", artifact_location=(scratch / "runs").as_uri())
    mlflow.set_experiment("several")


def measure(given: argparse.Namespace, scratch: Path) -> None:
    """Train every way, go on from checkpoints the other way, and load the adapters."""
    use_store(scratch)
    print(f"{given.architecture}, random weights, {describe_device()}, {torch.cuda.device_count()} GPUs")
    print(f"{versions()}, {given.rows} rows a step", flush=True)
    folder, runs, launches = base(given.architecture, given.models).resolve(), Runs(scratch), ways(scratch)
    data = runs.get("data", "prepare_data", base_model=folder, dataset=given.dataset)
    half = given.steps // 2 // given.logging_steps * given.logging_steps
    recipe = {
        "dataset_uri": f"runs:/{data}/dataset",
        "max_steps": given.steps,
        "batch_size": given.rows,
        "logging_steps": given.logging_steps,
        "save_steps": half,
        "torch_compile": given.torch_compile,
    }
    done = {name: runs.get(name, "train", **recipe, launch=launch) for name, launch in launches.items()}
    done = {name: run_id for name, run_id in done.items() if run_id}
    if list(done)[:1] != list(launches)[:1]:
        raise SystemExit("the training to compare with failed")
    if "train" in given.parts:
        last = given.steps - given.logging_steps  # a short training is timed by its last point alone
        show(trained(done, after=min(half + UNTIMED_STEPS, last)), curves(done))
    if "resume" in given.parts:
        one, *several = done
        resumed = {}
        for first, second in [(one, name) for name in several] + [(name, one) for name in several]:
            values = recipe | {"launch": launches[second], "resume_from": done[first]}
            if run_id := runs.get(f"{first} goes on as {second}", "train", **values):
                resumed[first, second] = run_id
        show(gone_on(resumed, done, after=half))
    if "load" in given.parts:
        show(loaded(done, folder))


def show(*tables: Table) -> None:
    """Print tables at once."""
    for table in tables:
        print()
        print_table(table)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
