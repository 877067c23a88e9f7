"""Training throughput of recipes on one device: rows a second, time of a step, memory, start.

    python -m benchmarks.train_throughput --architecture mistral-7b --rows 8 32 --rounds 3

Weights are random, made once in --models. Every recipe trains through transformers' Trainer on the same rows,
in a process of its own; with --rounds the recipes take turns. Prints a table in Markdown.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.markdown import Table, print_table
from steps.text2sql import adapter, gradients, memory_plan, training, training_speed
from steps.text2sql.checkpoints import Checkpoints
from steps.text2sql.device import operations_per_second
from steps.text2sql.sql_model import load_base, pick_device

# On a GPU the project records each shape of batch at its first one, which belongs to no usual step.
RECORDING_STEPS, PROFILED_STEPS = 24, 2
# A step on a CPU takes seconds, and the second is like the others.
WARM_UP_STEPS = {"cuda": 4, "cpu": 1}
VOCABULARY, BOS, EOS = 32000, 1, 2
# The tutorial's fixed length, and the lengths and the share of answers of b-mc2/sql-create-context.
TUTORIAL_LENGTH = 256
MEAN_TOKENS, DEVIATION, SHORTEST = 128, 33, 70
ANSWER_SHARE = 0.26
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "mistral-7b": MistralConfig(vocab_size=VOCABULARY),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "tiny": LlamaConfig(vocab_size=VOCABULARY, **TINY),
}
LORA = {"r": 32, "lora_alpha": 64, "task_type": "CAUSAL_LM", "bias": "none"}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock(TrainerCallback):
    """Times the steps after the warm-up, then profiles a few more for the time that the GPU works."""

    def __init__(self, steps: int, warm_up: int) -> None:
        self.warm_up, self.last = warm_up, warm_up + steps
        self.is_cuda = torch.cuda.is_available()
        self.busy = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the times at the edges."""
        step = state.global_step
        if step in (1, self.warm_up, self.last, self.last + PROFILED_STEPS) and self.is_cuda:
            torch.cuda.synchronize()
        if step == 1:
            self.first = time.perf_counter()
        if step == self.warm_up:
            self.start = time.perf_counter()
        if step == self.last:
            self.seconds = time.perf_counter() - self.start
            if self.is_cuda:
                self.profiler = profile(activities=[ProfilerActivity.CUDA])
                self.profiler.start()
        if step == self.last + PROFILED_STEPS and self.is_cuda:
            self.profiler.stop()
            events = self.profiler.key_averages()
            self.busy = sum(event.self_device_time_total for event in events) / 1e6 / PROFILED_STEPS


def rows(count: int) -> list[dict[str, list[int]]]:
    """Seeded random rows whose last quarter is the answer."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(count, generator=generator) * DEVIATION + MEAN_TOKENS
    found = []
    for length in spread.clamp(SHORTEST, TUTORIAL_LENGTH).long().tolist():
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        ids[0], ids[-1] = BOS, EOS
        prompt = length - round(length * ANSWER_SHARE)
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def make_weights(architecture: str, models: Path) -> Path:
    """Folder with random weights of an architecture."""
    folder = models / architecture
    if not (folder / "config.json").exists():
        write_weights(ARCHITECTURES[architecture], folder)
    return folder


def write_weights(config: PretrainedConfig, folder: Path) -> None:
    """Random weights of a configuration in bf16."""
    device, dtype = pick_device()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to(torch.bfloat16).save_pretrained(folder)
    del model
    gc.collect()
    torch.cuda.empty_cache()


def train_tutorial(folder: Path, batch_size: int, steps: int, clock: Clock) -> None:
    """The tutorial's: rows padded to 256, two at once, fp32 upcasts, recomputation, LoRA on lm_head."""
    model = load_base(str(folder), "nf4")
    model.gradient_checkpointing_enable()
    model = prepare_model_for_kbit_training(model)
    model.config.use_cache = False
    head = [] if model.config.tie_word_embeddings else ["lm_head"]
    model = get_peft_model(model, LoraConfig(**LORA, lora_dropout=0.1, target_modules=LINEAR + head))
    model.enable_input_require_grads()
    padded = [pad_left(row["input_ids"]) for row in rows(batch_size * steps)]
    is_cuda = torch.cuda.is_available()
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=batch_size // 2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim="paged_adamw_8bit" if is_cuda else "adamw_torch",
        bf16=is_cuda,
        use_cpu=not is_cuda,
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        max_steps=steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(
        model=model, args=settings, train_dataset=datasets.Dataset.from_list(padded), callbacks=[clock]
    ).train()


