"""Rows and new tokens a second of evaluation: length-sorted batches against a loop over single rows.

The embedded base in nf4 without an adapter answers built-in test rows, with the budget of new tokens that
evaluate gives; it never stops, so every row costs the whole budget. The loop takes every fourth row, by
length: it is long. Seconds of processor time stand beside those of the clock, for a machine not quite idle:

    python -m benchmarks.evaluate_throughput [rows, 64 by default]
"""

import sys
import time
from collections.abc import Callable

import pandas
import torch

from steps.text2sql import dataset, evaluation, sample_data, scored_rows, splits
from steps.text2sql.device import describe_device, free_memory_bytes
from steps.text2sql.sql_model import (
    EMBEDDED_BASE,
    PROMPT_TEMPLATE,
    SQLModel,
    load_base,
    load_base_tokenizer,
)


def model() -> SQLModel:
    """The embedded base as evaluate has it, without an adapter."""
    found = SQLModel()
    found.prompt_template, found.prompt_style = PROMPT_TEMPLATE, "plain"
    found.tokenizer = load_base_tokenizer(EMBEDDED_BASE)
    found.model = load_base(EMBEDDED_BASE, "nf4").eval()
    return found


def test_rows(count: int) -> pandas.DataFrame:
    """Built-in test rows, as evaluate chooses them."""
    sample = pandas.DataFrame(sample_data.generate(42))
    rows = splits.split(sample, by="schema", test_size=0.2, seed=42)["test"]
    return scored_rows.choose(rows[list(dataset.COLUMNS)], count)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock and of the processors."""
    clock, processors = time.monotonic(), time.process_time()
    work()
    return time.monotonic() - clock, time.process_time() - processors


def main() -> None:
    """Time both and print a Markdown table."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    answering, rows = model(), test_rows(count)
    budget = evaluation.token_budget(answering.tokenizer, rows["answer"])
    found = evaluation.find_batch_size(answering, rows, max_new_tokens=budget, free=free_memory_bytes())
    first = torch.ones(1, 8, dtype=torch.long, device=answering.model.device)
    answering.model.generate(first, max_new_tokens=2)  # the first one is slow
    by_length = rows.loc[(rows["question"] + rows["context"]).str.len().sort_values().index]
    parts = {1: by_length[::4]} | dict.fromkeys(sorted({32, found}), rows)

    def answer(size: int) -> None:
        evaluation.answer(answering, parts[size], adapter=True, max_new_tokens=budget, batch_size=size)

    rates = {}
    for size, part in parts.items():
        rates[size] = [len(part) / seconds for seconds in timed(lambda size=size: answer(size))]
    print(f"\n{count} rows, {budget} new tokens each, {describe_device()}, auto: {found} rows at once\n")
    print("| rows at once | rows/s | new tokens/s | faster | rows per processor second | faster |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size, (clock, processors) in rates.items():
        gains = clock / rates[1][0], processors / rates[1][1]
        speeds = f"{clock:.2f} | {clock * budget:.0f} | {gains[0]:.1f} x"
        print(f"| {size} | {speeds} | {processors:.2f} | {gains[1]:.1f} x |")


if __name__ == "__main__":
    main()
