"""What each part of a recipe is worth: the embedded base trained on real rows, one part changed at a time.

Trains by the project's own calls, answers rows with the trained model and scores them. Rows are files in
b-mc2/sql-create-context's shape, and a folder of Spider databases with their questions. `choice` is set apart
from --rows by table group and is what recipes are chosen on; --validation and --spider are reported only.

    python -m benchmarks.recipe --rows train.jsonl --steps 500 --seeds 0 1 2 --out found.jsonl
    python -m benchmarks.recipe --rows train.jsonl --validation validation.jsonl --spider spider_dev \
        --steps 500 --recipes defaults tutorial --out found.jsonl
    python -m benchmarks.recipe --rows train.jsonl --validation validation.jsonl --spider spider_dev \
        --table found.jsonl --databases spider_dev/db

A line of --out is one training and its answers. --part 0/4 does every fourth, for processes side by side.
--quick leaves out generating, which takes most of the time, and only reads gold answers: `likeliest` is the
share of rows whose every answer token is the likeliest after those before it, which is exact match of greedy
answers to the letter.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TextIO
from unittest import mock

import bitsandbytes
import datasets
import numpy
import pandas
import torch
import transformers
from peft import EvaConfig, PeftModel, initialize_lora_eva_weights
from peft.optimizers import create_loraplus_optimizer
from peft.optimizers.riemannian import create_riemannian_optimizer
from peft.tuners.lora import LoraLayer
from scipy.stats import t as student
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, TrainerCallback

from benchmarks.markdown import Table, print_table
from benchmarks.train_throughput import attach_as_planned, project_lora
from steps.text2sql import (
    adapter,
    correction,
    gradients,
    memory_plan,
    scoring,
    splits,
    tokenization,
    trainer,
    training,
)
from steps.text2sql.checkpoints import Checkpoints
from steps.text2sql.device import describe_device
from steps.text2sql.sql_execution import QueryError, check_query
from steps.text2sql.sql_model import (
    EMBEDDED_BASE,
    PROMPT_TEMPLATE,
    extract_sql,
    generate,
    load_base,
    load_base_tokenizer,
    pick_device,
    render_prompt,
    repair_sql,
)

CHOICE_ROWS = 2000
BATCH_SIZE, MAX_LENGTH, MAX_NEW_TOKENS = 8, 512, 96
ROWS_AT_ONCE = {"cuda": 4000, "cpu": 32}
ROWS_READ_AT_ONCE = {"cuda": 64, "cpu": 16}
NEVER = 10**9
GRADIENT_BATCHES = 8
QUERY_SECONDS = 5.0
Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that a recipe may say; the fields' defaults are the project's, and None its rule.

    `start` is how the adapter begins: `lora` (B is zero), `eva` (B is zero, and A the largest directions of
    the layer's inputs, arXiv 2410.07170), `gradient` (B is zero, and A those of the weight's gradient, which
    LoRA-GA begins with, arXiv 2407.05000), or on the largest directions of the weights (`pissa`, arXiv
    2404.02948) or of what quantizing loses (`loftq`, arXiv 2310.08659, one round). `corrected` is `lora` with
    most of what quantizing changes taken back beside it (`steps.text2sql.correction`).
    """

    learning_rate: float | None = None
    lr_scheduler_type: str = "linear"
    warmup_share: float = 0.05
    quantization: str = "nf4"
    start: str = "corrected"
    lora: dict[str, Any] = dataclasses.field(default_factory=lambda: {"use_rslora": True})
    settings: dict[str, Any] = dataclasses.field(default_factory=lambda: {"max_grad_norm": 0.3})
    optimizer: Literal["adamw", "muon", "riemannian"] = "adamw"
    loraplus_ratio: float = 1.0
    averaged_share: float = 0.0
    join_repeats: int = 1
    balanced_lengths: bool = False
    learns: str = "answers"


