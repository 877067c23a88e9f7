"""The built-in dataset `sample`: questions, schemas and SQL over made-up businesses, each answer executed.

A row is made in four moves: fill a domain's database with random rows, pick a `Kind`, draw what its template
names (columns, values, conditions), execute the answer. What returns nothing is thrown away and drawn again.
"""

from __future__ import annotations

import pathlib
import random
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import date, timedelta
from functools import cached_property
from typing import NamedTuple

from steps.text2sql.sample_domains import DATE, DOMAINS, PERSON, Domain, Maybe, Number, Pool, Table

Value = str | int | float | None
Rows = list[dict[str, Value]]

DRAWS_PER_ROW = 40  # before a kind is given up in a domain, where ties leave no clear answer
FIRST_DAY, LAST_DAY = date(2019, 1, 1), date(2024, 12, 31)
# Such ends of column names read "weight in kg" rather than "weight kg".
UNIT = re.compile("_(cm|days|hectares|hours|kg|km|m|mg|millions|minutes|mw|sqm|tonnes|years)$")


class Kind(NamedTuple):
    """A form of question: its answer's template, its phrasings, and how many rows of it a domain gets.

    Templates name what is drawn: `t` is any table, `p` and `c` are a parent and its child, each a `Draw`;
    `join` joins these two, `way` is a `Way` and `n` a small number.
    """

    name: str
    rows_per_domain: int
    sql: str
    phrasings: tuple[str, ...]

    @property
    def is_on_two_tables(self) -> bool:
        """Whether it joins a parent with its child."""
        return "{p." in self.sql

    @property
    def alias(self) -> tuple[str, str]:
        """What goes before the columns of the parent and of the child."""
        return ("T1.", "T2.") if "{join}" in self.sql else ("", "")


class Example(NamedTuple):
    """One row of the dataset and where it came from."""

    kind: str
    phrasing: str
    domain: str
    tables: tuple[str, ...]
    question: str
    context: str
    answer: str


class Column(NamedTuple):
    """A column or an aggregate as SQL and as words: "age", "average age", "ages"."""

    sql: str
    text: str
    plural: str


class Condition(NamedTuple):
    """A condition as SQL, as a clause ("age is above 40") and as a phrase after "with" ("age above 40")."""

    sql: str
    says: str
    brief: str


class Way(NamedTuple):
    """A direction of sorting and comparing, with the words for it."""

    sql: str
    most: str
    last: str
    sorted: str
    function: str
    extreme: str
    sign: str
    side: str


WAYS = (
    Way("DESC", "highest", "latest", "descending", "MAX", "maximum", ">", "above"),
    Way("ASC", "lowest", "earliest", "ascending", "MIN", "minimum", "<", "below"),
)
COMPARISONS = (
    (">", "above"),
    (">", "greater than"),
    ("<", "below"),
    ("<", "less than"),
    (">=", "at least"),
    ("<=", "at most"),
)
FUNCTIONS = {"AVG": "average", "SUM": "total", "MAX": "maximum", "MIN": "minimum"}
FUNCTIONS_BY_ROLE = {
    "amount": ("AVG", "SUM", "MAX", "MIN"),
    "level": ("AVG", "MAX", "MIN"),
    "year": ("MAX", "MIN"),
}

