"""Training: settings, the Trainer, and what it reports while it runs."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
from peft import PeftModel
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)

from steps.text2sql.checkpoints import Checkpoints, ResumableTrainer
from steps.text2sql.device import peak_memory_gib
from steps.text2sql.sql_model import pick_device

EVALUATIONS = 3
EVALUATION_ROWS = 64
# Rows that a 24 GB GPU holds at once with a 7B base in 4 bits; more are accumulated.
MICRO_BATCH_ROWS = 8
# Over this a 7B base in nf4 needs no recomputation at 8 rows: 16.4 GiB were measured at 130 tokens a row.
ROOMY_GPU_BYTES = 40 * 2**30
SMALL_BASE_PARAMETERS = 1_000_000_000
Log = Callable[[dict[str, float], int], None]


def learning_rate(parameters: int) -> float:
    """Peak learning rate for a base of so many parameters.

    A power law through two points: 2e-4 at 7e9, which the QLoRA paper (arXiv 2305.14314, table 9) and later
    recipes use for 7B, and 1e-3 at 1.35e8, measured with SmolLM2-135M on this task. Not above 1e-3.
    """
    exponent = math.log(1e-3 / 2e-4) / math.log(7e9 / 1.35e8)
    return min(1e-3, 2e-4 * (7e9 / parameters) ** exponent)


def optimizer(device: str) -> str:
    """`auto`: AdamW with paged 8-bit states on CUDA, whose states leave the GPU when it is full."""
    return "paged_adamw_8bit" if device == "cuda" else "adamw_torch"


def recompute_activations(device: str, parameters: int, memory_bytes: int) -> bool:
    """`auto` of gradient_checkpointing: a 1B or larger base on a GPU that is not roomy."""
    return device == "cuda" and parameters >= SMALL_BASE_PARAMETERS and memory_bytes < ROOMY_GPU_BYTES


def total_steps(*, rows: int, batch_size: int, max_steps: int, num_train_epochs: float) -> int:
    """Optimizer steps of the whole run."""
    return max_steps if max_steps > 0 else math.ceil(math.ceil(rows / batch_size) * num_train_epochs)


def evaluation_rows(*, steps: int, batch_size: int) -> int:
    """Rows of a validation: 64, or in short trainings so few that validating costs less than training."""
    return min(EVALUATION_ROWS, max(8, steps * batch_size // 8))


def batch_shape(batch_size: int) -> dict[str, int]:
    """Rows a micro-batch, and micro-batches a step, whose product is `batch_size`."""
    rows = max(n for n in range(1, min(batch_size, MICRO_BATCH_ROWS) + 1) if batch_size % n == 0)
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": batch_size // rows}


def arguments(
    output: Path, *, steps: int, batch_size: int, recompute: bool, **named: Any
) -> TrainingArguments:
    """Trainer's settings for `steps` optimizer steps of `batch_size` rows; `named` go to it as they are."""
    device, dtype = pick_device()
    precision = {"float32": {}, "bfloat16": {"bf16": True}, "float16": {"fp16": True}}
    return TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        **batch_shape(batch_size),
        per_device_eval_batch_size=MICRO_BATCH_ROWS,
        gradient_checkpointing=recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=device == "cpu",
        **precision[str(dtype).removeprefix("torch.")],
        eval_strategy="steps",
        eval_steps=math.ceil(steps / EVALUATIONS),
        logging_first_step=True,
        save_strategy="no",  # its checkpoints hold pickles; see checkpoints.py
        report_to=[],  # its MLflow callback drops parameters; see Reporter
        include_num_input_tokens_seen="non_padding",
        dataloader_pin_memory=device == "cuda",
        **named,
    )


class Reporter(TrainerCallback):
    """Hands the Trainer's numbers on under this project's names, with speed and memory.

    `log` takes (metrics, step). Speeds are means over the steps since the last report: `tokens_per_second`
    counts prompt and answer, without padding.
    """

    def __init__(self, log: Log, *, batch_size: int) -> None:
        self.log = log
        self.batch_size = batch_size
        self.train_loss: list[tuple[int, float]] = []
        self.eval_loss: list[tuple[int, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; the curves of a training that goes on begin with what it had reported before."""
        self._restart(state)
        for entry in state.log_history:
            self._report(entry, entry["step"], {})

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        """Report a point of the loss curve, or a validation loss."""
        self._report(logs, state.global_step, self._speed(state) if "loss" in logs else {})

    def _report(self, logs: dict[str, float], step: int, speed: Mapping[str, float]) -> None:
        if "loss" in logs:
            self.train_loss.append((step, logs["loss"]))
            metrics = {"train_loss": logs["loss"]} | {
                k: logs[k] for k in ("learning_rate", "grad_norm") if k in logs
            }
            self.log(metrics | speed, step)
        if "eval_loss" in logs:
            self.eval_loss.append((step, logs["eval_loss"]))
            self.log({"eval_loss": logs["eval_loss"]}, step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restart the clock, so that speeds are those of training."""
        self._restart(state)

    def _restart(self, state: Any) -> None:
        self.time, self.step, self.tokens = (
            time.monotonic(),
            state.global_step,
            int(state.num_input_tokens_seen),
        )

    def _speed(self, state: Any) -> dict[str, float]:
        seconds = time.monotonic() - self.time
        steps, tokens = state.global_step - self.step, int(state.num_input_tokens_seen) - self.tokens
        self._restart(state)
        return {
            "samples_per_second": steps * self.batch_size / seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gib": peak_memory_gib(),
        }


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    data: datasets.DatasetDict,
    *,
    settings: TrainingArguments,
    callbacks: list[TrainerCallback],
    checkpoints: Checkpoints,
) -> float:
    """Train the adapter on `data["train"]`; the mean loss of an answer token comes back.

    The loss counts labels only, so answer and EOS; the collator pads a batch to its own longest row.
    """
    rows, validation = (
        data[name].select_columns(["input_ids", "labels"]) for name in ("train", "validation")
    )
    count = evaluation_rows(
        steps=settings.max_steps, batch_size=settings.train_batch_size * settings.gradient_accumulation_steps
    )
    validation = validation.select(range(min(count, len(validation))))
    if not len(validation):
        settings.eval_strategy = "no"
    model.config.use_cache = False
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
    trainer = ResumableTrainer(
        model=model,
        checkpoints=checkpoints,
        args=settings,
        train_dataset=rows,
        eval_dataset=validation if len(validation) else None,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding="longest"),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    return trainer.train(resume_from_checkpoint=checkpoints.resume_from).training_loss
