"""Training: settings, the Trainer, and what it reports while it runs."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from transformers import TrainerCallback, TrainingArguments

from steps.text2sql import adapter, collectives, fused_layers, packed_attention, validations
from steps.text2sql.checkpoints import Checkpoints, spread_random_state
from steps.text2sql.device import Moment, peak_memory_gib
from steps.text2sql.errors import UserError
from steps.text2sql.memory_plan import Plan
from steps.text2sql.sql_model import pick_device
from steps.text2sql.tokenization import lengths
from steps.text2sql.trainer import PackedTrainer
from steps.text2sql.training_speed import Speed, operations_per_token, rows_seen

Log = Callable[[dict[str, float], int], None]


def learning_rate(parameters: int, steps: int, *, rank_stabilized: bool = False) -> float:
    """Peak learning rate for a base of so many parameters and so many steps, at most 2e-3.

    A power law in both. Of the size, at 500 steps: through 2e-4 at 7e9, which the QLoRA paper (arXiv
    2305.14314, table 9) and later recipes use, and 1.5e-3 at 1.35e8. Of the steps: through 2e-3 at 60 and
    1.5e-3 at 500, both for 1.35e8; that longer trainings want a smaller rate is known of pretraining (arXiv
    2409.19913). The rates at 1.35e8 were measured (SmolLM2-135M, 8 rows a step, benchmarks/recipe.py); that
    other sizes want the same exponent of the steps is a guess. So is the size in the rate of
    `rank_stabilized` adapters, which goes through 5e-4 at 1.35e8, measured at 60 and at 500 steps alike.
    """
    by_size = math.log(1.5e-3 / 2e-4) / math.log(7e9 / 1.35e8)
    if rank_stabilized:
        return min(2e-3, 5e-4 * (1.35e8 / parameters) ** by_size)
    by_steps = math.log(2e-3 / 1.5e-3) / math.log(500 / 60)
    return min(2e-3, 2e-4 * (7e9 / parameters) ** by_size * (500 / steps) ** by_steps)


def optimizer(device: str) -> str:
    """`auto`: AdamW in fp32, fused into few launches on CUDA. Its states are small with LoRA: 8 bytes a
    trainable parameter."""
    return "adamw_torch_fused" if device == "cuda" else "adamw_torch"


def resolve_auto(
    given: Mapping[str, Any], *, frozen_parameters: int, steps: int, device: str
) -> dict[str, Any]:
    """Learning rate, warm-up and optimizer; where `auto` is given, by size of the base, steps and device."""
    auto = {
        "learning_rate": learning_rate(
            frozen_parameters, steps, rank_stabilized=given["use_rslora"] == "yes"
        ),
        "warmup_steps": steps // 20,
        "optim": optimizer(device),
    }
    return {name: found if given[name] == "auto" else given[name] for name, found in auto.items()}


def total_steps(*, rows: int, batch_size: int, max_steps: int, num_train_epochs: float) -> int:
    """Optimizer steps of the whole run."""
    per_epoch = math.ceil(rows / batch_size)
    # Rounded: 100 times 1.1 is a little over 110.
    return max_steps if max_steps > 0 else max(1, math.ceil(round(per_epoch * num_train_epochs, 6)))


def arguments(
    output: Path, *, steps: int, batch_size: int, recompute: bool, has_dropout: bool = False, **named: Any
) -> TrainingArguments:
    """Trainer's settings for `steps` optimizer steps of `batch_size` rows; `named` go to it as they are."""
    device, dtype = pick_device()
    precision = {"float32": {}, "bfloat16": {"bf16": True}, "float16": {"fp16": True}}
    settings = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,  # of all devices: see PackedTrainer
        gradient_checkpointing=recompute,
        # Random states cannot be read while a CUDA graph is recorded, and count with dropout only.
        gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": has_dropout},
        use_cpu=device == "cpu",
        **precision[str(dtype).removeprefix("torch.")],
        eval_strategy="steps",
        eval_steps=validations.interval(steps),
        logging_first_step=True,
        save_strategy="no",  # its checkpoints hold pickles; see checkpoints.py
        report_to=[],  # its MLflow callback drops parameters; see Reporter
        logging_nan_inf_filter=False,  # would wait for the GPU after every step
        **named,
    )
    if settings.n_gpu > 1:
        settings._n_gpu = 1  # Trainer would spread one process over all GPUs by torch.nn.DataParallel
    return settings