# A table to read down, which the formatter would spread over a line an argument.
# fmt: off
KINDS = (
    Kind("select_all_rows", 3, "SELECT {t.columns.sql} FROM {t.name}", (
        "List the {t.columns.text} of all {t.many}.",
        "What are the {t.columns.plural} of all {t.many}?",
        "Show the {t.columns.text} of every {t.one}.",
    )),
    Kind("select_where", 7, "SELECT {t.columns.sql} FROM {t.name} WHERE {t.equals.sql}", (
        "Show the {t.columns.text} of all {t.many} whose {t.equals.says}.",
        "What are the {t.columns.plural} of {t.many} with {t.equals.brief}?",
        "List the {t.columns.plural} of the {t.many} where the {t.equals.says}.",
        "Find the {t.columns.text} for every {t.one} whose {t.equals.says}.",
        "Which {t.many} have {t.equals.brief}? Give their {t.columns.text}.",
    )),
    Kind("select_everything", 2, "SELECT * FROM {t.name} WHERE {t.either_type.sql}", (
        "Show all columns of the {t.many} whose {t.either_type.says}.",
        "Give me all details of {t.many} with {t.either_type.brief}.",
        "List everything about {t.many} where the {t.either_type.says}.",
    )),
    Kind("select_not_equal", 2, "SELECT {t.columns.sql} FROM {t.name} WHERE {t.differs.sql}", (
        "Show the {t.columns.text} of {t.many} whose {t.differs.says}.",
        "What are the {t.columns.plural} of all {t.many} with {t.differs.brief}?",
        "List the {t.columns.plural} of {t.many} where the {t.differs.says}.",
    )),
    Kind("select_and", 4, "SELECT {t.columns.sql} FROM {t.name} WHERE {t.equals.sql} AND {t.second.sql}", (
        "Show the {t.columns.text} of {t.many} whose {t.equals.says} and whose {t.second.says}.",
        "What are the {t.columns.plural} of {t.many} with {t.equals.brief} and {t.second.brief}?",
        "Find the {t.columns.plural} of {t.many} where the {t.equals.says} and the {t.second.says}.",
    )),
    Kind("select_or", 3, "SELECT {t.columns.sql} FROM {t.name} WHERE {t.equals.sql} OR {t.second.sql}", (
        "Show the {t.columns.text} of {t.many} whose {t.equals.says} or whose {t.second.says}.",
        "What are the {t.columns.plural} of {t.many} with {t.equals.brief} or {t.second.brief}?",
        "Find the {t.columns.plural} of {t.many} where the {t.equals.says} or the {t.second.says}.",
    )),
    Kind("select_either", 2, "SELECT {t.columns.sql} FROM {t.name} WHERE {t.either.sql}", (
        "Show the {t.columns.text} of {t.many} whose {t.either.says}.",
        "What are the {t.columns.plural} of {t.many} with {t.either.brief}?",
        "List the {t.columns.plural} of all {t.many} where the {t.either.says}.",
    )),
    Kind("select_compare", 5, "SELECT {t.columns.sql} FROM {t.name} WHERE {t.compares.sql}", (
        "Show the {t.columns.text} of all {t.many} whose {t.compares.says}.",
        "What are the {t.columns.plural} of {t.many} with {t.compares.brief}?",
        "Which {t.many} have {t.compares.brief}? List their {t.columns.text}.",
        "Find the {t.columns.plural} of the {t.many} where the {t.compares.says}.",
    )),
    Kind("select_between", 2, "SELECT {t.columns.sql} FROM {t.name} WHERE {t.between.sql}", (
        "Show the {t.columns.text} of {t.many} whose {t.between.says}.",
        "What are the {t.columns.plural} of {t.many} with {t.between.brief}?",
        "List the {t.columns.plural} of all {t.many} where the {t.between.says}.",
    )),
    Kind("count_all", 2, "SELECT COUNT(*) FROM {t.name}", (
        "How many {t.many} are there?",
        "Count all {t.many}.",
        "What is the total number of {t.many}?",
        "How many {t.many} are in the database?",
    )),
    Kind("count_where", 5, "SELECT COUNT(*) FROM {t.name} WHERE {t.either_type.sql}", (
        "How many {t.many} have {t.either_type.brief}?",
        "Count the {t.many} whose {t.either_type.says}.",
        "What is the number of {t.many} with {t.either_type.brief}?",
        "How many {t.many} are there whose {t.either_type.says}?",
    )),
    Kind("count_distinct", 2, "SELECT COUNT(DISTINCT {t.category.sql}) FROM {t.name}", (
        "How many different {t.category.plural} do the {t.many} have?",
        "Count the distinct {t.category.plural} of the {t.many}.",
        "What is the number of different {t.category.plural} among all {t.many}?",
    )),
    Kind("aggregate", 4, "SELECT {t.aggregate.sql} FROM {t.name}", (
        "What is the {t.aggregate.text} of all {t.many}?",
        "Find the {t.aggregate.text} of the {t.many}.",
        "Show the {t.aggregate.text} across all {t.many}.",
    )),
    Kind("aggregate_where", 3, "SELECT {t.aggregate.sql} FROM {t.name} WHERE {t.either_type.sql}", (
        "What is the {t.aggregate.text} of {t.many} whose {t.either_type.says}?",
        "Find the {t.aggregate.text} of all {t.many} with {t.either_type.brief}.",
        "For {t.many} whose {t.either_type.says}, what is the {t.aggregate.text}?",
    )),
    Kind("distinct", 2, "SELECT DISTINCT {t.category.sql} FROM {t.name}", (
        "What are the different {t.category.plural} of the {t.many}?",
        "List the distinct {t.category.plural} of all {t.many}.",
        "Show each different {t.category.text} that occurs among the {t.many}.",
    )),
    Kind("like", 3, "SELECT {t.columns.sql} FROM {t.name} WHERE {t.like.sql}", (
        "Show the {t.columns.text} of {t.many} whose {t.like.says}.",
        "What are the {t.columns.plural} of the {t.many} with {t.like.brief}?",
        "Find the {t.columns.plural} of all {t.many} where the {t.like.says}.",
    )),
    Kind("is_null", 2, "SELECT {t.columns.sql} FROM {t.name} WHERE {t.nullable.sql} IS NULL", (
        "Show the {t.columns.text} of {t.many} whose {t.nullable.text} is missing.",
        "Which {t.many} have no {t.nullable.text}? Give their {t.columns.text}.",
        "List the {t.columns.plural} of {t.many} without any {t.nullable.text}.",
    )),
    Kind("is_not_null", 2, "SELECT {t.columns.sql} FROM {t.name} WHERE {t.nullable.sql} IS NOT NULL", (
        "Show the {t.columns.text} of {t.many} whose {t.nullable.text} is known.",
        "Which {t.many} have a recorded {t.nullable.text}? Give their {t.columns.text}.",
        "List the {t.columns.plural} of {t.many} whose {t.nullable.text} is not missing.",
    )),
    Kind("order_by", 2, "SELECT {t.columns.sql} FROM {t.name} ORDER BY {t.number.sql} {way.sql}", (
        "List the {t.columns.plural} of all {t.many} in {way.sorted} order of {t.number.text}.",
        "Show the {t.columns.text} of every {t.one}, sorted by {t.number.text} in {way.sorted} order.",
        "What are the {t.columns.plural} of the {t.many}, ordered by {t.number.text} {way.sorted}?",
    )),
    Kind("top_one", 3, "SELECT {t.columns.sql} FROM {t.name} ORDER BY {t.number.sql} {way.sql} LIMIT 1", (
        "What is the {t.columns.text} of the {t.one} with the {way.most} {t.number.text}?",
        "Which {t.one} has the {way.most} {t.number.text}? Give the {t.columns.text}.",
        "Show the {t.columns.text} of the {t.one} that has the {way.most} {t.number.text}.",
    )),
    Kind("top_n", 3, "SELECT {t.columns.sql} FROM {t.name} ORDER BY {t.number.sql} {way.sql} LIMIT {n}", (
        "Show the {t.columns.text} of the {n} {t.many} with the {way.most} {t.number.text}.",
        "What are the {t.columns.plural} of the {n} {t.many} with the {way.most} {t.number.text}?",
        "List the {t.columns.text} of the {n} {t.many} that have the {way.most} {t.number.text}.",
    )),
    Kind("date_year", 2, "SELECT {t.columns.sql} FROM {t.name} WHERE {t.in_year.sql}", (
        "Show the {t.columns.text} of {t.many} whose {t.in_year.says}.",
        "What are the {t.columns.plural} of {t.many} with {t.in_year.brief}?",
        "Find the {t.columns.plural} of all {t.many} where the {t.in_year.says}.",
    )),
    Kind("date_count", 2, "SELECT COUNT(*) FROM {t.name} WHERE {t.in_year.sql}", (
        "How many {t.many} have {t.in_year.brief}?",
        "Count the {t.many} whose {t.in_year.says}.",
        "What is the number of {t.many} with {t.in_year.brief}?",
    )),
    Kind("date_compare", 3, "SELECT {t.columns.sql} FROM {t.name} WHERE {t.dated.sql}", (
        "Show the {t.columns.text} of {t.many} whose {t.dated.says}.",
        "What are the {t.columns.plural} of {t.many} with {t.dated.brief}?",
        "Which {t.many} have {t.dated.brief}? List their {t.columns.text}.",
    )),
    Kind("date_between", 2, "SELECT {t.columns.sql} FROM {t.name} WHERE {t.period.sql}", (
        "Show the {t.columns.text} of {t.many} whose {t.period.says}.",
        "What are the {t.columns.plural} of {t.many} with {t.period.brief}?",
        "List the {t.columns.plural} of all {t.many} where the {t.period.says}.",
    )),
    Kind("date_extreme", 2, "SELECT {t.columns.sql} FROM {t.name} ORDER BY {t.date.sql} {way.sql} LIMIT 1", (
        "What is the {t.columns.text} of the {t.one} with the {way.last} {t.date.text}?",
        "Show the {t.columns.text} of the {t.one} that has the {way.last} {t.date.text}.",
        "Which {t.one} has the {way.last} {t.date.text}? Give the {t.columns.text}.",
    )),
    Kind("date_aggregate", 2, "SELECT {way.function}({t.date.sql}) FROM {t.name}", (
        "What is the {way.last} {t.date.text} of all {t.many}?",
        "Find the {way.last} {t.date.text} among the {t.many}.",
        "Show the {way.last} {t.date.text} of any {t.one}.",
    )),
    Kind("group_count", 3, "SELECT {t.category.sql}, COUNT(*) FROM {t.name} GROUP BY {t.category.sql}", (
        "For each {t.category.text}, how many {t.many} are there?",
        "Show each {t.category.text} and the number of {t.many} with it.",
        "List the {t.category.plural} together with the number of {t.many} of each.",
    )),
    Kind(
        "group_aggregate", 4,
        "SELECT {t.category.sql}, {t.aggregate.sql} FROM {t.name} GROUP BY {t.category.sql}", (
            "For each {t.category.text}, what is the {t.aggregate.text} of the {t.many}?",
            "Show each {t.category.text} and the {t.aggregate.text} of its {t.many}.",
            "List the {t.category.plural} of the {t.many} and the {t.aggregate.text} of each.",
        ),
    ),
    Kind(
        "group_having", 3,
        "SELECT {t.category.sql} FROM {t.name} GROUP BY {t.category.sql} HAVING COUNT(*) > {n}", (
            "Which {t.category.plural} occur for more than {n} {t.many}?",
            "List the {t.category.plural} that more than {n} {t.many} have.",
            "Show every {t.category.text} with more than {n} {t.many}.",
        ),
    ),
    Kind(
        "most_common", 2,
        "SELECT {t.category.sql} FROM {t.name} GROUP BY {t.category.sql} "
        "ORDER BY COUNT(*) {way.sql} LIMIT 1", (
            "Which {t.category.text} has the {way.most} number of {t.many}?",
            "Find the {t.category.text} with the {way.most} number of {t.many}.",
            "What is the {t.category.text} that has the {way.most} number of {t.many}?",
        ),
    ),
    Kind("join_parent_where", 4, "SELECT {p.columns.sql} FROM {join} WHERE {c.either_type.sql}", (
        "Show the {p.columns.text} of {p.many} {p.who} have {c.a_one} whose {c.either_type.says}.",
        "Which {p.many} have {c.a_one} with {c.either_type.brief}? Give their {p.columns.text}.",
        "What are the {p.columns.plural} of {p.many} with {c.a_one} whose {c.either_type.says}?",
    )),
    Kind("join_child_where", 4, "SELECT {c.columns.sql} FROM {join} WHERE {p.either_type.sql}", (
        "Show the {c.columns.text} of the {c.many} of {p.many} whose {p.either_type.says}.",
        "What are the {c.columns.plural} of all {c.many} that belong to {p.many} with {p.either_type.brief}?",
        "For {p.many} whose {p.either_type.says}, list the {c.columns.plural} of their {c.many}.",
    )),
    Kind("join_child_of_one", 3, "SELECT {c.columns.sql} FROM {join} WHERE {p.named.sql}", (
        "Show the {c.columns.text} of every {c.one} of the {p.one} {p.named.brief}.",
        "What are the {c.columns.plural} of the {c.many} that belong to the {p.one} {p.named.brief}?",
        "List the {c.columns.plural} of all {c.many} of the {p.one} whose {p.named.says}.",
    )),
    Kind("join_both", 2, "SELECT {p.label.sql}, {c.columns.sql} FROM {join}", (
        "Show the {p.label.text} of each {p.one} with the {c.columns.text} of each of the {c.many}.",
        "For every {c.one}, list the {p.label.text} of its {p.one} and the {c.columns.text} of the {c.one}.",
        "List the {p.label.text} of each {p.one} together with the {c.columns.text} of every {c.one}.",
    )),
    Kind("join_count", 3, "SELECT COUNT(*) FROM {join} WHERE {p.either_type.sql}", (
        "How many {c.many} belong to {p.many} whose {p.either_type.says}?",
        "Count the {c.many} of {p.many} with {p.either_type.brief}.",
        "What is the number of {c.many} of {p.many} whose {p.either_type.says}?",
    )),
    Kind("join_aggregate", 3, "SELECT {c.aggregate.sql} FROM {join} WHERE {p.equals.sql}", (
        "What is the {c.aggregate.text} of the {c.many} of {p.many} whose {p.equals.says}?",
        "Find the {c.aggregate.text} of all {c.many} that belong to {p.many} with {p.equals.brief}.",
        "For {p.many} whose {p.equals.says}, what is the {c.aggregate.text} of their {c.many}?",
    )),
    Kind("join_group_count", 2, "SELECT {p.label.sql}, COUNT(*) FROM {join} GROUP BY {p.key}", (
        "For each {p.one}, show the {p.label.text} and the number of {c.many}.",
        "How many {c.many} does each {p.one} have? List the {p.label.text} and the count.",
        "List the {p.label.plural} of the {p.many} with the number of {c.many} of each.",
    )),
    Kind(
        "join_group_aggregate", 2,
        "SELECT {p.category.sql}, {c.aggregate.sql} FROM {join} GROUP BY {p.category.sql}", (
            "For each {p.category.text} of the {p.many}, what is the {c.aggregate.text} of their {c.many}?",
            "Show each {p.one} {p.category.text} and the {c.aggregate.text} of the {c.many}.",
            "List the {p.category.plural} of the {p.many} and the {c.aggregate.text} of their {c.many}.",
        ),
    ),
    Kind("join_having", 2, "SELECT {p.columns.sql} FROM {join} GROUP BY {p.key} HAVING COUNT(*) > {n}", (
        "Show the {p.columns.text} of {p.many} {p.who} have more than {n} {c.many}.",
        "Which {p.many} have more than {n} {c.many}? List their {p.columns.text}.",
        "What are the {p.columns.plural} of all {p.many} with more than {n} {c.many}?",
    )),
    Kind(
        "join_most", 2,
        "SELECT {p.columns.sql} FROM {join} GROUP BY {p.key} ORDER BY COUNT(*) DESC LIMIT 1", (
            "What is the {p.columns.text} of the {p.one} with the most {c.many}?",
            "Which {p.one} has the most {c.many}? Show the {p.columns.text}.",
            "Find the {p.columns.text} of the {p.one} {p.who} has the highest number of {c.many}.",
        ),
    ),
    Kind(
        "above_average", 2,
        "SELECT {t.columns.sql} FROM {t.name} WHERE {t.measure.sql} {way.sign} "
        "(SELECT AVG({t.measure.sql}) FROM {t.name})", (
            "Show the {t.columns.text} of {t.many} whose {t.measure.text} is {way.side} the average.",
            "Which {t.many} have {t.measure.text} {way.side} the average? Give their {t.columns.text}.",
            "What are the {t.columns.plural} of all {t.many} with {t.measure.text} {way.side} average?",
        ),
    ),
    Kind(
        "equals_extreme", 2,
        "SELECT {t.columns.sql} FROM {t.name} WHERE {t.number.sql} = "
        "(SELECT {way.function}({t.number.sql}) FROM {t.name})", (
            "Show the {t.columns.text} of all {t.many} whose {t.number.text} equals the {way.extreme}.",
            "What are the {t.columns.plural} of the {t.many} whose {t.number.text} is the {way.extreme}?",
            "List the {t.columns.text} of all {t.many} with {t.number.text} equal to the {way.extreme}.",
        ),
    ),
    Kind(
        "has_child", 2,
        "SELECT {p.columns.sql} FROM {p.name} WHERE {p.key} IN "
        "(SELECT {p.foreign_key} FROM {c.name})", (
            "Show the {p.columns.text} of {p.many} {p.who} have at least one {c.one}.",
            "Which {p.many} have at least one {c.one}? Give their {p.columns.text}.",
            "List the {p.columns.plural} of all {p.many} with at least one {c.one}.",
        ),
    ),
    Kind(
        "has_no_child", 2,
        "SELECT {p.columns.sql} FROM {p.name} WHERE {p.key} NOT IN (SELECT {p.foreign_key} FROM {c.name})", (
            "Show the {p.columns.text} of {p.many} {p.who} have no {c.many}.",
            "Which {p.many} do not have any {c.many}? Give their {p.columns.text}.",
            "List the {p.columns.plural} of all {p.many} without any {c.many}.",
        ),
    ),
    Kind(
        "has_no_child_where", 2,
        "SELECT {p.columns.sql} FROM {p.name} WHERE {p.key} NOT IN "
        "(SELECT {p.foreign_key} FROM {c.name} WHERE {c.either_type.sql})", (
            "Show the {p.columns.text} of {p.many} {p.who} have no {c.one} whose {c.either_type.says}.",
            "Which {p.many} do not have any {c.one} with {c.either_type.brief}? Give their {p.columns.text}.",
            "List the {p.columns.plural} of all {p.many} without any {c.one} whose {c.either_type.says}.",
        ),
    ),
)
# fmt: on


