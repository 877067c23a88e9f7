"""From a row to the token ids and labels that the model learns from."""

import hashlib
from typing import Any

import datasets
import pandas
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from steps.text2sql.errors import UserError
from steps.text2sql.sql_model import encode_prompts, render_prompt

# The label that transformers' losses skip.
IGNORED = -100
PREFIX_CHECK_ROWS = 100


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of all that decides how a tokenizer encodes: vocabulary, merges, rules and special ids."""
    special = f"{tokenizer.bos_token_id} {tokenizer.eos_token_id}"
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return hashlib.sha256(f"{special} {backend.to_str()}".encode()).hexdigest()


def tokenize(
    rows: pandas.DataFrame, *, tokenizer: PreTrainedTokenizerFast, template: str, style: str, max_length: int
) -> tuple[datasets.Dataset, pandas.Series]:
    """Add `input_ids` and `labels` (each `(tokens,)`), and leave out what does not fit in `max_length`.

    Prompt and answer are encoded together (apart in chat style, where a control token or a line break of the
    chat template stands between them), EOS follows by its id. A label is the token itself in the answer
    and at EOS, and `IGNORED` in the prompt. Nothing is cut: too long rows come back as reasons, by index.

    Raises:
        UserError: the prompt alone would be encoded otherwise when the model is served.
    """
    if rows.empty:
        columns = [*rows.columns, "input_ids", "labels"]
        return datasets.Dataset.from_dict({name: [] for name in columns}), pandas.Series(dtype=object)
    # The shortest, since a row may have any length; where the answer begins does not depend on it.
    lengths_of_text = rows["question"].str.len() + rows["context"].str.len()
    shortest = lengths_of_text.nsmallest(PREFIX_CHECK_ROWS).index
    check_prefix(rows.loc[shortest], tokenizer=tokenizer, template=template, style=style)
    table = datasets.Dataset.from_pandas(rows.rename_axis("row").reset_index(), preserve_index=False)
    encoded = table.map(
        encode_batch,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "template": template, "style": style},
        desc="Tokenizing",
        load_from_cache_file=False,
        # datasets hashes the function and its arguments otherwise, the whole tokenizer among them.
        new_fingerprint=hashlib.sha256(f"{len(rows)} {template}".encode()).hexdigest()[:16],
    )
    tokens = lengths(encoded)
    fits = (tokens <= max_length).to_numpy()
    too_long = pandas.Series(
        [f"{n} tokens, more than max_length={max_length}" for n in tokens[~fits]],
        index=rows.index[~fits],
        dtype=object,
    )
    return encoded.select(fits.nonzero()[0]).remove_columns("row"), too_long


def lengths(encoded: datasets.Dataset) -> pandas.Series:
    """Tokens of prompt, answer and EOS of each row, `(rows,)`."""
    column = encoded.with_format("arrow")[:].column("input_ids")
    return column.combine_chunks().value_lengths().to_pandas()


def encode_batch(
    batch: dict[str, list[Any]], *, tokenizer: PreTrainedTokenizerFast, template: str, style: str
) -> dict[str, list[list[int]]]:
    """Columns of rows to `input_ids` and `labels`; see `tokenize`."""
    prompts = [
        render_prompt(template, question=question, context=context, style=style)
        for question, context in zip(batch["question"], batch["context"], strict=True)
    ]
    if style == "chat":
        return _encode_apart(prompts, batch["answer"], tokenizer)
    texts = [prompt + answer for prompt, answer in zip(prompts, batch["answer"], strict=True)]
    encoded = tokenizer(texts, split_special_tokens=True, return_attention_mask=False, verbose=False)
    eos = tokenizer.eos_token_id
    input_ids, labels = [], []
    for i, ids in enumerate(encoded["input_ids"]):
        # A normalizer may have taken the answer's first characters away.
        places = (encoded.char_to_token(i, at) for at in range(len(prompts[i]), len(texts[i])))
        answer_start = next((place for place in places if place is not None), len(ids))
        ids = ids if ids[-1] == eos else [*ids, eos]
        input_ids.append(ids)
        labels.append([IGNORED] * answer_start + ids[answer_start:])
    return {"input_ids": input_ids, "labels": labels}


def _encode_apart(
    prompts: list[str], answers: list[str], tokenizer: PreTrainedTokenizerFast
) -> dict[str, list[list[int]]]:
    starts = encode_prompts(tokenizer, prompts)
    ends = tokenizer(answers, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    ends = [[*ids, tokenizer.eos_token_id] for ids in ends]
    return {
        "input_ids": [start + end for start, end in zip(starts, ends, strict=True)],
        "labels": [[IGNORED] * len(start) + end for start, end in zip(starts, ends, strict=True)],
    }


def for_filled_prompts(tokenizer: PreTrainedTokenizerFast, style: str) -> PreTrainedTokenizerFast:
    """The same tokenizer for those who encode filled prompts as they encode any text: a chat's has its own
    control tokens, so that another BOS would be one too many."""
    if style == "chat":
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    return tokenizer


def check_prefix(
    rows: pandas.DataFrame, *, tokenizer: PreTrainedTokenizerFast, template: str, style: str
) -> None:
    """Refuse a template whose prompt, encoded alone, does not begin the encoding of prompt and answer.

    Raises:
        UserError: naming the row.
    """
    encoded = encode_batch(rows.to_dict("list"), tokenizer=tokenizer, template=template, style=style)
    prompts = [
        render_prompt(template, question=row.question, context=row.context, style=style)
        for row in rows.itertuples()
    ]
    alone = encode_prompts(tokenizer, prompts)
    for i, (together, labels) in enumerate(zip(encoded["input_ids"], encoded["labels"], strict=True)):
        if alone[i] != together[: labels.count(IGNORED)]:
            raise UserError(
                f"prompt_template: this tokenizer joins the end of the prompt with the answer of row "
                f"{rows.index[i]}; the template must end with a line break."
            )
