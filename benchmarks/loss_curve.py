"""Loss of the project's training against that of a plain Trainer: same weights, rows, order and seed.

Plain: transformers' own Trainer and loss on rows padded side by side; no packs, no recorded launches, nothing
compiled. On a GPU all compute in bf16 under autocast, so that single steps differ by rounding; there the
plain training runs twice more, as it is and with the rows of a step in halves: so far do sums in another
order take it away from itself.

    python -m benchmarks.loss_curve [--steps 200] [--rows train.jsonl] [--learning-rate 0.001] [--compiled]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pandas
import torch
import transformers
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainerCallback

from benchmarks.markdown import print_table
from benchmarks.train_throughput import fit_project, project_lora, versions
from steps.text2sql import adapter, preparation, sample_data, splits, training
from steps.text2sql.device import describe_device
from steps.text2sql.sql_model import (
    EMBEDDED_BASE,
    PROMPT_TEMPLATE,
    load_base,
    load_base_tokenizer,
    pick_device,
)
from steps.text2sql.trainer import Shuffled

SEED, BATCH_SIZE = 42, 8
SMOOTHED_STEPS = 20


class Losses(TrainerCallback):
    """Notes the loss of every step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        """Note one step."""
        if "loss" in logs:
            self.found.append(logs["loss"])


def prepared_rows(tokenizer: PreTrainedTokenizerFast, file: Path | None) -> datasets.DatasetDict:
    """Rows of a file in JSON lines, or built-in ones, to train on; tokenized, without validation."""
    rows = pandas.read_json(file, lines=True) if file else pandas.DataFrame(sample_data.generate(SEED))
    parts = splits.split(rows, by="schema", test_size=0.2, seed=SEED)
    found = preparation.prepare(
        parts, tokenizer=tokenizer, template=PROMPT_TEMPLATE, style="plain", max_length=512
    )
    rows = found.splits["train"].select_columns(preparation.TOKENS)
    return datasets.DatasetDict(train=rows, validation=rows.select([]))


def plain(
    tokenizer: PreTrainedTokenizerFast,
    data: datasets.DatasetDict,
    *,
    steps: int,
    learning_rate: float,
    parts: int = 1,
) -> list[float]:
    """Losses of transformers' Trainer as it is, the rows of a step in so many parts."""
    transformers.set_seed(SEED)
    losses = Losses()
    settings = training.arguments(
        tempfile.mkdtemp(),
        steps=steps,
        batch_size=BATCH_SIZE // parts,
        gradient_accumulation_steps=parts,
        recompute=False,
        learning_rate=learning_rate,
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


def project(data: datasets.DatasetDict, *, steps: int, learning_rate: float, compiled: bool) -> list[float]:
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
        learning_rate=learning_rate,
        logging_steps=1,
    )
    return losses.found


def main() -> None:
    """Train both ways and print how far the curves are apart."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--compiled", action="store_true", help="compile the project's layers")
    parser.add_argument("--rows", type=Path, help="file in JSON lines, instead of the built-in rows")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    given = parser.parse_args()
    tokenizer = load_base_tokenizer(EMBEDDED_BASE)
    data = prepared_rows(tokenizer, given.rows)
    how = {"steps": given.steps, "learning_rate": given.learning_rate}
    curves = {
        "plain": plain(tokenizer, data, **how),
        "project": project(data, **how, compiled=given.compiled),
    }
    if pick_device()[0] == "cuda":
        curves["plain again"] = plain(tokenizer, data, **how)
        curves["plain, in halves"] = plain(tokenizer, data, **how, parts=2)
    table = pandas.DataFrame(curves, index=range(1, given.steps + 1))
    smoothed = table.rolling(min(SMOOTHED_STEPS, given.steps)).mean().dropna()
    apart = smoothed.drop(columns="plain").div(smoothed["plain"], axis=0).sub(1).abs()
    print(f"\n{describe_device()}, {versions()}, learning rate {given.learning_rate:g}\n")
    cells = smoothed.map("{:.4f}".format).join(apart.map("{:.2%}".format).add_suffix(", apart"))
    shown = cells.iloc[:: max(1, len(cells) // 9)]
    print_table([("step", *cells), *shown.itertuples(name=None)])
    for name, column in apart.items():
        print(f"\n{name}: furthest apart {column.max():.3%}, in the mean {column.mean():.3%}")


if __name__ == "__main__":
    main()