def generate(seed: int) -> list[dict[str, str]]:
    """The dataset: rows with question, context, answer and database (the domain), by domain and kind."""
    return [
        {"question": e.question, "context": e.context, "answer": e.answer, "database": e.domain}
        for e in generate_examples(seed)
    ]


def generate_examples(seed: int) -> list[Example]:
    """What `generate` returns, with the kind, phrasing and tables of each row."""
    return [example for domain in DOMAINS for example in _examples_of(domain, seed)]


def build_database(domain: str, path: pathlib.Path, *, seed: int) -> None:
    """Writes the SQLite file that `generate(seed)` executed a domain's answers against.

    Raises ValueError for an unknown domain and FileExistsError where `path` exists.
    """
    known = {d.name: d for d in DOMAINS}
    if domain not in known:
        raise ValueError(f"unknown domain {domain!r}; the built-in domains are {', '.join(known)}")
    if path.exists():
        raise FileExistsError(f"{path} exists; build_database writes new files only")
    with closing(sqlite3.connect(path)) as connection:
        _store(connection, known[domain], _make_rows(known[domain], seed))


# Databases


def _make_rows(domain: Domain, seed: int) -> dict[str, Rows]:
    """The rows of each table, by the table's name."""
    # A string seeds the same in every process, and keeps a domain's rows when another domain is edited.
    rng = random.Random(f"{seed} rows of {domain.name}")
    rows: dict[str, Rows] = {}
    for table in domain.tables:
        count = rng.randint(45, 80) if table.parents else rng.randint(30, 45)
        parent_keys = {
            domain.table(p).foreign_key: _pick_parents(rng, len(rows[p]), count) for p in table.parents
        }
        rows[table.name] = [
            {table.key: i + 1}
            | {column: keys[i] for column, keys in parent_keys.items()}
            | {column: _value(rng, pool) for column, pool in table.columns.items()}
            for i in range(count)
        ]
    return rows