RATES = (2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 8e-3)
RECIPES: dict[str, dict[str, Any]] = {
    "defaults": {},
    **{f"learning rate {rate:g}": {"learning_rate": rate} for rate in RATES},
    "cosine": {"lr_scheduler_type": "cosine"},
    "constant after warm-up": {"lr_scheduler_type": "constant_with_warmup"},
    "no warm-up": {"warmup_share": 0.0},
    "warm-up 10 %": {"warmup_share": 0.1},
    "attention only": {"lora": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}},
    "MLP only": {"lora": {"target_modules": ["gate_proj", "up_proj", "down_proj"]}},
    "norms too": {"lora": {"modules_to_save": ["input_layernorm", "post_attention_layernorm"]}},
    "r=16, alpha=32": {"lora": {"r": 16, "lora_alpha": 32}},
    "r=64, alpha=128": {"lora": {"r": 64, "lora_alpha": 128}},
    "dropout 0.05": {"lora": {"lora_dropout": 0.05}},
    "weight decay 0.1": {"settings": {"weight_decay": 0.1}},
    "clip 1.0": {"settings": {"max_grad_norm": 1.0}},
    "no clipping": {"settings": {"max_grad_norm": 0.0}},
    "beta2 0.99": {"settings": {"adam_beta2": 0.99}},
    **{f"LoRA+ {ratio:g}": {"loraplus_ratio": ratio} for ratio in (2.0, 4.0, 8.0, 16.0)},
    "Muon": {"optimizer": "muon"},
    "Riemannian": {"optimizer": "riemannian"},
    "plain scale": {"lora": {"use_rslora": False}},
    "DoRA": {"lora": {"use_dora": True}},
    "PiSSA": {"start": "pissa"},
    "LoftQ": {"start": "loftq"},
    "EVA": {"start": "eva", "lora": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)}},
    "gradient": {"start": "gradient"},
    "not corrected": {"start": "lora"},
    "NEFTune 5": {"settings": {"neftune_noise_alpha": 5.0}},
    "NEFTune 15": {"settings": {"neftune_noise_alpha": 15.0}},
    "balanced lengths": {"balanced_lengths": True},
    "joins 3 times": {"join_repeats": 3},
    "mean of last 20 %": {"averaged_share": 0.2},
    "mean of last 40 %": {"averaged_share": 0.4},
    "not quantized": {"quantization": "none", "start": "lora"},
    "loss on prompts too": {"learns": "all"},
    "tutorial": {
        "learning_rate": 2e-5,
        "lr_scheduler_type": "constant",
        "start": "lora",
        "lora": {"lora_dropout": 0.1, "use_rslora": False},
        "settings": {"max_grad_norm": 1.0},
        "learns": "all but EOS",
    },
}


def recipe_of(name: str) -> Recipe:
    """One of `RECIPES`, or several of them at once: "EVA & learning rate 0.002"."""
    found: dict[str, Any] = {"lora": Recipe().lora, "settings": Recipe().settings}
    for part in name.split(" & "):
        for field, value in RECIPES[part].items():
            found[field] = found[field] | value if isinstance(value, dict) else value
    return Recipe(**found)


# Rows


