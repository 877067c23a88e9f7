"""Trainings of the tiny base, alone or as one of two processes that the tests start with this module.

`python -m tests.two_processes <folder of the base> <scratch folder>` runs `SCENARIOS` one after the other.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
import transformers
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from steps.text2sql import (
    adapter,
    collectives,
    correction,
    gradients,
    memory_plan,
    ranks,
    run_folder,
    sharding,
    sql_model,
    trainer,
)
from steps.text2sql import training as library
from steps.text2sql.checkpoints import Checkpoints
from steps.text2sql.manifest import AdapterManifest, DatasetManifest
from tests.recorded import Recorded

PROJECT = Path(__file__).parents[1]
STEPS, ROWS, LAYERS = 6, 14, 5
ADD = gradients.Gradients.add
# Name of a training: what differs from the others. All by two processes; `go_on` is one by one process.
SCENARIOS = {
    "ddp": {},
    "one_row": {"batch_size": 1},
    "resumed": {"go_on": "single/checkpoint-3"},
    "stopped": {"stop_at": 2},
    "dropout": {"dropout": 0.5, "steps": 1},
    "short_of_memory": {"room": 36},
    "recorded": {"recorded": True},
    "fsdp": {"sharded": True},
    "fsdp_resumed": {"sharded": True, "go_on": "single/checkpoint-3"},
    "fsdp_nf4": {"sharded": True, "quantization": "nf4"},
    "fsdp_dequantized": {"sharded": True, "quantization": "nf4", "dequantize": True},
    "fsdp_recompute": {"sharded": True, "recompute": True},
    "fsdp_compiled": {"sharded": True, "compiled": True},
    "corrected": {"quantization": "nf4", "corrected": True},
    "fsdp_corrected": {"quantization": "nf4", "corrected": True, "sharded": True},
    "pulled": {"sharded": True, "pulled": True},
    "pulled_resumed": {"sharded": True, "pulled": True, "go_on": "single/checkpoint-3"},
    "pulled_nf4": {"sharded": True, "pulled": True, "quantization": "nf4"},
    "pulled_dequantized": {"sharded": True, "pulled": True, "quantization": "nf4", "dequantize": True},
    "pulled_recompute": {"sharded": True, "pulled": True, "recompute": True},
    "pulled_compiled": {"sharded": True, "pulled": True, "compiled": True},
}


class Probe(TrainerCallback):
    """Notes losses and evaluations; may stop this process at a step."""

    def __init__(self, stop_at: int) -> None:
        self.stop_at, self.losses, self.evaluations, self.drawn = stop_at, [], [], 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """Draw a number as dropout would."""
        self.drawn = torch.rand(1).item()

    def on_step_end(self, args, state, control, **kwargs):
        """Send SIGTERM to the second process alone."""
        if state.global_step == self.stop_at and ranks.index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_log(self, args, state, control, *, logs, **kwargs):
        """Keep the numbers."""
        self.losses += [logs["loss"]] if "loss" in logs else []
        self.evaluations += [logs["eval_loss"]] if "eval_loss" in logs else []


def rows(count: int) -> datasets.Dataset:
    """Tokenized rows of many lengths."""
    found = []
    for i in range(count):
        prompt, answer = [5 + i, *range(20, 24 + i % 5)], [100 + i, *range(200, 200 + i * 5 % 24), 2]
        found.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return datasets.Dataset.from_list(found)


def train(
    base: Path,
    folder: Path,
    *,
    sharded=False,
    pulled=False,
    quantization="none",
    dequantize=False,
    corrected=False,
    go_on="",
    stop_at=0,
    recompute=False,
    dropout=0.0,
    room=0,
    batch_size=4,
    steps=STEPS,
    compiled=False,
    recorded=False,
) -> dict[str, object]:
    """Train the tiny base, with checkpoints in a folder; what can be compared comes back."""
    torch.manual_seed(0)
    lora = adapter.lora_config(r=4, alpha=8, dropout=dropout, target_modules="all-linear")
    model = sql_model.load_base(str(base), quantization)
    model = adapter.attach(model.dequantize() if dequantize else model, lora)
    if corrected:
        correction.add(model, sql_model.load_base(str(base), "none"), rows(ROWS))
    tokenizer = sql_model.load_base_tokenizer(str(base))
    os.environ["ACCELERATE_USE_FSDP"] = str(sharded)  # as accelerate says it
    gradients.Gradients.add = with_room(room)
    trainer.Gradients, trainer.SHAPE_TOKENS = (Recorded, 4) if recorded else (gradients.Gradients, 128)
    library.speed_up(model, compiled=compiled)
    if sharded:
        sharding.gathers_fast = lambda: pulled
        sharding.shard(model)
    settings = library.arguments(
        folder,
        steps=steps,
        batch_size=batch_size,
        recompute=recompute,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
        logging_steps=1,
        seed=7,
        disable_tqdm=True,
    )
    described = DatasetManifest(*[""] * len(DatasetManifest.__dataclass_fields__))

    def save(step, write_state):
        def fill(work):
            write_state(work)
            adapter.save(model, tokenizer, AdapterManifest("none", step, steps, vars(described)), work)

        if ranks.is_first():
            run_folder.write_folder(folder / f"checkpoint-{step}", fill)

    resume_from = folder.parent / go_on if go_on else None
    probe, checkpoints = Probe(stop_at), Checkpoints(save, save_steps=1, resume_from=resume_from)
    with checkpoints.listening():
        mean = library.train(
            model,
            datasets.DatasetDict({"train": rows(ROWS), "validation": rows(5)}),
            settings=settings,
            plan=memory_plan.Plan(tokens=48, recompute=recompute, dequantize=False, reason=""),
            replay=recorded,
            callbacks=[probe],
            checkpoints=checkpoints,
        )
    save_file(
        {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad},
        folder / f"adapter-{ranks.index()}.safetensors",
    )
    return {
        "losses": probe.losses,
        "evaluations": probe.evaluations,
        "mean": mean,
        "stopped_by": checkpoints.stopped_by,
        "divided": share_divided(model),
        "places": places(model),
        "drawn": probe.drawn,
        "computed": Recorded.computed,
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
    }


def with_room(tokens: int) -> Callable[..., torch.Tensor]:
    """`Gradients.add`; in the second process memory runs out with more tokens than these."""

    def add(self, pack, scale):
        if tokens and ranks.index() == 1 and pack.input_ids.shape[1] > tokens:
            raise torch.cuda.OutOfMemoryError
        return ADD(self, pack, scale)

    return add


def share_divided(model: torch.nn.Module) -> float:
    """Share of the base's numbers that this process holds."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in frozen)
    return held / sum(p.numel() for p in frozen)


def places(model: torch.nn.Module) -> int:
    """In how many blocks of memory the frozen matrices of the decoder's layers are."""
    layers = adapter.decoder_layers(model)
    frozen = [one for one in layers.parameters() if not one.requires_grad and one.dim() > 1]
    return len({one.untyped_storage().data_ptr() for one in frozen if not isinstance(one, DTensor)})


@contextmanager
def started(module: str, *words: str) -> Iterator[list[subprocess.Popen]]:
    """Two processes of a module, as a launcher starts them; those that still run at the end are killed."""
    pair = start(module, *words)
    try:
        yield pair
    finally:
        for process in pair:
            process.kill()
            process.wait()


def start(module: str, *words: str) -> list[subprocess.Popen]:
    """Two processes of a module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=PROJECT,
            env=os.environ | common | {"RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]


def main(base: Path, scratch: Path) -> None:
    """Run every scenario and write what came of it."""
    torch.set_num_threads(1)
    transformers.trainer.distributed_broadcast_scalars = None  # it would wait for the GPU at each point
    with collectives.joined():
        for name, changed in SCENARIOS.items():
            folder = scratch / name
            folder.mkdir(exist_ok=True)
            found = train(base, folder, **changed)
            (folder / f"{ranks.index()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