def _pick_parents(rng: random.Random, parent_count: int, child_count: int) -> list[int]:
    """A parent's key for each child: some parents stay without children, few have many."""
    parents = rng.sample(range(1, parent_count + 1), k=parent_count * 4 // 5)
    weights = [1 / (rank + 2) for rank in range(len(parents))]
    return rng.choices(parents, weights, k=child_count)


def _value(rng: random.Random, pool: Pool) -> Value:
    if isinstance(pool, Maybe):
        return None if rng.random() < 0.3 else _value(rng, pool.pool)
    if isinstance(pool, Number):
        if isinstance(pool.low, int):
            return rng.randint(pool.low, int(pool.high))
        return round(rng.uniform(pool.low, pool.high), 1 if pool.high <= 20 else 2)
    if pool == DATE:
        return str(FIRST_DAY + timedelta(days=rng.randint(0, (LAST_DAY - FIRST_DAY).days)))
    return " ".join(rng.choice(part.split("|")) for part in pool.split(" + "))


def _create_statement(domain: Domain, table: Table) -> str:
    types = {table.key: "INTEGER"} | {domain.table(p).foreign_key: "INTEGER" for p in table.parents}
    types |= {column: _sql_type(pool) for column, pool in table.columns.items()}
    return f"CREATE TABLE {table.name} ({', '.join(f'{column} {kind}' for column, kind in types.items())})"


def _sql_type(pool: Pool) -> str:
    if not isinstance(pool, Number):
        return "TEXT"
    return "INTEGER" if isinstance(pool.low, int) else "REAL"


def _store(connection: sqlite3.Connection, domain: Domain, rows: dict[str, Rows]) -> None:
    for table in domain.tables:
        connection.execute(_create_statement(domain, table))
        marks = ", ".join("?" * len(rows[table.name][0]))
        values = [tuple(row.values()) for row in rows[table.name]]
        connection.executemany(f"INSERT INTO {table.name} VALUES ({marks})", values)
    connection.commit()


# Rows of the dataset


def _examples_of(domain: Domain, seed: int) -> Iterator[Example]:
    rng = random.Random(f"{seed} questions of {domain.name}")
    rows = _make_rows(domain, seed)
    seen: set[tuple[str, str]] = set()
    with closing(sqlite3.connect(":memory:")) as connection:
        _store(connection, domain, rows)
        for kind in KINDS:
            yield from _examples_of_kind(kind, domain, rows, connection, rng, seen)


def _examples_of_kind(
    kind: Kind,
    domain: Domain,
    rows: dict[str, Rows],
    connection: sqlite3.Connection,
    rng: random.Random,
    seen: set[tuple[str, str]],
) -> Iterator[Example]:
    """Up to `rows_per_domain` examples that are new in their domain and whose answers return something."""
    # From a random start in turn, so that every phrasing and every pair of tables gets its share.
    start, made = rng.randrange(100), 0
    for turn in range(start, start + DRAWS_PER_ROW * kind.rows_per_domain):
        phrasing = kind.phrasings[(start + made) % len(kind.phrasings)]
        try:
            example = _draw_example(kind, phrasing, domain, rows, rng, turn=turn)
        except LookupError:  # the table has no column of a sort that the template names
            continue
        if (example.question, example.context) in seen or not _is_answered(connection, example.answer):
            continue
        seen.add((example.question, example.context))
        yield example
        made += 1
        if made == kind.rows_per_domain:
            return


def _draw_example(
    kind: Kind, phrasing: str, domain: Domain, rows: dict[str, Rows], rng: random.Random, *, turn: int
) -> Example:
    slots, tables = _draw_slots(kind, domain, rows, rng, turn)
    # The answer first: what it names is drawn in its order, and the question repeats it.
    answer = kind.sql.format(**slots)
    context = "; ".join(_create_statement(domain, table) for table in tables)
    question = phrasing.format(**slots)
    return Example(kind.name, phrasing, domain.name, tuple(t.name for t in tables), question, context, answer)


def _draw_slots(
    kind: Kind, domain: Domain, rows: dict[str, Rows], rng: random.Random, turn: int
) -> tuple[dict[str, object], tuple[Table, ...]]:
    """What a template may name, and the tables of the answer."""
    slots: dict[str, object] = {"way": rng.choice(WAYS), "n": rng.randint(2, 8)}
    if not kind.is_on_two_tables:
        table = rng.choice(domain.tables)
        return slots | {"t": Draw(rng, table, rows[table.name], alias="")}, (table,)
    pairs = [(p, c) for c in domain.tables for p in domain.tables if p.name in c.parents]
    parent, child = pairs[turn % len(pairs)]
    p = Draw(rng, parent, rows[parent.name], alias=kind.alias[0])
    c = Draw(rng, child, rows[child.name], alias=kind.alias[1])
    join = f"{parent.name} AS T1 JOIN {child.name} AS T2 ON T1.{parent.key} = T2.{p.foreign_key}"
    return slots | {"p": p, "c": c, "join": join}, tuple(t for t in domain.tables if t in (parent, child))


def _is_answered(connection: sqlite3.Connection, answer: str) -> bool:
    """Whether the answer returns something other than NULLs or a lone 0, and cuts no tie."""
    result = connection.execute(answer).fetchall()
    has_values = any(value is not None for row in result for value in row)
    return has_values and result != [(0,)] and not _cuts_a_tie(connection, answer)


def _cuts_a_tie(connection: sqlite3.Connection, answer: str) -> bool:
    """Whether two rows up to and just after the LIMIT tie, so that the result is a matter of luck."""
    body, limited, limit = answer.partition(" LIMIT ")
    if not limited:
        return False
    selected, order = body.split(" ORDER BY ")
    key, source = order.rsplit(" ", 1)[0], selected.partition(" FROM ")[2]
    values = connection.execute(
        f"SELECT {key} FROM {source} ORDER BY {order} LIMIT {int(limit) + 1}"
    ).fetchall()
    return len(set(values)) < len(values)


# Draws from one table


class Draw:
    """Random columns, aggregates and conditions of one table.

    Each property is drawn when a template first names it and stays the same after, and none takes a column
    that another has taken, so that no question asks for the city of those whose city is known. LookupError
    where the table has no such column left.
    """

    def __init__(self, rng: random.Random, table: Table, rows: Rows, *, alias: str) -> None:
        self._rng, self._rows, self._alias = rng, rows, alias
        self._free = {column: _role(column, pool) for column, pool in table.columns.items()}
        self._subject = next(iter(table.columns))
        self._whole = {column for column, pool in table.columns.items() if _sql_type(pool) == "INTEGER"}
        self.name, self.one, self.many = table.name, table.one, _plural(table.one)
        self.a_one = f"{'an' if table.one[0] in 'aeio' else 'a'} {table.one}"
        self.who = "who" if table.columns.get("name") == PERSON else "that"
        self.key = alias + table.key
        self.foreign_key = table.foreign_key

    def _take(self, *roles: str) -> str:
        """A free column of one of the roles, free no more."""
        column = self._rng.choice([column for column, role in self._free.items() if role in roles])
        del self._free[column]
        return column

    def _column(self, column: str) -> Column:
        return Column(self._alias + column, _words(column), _plural(_words(column)))

    def _condition(self, column: str, sql: str, phrase: str, verb: str = "is ") -> Condition:
        text = _words(column)
        return Condition(f"{self._alias}{column} {sql}", f"{text} {verb}{phrase}", f"{text} {phrase}")

    def _sample(self, column: str) -> Value:
        return self._rng.choice([row[column] for row in self._rows if row[column] is not None])

    def _span(self, low: Value, high: Value) -> tuple[Value, Value]:
        if low == high:
            raise LookupError("the ends of a range are drawn equal")
        return min(low, high), max(low, high)

    @cached_property
    def columns(self) -> Column:
        """One to three columns to select, the subject more often than not among them."""
        taken = [self._subject] if self._rng.random() < 0.7 and self._free.pop(self._subject, None) else []
        count = self._rng.choice((1, 1, 2, 2, 3))
        while len(taken) < count:
            taken.append(self._take(*ROLES))
        columns = [self._column(c) for c in taken]
        return Column(
            ", ".join(c.sql for c in columns),
            _listing(c.text for c in columns),
            _listing(c.plural for c in columns),
        )

    @cached_property
    def label(self) -> Column:
        """The column that a row is called by."""
        del self._free[self._subject]
        return self._column(self._subject)

    @cached_property
    def category(self) -> Column:
        """A column of few values to group by."""
        return self._column(self._take("category"))

    @cached_property
    def number(self) -> Column:
        """A column with numbers."""
        return self._column(self._take("amount", "level", "year"))

    @cached_property
    def measure(self) -> Column:
        """A number that has an average."""
        return self._column(self._take("amount", "level"))

    @cached_property
    def date(self) -> Column:
        """A column with dates."""
        return self._column(self._take("date"))

    @cached_property
    def nullable(self) -> Column:
        """A column that has NULLs."""
        return self._column(self._take("nullable"))

    @cached_property
    def aggregate(self) -> Column:
        """A function over a column with numbers."""
        roles = dict(self._free)
        column = self._take(*FUNCTIONS_BY_ROLE)
        function = self._rng.choice(FUNCTIONS_BY_ROLE[roles[column]])
        return Column(f"{function}({self._alias}{column})", f"{FUNCTIONS[function]} {_words(column)}", "")

    @cached_property
    def equals(self) -> Condition:
        """Equality with text or a whole number that occurs."""
        column = self._take("category", "label", "level", "year")
        value = self._sample(column)
        if not isinstance(value, str) and column not in self._whole:
            raise LookupError("nobody asks for the rows whose price is exactly 17.35")
        return self._condition(column, f"= {_literal(value)}", self._quote(value))

    def _quote(self, value: Value) -> str:
        """The value as people type it, sometimes in quotes."""
        return f'"{value}"' if isinstance(value, str) and self._rng.random() < 0.15 else str(value)

    @cached_property
    def compares(self) -> Condition:
        """A condition that compares a number."""
        column = self._take("amount", "level", "year")
        sign, words = self._rng.choice(COMPARISONS)
        limit = _literal(_rounded(self._sample(column)))
        return self._condition(column, f"{sign} {limit}", f"{words} {limit}")

    @cached_property
    def either_type(self) -> Condition:
        """An equality twice as often as a comparison."""
        return self.compares if self._rng.random() < 0.33 else self.equals

    @cached_property
    def second(self) -> Condition:
        """A condition beside `equals`."""
        if self._rng.random() < 0.6:
            return self.compares
        column = self._take("category")
        value = self._sample(column)
        return self._condition(column, f"= {_literal(value)}", str(value))

    @cached_property
    def differs(self) -> Condition:
        """A condition that a category is not a value."""
        column = self._take("category")
        value = self._sample(column)
        condition = self._condition(column, f"!= {_literal(value)}", f"other than {value}")
        return condition._replace(says=f"{_words(column)} is not {value}")

    @cached_property
    def either(self) -> Condition:
        """A condition that a category is one of two values."""
        column = self._take("category")
        first, second = self._span(self._sample(column), self._sample(column))
        sql = f"= {_literal(first)} OR {self._alias}{column} = {_literal(second)}"
        return self._condition(column, sql, f"{first} or {second}")

    @cached_property
    def between(self) -> Condition:
        """A condition that a number lies between two."""
        column = self._take("amount", "level", "year")
        low, high = self._span(*(_rounded(self._sample(column)) for _ in range(2)))
        low, high = _literal(low), _literal(high)
        return self._condition(column, f"BETWEEN {low} AND {high}", f"between {low} and {high}")

    @cached_property
    def like(self) -> Condition:
        """A condition on the beginning, end or middle of a text."""
        column = self._take("label")
        words = str(self._sample(column)).replace("'", " ").split()
        pattern, verb, phrase, text = self._rng.choice(
            (
                ("{}%", "starts with", "starting with", words[0][0]),
                ("{}%", "starts with", "starting with", words[0]),
                ("%{}", "ends with", "ending with", words[-1]),
                ("%{}%", "contains", "containing", max(words, key=len)),
            )
        )
        condition = self._condition(column, f"LIKE '{pattern.format(text)}'", f"{phrase} {self._quote(text)}")
        return condition._replace(says=condition.says.replace(f"is {phrase}", verb))

    @cached_property
    def in_year(self) -> Condition:
        """A condition that a date is in a year."""
        column = self._take("date")
        year = str(self._sample(column))[:4]
        return self._condition(column, f"LIKE '{year}-%'", f"in {year}")

    @cached_property
    def dated(self) -> Condition:
        """A condition that a date is before or after one."""
        column = self._take("date")
        sign, word = self._rng.choice(((">", "after"), ("<", "before")))
        day = self._sample(column)
        return self._condition(column, f"{sign} '{day}'", f"{word} {day}")

    @cached_property
    def period(self) -> Condition:
        """A condition that a date lies between two."""
        column = self._take("date")
        first, last = self._span(self._sample(column), self._sample(column))
        return self._condition(column, f"BETWEEN '{first}' AND '{last}'", f"between {first} and {last}")

    @cached_property
    def named(self) -> Condition:
        """The subject's value, whose phrase is the bare value: "the patient Alice Brown"."""
        del self._free[self._subject]
        value = self._sample(self._subject)
        return self._condition(self._subject, f"= {_literal(value)}", str(value))._replace(brief=str(value))


# Words


ROLES = ("category", "label", "amount", "level", "year", "date", "nullable")


def _role(column: str, pool: Pool) -> str:
    """What a column can be asked about: one of ROLES."""
    if isinstance(pool, Maybe):
        return "nullable"
    if isinstance(pool, Number):
        return "year" if column.endswith("year") else "amount" if pool.adds_up else "level"
    if pool == DATE:
        return "date"
    return "label" if " + " in pool else "category"


def _words(column: str) -> str:
    """The column as a phrase: "visit date", "weight in kg"."""
    return UNIT.sub(r" in \1", column).replace("_", " ")


def _plural(phrase: str) -> str:
    noun, unit, rest = phrase.partition(" in ")
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies{unit}{rest}"
    return f"{noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}{unit}{rest}"


def _listing(words: Iterator[str]) -> str:
    *head, last = words
    return f"{', '.join(head)} and {last}" if head else last


def _literal(value: Value) -> str:
    """The value as SQL, for numbers also as words."""
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(int(value)) if value == int(value) else str(value)


def _rounded(value: Value) -> float:
    """Two significant digits, as people name limits: 2834 is 2800, 17.35 is 17; years and less stay."""
    return value if isinstance(value, int) and value < 2100 else float(f"{value:.2g}")
