"""Fine-tune the quantized base with LoRA on a prepared dataset."""

import tempfile
from pathlib import Path

import datasets
import mlflow
import transformers
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

from steps.text2sql import adapter, base_model, figures, manifest, memory_plan, tracking, training
from steps.text2sql.device import describe_device, operations_per_second
from steps.text2sql.errors import UserError
from steps.text2sql.manifest import AdapterManifest, DatasetManifest
from steps.text2sql.params import TrainParams
from steps.text2sql.sql_model import (
    BaseModelError,
    load_base,
    load_base_tokenizer,
    pick_device,
    quantization_config,
)
from steps.text2sql.tokenization import fingerprint


def main(params: TrainParams) -> None:
    """Train, and log the adapter with all that repeats it."""
    with tracking.downloaded(params.dataset_uri, parameter="dataset_uri", needs=manifest.FILE) as folder:
        described = manifest.read(DatasetManifest, folder, source=f"dataset_uri={params.dataset_uri}")
        data = datasets.load_from_disk(folder, keep_in_memory=True)
    base_model.check_memory(described.base_model, params.quantization)
    tokenizer = load_tokenizer(described, params.dataset_uri)
    transformers.set_seed(params.seed)
    model, plan = load_model(params, described, data)
    settings = trainer_settings(params, model, plan, rows=len(data["train"]))
    tracking.log_settings("trainer", settings.to_dict())
    speed = speed_settings(params, model, data, settings)

    saver = AdapterSaver(model, tokenizer, params, described, settings.max_steps)
    checkpoints = training.Checkpoints(saver.save_checkpoint, save_steps=params.save_steps)
    reporter = training.Reporter(mlflow.log_metrics, batch_size=params.batch_size, **speed)
    with checkpoints.listening():
        mean_loss = training.train(
            model,
            data,
            settings=settings,
            plan=plan,
            replay=pick_device()[0] == "cuda" and not params.lora_dropout,
            callbacks=[reporter, checkpoints],
        )
    mlflow.log_figure(figures.loss_curve(reporter.train_loss, reporter.eval_loss), "loss_curve.png")
    if checkpoints.stopped_by:
        raise tracking.Interrupted(checkpoints.stopped_by)
    mlflow.log_metric("train_loss_mean", mean_loss)
    saver.save(tracking.ADAPTER, settings.max_steps)


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
    lora = adapter.lora_config(
        r=params.lora_r,
        alpha=params.lora_alpha,
        dropout=params.lora_dropout,
        target_modules=params.target_modules,
    )
    plan = plan_memory(params, base, data, adapter.size(base, lora))
    model = adapter.attach(base.dequantize() if plan.dequantize else base, lora)
    quantization = quantization_config(params.quantization, pick_device()[1])
    tracking.log_settings("lora", model.peft_config["default"].to_dict())
    tracking.log_settings("quantization", quantization.to_dict() if quantization else {"load_in_4bit": False})
    count = adapter.count_parameters(model)
    tracking.log_choices(
        device=describe_device(),
        base_model=f"{described.base_model}, quantization {params.quantization}",
        trainable=f"{count.trainable:,} of {count.all:,} parameters ({count.share:.2%})",
    )
    mlflow.log_metrics(
        {"trainable_parameters": count.trainable, "all_parameters": count.all, "trainable_share": count.share}
    )
    return model, plan


def plan_memory(
    params: TrainParams, base: PreTrainedModel, data: datasets.DatasetDict, trainable: int
) -> memory_plan.Plan:
    """How to use the memory that is free with the base loaded; says so."""
    device, dtype = pick_device()
    step_tokens = training.mean_tokens(data["train"]) * params.batch_size
    plan = memory_plan.make(
        memory_plan.Shape.of(base.config, dtype),
        device=device,
        free=memory_plan.free_bytes(device),
        trainable=trainable,
        four_bit=memory_plan.four_bit_parameters(base),
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
    count = adapter.count_parameters(model)
    speed = {
        "frozen_parameters": count.all - count.trainable,
        "operations_per_second": operations_per_second(),
    }
    tokens = training.mean_tokens(data["train"]) * params.batch_size * settings.max_steps
    pays = pick_device()[0] == "cuda" and training.compiling_pays(tokens=tokens, **speed)
    chosen = {"auto": "yes" if pays else "no"}.get(params.torch_compile, params.torch_compile)
    if chosen == "yes":
        training.compile_layers(model)
    tracking.log_choices(torch_compile=chosen)
    return speed


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


class AdapterSaver:
    """Logs the adapter as it is now as an artifact folder that register accepts."""

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerFast,
        params: TrainParams,
        described: DatasetManifest,
        max_steps: int,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.params, self.described, self.max_steps = params, described, max_steps

    def save_checkpoint(self, step: int) -> None:
        """Log `checkpoints/checkpoint-<step>`."""
        path = f"{tracking.CHECKPOINTS}/checkpoint-{step}"
        self.save(path, step)
        print(f"\nCheckpoint: {tracking.artifact_uri(path)}", flush=True)

    def save(self, path: str, step: int) -> None:
        """Log the adapter after `step` optimizer steps under `path`."""
        described = AdapterManifest(self.params.quantization, step, self.max_steps, vars(self.described))
        with tracking.logged_folder(path) as folder:
            adapter.save(self.model, self.tokenizer, described, folder)


if __name__ == "__main__":
    tracking.run_step(TrainParams, main, user_errors=(BaseModelError,))
