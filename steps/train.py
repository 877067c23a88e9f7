"""Fine-tune the quantized base with LoRA on a prepared dataset, in one process or in several."""

import tempfile
from pathlib import Path

import datasets
import transformers
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

from steps.text2sql import (
    active_run,
    adapter,
    base_model,
    collectives,
    correction,
    figures,
    gradients,
    launching,
    memory_plan,
    prepared_data,
    processes,
    ranks,
    resume,
    run_log,
    screen,
    sharding,
    shared_checkpoint,
    step_run,
    training,
    training_estimate,
    training_speed,
)
from steps.text2sql.adapter import ParameterCount
from steps.text2sql.checkpoints import Checkpoints
from steps.text2sql.device import describe_device
from steps.text2sql.errors import Interrupted, UserError
from steps.text2sql.manifest import AdapterManifest, DatasetManifest
from steps.text2sql.outputs import NoOutputs, Outputs
from steps.text2sql.params import TrainParams
from steps.text2sql.sql_model import (
    BaseModelError,
    load_base,
    pick_device,
    quantization_config,
)
from steps.text2sql.tokenization import lengths
from steps.text2sql.training_estimate import Work
from steps.text2sql.training_speed import Speed

# Settings that a training goes on with, `auto` resolved.
RESOLVED = ("max_steps", "learning_rate", "warmup_steps", "optim")


def main(params: TrainParams) -> None:
    """Train here, or start the processes that do."""
    if params.project_backend != "local":
        raise UserError(
            f"project_backend={params.project_backend}: is for main, which sends train there; train alone is "
            f"sent with: mlflow run . -e train --backend {params.project_backend} --backend-config <file>"
        )
    if params.dry_run == "yes":
        dry_run(params)
        return
    if launching.is_due(params.launch):
        launching.run("steps.train", vars(params), launch=params.launch)
        return
    with collectives.joined():
        train(params)


def train(params: TrainParams) -> None:
    """Train, and log the adapter with all that repeats it; so each of the processes that train together."""
    described, data = open_data(params)
    tokenizer = prepared_data.load_tokenizer(described, params.dataset_uri)
    transformers.set_seed(params.seed)
    model, plan, count = load_model(params, described, data)
    settings = trainer_settings(params, plan, rows=len(data["train"]), frozen_parameters=count.frozen)
    speed, work = training_speed.of_devices(count.frozen), work_of(params, data, steps=settings.max_steps)
    compile_layers(params, model, work, speed)
    if ranks.is_sharded():  # after compiling, the order that torchtitan has too
        sharding.shard(model)
    with open_outputs(params, settings, described, model, tokenizer) as outputs:
        fit(params, settings, outputs, data, plan, speed)
    if ranks.is_first():
        resume.forget(params.resume_from)


def open_outputs(
    params: TrainParams,
    settings: TrainingArguments,
    described: DatasetManifest,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
) -> Outputs | NoOutputs:
    """Where adapter, checkpoints and curves go."""
    resolved = {name: getattr(settings, name) for name in RESOLVED}
    resolved["quantization_correction"] = "yes" if correction.is_in(model) else "no"
    recipe = resume.recipe_of(vars(described), vars(params), resolved)
    if not ranks.is_first():
        return NoOutputs(model, recipe)
    return Outputs(
        model,
        tokenizer,
        lambda step: AdapterManifest(
            params.quantization, step, settings.max_steps, vars(described), correction.is_in(model)
        ),
        recipe=recipe,
        keep=params.keep_checkpoints,
    )


def fit(
    params: TrainParams,
    settings: TrainingArguments,
    outputs: Outputs | NoOutputs,
    data: datasets.DatasetDict,
    plan: memory_plan.Plan,
    speed: Speed,
) -> None:
    """Train from the start or from a checkpoint, and keep adapter and curves.

    Raises:
        Interrupted: a signal came; there is a checkpoint of the last step.
    """
    reporter = training.Reporter(
        outputs.log_metrics, rows=len(data["train"]), batch_size=params.batch_size, speed=speed
    )
    with shared_checkpoint.found(params.resume_from, outputs.recipe) as resume_from:
        checkpoints = Checkpoints(
            outputs.save_checkpoint, save_steps=params.save_steps, resume_from=resume_from
        )
        with checkpoints.listening():
            mean_loss = training.train(
                outputs.model,
                data,
                settings=settings,
                plan=plan,
                replay=can_record(params, outputs.model),
                callbacks=[reporter],
                checkpoints=checkpoints,
                evaluated=params.validation_rows,
            )
    if checkpoints.stopped_by:
        processes.ignore_terminations()  # a checkpoint is on its way to the store
        raise Interrupted(checkpoints.stopped_by, how_to_go_on(params))
    outputs.keep_adapter(settings.max_steps)
    run_log.log_figure(figures.loss_curve(reporter.train_loss, reporter.eval_loss), "loss_curve.png")
    run_log.log_metrics(train_loss_mean=mean_loss)


