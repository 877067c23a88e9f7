"""Fine-tune the quantized base with LoRA on a prepared dataset."""

import shutil
import tempfile
from pathlib import Path

import datasets
import mlflow
import transformers
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

from steps.text2sql import (
    adapter,
    base_model,
    figures,
    manifest,
    memory_plan,
    resume,
    screen,
    tracking,
    training,
)
from steps.text2sql.checkpoints import Checkpoints
from steps.text2sql.device import describe_device, operations_per_second
from steps.text2sql.errors import UserError
from steps.text2sql.manifest import AdapterManifest, DatasetManifest
from steps.text2sql.outputs import Outputs
from steps.text2sql.params import TrainParams
from steps.text2sql.run_folder import run_folder
from steps.text2sql.sql_model import (
    BaseModelError,
    load_base,
    load_base_tokenizer,
    pick_device,
    quantization_config,
)
from steps.text2sql.tokenization import fingerprint

# Where a training comes from and how often it reports does not change what it learns.
NO_RECIPE = {"dataset_uri", "resume_from", "keep_checkpoints", "save_steps", "logging_steps", "dry_run"}


def main(params: TrainParams) -> None:
    """Train, and log the adapter with all that repeats it."""
    with tracking.downloaded(params.dataset_uri, parameter="dataset_uri", needs=manifest.FILE) as folder:
        described = manifest.read(DatasetManifest, folder, source=f"dataset_uri={params.dataset_uri}")
        data = datasets.load_from_disk(folder, keep_in_memory=True)
    tracking.tag_data(base_model=described.base_model, dataset=described.dataset)
    base_model.check_memory(described.base_model, params.quantization)
    if params.dry_run == "yes":
        dry_run(params, described, data)
        return
    tokenizer = load_tokenizer(described, params.dataset_uri)
    transformers.set_seed(params.seed)
    model, plan = load_model(params, described, data)
    settings = trainer_settings(params, model, plan, rows=len(data["train"]))
    tracking.log_settings("trainer", settings.to_dict())
    speed = speed_settings(params, model, data, settings)

    with Outputs(
        model,
        tokenizer,
        lambda step: AdapterManifest(params.quantization, step, settings.max_steps, vars(described)),
        recipe=recipe(params, settings, described),
        keep=params.keep_checkpoints,
    ) as outputs:
        fit(params, settings, outputs, data, plan, speed)
    if params.resume_from:  # what it left on this machine is not needed any more
        shutil.rmtree(run_folder(params.resume_from), ignore_errors=True)


def fit(
    params: TrainParams,
    settings: TrainingArguments,
    outputs: Outputs,
    data: datasets.DatasetDict,
    plan: memory_plan.Plan,
    speed: dict[str, float],
) -> None:
    """Train from the start or from a checkpoint, and keep adapter and curves.

    Raises:
        tracking.Interrupted: a signal came; there is a checkpoint of the last step.
    """
    reporter = training.Reporter(outputs.log_metrics, batch_size=params.batch_size, **speed)
    with resume.checkpoint(params.resume_from, outputs.recipe) as resume_from:
        checkpoints = Checkpoints(
            outputs.save_checkpoint, save_steps=params.save_steps, resume_from=resume_from
        )
        with checkpoints.listening():
            mean_loss = training.train(
                outputs.model,
                data,
                settings=settings,
                plan=plan,
                replay=pick_device()[0] == "cuda" and not params.lora_dropout,
                callbacks=[reporter],
                checkpoints=checkpoints,
            )
    if checkpoints.stopped_by:
        go_on = {name: str(value) for name, value in vars(params).items()} | {"resume_from": outputs.run_id}
        raise tracking.Interrupted(checkpoints.stopped_by, screen.to_go_on("train", go_on))
    outputs.keep_adapter(settings.max_steps)
    mlflow.log_figure(figures.loss_curve(reporter.train_loss, reporter.eval_loss), "loss_curve.png")
    mlflow.log_metric("train_loss_mean", mean_loss)


