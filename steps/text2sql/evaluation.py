"""Answers of a model for test rows, and their scores as a table."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from steps.text2sql import dataset, scoring
from steps.text2sql.databases import DATABASE
from steps.text2sql.sql_model import Generated, SQLModel, extract_sql

# New tokens beyond the longest gold answer: room for a longer but right query, and for EOS.
BUDGET_MARGIN_TOKENS = 16


def choose_rows(test: pandas.DataFrame, count: int) -> pandas.DataFrame:
    """`count` rows, or all if there are fewer: the same ones for every seed and every order of rows."""
    hashes = test.apply(_row_hash, axis="columns")
    return test.loc[hashes.sort_values().index[:count]].reset_index(drop=True)


def rows_digest(rows: pandas.DataFrame) -> str:
    """SHA-256 of the scored rows: two evaluations with the same one can be compared."""
    return hashlib.sha256("".join(rows.apply(_row_hash, axis="columns")).encode()).hexdigest()


def _row_hash(row: pandas.Series) -> str:
    return hashlib.sha256("\x00".join(row[list(dataset.COLUMNS)]).encode()).hexdigest()


def token_budget(tokenizer: PreTrainedTokenizerFast, answers: Sequence[str]) -> int:
    """New tokens that a model may write: those of the longest gold answer and a margin."""
    return max(map(len, tokenizer(list(answers))["input_ids"])) + BUDGET_MARGIN_TOKENS


def answer(
    model: SQLModel, rows: pandas.DataFrame, *, adapter: bool, max_new_tokens: int, batch_size: int
) -> list[Generated]:
    """Answers in the order of the rows, with the adapter or with the base alone; shows a progress bar."""
    found: dict[int, Generated] = {}
    with tqdm(total=len(rows), desc=f"Answering ({'tuned' if adapter else 'base'})", unit="row") as bar:
        for batch in model.answer(
            rows, adapter=adapter, max_new_tokens=max_new_tokens, batch_size=batch_size
        ):
            found |= batch
            bar.update(len(batch))
    return [found[i] for i in range(len(rows))]


def judge(
    rows: pandas.DataFrame, answers: Sequence[Generated], *, databases: Path, timeout_seconds: float
) -> list[scoring.Verdict]:
    """Verdicts in the order of the rows; a row's `database` is a path below `databases`."""
    names = rows[DATABASE] if DATABASE in rows else [None] * len(rows)
    return [
        scoring.judge(
            context=row.context,
            gold=row.answer,
            predicted=extract_sql(given.text),
            stopped=given.stopped,
            database=databases / name if name else None,
            timeout_seconds=timeout_seconds,
        )
        for row, given, name in zip(rows.itertuples(), answers, names, strict=True)
    ]


def predictions(
    rows: pandas.DataFrame,
    answers: Mapping[str, Sequence[Generated]],
    verdicts: Mapping[str, Sequence[scoring.Verdict]],
) -> pandas.DataFrame:
    """One table: question, context and gold; then for each model (by prefix) its SQL and verdicts."""
    table = rows[list(dataset.COLUMNS)].rename(columns={"answer": "gold"})
    for prefix, given in answers.items():
        table[f"{prefix}prediction"] = [extract_sql(one.text) for one in given]
        judged = pandas.DataFrame([dataclasses.asdict(one) for one in verdicts[prefix]])
        table = table.join(judged.add_prefix(prefix))
    return table
