"""Loss of the project's training against that of a plain Trainer: same weights, rows, order and seed.

Plain: transformers' own Trainer and loss on rows padded side by side; no packs, no recorded launches, nothing
compiled. On a GPU all compute in bf16 under autocast, so that single steps differ by rounding.

    python -m benchmarks.loss_curve [--steps 200] [--compiled]
"""

import argparse
import tempfile
from typing import Any

import datasets
import pandas
import torch
import transformers
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainerCallback

from benchmarks.train_throughput import fit_project, project_lora, versions
from steps.text2sql import adapter, preparation, sample_data, splits, training
from steps.text2sql.device import describe_device
from steps.text2sql.sql_model import EMBEDDED_BASE, PROMPT_TEMPLATE, load_base, load_base_tokenizer
from steps.text2sql.trainer import Shuffled

SEED, BATCH_SIZE, LEARNING_RATE = 42, 8, 1e-3
SMOOTHED_STEPS = 20


class Losses(TrainerCallback):
    """Notes the loss of every step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        """Note one step."""
        if "loss" in logs:
            self.found.append(logs["loss"])


def prepared_rows(tokenizer: PreTrainedTokenizerFast) -> datasets.DatasetDict:
    """Built-in rows to train on, tokenized, without validation."""
    parts = splits.split(pandas.DataFrame(sample_data.generate(SEED)), by="schema", test_size=0.2, seed=SEED)
    found = preparation.prepare(
        parts, tokenizer=tokenizer, template=PROMPT_TEMPLATE, style="plain", max_length=512
    )
    rows = found.splits["train"].select_columns(preparation.TOKENS)
    return datasets.DatasetDict(train=rows, validation=rows.select([]))


def plain(tokenizer: PreTrainedTokenizerFast, data: datasets.DatasetDict, steps: int) -> list[float]:
    """Losses of transformers' Trainer as it is."""
    transformers.set_seed(SEED)
    losses = Losses()
    settings = training.arguments(
        tempfile.mkdtemp(),
        steps=steps,
        batch_size=BATCH_SIZE,
        recompute=False,
        learning_rate=LEARNING_RATE,
        logging_steps=1,
        disable_tqdm=True,
    )
    settings.eval_strategy = "no"
    trainer = Trainer(
        model=adapter.attach(load_base(EMBEDDED_BASE, "nf4"), project_lora()),
        args=settings,
        train_dataset=data["train"],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[losses],
    )
    order = Shuffled(data["train"], generator=torch.Generator(), data_seed=SEED)
    order.epoch_now = lambda: int(trainer.state.epoch or 0)
    trainer._get_train_sampler = lambda *_: order
    trainer.train()
    return losses.found


def project(data: datasets.DatasetDict, steps: int, *, compiled: bool) -> list[float]:
    """Losses of this project's training."""
    transformers.set_seed(SEED)
    losses = Losses()
    fit_project(
        load_base(EMBEDDED_BASE, "nf4"),
        data,
        batch_size=BATCH_SIZE,
        steps=steps,
        compiled=compiled,
        callbacks=[losses],
        learning_rate=LEARNING_RATE,
        logging_steps=1,
    )
    return losses.found


def main() -> None:
    """Train both ways and print how far the curves are apart."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--compiled", action="store_true", help="compile the project's layers")
    given = parser.parse_args()
    tokenizer = load_base_tokenizer(EMBEDDED_BASE)
    data = prepared_rows(tokenizer)
    curves = {
        "plain": plain(tokenizer, data, given.steps),
        "project": project(data, given.steps, compiled=given.compiled),
    }
    table = pandas.DataFrame(curves, index=range(1, given.steps + 1))
    smoothed = table.rolling(min(SMOOTHED_STEPS, given.steps)).mean().dropna()
    apart = (smoothed["project"] / smoothed["plain"] - 1).abs()
    print(f"\n{describe_device()}, {versions()}\n")
    print(f"| step | plain | project | apart (means of {SMOOTHED_STEPS} steps) |\n| --- | --- | --- | --- |")
    for step in smoothed.index[:: max(1, len(smoothed) // 9)]:
        losses = f"{smoothed['plain'][step]:.4f} | {smoothed['project'][step]:.4f}"
        print(f"| {step} | {losses} | {apart[step]:.2%} |")
    print(f"\nFurthest apart: {apart.max():.3%}, in the mean {apart.mean():.3%}")


if __name__ == "__main__":
    main()