def dry_run(params: TrainParams, described: DatasetManifest, data: datasets.DatasetDict) -> None:
    """Say what a training would choose and take, from shapes alone: no weights are fetched or loaded."""
    mlflow.set_tag(tracking.TAG_DRY_RUN, "yes")
    base, (device, dtype) = base_model.skeleton(described.base_model), pick_device()
    held = base_model.held(base, params.quantization, dtype)
    lora = lora_settings(params)
    free = memory_plan.free_bytes(device) - held.bytes
    trainable = adapter.size(base, lora)
    plan = plan_memory(params, base, data, trainable, free=free, four_bit=held.four_bit)
    model = adapter.attach(base, lora)
    log_base(described, params, model)
    settings = trainer_settings(params, model, plan, rows=len(data["train"]))
    speed = speed_of_device(model)
    step_tokens = training.mean_tokens(data["train"]) * params.batch_size
    tracking.log_choices(
        torch_compile=choose_compile(params, tokens=step_tokens * settings.max_steps, **speed),
        **screen.estimates(
            rows=len(data["train"]),
            rows_to_train_on=settings.max_steps * params.batch_size,
            peak_bytes=memory_plan.peak_bytes(
                plan,
                memory_plan.Shape.of(base.config, dtype),
                device=device,
                weights=held.bytes,
                four_bit=held.four_bit,
                trainable=trainable,
                step_tokens=step_tokens,
            ),
            download_bytes=base_model.to_download(described.base_model),
            seconds=training.training_seconds(
                tokens=step_tokens * settings.max_steps,
                device=device,
                recompute=plan.recompute,
                **speed,
            ),
        ),
    )


def load_tokenizer(described: DatasetManifest, dataset_uri: str) -> PreTrainedTokenizerFast:
    """Tokenizer of the base, which must be the one that the dataset was made with."""
    tokenizer = load_base_tokenizer(described.base_model)
    if fingerprint(tokenizer) != described.tokenizer_fingerprint:
        raise UserError(
            f"dataset_uri={dataset_uri}: was tokenized with another tokenizer than base model "
            f"{described.base_model} has now; run prepare_data again."
        )
    return tokenizer


def load_model(
    params: TrainParams, described: DatasetManifest, data: datasets.DatasetDict
) -> tuple[PeftModel, memory_plan.Plan]:
    """Quantized base with a new adapter, and the plan for its memory; settings and numbers are logged."""
    base = load_base(described.base_model, params.quantization)
    lora = lora_settings(params)
    plan = plan_memory(
        params,
        base,
        data,
        adapter.size(base, lora),
        free=memory_plan.free_bytes(pick_device()[0]),
        four_bit=memory_plan.four_bit_parameters(base),
    )
    model = adapter.attach(base.dequantize() if plan.dequantize else base, lora)
    quantization = quantization_config(params.quantization, pick_device()[1])
    tracking.log_settings("lora", model.peft_config["default"].to_dict())
    tracking.log_settings("quantization", quantization.to_dict() if quantization else {"load_in_4bit": False})
    log_base(described, params, model)
    return model, plan


def lora_settings(params: TrainParams) -> LoraConfig:
    """The adapter to train."""
    return adapter.lora_config(
        r=params.lora_r,
        alpha=params.lora_alpha,
        dropout=params.lora_dropout,
        target_modules=params.target_modules,
    )


def log_base(described: DatasetManifest, params: TrainParams, model: PeftModel) -> None:
    """Say what is trained on what."""
    count = adapter.count_parameters(model)
    tracking.log_choices(
        device=describe_device(),
        base_model=f"{described.base_model}, quantization {params.quantization}",
        trainable=f"{count.trainable:,} of {count.all:,} parameters ({count.share:.2%})",
    )
    mlflow.log_metrics(
        {"trainable_parameters": count.trainable, "all_parameters": count.all, "trainable_share": count.share}
    )