def can_record(params: TrainParams, model: PeftModel) -> bool:
    """Whether steps are recorded and replayed; with dropout each one is another."""
    return not params.lora_dropout and gradients.can_record(model.config)


def how_to_go_on(params: TrainParams) -> str:
    """What to type after this training was stopped; only the first of several processes says it."""
    if not ranks.is_first():
        return ""
    values = {name: str(value) for name, value in vars(params).items()}
    if resume.can_go_on(active_run.run_id()):
        values["resume_from"] = active_run.run_id()
    return screen.to_go_on("train", values)


def open_data(params: TrainParams) -> tuple[DatasetManifest, datasets.DatasetDict]:
    """What prepare_data made, for a base that this machine can train; the run is tagged with both."""
    described, data = prepared_data.load(params.dataset_uri)
    run_log.tag_data(base_model=described.base_model, dataset=described.dataset)
    base_model.check_quantization(described.base_model, params.quantization)
    base_model.check_memory(described.base_model, params.quantization, processes=ranks.count_here())
    return described, data


def dry_run(params: TrainParams) -> None:
    """Say what a training in one process would choose and take, from shapes alone: no weights are fetched."""
    run_log.tag_dry_run()
    described, data = open_data(params)
    base_model.check_layers(described.base_model)
    base, lora = base_model.skeleton(described.base_model), lora_settings(params)
    held, trainable = base_model.held(base, params.quantization, pick_device()[1]), adapter.size(base, lora)
    free = memory_plan.free_bytes(pick_device()[0]) - held.bytes
    plan = plan_memory(params, base, data, trainable, free=free, four_bit=held.four_bit)
    count = adapter.count_parameters(adapter.attach(base, lora))
    log_base(params, described, count)
    settings = trainer_settings(params, plan, rows=len(data["train"]), frozen_parameters=count.frozen)
    work = work_of(params, data, steps=settings.max_steps)
    peak_bytes = training_estimate.peak_bytes(base, held, plan, work, trainable=trainable)
    speed = training_speed.of_devices(count.frozen)
    run_log.log_choices(
        torch_compile=training_speed.choose_compile(params.torch_compile, speed, tokens=work.tokens),
        **training_estimate.describe(
            work,
            speed,
            recompute=plan.recompute,
            peak_bytes=peak_bytes,
            download_bytes=base_model.to_download(described.base_model),
        ),
    )


def work_of(params: TrainParams, data: datasets.DatasetDict, *, steps: int) -> Work:
    """What is to be trained on."""
    rows = data["train"]
    tokens = lengths(rows)
    return Work(
        len(rows),
        float(tokens.mean()),
        float(tokens.std(ddof=0)),
        training.longest_row(data),
        params.batch_size,
        steps,
    )


def load_model(
    params: TrainParams, described: DatasetManifest, data: datasets.DatasetDict
) -> tuple[PeftModel, memory_plan.Plan, ParameterCount]:
    """Quantized base with a new adapter, the plan for its memory, and its size; settings are logged."""
    base = load_base(described.base_model, params.quantization)
    base_model.check_layers(described.base_model, base)
    lora = lora_settings(params)
    four_bit = memory_plan.four_bit_parameters(base)
    plan = plan_memory(
        params, base, data, adapter.size(base, lora), free=free_everywhere(), four_bit=four_bit
    )
    model = adapter.attach(base.dequantize() if plan.dequantize else base, lora)
    count = adapter.count_parameters(model)
    quantization = quantization_config(params.quantization, pick_device()[1])
    run_log.log_settings("lora", model.peft_config[correction.TRAINED].to_dict())
    run_log.log_settings("quantization", quantization.to_dict() if quantization else {"load_in_4bit": False})
    log_base(params, described, count)
    if is_corrected(params, count):
        correct(params, described.base_model, model, data)
    return model, plan, count


