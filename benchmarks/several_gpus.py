"""Training on all GPUs of a machine against training on one: losses, speed, memory, checkpoints, adapter.

    python -m benchmarks.several_gpus --architecture mistral-7b --rows 32 --steps 50

Weights are random, made once in --models, with the embedded base's tokenizer; rows are the built-in ones. All
trainings are runs of the project's own step `train`, in a tracking store of their own. Losses are means of
`--logging-steps` steps, rows a second the median of those points but the first, in which shapes are recorded.
Where there is no GPU, two processes share the processors: that shows that it works, and nothing of speed.
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
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


def run(step: str, **values: object) -> str:
    """Run a step of the project to its end; the id of its run."""
    named = {name: str(value) for name, value in values.items()}
    return mlflow.projects.run(str(PROJECT), step, env_manager="local", parameters=named).run_id


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


def apart(run_id: str, other: str, *, after: int = 0) -> float:
    """Furthest relative difference of two runs' losses, over the steps after one."""
    losses, others = points(run_id, "train_loss"), points(other, "train_loss")
    return max(abs(losses[step] / others[step] - 1) for step in losses if step > after)


def speed(run_id: str) -> float:
    """Rows a second."""
    return statistics.median(list(points(run_id, "samples_per_second").values())[1:])


def peak(run_id: str) -> float:
    """GiB that the first process held at most."""
    return max(points(run_id, "peak_memory_gib").values())


def trained(runs: Mapping[str, str]) -> Table:
    """Each way against the first."""
    yield "training", "losses apart", "rows/s", "to one", "peak GiB of the first", "to one"
    one = next(iter(runs.values()))
    for name, run_id in runs.items():
        rows, memory = speed(run_id), peak(run_id)
        times, share = f"{rows / speed(one):.2f} x", f"{memory / peak(one):.0%}"
        yield name, f"{apart(run_id, one):.2%}", f"{rows:.2f}", times, f"{memory:.1f}", share


def gone_on(runs: Mapping[tuple[str, str], str], whole: Mapping[str, str], *, after: int) -> Table:
    """Losses after a checkpoint against those of the training that it is of."""
    yield "checkpoint of", "goes on as", "losses apart"
    for (first, second), run_id in runs.items():
        yield first, second, f"{apart(run_id, whole[first], after=after):.2%}"


def loss_of(adapter: str, folder: str) -> float:
    """Loss of one sentence with an adapter on the device of this process."""
    tokenizer = load_base_tokenizer(folder)
    model = PeftModel.from_pretrained(load_base(folder, "nf4"), adapter).eval()
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids.to(model.device)
    with torch.inference_mode():
        return model(input_ids=ids, labels=ids).loss.item()


def loaded(runs: Mapping[str, str], folder: Path) -> Table:
    """Each adapter loaded on one GPU and on the CPU."""
    yield "adapter of", "device", "loss of a sentence"
    devices = {"CPU": {"CUDA_VISIBLE_DEVICES": ""}}
    if torch.cuda.is_available():
        devices = {"one GPU": {"CUDA_VISIBLE_DEVICES": "0"}} | devices
    for name, run_id in runs.items():
        adapter = download_artifacts(f"runs:/{run_id}/adapter")
        for device, variables in devices.items():
            words = [sys.executable, "-m", "benchmarks.several_gpus", "--loss-of", adapter, str(folder)]
            done = subprocess.run(
                words, env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=True
            )
            yield name, device, done.stdout.split()[-1]


def main() -> None:
    """Measure, and print three tables."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="tiny")
    parser.add_argument("--rows", type=int, default=32, help="of an optimizer step")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--logging-steps", type=int, default=5)
    parser.add_argument("--torch-compile", choices=("auto", "yes", "no"), default="auto")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "text2sql-weights")
    parser.add_argument("--loss-of", nargs=2, metavar=("ADAPTER", "BASE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loss_of:
        print(f"{loss_of(*given.loss_of):.4f}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        measure(given, Path(scratch))


def measure(given: argparse.Namespace, scratch: Path) -> None:
    """Train every way, go on from checkpoints the other way, and load the adapters."""
    mlflow.set_tracking_uri(f"sqlite:///{scratch}/mlflow.db")
    mlflow.set_experiment(
        experiment_id=mlflow.create_experiment("several", artifact_location=(scratch / "runs").as_uri())
    )
    folder = base(given.architecture, given.models).resolve()
    data = run("prepare_data", base_model=folder)
    half = given.steps // 2 // given.logging_steps * given.logging_steps
    recipe = {
        "dataset_uri": f"runs:/{data}/dataset",
        "max_steps": given.steps,
        "batch_size": given.rows,
        "logging_steps": given.logging_steps,
        "torch_compile": given.torch_compile,
        "save_steps": half,
    }
    launches = ways(scratch)
    runs = {name: run("train", **recipe, launch=launch) for name, launch in launches.items()}
    one, *several = runs
    pairs = [(one, name) for name in several] + [(name, one) for name in several]
    resumed = {
        (first, second): run("train", **recipe, launch=launches[second], resume_from=runs[first])
        for first, second in pairs
    }
    print(f"\n{given.architecture}, random weights, {describe_device()}, {torch.cuda.device_count()} GPUs")
    print(f"{versions()}, {given.rows} rows a step\n")
    print_table(trained(runs))
    print()
    print_table(gone_on(resumed, runs, after=half))
    print()
    print_table(loaded(runs, folder))


if __name__ == "__main__":
    main()
