"""How long 78,577 distinct rows take to be read, split, checked and tokenized.

As many rows as b-mc2/sql-create-context has, and a little longer than its mean of 130 tokens: the built-in
ones over and over, told apart by a number in the question. Run it on an idle machine:

    python -m benchmarks.prepare_data
"""

import os
import tempfile
import time
from pathlib import Path

import pandas

from benchmarks.markdown import print_table
from steps.text2sql import dataset, preparation, sample_data, splits
from steps.text2sql.sql_model import PROMPT_TEMPLATE, load_base_tokenizer

ROWS = 78_577


def numbered_rows(count: int) -> pandas.DataFrame:
    """The built-in rows over and over, each time with another number in the question."""
    sample = sample_data.generate(42)
    rows = [
        sample[i % len(sample)] | {"question": f"{i}: {sample[i % len(sample)]['question']}"}
        for i in range(count)
    ]
    return pandas.DataFrame(rows)[list(dataset.COLUMNS)]


def main() -> None:
    """Time each part and print a Markdown table."""
    tokenizer = load_base_tokenizer("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        numbered_rows(ROWS).to_json(path, orient="records", lines=True)
        times, begin = {}, time.monotonic()

        def lap(name: str) -> None:
            times[name] = time.monotonic() - begin - sum(times.values())

        columns = dataset.Columns(*dataset.COLUMNS, database="")
        rows = dataset.read_file(path, columns=columns, parameter="dataset")
        lap("read")
        parts = splits.split(rows, by="schema", test_size=0.2, seed=42)
        lap("split")
        prepared = preparation.prepare(
            parts, tokenizer=tokenizer, template=PROMPT_TEMPLATE, style="plain", max_length=512
        )
        lap("check and tokenize")
        prepared.splits.save_to_disk(Path(folder) / "dataset")
        lap("save")
    print(
        f"\n{len(rows):,} rows of {prepared.lengths.mean():.0f} tokens in the mean, {os.cpu_count()} cores\n"
    )
    seconds = times | {"all": sum(times.values())}
    print_table([("part", "seconds"), *((name, f"{value:.1f}") for name, value in seconds.items())])


if __name__ == "__main__":
    main()
