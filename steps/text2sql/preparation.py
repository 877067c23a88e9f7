"""From split rows to what training and evaluation read: checked, tokenized, with the rejected rows apart."""

from collections import Counter
from typing import NamedTuple

import datasets
import pandas
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerFast

from steps.text2sql import dataset, tokenization
from steps.text2sql.databases import DATABASE
from steps.text2sql.errors import UserError

TOKENS = ["input_ids", "labels"]


class Prepared(NamedTuple):
    """Splits `train` and `validation` with tokens, `test` with raw rows; rejected rows with split and reason.

    `lengths` are the tokens of the rows of `train`, `(rows,)`.
    """

    splits: datasets.DatasetDict
    rejected: pandas.DataFrame
    lengths: pandas.Series


def prepare(
    parts: dict[str, pandas.DataFrame],
    *,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    style: str,
    max_length: int,
) -> Prepared:
    """Check and tokenize each split.

    Raises:
        UserError: no row of train or test is left, naming the reasons.
    """
    kept, rejected = {}, []
    for name, rows in parts.items():
        sound, reasons = dataset.check(rows)
        kept[name], too_long = tokenization.tokenize(
            sound, tokenizer=tokenizer, template=template, style=style, max_length=max_length
        )
        rejected.append(_rejected(rows, pandas.concat([reasons, too_long]), name))
        if name != "validation" and not len(kept[name]):
            raise UserError(f"dataset: no sound row is left for {name}: {_most_common(rejected[-1])}.")
    lengths = tokenization.lengths(kept["train"])
    unused = {"train": [DATABASE], "validation": [DATABASE], "test": TOKENS}
    kept = {
        name: rows.remove_columns([c for c in unused[name] if c in rows.column_names])
        for name, rows in kept.items()
    }
    return Prepared(datasets.DatasetDict(kept), pandas.concat(rejected), lengths)


def highest_token(prepared: Prepared) -> int:
    """Highest id of a token in the rows to train on and to validate with."""
    parts = [prepared.splits[name] for name in ("train", "validation") if len(prepared.splits[name])]
    columns = [part.with_format("arrow")[:].column("input_ids") for part in parts]
    return max(pc.max(column.combine_chunks().flatten()).as_py() for column in columns)


def _rejected(rows: pandas.DataFrame, reasons: pandas.Series, split: str) -> pandas.DataFrame:
    columns = ["row", "split", "reason", *rows.columns]
    found = rows.loc[reasons.index].assign(split=split, reason=reasons).rename_axis("row").reset_index()
    return found[columns].sort_values("row")


def _most_common(rejected: pandas.DataFrame) -> str:
    counts = Counter(rejected["reason"]).most_common(3)
    return "; ".join(f"{count} x {reason}" for reason, count in counts)


def counts(parts: dict[str, pandas.DataFrame], prepared: Prepared) -> dict[str, int]:
    """Rows by split, raw and kept, and rejected ones by kind of reason, as names of metrics."""
    found = {f"rows_{name}_raw": len(rows) for name, rows in parts.items()}
    found |= {f"rows_{name}": len(rows) for name, rows in prepared.splits.items()}
    reasons = prepared.rejected["reason"]
    kinds = {
        "rejected_incomplete": reasons.str.contains(dataset.INCOMPLETE, regex=False),
        "rejected_contradiction": reasons.str.startswith("contradiction"),
        "rejected_duplicate": reasons.str.startswith("duplicate"),
        "rejected_too_long": reasons.str.contains("more than max_length", regex=False),
    }
    return found | {kind: int(matches.sum()) for kind, matches in kinds.items()}
