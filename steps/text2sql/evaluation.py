"""Answers of a model for test rows, and their scores as a table."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from steps.text2sql import dataset, memory_plan, scoring
from steps.text2sql.databases import DATABASE
from steps.text2sql.sql_model import (
    MAX_NEW_TOKENS,
    Generated,
    SQLModel,
    encode_prompts,
    extract_sql,
    pick_device,
    positions,
    repair_sql,
)

# New tokens beyond the longest gold answer: room for a longer but right query, and for EOS.
BUDGET_MARGIN_TOKENS = 16
# More rows at once bring nothing: rows that have stopped wait for the last one of their batch.
# On a CPU the keys and values of more do not stay near the cores: 32 at once were a fifth faster than 64.
MAX_BATCH_SIZE = {"cuda": 64, "cpu": 32}
# The rest is for the allocator's gaps and for what other programs take meanwhile.
MEMORY_SHARE = 0.5
# Hidden states, queries, keys and values, and an MLP of four times the hidden size with its gate.
ACTIVATIONS_PER_TOKEN = 16


def token_budget(tokenizer: PreTrainedTokenizerFast, answers: Sequence[str]) -> int:
    """New tokens that a model may write: those of the longest gold answer and a margin, or what it may write
    when it is served."""
    longest = max(map(len, tokenizer(list(answers))["input_ids"]))
    return min(longest + BUDGET_MARGIN_TOKENS, MAX_NEW_TOKENS)


def find_batch_size(model: SQLModel, rows: pandas.DataFrame, *, max_new_tokens: int, free: int) -> int:
    """Rows to generate at once in `free` bytes, 1 to `MAX_BATCH_SIZE`, if all were as long as the longest
    that the model reads."""
    lengths = map(len, encode_prompts(model.tokenizer, model.prompts(rows)))
    most = positions(model.model)
    longest = max((length for length in lengths if length < most), default=0)
    device, dtype = pick_device()
    needed = bytes_per_row(
        model.model.config.get_text_config(),
        tokens=longest + max_new_tokens,
        value_bytes=dtype.itemsize,
    )
    return max(1, min(MAX_BATCH_SIZE[device], int(free * MEMORY_SHARE / needed)))


def bytes_per_row(config: PretrainedConfig, *, tokens: int, value_bytes: int) -> int:
    """Memory of one row while it is generated, beside the weights, from above.

    Keys and values of all layers; one layer's activations of the prompt, with its attention weights as a
    whole (as sdpa without a fused kernel makes them); the logits of one token, in fp32 and copied twice.
    """
    _, keys = memory_plan.attention_sizes(config)
    cache = 2 * config.num_hidden_layers * keys * tokens
    activations = tokens * (ACTIVATIONS_PER_TOKEN * config.hidden_size + config.num_attention_heads * tokens)
    return (cache + activations) * value_bytes + 3 * config.vocab_size * 4


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


def served(rows: pandas.DataFrame, answers: Sequence[Generated]) -> list[str]:
    """SQL in the order of the rows, as the served model returns it."""
    found = [extract_sql(given.text) for given in answers]
    return [repair_sql(sql, context) for sql, context in zip(found, rows["context"], strict=True)]


def judge(
    rows: pandas.DataFrame,
    answers: Sequence[Generated],
    queries: Sequence[str],
    *,
    databases: Path,
    timeout_seconds: float,
) -> list[scoring.Verdict]:
    """Verdicts on `queries`, those of `answers`, in the order of the rows.

    A row's `database` is a path below `databases`.
    """
    names = rows[DATABASE] if DATABASE in rows else [None] * len(rows)
    return [
        scoring.judge(
            context=row.context,
            gold=row.answer,
            predicted=query,
            stopped=given.stopped,
            database=databases / name if name else None,
            timeout_seconds=timeout_seconds,
        )
        for row, given, query, name in zip(rows.itertuples(), answers, queries, names, strict=True)
    ]


def unrepaired(
    rows: pandas.DataFrame,
    answers: Sequence[Generated],
    queries: Sequence[str],
    verdicts: Sequence[scoring.Verdict],
    **limits: Any,
) -> list[scoring.Verdict]:
    """Verdicts on the answers as they were generated; `queries` and `verdicts` are those as served.

    `limits` as in `judge`. Only answers that the repair changed are judged again.
    """
    generated = [extract_sql(given.text) for given in answers]
    changed = [i for i, query in enumerate(queries) if query != generated[i]]
    again = judge(
        rows.iloc[changed], [answers[i] for i in changed], [generated[i] for i in changed], **limits
    )
    found = dict(zip(changed, again, strict=True))
    return [found.get(i, verdict) for i, verdict in enumerate(verdicts)]


def metrics(verdicts: Mapping[str, Sequence[scoring.Verdict]]) -> dict[str, float]:
    """Shares with their bounds and counts of failures of each model (by prefix), and the number of rows."""
    found: dict[str, float] = {}
    for prefix, of_model in verdicts.items():
        found |= scoring.metrics(of_model, prefix=prefix) | scoring.failure_counts(of_model, prefix=prefix)
    return found | {"evaluated_rows": len(of_model)}


def predictions(
    rows: pandas.DataFrame,
    answers: Mapping[str, Sequence[Generated]],
    verdicts: Mapping[str, Sequence[scoring.Verdict]],
) -> pandas.DataFrame:
    """One table: question, context and gold; then for each model (by prefix) its SQL as served and as
    generated, and verdicts."""
    table = rows[list(dataset.COLUMNS)].rename(columns={"answer": "gold"})
    for prefix, given in answers.items():
        table[f"{prefix}prediction"] = served(rows, given)
        table[f"{prefix}generated"] = [extract_sql(one.text) for one in given]
        judged = pandas.DataFrame([dataclasses.asdict(one) for one in verdicts[prefix]])
        table = table.join(judged.add_prefix(prefix))
    return table