def pad_left(ids: list[int]) -> dict[str, list[int]]:
    """As the tutorial does it: EOS pads, and the loss counts the prompt too."""
    padding = TUTORIAL_LENGTH - len(ids)
    return {
        "input_ids": [EOS] * padding + ids,
        "attention_mask": [0] * padding + [1] * len(ids),
        "labels": [-100] * padding + ids[:-1] + [-100],
    }


def train_trl(folder: Path, batch_size: int, steps: int, clock: Clock) -> None:
    """TRL's SFTTrainer with its own defaults."""
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    SFTTrainer(
        model=load_base(str(folder), "nf4"),
        args=settings,
        train_dataset=datasets.Dataset.from_list(
            [{"input_ids": row["input_ids"]} for row in rows(batch_size * steps)]
        ),
        processing_class=bare_tokenizer(),
        peft_config=LoraConfig(**LORA, target_modules=LINEAR),
        callbacks=[clock],
    ).train()


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """What a trainer asks of a tokenizer where rows are token ids already: the special ones."""
    special = Tokenizer(WordLevel({"<unk>": 0, "<s>": BOS, "</s>": EOS}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=special, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def train_project(
    folder: Path,
    batch_size: int,
    steps: int,
    clock: Clock,
    *,
    compiled: bool = False,
    quantization: str = "nf4",
) -> str:
    """This project's recipe; its plan comes back."""
    data = datasets.Dataset.from_list(rows(batch_size * steps))
    return fit_project(
        load_base(str(folder), quantization),
        datasets.DatasetDict(train=data, validation=data.select([])),
        batch_size=batch_size,
        steps=steps,
        compiled=compiled,
        callbacks=[clock],
    )


def project_lora() -> LoraConfig:
    """The adapter of the project's recipe: the same size as the others'."""
    return adapter.lora_config(
        r=LORA["r"], alpha=LORA["lora_alpha"], dropout=0.0, target_modules="all-linear"
    )


def attach_as_planned(
    base: PreTrainedModel, lora: LoraConfig, data: datasets.DatasetDict, *, step_tokens: float
) -> tuple[PeftModel, memory_plan.Plan]:
    """Base with a new adapter, held as the project plans it for this device; and that plan."""
    device, dtype = pick_device()
    plan = memory_plan.make(
        memory_plan.Shape.of(base.config, dtype),
        device=device,
        free=memory_plan.free_bytes(device),
        trainable=adapter.size(base, lora),
        four_bit=memory_plan.four_bit_parameters(base),
        longest=training.longest_row(data),
        step_tokens=int(step_tokens),
        gradient_checkpointing="auto",
    )
    return adapter.attach(base.dequantize() if plan.dequantize else base, lora), plan


def fit_project(
    base: PreTrainedModel,
    data: datasets.DatasetDict,
    *,
    batch_size: int,
    steps: int,
    compiled: bool,
    callbacks: list[TrainerCallback],
    learning_rate: float = 2e-4,
    logging_steps: int = 10,
) -> str:
    """Train by the same calls as the train step; its plan for the memory comes back."""
    device = pick_device()[0]
    step_tokens = training.mean_tokens(data["train"]) * batch_size
    model, plan = attach_as_planned(base, project_lora(), data, step_tokens=step_tokens)
    training.speed_up(model, compiled=compiled)
    settings = training.arguments(
        Path(tempfile.mkdtemp()),
        steps=steps,
        batch_size=batch_size,
        recompute=plan.recompute,
        optim=training.optimizer(device),
        learning_rate=learning_rate,
        logging_steps=logging_steps,
        disable_tqdm=True,
    )
    training.train(
        model,
        data,
        settings=settings,
        plan=plan,
        replay=gradients.can_record(model.config),
        callbacks=callbacks,
        checkpoints=Checkpoints(lambda *_: None, save_steps=steps + 1),
    )
    return memory_plan.describe(plan, step_tokens=step_tokens, device=device)


RECIPES = {
    "tutorial": train_tutorial,
    "trl": train_trl,
    "project": train_project,
    "project, compiled": lambda *given: train_project(*given, compiled=True),
    "project, bf16": lambda *given: train_project(*given, quantization="none"),
}


def measure(recipe: str, folder: Path, batch_size: int, steps: int, cap_gib: float) -> dict[str, Any]:
    """Numbers of one recipe, in this process."""
    torch.manual_seed(0)
    if cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap_gib * 2**30 / total)
    device = pick_device()[0]
    is_recorded = recipe.startswith("project") and device == "cuda"
    warm_up = RECORDING_STEPS if is_recorded else WARM_UP_STEPS[device]
    clock, start = Clock(steps, warm_up), time.perf_counter()
    trained = warm_up + steps + PROFILED_STEPS
    plan = RECIPES[recipe](folder, batch_size, trained, clock)
    # Every trainer shuffles them: those that were timed are within 4 % of the mean.
    mean_tokens = statistics.mean(len(row["input_ids"]) for row in rows(batch_size * trained))
    return {
        "recipe": recipe,
        "rows": batch_size,
        "cap_gib": cap_gib,
        "rows_per_second": batch_size * steps / clock.seconds,
        "tokens_per_second": mean_tokens * batch_size * steps / clock.seconds,
        "seconds_per_step": clock.seconds / steps,
        "busy_seconds_per_step": clock.busy,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if clock.is_cuda else None,
        "start_seconds": clock.first - start,
        "plan": plan or "",
    }


def measure_in_process(given: argparse.Namespace, recipe: str, batch_size: int) -> dict[str, Any] | None:
    """The same in a process of its own, so that recipes do not share memory or compiled code."""
    words = [sys.executable, "-m", "benchmarks.train_throughput", "--one", recipe, "--rows", str(batch_size)]
    words += ["--architecture", given.architecture, "--models", str(given.models)]
    words += ["--steps", str(given.steps), "--cap-gib", str(given.cap_gib)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(f"{recipe}, {batch_size} rows: failed\n{done.stderr[-2000:]}", file=sys.stderr, flush=True)
        return None
    print(lines[-1], file=sys.stderr, flush=True)
    return json.loads(lines[-1])


def table(found: list[dict[str, Any]], operations: float, frozen: int) -> Table:
    """Medians over the rounds, with the ratio to the tutorial's recipe and its range."""
    yield (
        *("recipe", "rows a step", "rows/s", "to tutorial", "s/step", "GPU works, s"),
        *("share of product rate", "peak GiB", "start, s"),
    )
    for key in dict.fromkeys((one["recipe"], one["rows"]) for one in found):
        same = [one for one in found if (one["recipe"], one["rows"]) == key]
        yardstick = [one for one in found if (one["recipe"], one["rows"]) == ("tutorial", key[1])]
        median = {
            name: statistics.median(one[name] for one in same)
            for name in same[0]
            if isinstance(same[0][name], float)
        }
        ratios = [a["rows_per_second"] / b["rows_per_second"] for a, b in zip(same, yardstick, strict=False)]
        share = median["tokens_per_second"] * training_speed.operations_per_token(frozen) / operations
        yield (
            *key,
            f"{median['rows_per_second']:.1f}",
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})" if ratios else "",
            f"{median['seconds_per_step']:.3f}",
            f"{median['busy_seconds_per_step']:.3f}" if "busy_seconds_per_step" in median else "",
            f"{share:.0%}",
            f"{median['peak_gib']:.1f}" if "peak_gib" in median else "",
            f"{median['start_seconds']:.1f}",
        )


def versions() -> str:
    """Versions of what counts."""
    found = []
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="tiny")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["tutorial", "project"])
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cap-gib", type=float, default=0.0, help="as if the GPU had so much memory")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "text2sql-weights")
    parser.add_argument("--one", choices=RECIPES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = make_weights(given.architecture, given.models)
    if given.one:
        print(json.dumps(measure(given.one, folder, given.rows[0], given.steps, given.cap_gib)))
        return
    with torch.device("meta"):
        frozen = AutoModelForCausalLM.from_config(ARCHITECTURES[given.architecture]).num_parameters()
    operations = operations_per_second()
    torch.cuda.empty_cache()
    turns = [(rows, recipe) for rows in given.rows for _ in range(given.rounds) for recipe in given.recipes]
    found = [measure_in_process(given, recipe, rows) for rows, recipe in turns]
    name = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads"
    )
    print(f"{given.architecture}, random weights, {name}, product rate {operations / 1e12:.3g} TFLOP/s")
    print(f"{versions()}\n")
    print_table(table([one for one in found if one], operations, frozen))


if __name__ == "__main__":
    main()