def table_apart(rows: pandas.DataFrame) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Rows to train on, and up to `CHOICE_ROWS` to choose on: whole groups of tables, drawn with seed 0."""
    group = splits.groups(rows["context"])
    sizes = numpy.bincount(group)
    order = numpy.random.default_rng(0).permutation(len(sizes))
    taken = numpy.cumsum(sizes[order]) <= CHOICE_ROWS
    apart = numpy.isin(group, order[: numpy.argmin(taken)])
    return rows[~apart], rows[apart].head(CHOICE_ROWS)


def spider_rows(folder: Path) -> pandas.DataFrame:
    """Questions of Spider that have a context in the short form, with `db`."""
    rows = pandas.read_json(folder / "questions.jsonl", lines=True)
    return rows.dropna(subset=["context", "answer"])[["question", "context", "answer", "db"]]


def tokenized(rows: pandas.DataFrame, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> datasets.Dataset:
    """Rows as training takes them, with what the recipe wants of them."""
    joins = rows["answer"].str.contains(r"\bJOIN\b", case=False)
    rows = pandas.concat([rows, *[rows[joins]] * (recipe.join_repeats - 1)], ignore_index=True)
    encoded, _ = tokenization.tokenize(
        rows, tokenizer=tokenizer, template=PROMPT_TEMPLATE, style="plain", max_length=MAX_LENGTH
    )
    if recipe.learns == "answers":
        return encoded
    last = [] if recipe.learns == "all" else [tokenization.IGNORED]
    return encoded.map(lambda row: {"labels": row["input_ids"][: len(row["input_ids"]) - len(last)] + last})


def prepared(rows: pandas.DataFrame, recipe: Recipe) -> datasets.DatasetDict:
    """Rows to train on as training takes them, without validation."""
    encoded = tokenized(rows, load_base_tokenizer(EMBEDDED_BASE), recipe)
    return datasets.DatasetDict(train=encoded, validation=encoded.select([]))


class Balanced(trainer.Shuffled):
    """Each step has one row of every eighth of the lengths."""

    def __iter__(self) -> Iterator[int]:
        """Indices of all rows but an odd rest."""
        self.set_epoch(self.epoch_now())
        random = numpy.random.default_rng([self.initial_seed, self.epoch_now()])
        lengths = tokenization.lengths(self.data_source).to_numpy()
        steps = len(lengths) // BATCH_SIZE
        strata = numpy.argsort(lengths, kind="stable")[: steps * BATCH_SIZE].reshape(BATCH_SIZE, steps)
        yield from random.permuted(strata, axis=1).T.ravel().tolist()


# Training


class Averaging(TrainerCallback):
    """Puts the mean of the adapters of the last steps in the place of the last one."""

    def __init__(self, share: float) -> None:
        self.share, self.count = share, 0

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: PeftModel, **kwargs: Any) -> None:
        """Take the step into the mean."""
        if state.global_step <= state.max_steps * (1 - self.share):
            return
        now = [one.detach() for one in model.parameters() if one.requires_grad]
        self.count += 1
        if self.count == 1:
            self.mean = [one.clone() for one in now]
        torch._foreach_lerp_(self.mean, now, 1 / self.count)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: PeftModel, **kwargs: Any) -> None:
        """Take the mean."""
        for one, mean in zip(
            (one for one in model.parameters() if one.requires_grad), self.mean, strict=True
        ):
            one.data.copy_(mean)


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What nf4 with double quantization makes of a weight."""
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return bitsandbytes.functional.dequantize_4bit(packed, state)


def start_on_directions(model: PeftModel, kind: str) -> None:
    """Begin an adapter as `Recipe.start` says, and quantize the base under it, which is not yet."""
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        weight, scale = layer.base_layer.weight, layer.scaling["default"]
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        target = weight.float() if kind == "pissa" else (weight - through_nf4(weight)).float()
        left, sizes, right = torch.svd_lowrank(target, q=down.shape[0], niter=16)
        root = (sizes / scale).sqrt()
        with torch.no_grad():
            down.copy_((right * root).T)
            up.copy_(left * root)
            rest = weight.float() - (scale * up @ down if kind == "pissa" else 0)
            weight.copy_(through_nf4(rest.to(weight.dtype)))


def batches_of(rows: datasets.Dataset) -> torch.utils.data.DataLoader:
    """Shuffled rows, padded."""
    collate = DataCollatorForSeq2Seq(load_base_tokenizer(EMBEDDED_BASE))
    return torch.utils.data.DataLoader(
        rows.select_columns(["input_ids", "labels"]),
        batch_size=BATCH_SIZE,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        collate_fn=lambda batch: dict(collate(batch)),
    )