def is_corrected(params: TrainParams, count: ParameterCount) -> bool:
    """Whether what nf4 changes in the base is taken back."""
    given = params.quantization_correction
    return correction.is_due(given, quantization=params.quantization, parameters=count.frozen)


def correct(params: TrainParams, reference: str, model: PeftModel, data: datasets.DatasetDict) -> None:
    """Take back most of what nf4 changes in the base; says how much is left. A checkpoint has it already.

    Raises:
        UserError: the base as it was published does not fit beside the quantized one.
    """
    if params.resume_from:
        correction.attach(model)
        return
    base_model.check_room(reference, params.quantization_correction, free_everywhere())
    left = correction.add(model, load_base(reference, "none"), data["train"])
    run_log.log_choices(correction=f"{left:.0%} of the squared error that nf4 makes in the outputs is left")
    run_log.log_metrics(quantization_error_left=left)


def free_everywhere() -> int:
    """Bytes that are free to every process, once all have loaded the base."""
    collectives.smallest(0)
    return int(collectives.smallest(memory_plan.free_bytes(pick_device()[0], processes=ranks.count_here())))


def lora_settings(params: TrainParams) -> LoraConfig:
    """The adapter to train."""
    return adapter.lora_config(
        r=params.lora_r,
        alpha=params.lora_alpha,
        dropout=params.lora_dropout,
        target_modules=params.target_modules,
        rank_stabilized=params.use_rslora == "yes",
    )


def log_base(params: TrainParams, described: DatasetManifest, count: ParameterCount) -> None:
    """Say what is trained, on what and where."""
    run_log.log_choices(
        device=describe_device(),
        processes=ranks.describe(),
        base_model=f"{described.base_model}, quantization {params.quantization}",
        quantization_correction="yes" if is_corrected(params, count) else "no",
        trainable=f"{count.trainable:,} of {count.all:,} parameters ({count.share:.2%})",
    )
    run_log.log_metrics(
        trainable_parameters=count.trainable, all_parameters=count.all, trainable_share=count.share
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
    """How to use the `free` bytes that there are with the base loaded, the same in all processes; says so."""
    device, dtype = pick_device()
    rows = min(params.batch_size, len(data["train"]))
    step_tokens = training.mean_tokens(data["train"]) * rows / ranks.count()
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
        may_dequantize=not ranks.is_sharded() or sharding.gathers_fast(),
    )
    run_log.log_choices(memory=memory_plan.describe(plan, step_tokens=step_tokens, device=device))
    return plan


def compile_layers(params: TrainParams, model: PeftModel, work: Work, speed: Speed) -> None:
    """Compile the layers where that pays, else fuse what they do."""
    chosen = training_speed.choose_compile(params.torch_compile, speed, tokens=work.tokens)
    training.speed_up(model, compiled=chosen == "yes")
    run_log.log_choices(torch_compile=chosen)


def trainer_settings(
    params: TrainParams, plan: memory_plan.Plan, *, rows: int, frozen_parameters: int
) -> TrainingArguments:
    """Every setting of the Trainer, with `auto` resolved; logged."""
    steps = training.total_steps(
        rows=rows,
        batch_size=params.batch_size,
        max_steps=params.max_steps,
        num_train_epochs=params.num_train_epochs,
    )
    chosen = training.resolve_auto(
        vars(params), frozen_parameters=frozen_parameters, steps=steps, device=pick_device()[0]
    )
    run_log.log_choices(**{name: str(value) for name, value in chosen.items()}, steps=str(steps))
    settings = training.arguments(
        Path(tempfile.gettempdir()),
        steps=steps,
        batch_size=params.batch_size,
        recompute=plan.recompute,
        has_dropout=params.lora_dropout > 0,
        **chosen,
        lr_scheduler_type=params.lr_scheduler_type,
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        logging_steps=params.logging_steps,
        seed=params.seed,
    )
    run_log.log_settings("trainer", settings.to_dict())
    return settings


if __name__ == "__main__":
    step_run.run_step(TrainParams, main, user_errors=(BaseModelError,))
