"""The built-in dataset: enough rows, the same in every process, and every answer right for its database."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import closing

import pytest

from steps.text2sql.sample_data import KINDS, build_database, generate, generate_examples
from steps.text2sql.sample_domains import DOMAINS

SEED = 42
DOMAIN_NAMES = [domain.name for domain in DOMAINS]


@pytest.fixture(scope="module")
def examples():
    return generate_examples(SEED)


@pytest.fixture(scope="module")
def rows():
    return generate(SEED)


@pytest.fixture(scope="module")
def databases(tmp_path_factory):
    """An open connection to the built database of each domain."""
    folder = tmp_path_factory.mktemp("databases")
    connections = {}
    for name in DOMAIN_NAMES:
        build_database(name, folder / f"{name}.sqlite", seed=SEED)
        connections[name] = sqlite3.connect(folder / f"{name}.sqlite")
    yield connections
    for connection in connections.values():
        connection.close()


def digest(rows):
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def test_there_are_3000_rows_over_30_domains_in_even_shares(rows):
    per_domain = defaultdict(int)
    for row in rows:
        per_domain[row["database"]] += 1
    assert len(rows) >= 3000
    assert len(per_domain) >= 30
    assert list(per_domain) == DOMAIN_NAMES
    assert min(per_domain.values()) >= 0.9 * max(per_domain.values())


def test_rows_have_the_four_keys_and_single_lines(rows):
    assert {tuple(row) for row in rows} == {("question", "context", "answer", "database")}
    assert not [v for row in rows for v in row.values() if not v.strip() or "\n" in v or "{" in v]


@pytest.mark.parametrize("hash_seed", ["0", "4242"])
def test_rows_are_the_same_in_every_process(rows, hash_seed):
    script = (
        "import hashlib, json; from steps.text2sql.sample_data import generate; "
        f"print(hashlib.sha256(json.dumps(generate({SEED})).encode()).hexdigest())"
    )
    env = os.environ | {"PYTHONHASHSEED": hash_seed}
    run = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout.strip() == digest(rows)


def test_another_seed_makes_other_rows(rows):
    other = generate(SEED + 1)
    shared = {(r["question"], r["context"]) for r in rows} & {(r["question"], r["context"]) for r in other}
    assert digest(other) != digest(rows)
    assert len(shared) < len(rows) / 2


def test_generation_takes_under_20_seconds():
    start = time.perf_counter()
    generate(SEED)
    assert time.perf_counter() - start < 20


def test_every_answer_returns_something_on_the_built_database(rows, databases):
    useless = [
        row
        for row in rows
        if databases[row["database"]].execute(row["answer"]).fetchall() in ([], [(None,)], [(0,)])
    ]
    assert not useless


def test_no_limit_cuts_a_tie(rows, databases):
    """Asks for every sorting value and looks at the cut, where the generator asks for one row more."""
    limited = [row for row in rows if " LIMIT " in row["answer"]]
    cut = []
    for row in limited:
        selected, _, rest = row["answer"].partition(" ORDER BY ")
        key, _, count = re.fullmatch(r"(.+) (ASC|DESC) LIMIT (\d+)", rest).groups()
        order = rest.partition(" LIMIT ")[0]
        query = re.sub(r"^SELECT .+? FROM", f"SELECT {key} FROM", selected) + f" ORDER BY {order}"
        values = [v for (v,) in databases[row["database"]].execute(query)]
        if int(count) < len(values) and values[int(count) - 1] == values[int(count)]:
            cut.append(row)
    assert len(limited) > 200
    assert not cut


def test_a_context_alone_is_enough_for_its_answer_and_holds_no_other_table(rows):
    for row in rows:
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.executescript(row["context"])
            connection.execute(f"EXPLAIN {row['answer']}")
        created = set(re.findall(r"CREATE TABLE (\w+)", row["context"]))
        assert created == set(re.findall(r"(?:FROM|JOIN) (\w+)", row["answer"])), row


def test_contexts_are_the_statements_of_the_built_database(rows, databases):
    for row in rows:
        schema = databases[row["database"]].execute("SELECT sql FROM sqlite_master").fetchall()
        assert set(row["context"].split("; ")) <= {sql for (sql,) in schema}


def test_no_question_occurs_twice_for_a_context(rows):
    keys = {(row["question"], row["context"]) for row in rows}
    assert len(keys) == len(rows)


def test_every_value_in_an_answer_stands_in_its_question(rows):
    for row in rows:
        for literal in re.findall(r"'((?:[^']|'')*)'", row["answer"]):
            value = literal.replace("''", "'").strip("%").removesuffix("-")
            assert value in row["question"], row
        for number in re.findall(r"(?<=[<>=]) (-?[\d.]+)", row["answer"]):
            assert number in row["question"], row


def test_some_answers_hold_a_doubled_quote(rows):
    assert [row for row in rows if "O''Brien'" in row["answer"] or "D''Angelo'" in row["answer"]]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_kind_occurs_in_three_phrasings_and_in_half_the_domains(kind, examples):
    mine = [example for example in examples if example.kind == kind.name]
    assert len(kind.phrasings) >= 3
    assert {example.phrasing for example in mine} == set(kind.phrasings)
    assert len({example.domain for example in mine}) >= len(DOMAINS) / 2


def test_no_table_is_in_two_domains():
    names = [table.name for domain in DOMAINS for table in domain.tables]
    assert len(set(names)) == len(names)


def test_no_two_columns_of_a_table_share_a_name():
    for domain in DOMAINS:
        for table in domain.tables:
            keys = [table.key, *(domain.table(parent).foreign_key for parent in table.parents)]
            assert not set(keys) & set(table.columns), table.name


def test_each_domain_is_one_connected_set_of_tables(examples):
    linked = defaultdict(list)
    for example in examples:
        linked[example.domain].append(set(example.tables))
    for domain in DOMAINS:
        reached = {domain.tables[0].name}
        for _ in domain.tables:
            reached = reached.union(*(tables for tables in linked[domain.name] if tables & reached))
        assert reached == {table.name for table in domain.tables}


def test_every_domain_has_nulls_ties_and_30_to_80_rows(databases):
    for domain in DOMAINS:
        nulls = 0
        for table in domain.tables:
            values = databases[domain.name].execute(f"SELECT * FROM {table.name}").fetchall()
            nulls += sum(value is None for row in values for value in row)
            assert 30 <= len(values) <= 80
            assert any(len(set(column)) < len(column) for column in zip(*values, strict=True))
        assert nulls > 0


def test_an_unknown_domain_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'hospitl'.*hospital, library"):
        build_database("hospitl", tmp_path / "x.sqlite", seed=SEED)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_not_overwritten(tmp_path):
    path = tmp_path / "x.sqlite"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"x\.sqlite"):
        build_database("hospital", path, seed=SEED)
    assert path.read_text() == "mine"