def weight_gradients(model: PeftModel, rows: datasets.Dataset) -> dict[LoraLayer, torch.Tensor]:
    """Each adapted layer's gradient, (outputs, inputs), summed over `GRADIENT_BATCHES`."""
    totals: dict[LoraLayer, torch.Tensor | float] = defaultdict(float)

    def note(layer: LoraLayer, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        inputs = given[0].detach().flatten(0, -2).float()

        def add(gradient: torch.Tensor) -> None:
            totals[layer] = totals[layer] + gradient.flatten(0, -2).float().T @ inputs

        made.register_hook(add)

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    for batch in itertools.islice(batches_of(rows), GRADIENT_BATCHES):
        model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return totals


def start_on_gradients(model: PeftModel, rows: datasets.Dataset) -> None:
    """Begin each A on the largest directions of its weight's gradient, with rows as long as those of peft."""
    for layer, gradient in weight_gradients(model, rows).items():
        down = layer.lora_A["default"].weight
        *_, right = torch.svd_lowrank(gradient, q=4 * len(down), niter=4)
        down.data.copy_(right[:, : len(down)].T / 3**0.5)


def load(recipe: Recipe, data: datasets.DatasetDict) -> tuple[PeftModel, memory_plan.Plan]:
    """Base with a new adapter, and the plan for its memory."""
    changes_base = recipe.start in ("pissa", "loftq")
    base = load_base(EMBEDDED_BASE, "none" if changes_base else recipe.quantization)
    lora = dataclasses.replace(project_lora(), **recipe.lora)
    step_tokens = training.mean_tokens(data["train"]) * BATCH_SIZE
    model, plan = attach_as_planned(base, lora, data, step_tokens=step_tokens)
    if changes_base:
        start_on_directions(model, recipe.start)
    elif recipe.start == "eva":
        initialize_lora_eva_weights(model, batches_of(data["train"]), show_progress_bar=False)
    elif recipe.start == "gradient":
        start_on_gradients(model, data["train"])
    return model, plan


def optimizer(model: PeftModel, recipe: Recipe) -> torch.optim.Optimizer | None:
    """The recipe's own; None where it is that of the settings.

    AdamW with B learning so many times faster than A (LoRA+, arXiv 2402.12354) or with gradients scaled by
    the other factor (arXiv 2402.02347), or Muon with steps of AdamW's size (arXiv 2502.16982).
    """
    shared = {"lr": recipe.learning_rate, "weight_decay": recipe.settings.get("weight_decay", 0.0)}
    if recipe.optimizer == "muon":
        trainable = [one for one in model.parameters() if one.requires_grad]
        return torch.optim.Muon(trainable, adjust_lr_fn="match_rms_adamw", **shared)
    if recipe.optimizer == "riemannian":
        return create_riemannian_optimizer(model, torch.optim.AdamW, **shared)
    if recipe.loraplus_ratio == 1:
        return None
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, loraplus_lr_ratio=recipe.loraplus_ratio, **shared
    )


def train(recipe: Recipe, data: datasets.DatasetDict, *, steps: int, seed: int) -> PeftModel:
    """Train by the same calls as the train step."""
    transformers.set_seed(seed)
    model, plan = load(recipe, data)
    rule = training.learning_rate(
        adapter.count_parameters(model).frozen, steps, rank_stabilized=recipe.lora["use_rslora"]
    )
    if recipe.start == "corrected":  # after counting: it is no part of the base
        correction.add(model, load_base(EMBEDDED_BASE, "none"), data["train"])
    recipe = dataclasses.replace(recipe, learning_rate=recipe.learning_rate or rule)
    settings = training.arguments(
        Path(tempfile.mkdtemp()),
        steps=steps,
        batch_size=BATCH_SIZE,
        recompute=plan.recompute,
        **{
            "optim": training.optimizer(pick_device()[0]),
            "learning_rate": recipe.learning_rate,
            "lr_scheduler_type": recipe.lr_scheduler_type,
            "warmup_steps": int(steps * recipe.warmup_share),
            "logging_steps": 50,
            "disable_tqdm": True,
            "seed": seed,
        }
        | recipe.settings,
    )
    training.speed_up(model, compiled=False)
    with mock.patch.object(trainer, "Shuffled", Balanced) if recipe.balanced_lengths else nullcontext():
        training.train(
            model,
            data,
            settings=settings,
            plan=plan,
            replay=gradients.can_record(model.config),
            callbacks=[Averaging(recipe.averaged_share)] if recipe.averaged_share else [],
            checkpoints=Checkpoints(lambda *_: None, save_steps=NEVER),
            optimizer=optimizer(model, recipe),
        )
    model.config.use_cache = True
    model.set_attn_implementation("sdpa")
    return model.eval()


# Answers


def answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    sets: dict[str, pandas.DataFrame],
    **batches: int,
) -> dict[str, dict[str, list[Any]]]:
    """Columns `generated` and `stopped` of each set, all answered together, in `batches` of `generate`."""
    rows = pandas.concat(sets.values())
    prompts = [
        render_prompt(PROMPT_TEMPLATE, question=row.question, context=row.context)
        for row in rows.itertuples()
    ]
    batches = batches or {"batch_size": ROWS_AT_ONCE[pick_device()[0]]}
    found = {}
    for batch in generate(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, **batches):
        found |= batch
    in_order = iter([found[i] for i in range(len(rows))])
    parts = {name: list(itertools.islice(in_order, len(part))) for name, part in sets.items()}
    return {
        name: {
            "generated": [extract_sql(one.text) for one in part],
            "stopped": [one.stopped for one in part],
        }
        for name, part in parts.items()
    }


def is_likeliest(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether each row's labels, (rows, tokens), are all the likeliest by `logits`, (rows, tokens, words)."""
    found, wanted = logits[:, :-1].argmax(dim=-1), labels[:, 1:]
    return ((found == wanted) | (wanted == tokenization.IGNORED)).all(dim=1)


def likeliest(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, sets: dict[str, pandas.DataFrame]
) -> Scores:
    """Share of each set's rows whose gold answer, with its end, is the likeliest one token by token."""
    device, dtype = pick_device()
    settings = transformers.TrainingArguments(
        tempfile.mkdtemp(),
        per_device_eval_batch_size=ROWS_READ_AT_ONCE[device],
        use_cpu=device == "cpu",
        bf16=dtype == torch.bfloat16,
        report_to=[],
        disable_tqdm=True,
    )
    reader = transformers.Trainer(
        model,
        settings,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        preprocess_logits_for_metrics=is_likeliest,
    )
    found = {name: tokenized(rows, tokenizer, Recipe()) for name, rows in sets.items()}
    return {
        name: float(reader.predict(rows.select_columns(["input_ids", "labels"])).predictions.mean())
        for name, rows in found.items()
    }


def read_rows(given: argparse.Namespace) -> tuple[pandas.DataFrame, dict[str, pandas.DataFrame]]:
    """Rows to train on, and the sets to answer."""
    rows = pandas.read_json(given.rows, lines=True)
    to_train, choice = table_apart(rows)
    sets = {} if given.all_rows else {"choice": choice}
    if given.validation:
        sets["validation"] = pandas.read_json(given.validation, lines=True)
    if given.spider:
        sets["spider"] = spider_rows(given.spider)
    return rows if given.all_rows else to_train, sets


def measure(given: argparse.Namespace, out: TextIO) -> None:
    """Train and answer what the command line asks for; writes a line for each training."""
    tokenizer = load_base_tokenizer(EMBEDDED_BASE)
    to_train, sets = read_rows(given)
    part, parts = map(int, given.part.split("/"))
    for seed, name in [(seed, name) for seed in given.seeds for name in given.recipes][part::parts]:
        recipe = recipe_of(name)
        data = prepared(to_train, recipe)
        start = time.monotonic()
        model = train(recipe, data, steps=given.steps, seed=seed)
        line = {"recipe": name, "steps": given.steps, "seed": seed, "device": describe_device()}
        line |= {"train_seconds": time.monotonic() - start}
        line |= {"likeliest": likeliest(model, tokenizer, sets)}
        line |= {"sets": {} if given.quick else answers(model, tokenizer, sets)}
        out.write(json.dumps(line) + "\n")
        out.flush()
        print(json.dumps({**line, "sets": list(line["sets"])}), flush=True)  # --table scores on the CPU
        del model
        gc.collect()
        torch.cuda.empty_cache()


# Scores


def score(rows: pandas.DataFrame, answered: Mapping[str, list[Any]], databases: Path | None = None) -> Scores:
    """Shares of the rows: right by exact match as served and as generated, valid SQL, and stopped.

    With a folder of `databases`, also by execution on the real database of each row.
    """
    generated = answered["generated"]
    served = repaired(generated, rows)
    found = {
        "exact match": list(map(scoring.exact_match, rows["answer"], served)),
        "unrepaired": list(map(scoring.exact_match, rows["answer"], generated)),
        "valid": list(map(is_valid, rows["context"], served)),
        "stopped": answered["stopped"],
    }
    if databases and "db" in rows:
        found["execution"] = [
            is_right_on(databases / f"{row.db}.sqlite", row.answer, sql)
            for row, sql in zip(rows.itertuples(), served, strict=True)
        ]
    return {name: statistics.mean(values) for name, values in found.items()}


def repaired(generated: Sequence[str], rows: pandas.DataFrame) -> list[str]:
    """Answers to rows, as they are served."""
    return [repair_sql(sql, context) for sql, context in zip(generated, rows["context"], strict=True)]


def is_valid(context: str, query: str) -> bool:
    """Whether a query is sound against its context."""
    try:
        check_query(context, query, timeout_seconds=QUERY_SECONDS)
    except QueryError:
        return False
    return True


def is_right_on(database: Path, gold: str, query: str) -> bool:
    """Whether a query returns what gold does on a real database."""
    return not scoring.execution_difference_on(database, gold, query, timeout_seconds=QUERY_SECONDS)


def table(given: argparse.Namespace) -> Table:
    """Each recipe's mean over its seeds, with an interval where there are several; the best first.

    `to defaults` is the mean difference of the first column to the defaults with the same seed.
    """
    _, sets = read_rows(given)
    lines = [json.loads(line) for line in given.table.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["scores"] = scores_of(line, sets, given.databases)
    columns = list(dict.fromkeys(name for line in lines for name in line["scores"]))
    ours = {(line["steps"], line["seed"]): line["scores"] for line in lines if line["recipe"] == "defaults"}
    found = defaultdict(list)
    for line in lines:
        found[line["steps"], line["recipe"]].append(line)
    yield "recipe", "steps", "seeds", *columns, "to defaults", "training, s"
    for (steps, recipe), runs in sorted(found.items(), key=lambda item: best_first(item, columns[0])):
        cells = [interval([run["scores"][one] for run in runs if one in run["scores"]]) for one in columns]
        gains = [
            run["scores"][columns[0]] - ours[steps, run["seed"]][columns[0]]
            for run in runs
            if (steps, run["seed"]) in ours
        ]
        seconds = statistics.mean(run["train_seconds"] for run in runs)
        yield recipe, steps, len(runs), *cells, interval(gains, sign="+"), f"{seconds:.0f}"


def best_first(runs: tuple[tuple[int, str], list[dict[str, Any]]], column: str) -> tuple[int, float]:
    """What recipes are ordered by: steps, and then by the mean of a column, the largest first."""
    return runs[0][0], -statistics.mean(run["scores"].get(column, 0.0) for run in runs[1])


def scores_of(line: Mapping[str, Any], sets: dict[str, pandas.DataFrame], databases: Path | None) -> Scores:
    """What a line of --out says of each set, by "set, metric"."""
    likeliest = {f"{name}, likeliest": share for name, share in line.get("likeliest", {}).items()}
    return likeliest | {
        f"{name}, {metric}": value
        for name, answered in line["sets"].items()
        if name in sets
        for metric, value in score(sets[name], answered, databases).items()
    }


def interval(values: Sequence[float], sign: Literal["", "+"] = "") -> str:
    """Mean with the half width of its 95 % interval (Student's t over seeds)."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.1%}"
    if len(values) == 1:
        return mean
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {100 * student.ppf(0.975, len(values) - 1) * error:.1f}"


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--spider", type=Path)
    parser.add_argument("--all-rows", action="store_true", help="train on those of `choice` too")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help=recipe_of.__doc__)
    parser.add_argument("--quick", action="store_true", help="generate no answers")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--out", type=Path, default=Path("recipes.jsonl"))
    parser.add_argument("--table", type=Path, help="print the scores of an --out, train nothing")
    parser.add_argument("--databases", type=Path, help="folder with Spider's <db>.sqlite, for --table")
    given = parser.parse_args()
    if given.table:
        print_table(table(given))
        return
    with given.out.open("a", encoding="utf-8") as out:
        measure(given, out)


if __name__ == "__main__":
    main()
