"""Rows and new tokens a second of evaluation: length-sorted batches against a loop over single rows.

The embedded base in nf4 without an adapter answers built-in test rows, with the budget of new tokens that
evaluate gives; it never stops, so every row costs the whole budget. Both take turns, since the speed of a
machine changes; the loop has a sixteenth of the rows each time, by length. Seconds of processor time stand
beside those of the clock, for a machine not quite idle:

    python -m benchmarks.evaluate_throughput [rows, 64 by default]
"""

import sys
import time

import numpy
import pandas
import torch

from benchmarks.markdown import Table, print_table
from steps.text2sql import dataset, evaluation, memory_plan, sample_data, scored_rows, splits
from steps.text2sql.device import describe_device
from steps.text2sql.sql_model import (
    EMBEDDED_BASE,
    PROMPT_TEMPLATE,
    SQLModel,
    load_base,
    load_base_tokenizer,
    pick_device,
)

TURNS = 4


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


def main() -> None:
    """Time both and print a Markdown table."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    answering, rows = model(), test_rows(count)
    budget = evaluation.token_budget(answering.tokenizer, rows["answer"])
    free = memory_plan.free_bytes(pick_device()[0])
    found = evaluation.find_batch_size(answering, rows, max_new_tokens=budget, free=free)
    first = torch.ones(1, 8, dtype=torch.long, device=answering.model.device)
    answering.model.generate(first, max_new_tokens=2)  # the first one is slow
    by_length = rows.loc[(rows["question"] + rows["context"]).str.len().sort_values().index]
    sizes = [1, *sorted({32, found})]
    turns = []
    for turn in range(TURNS):
        parts = {size: by_length[turn :: 4 * TURNS] if size == 1 else rows for size in sizes}
        turns.append({size: speed(answering, parts[size], budget=budget, batch_size=size) for size in sizes})
    print(f"\n{count} rows, {budget} new tokens each, {describe_device()}, auto: {found} rows at once\n")
    print_table(table(turns, budget))


def speed(answering: SQLModel, rows: pandas.DataFrame, *, budget: int, batch_size: int) -> numpy.ndarray:
    """Rows a second of the clock and of the processors, so many rows at once."""
    clock, processors = time.monotonic(), time.process_time()
    evaluation.answer(answering, rows, adapter=True, max_new_tokens=budget, batch_size=batch_size)
    return len(rows) / numpy.array([time.monotonic() - clock, time.process_time() - processors])


def table(turns: list[dict[int, numpy.ndarray]], budget: int) -> Table:
    """Medians over the turns, and of the ratios of each turn with their range."""
    yield "rows at once", "rows/s", "new tokens/s", "faster", "rows per processor second", "faster"
    for size in turns[0]:
        clock, processors = numpy.median([turn[size] for turn in turns], axis=0)
        gains = numpy.array([turn[size] / turn[1] for turn in turns])
        wall, work = (
            f"{middle:.1f} x ({low:.1f} to {high:.1f})"
            for middle, low, high in zip(*numpy.quantile(gains, [0.5, 0, 1], axis=0), strict=True)
        )
        yield size, f"{clock:.2f}", f"{clock * budget:.0f}", wall, f"{processors:.2f}", work


if __name__ == "__main__":
    main()