class Reporter(TrainerCallback):
    """Hands the Trainer's numbers on under this project's names, with speed and memory.

    `log` takes (metrics, step). Speeds are means over the steps since the last report: `tokens_per_second`
    counts prompt and answer, without padding; `mfu` is the model FLOPs utilization (Chowdhery et al., arXiv
    2204.02311, appendix B): tokens per second times `operations_per_token`, over what the device reaches in
    a large matrix product. `seconds_left` goes on at the speed so far. A loss that is no number ends the
    training.
    """

    def __init__(self, log: Log, *, rows: int, batch_size: int, speed: Speed) -> None:
        self.log = log
        self.rows_seen = partial(rows_seen, rows=rows, batch_size=batch_size)
        self.token_share = operations_per_token(speed.frozen_parameters) / speed.operations_per_second
        self.train_loss: list[tuple[int, float]] = []
        self.eval_loss: list[tuple[int, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; the curves of a training that goes on begin with what it had reported before."""
        self._restart(state, Moment())
        for entry in state.log_history:
            self._report(entry, entry["step"], {})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when, since the step may be reported amid the next."""
        self.step_ended = Moment()

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        """Report a point of the loss curve, or a validation loss."""
        self._report(logs, state.global_step, self._speed(state) if "loss" in logs else {})
        check_loss(logs.get("loss", 0.0), state.global_step)

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
        self._restart(state, Moment())

    def _restart(self, state: Any, moment: Moment) -> None:
        self.since, self.step, self.tokens = moment, state.global_step, int(state.num_input_tokens_seen)

    def _speed(self, state: Any) -> dict[str, float]:
        seconds = self.step_ended.seconds_since(self.since)
        steps, tokens = state.global_step - self.step, int(state.num_input_tokens_seen) - self.tokens
        rows = self.rows_seen(state.global_step) - self.rows_seen(self.step)
        self._restart(state, self.step_ended)
        return {
            "samples_per_second": rows / seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": tokens / seconds * self.token_share,
            "peak_memory_gib": peak_memory_gib(),
            "seconds_left": (state.max_steps - state.global_step) * seconds / steps if steps else 0.0,
        }


def check_loss(loss: float, step: int) -> None:
    """End a training whose loss is no number any more.

    Raises:
        UserError: it is none.
    """
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} by step {step}: the training diverged, and its adapter would be of no use; "
            "give a lower learning_rate or lora_alpha."
        )


def validation_rows(
    data: datasets.DatasetDict, settings: TrainingArguments, given: int | Literal["auto"]
) -> datasets.Dataset | None:
    """Rows of a validation in this training, or None if there are none."""
    count = given
    if given == "auto":
        count = validations.rows(steps=settings.max_steps, batch_size=settings.train_batch_size)
    rows = data["validation"].select_columns(["input_ids", "labels"])
    return rows.select(range(min(count, len(rows)))) if len(rows) else None


def compile_layers(model: PeftModel) -> None:
    """Compile the decoder's layers: one compilation serves them all, for every number of tokens.

    The input of the first layer, too, is made to need a gradient: else that layer is compiled apart.
    """
    model.enable_input_require_grads()
    # A float such as LoRA's scale would be an input, a number on the CPU: the first kernel for one costs most
    # of a minute, in which its C++ compiler is tried out.
    torch._dynamo.config.specialize_float = True
    for layer in adapter.decoder_layers(model):
        layer.compile(dynamic=True)


def speed_up(model: PeftModel, *, compiled: bool) -> None:
    """Compile the decoder's layers, or take fewer launches without."""
    (compile_layers if compiled else fused_layers.fuse)(model)


def train(
    model: PeftModel,
    data: datasets.DatasetDict,
    *,
    settings: TrainingArguments,
    plan: Plan,
    replay: bool,
    callbacks: list[TrainerCallback],
    checkpoints: Checkpoints,
    optimizer: torch.optim.Optimizer | None = None,
    evaluated: int | Literal["auto"] = "auto",
) -> float:
    """Train the adapter on `data["train"]`; the mean loss of an answer token comes back.

    `replay` records CUDA graphs: see `Gradients`. Without an `optimizer` it is the one of the settings.
    `evaluated` are the rows of a validation: see `validations.rows`.
    """
    rows = data["train"].select_columns(["input_ids", "labels"])
    validation = validation_rows(data, settings, evaluated)
    if validation is None:
        settings.eval_strategy = "no"
    model.config.use_cache = False
    model.set_attn_implementation(packed_attention.NAME)
    trainer = PackedTrainer(
        model=model,
        checkpoints=checkpoints,
        args=settings,
        train_dataset=rows,
        eval_dataset=validation,
        callbacks=callbacks,
        optimizers=(optimizer, None),
        plan=plan,
        longest=longest_row(data),
        replay=replay,
    )
    collectives.copy_from_first(one.data for one in adapter.own(model))
    spread_random_state(0)
    # Under autocast peft would cast every input to fp32, and autocast back.
    with disable_input_dtype_casting(model, active=settings.bf16 or settings.fp16):
        loss = trainer.train(resume_from_checkpoint=checkpoints.resume_from).training_loss
    check_loss(loss, trainer.state.global_step)
    # NCCL waits for ever when it is closed while a recording holds launches of it.
    trainer.gradients.forget_graphs()
    return loss


def mean_tokens(rows: datasets.Dataset) -> float:
    """Tokens of a row, in the mean."""
    return float(lengths(rows).mean())


def longest_row(data: datasets.DatasetDict) -> int:
    """Tokens of the longest row to train or validate on."""
    return max(int(lengths(rows).max()) for rows in (data["train"], data["validation"]) if len(rows))