def plan_memory(
    params: TrainParams,
    base: PreTrainedModel,
    data: datasets.DatasetDict,
    trainable: int,
    *,
    free: int,
    four_bit: int,
) -> memory_plan.Plan:
    """How to use the `free` bytes that there are with the base loaded; says so."""
    device, dtype = pick_device()
    step_tokens = training.mean_tokens(data["train"]) * params.batch_size
    plan = memory_plan.make(
        memory_plan.Shape.of(base.config, dtype),
        device=device,
        free=free,
        trainable=trainable,
        four_bit=four_bit,
        longest=training.longest_row(data),
        step_tokens=int(step_tokens),
        gradient_checkpointing=params.gradient_checkpointing,
        micro_batch_tokens=params.micro_batch_tokens,
    )
    tracking.log_choices(memory=memory_plan.describe(plan, step_tokens=step_tokens, device=device))
    return plan


def speed_settings(
    params: TrainParams, model: PeftModel, data: datasets.DatasetDict, settings: TrainingArguments
) -> dict[str, float]:
    """Compile the layers where that pays; what Reporter measures speed by comes back."""
    speed = speed_of_device(model)
    tokens = training.mean_tokens(data["train"]) * params.batch_size * settings.max_steps
    chosen = choose_compile(params, tokens=tokens, **speed)
    if chosen == "yes":
        training.compile_layers(model)
    tracking.log_choices(torch_compile=chosen)
    return speed


def speed_of_device(model: PeftModel) -> dict[str, float]:
    """What times are estimated and measured by."""
    count = adapter.count_parameters(model)
    return {
        "frozen_parameters": count.all - count.trainable,
        "operations_per_second": operations_per_second(),
    }


def choose_compile(params: TrainParams, *, tokens: float, **speed: float) -> str:
    """`yes` or `no`, by whether so many tokens take long enough."""
    pays = pick_device()[0] == "cuda" and training.compiling_pays(tokens=tokens, **speed)
    return {"auto": "yes" if pays else "no"}.get(params.torch_compile, params.torch_compile)


def trainer_settings(
    params: TrainParams, model: PeftModel, plan: memory_plan.Plan, *, rows: int
) -> TrainingArguments:
    """Every setting of the Trainer, with `auto` resolved by the device and the size of the base."""
    device, _ = pick_device()
    count = adapter.count_parameters(model)
    frozen = count.all - count.trainable
    steps = training.total_steps(
        rows=rows,
        batch_size=params.batch_size,
        max_steps=params.max_steps,
        num_train_epochs=params.num_train_epochs,
    )
    auto = {
        "learning_rate": training.learning_rate(frozen),
        "warmup_steps": steps // 20,
        "optim": training.optimizer(device),
    }
    chosen = {
        name: found if getattr(params, name) == "auto" else getattr(params, name)
        for name, found in auto.items()
    }
    tracking.log_choices(**{name: str(value) for name, value in chosen.items()}, steps=str(steps))
    return training.arguments(
        Path(tempfile.gettempdir()),
        steps=steps,
        batch_size=params.batch_size,
        recompute=plan.recompute,
        has_dropout=params.lora_dropout > 0,
        **chosen,
        lr_scheduler_type=params.lr_scheduler_type,
        weight_decay=params.weight_decay,
        logging_steps=params.logging_steps,
        seed=params.seed,
    )


def recipe(params: TrainParams, settings: TrainingArguments, described: DatasetManifest) -> dict[str, str]:
    """All that decides what a training learns, `auto` resolved: only with the same one it goes on."""
    resolved = ("max_steps", "learning_rate", "warmup_steps", "optim")
    found = {name: value for name, value in vars(params).items() if name not in NO_RECIPE}
    found |= {name: getattr(settings, name) for name in resolved} | vars(described)
    return {name: str(value) for name, value in found.items()}


if __name__ == "__main__":
    tracking.run_step(TrainParams, main, user_errors=(BaseModelError,))
