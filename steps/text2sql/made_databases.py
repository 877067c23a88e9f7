"""Small databases made for a gold query, so that a query that means something else returns something else.

In the spirit of test suites for SQL (Zhong, Yu, Klein 2020, https://arxiv.org/abs/2010.02840), but from the
context and the gold query alone: its constants occur with near misses, each subset of its conditions holds for
some row, columns that it joins share values.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sqlglot import exp

from steps.text2sql.gold_query import Column, Condition, Needs, Table, Value, read_needs, read_tables
from steps.text2sql.sql_execution import MadeDatabase, Row

DATABASES = 20
# More subsets of conditions than these are sampled.
MOST_SUBSETS = 32
MOST_ROWS = 60
NUMBER = re.compile(r"\s*[+-]?\d+(\.\d+)?\s*")


@dataclass(frozen=True)
class Style:
    """How the rows of one database are drawn.

    `satisfied` is the probability that a row is made to meet the conditions of its column, `keys` how many
    values joined columns share, `is_keyed` whether one of them is unique, `nulls` a probability.
    """

    rows: int
    satisfied: float
    keys: int
    variety: int
    nulls: float
    is_keyed: bool
    is_skewed: bool
    has_copies: bool


STYLES = tuple(
    Style(*values)
    for values in (
        # rows satisfied keys variety nulls is_keyed is_skewed has_copies
        (12, 0.5, 4, 12, 0.0, True, False, False),
        (8, 0.9, 3, 3, 0.1, False, False, True),
        (16, 0.6, 5, 6, 0.1, True, True, False),
        (10, 0.8, 3, 20, 0.0, True, True, False),
        (6, 0.7, 2, 4, 0.0, False, True, False),
        (20, 0.4, 6, 4, 0.2, True, False, True),
        (14, 0.7, 12, 20, 0.1, False, False, False),
        (9, 0.95, 10, 8, 0.0, True, True, False),
        (18, 0.5, 3, 3, 0.1, True, True, True),
        (5, 0.9, 3, 10, 0.3, True, False, False),
    )
)


def make_databases(context: str, gold: str, *, seed: int = 0, count: int = DATABASES) -> list[MadeDatabase]:
    """Databases for one gold query: the same ones for the same arguments, on every machine.

    Raises:
        QueryError: the context does not parse. Whether it executes shows when the databases are opened.
    """
    tables = read_tables(context)
    needs = read_needs(tables, gold)
    rng = random.Random(f"{seed}\n{context}\n{gold}")
    maker = _Maker(tables, needs, rng)
    styles = itertools.islice(itertools.cycle(STYLES), count)
    return [MadeDatabase(context, maker.rows(style)) for style in styles]


class _Maker:
    def __init__(self, tables: dict[str, Table], needs: Needs, rng: random.Random) -> None:
        self._tables, self._needs, self._rng = tables, needs, rng
        self._columns = [Column(t, name) for t, table in tables.items() for name in table.columns]
        self._families = _families(self._columns, needs)
        self._constants = {
            family: [
                value for column in family for value in near_misses(column, needs, self._affinity(column))
            ]
            for family in set(self._families.values())
        }

    def _affinity(self, column: Column) -> str:
        return self._tables[column.table].columns[column.name].affinity

    def rows(self, style: Style) -> dict[str, list[Row]]:
        """Rows of all tables for one database."""
        uniques = self._choose_uniques(style)
        pools = {family: self._pool(family, style) for family in sorted(set(self._families.values()))}
        return {
            table.name: self._table_rows(key, table, pools, uniques, style)
            for key, table in self._tables.items()
        }

    def _choose_uniques(self, style: Style) -> set[Column]:
        uniques = {c for c in self._columns if self._tables[c.table].columns[c.name].is_unique}
        if not style.is_keyed:
            return uniques
        for column in sorted(self._needs.grouped):
            described = {c.table for c in self._needs.listed - self._needs.grouped}
            keys = [c for c in self._families[column] if c.table in described]
            if keys and self._rng.random() < 0.8:
                uniques.add(self._rng.choice(keys))
        for family in sorted(set(self._families.values())):
            tables = {column.table for column in family}
            if len(family) > 1 and not uniques & set(family) and len(tables) > 1:
                uniques.add(self._rng.choice(family))
        return uniques

    def _pool(self, family: tuple[Column, ...], style: Style) -> list[Value]:
        """Values that the columns of a family draw from: constants and their neighbours, and ordinary ones."""
        constants = list(dict.fromkeys(self._constants[family]))
        ordinary = self._ordinary(family, style)
        size = style.keys if len(family) > 1 else style.variety
        size = max(size, self._needs.rows_to_skip + 2)
        return constants + ordinary[:size] if constants else ordinary[:size]

    def _ordinary(self, family: tuple[Column, ...], style: Style) -> list[Value]:
        number = self._columns.index(family[0])
        kinds = [self._tables[c.table].columns[c.name] for c in family]
        is_number = any(kind.affinity not in ("TEXT", "BLOB") for kind in kinds)
        is_number = is_number or bool(self._needs.numeric & set(family))
        if self._needs.dates & set(family) or any(kind.is_date for kind in kinds):
            return [
                f"20{self._rng.randint(10, 25)}-{self._rng.randint(1, 12):02}-{self._rng.randint(1, 28):02}"
                for _ in range(MOST_ROWS)
            ]
        if not is_number and self._rng.random() < 0.25:
            is_number = True
        if is_number:
            start = 13 * number
            values = self._rng.sample(range(start + 1, start + 90), 60)
            values[3:3] = [-values[0], 0]
            if any(kind.affinity == "REAL" for kind in kinds):
                values = [value + self._rng.choice((0, 0.5, 0.25)) for value in values]
            return values
        name = family[0].name
        words = [f"{name} {letter}{tail}" for tail in ("", "a", "z") for letter in "abcdefghijklmnopqrst"]
        self._rng.shuffle(words)
        words[2:2] = [words[0].upper(), ""]
        return words

    def _table_rows(self, key: str, table: Table, pools, uniques: set[Column], style: Style) -> list[Row]:
        columns = [Column(key, name) for name in table.columns]
        count = self._count(style)
        signatures = {c: self._by_signature(c, pools[self._families[c]]) for c in columns}
        wanted = self._wanted(columns, signatures, count, style)
        values = [
            self._column_values(c, signatures[c], [w[i] for w in wanted], pools, uniques, style)
            for i, c in enumerate(columns)
        ]
        rows = list(zip(*values, strict=True))
        if style.has_copies:
            rows += self._rng.sample(rows, min(3, len(rows)))
        self._rng.shuffle(rows)
        return _without_clashes(table, rows)

    def _count(self, style: Style) -> int:
        """Rows enough to cut by a LIMIT, and to make groups on both sides of a HAVING COUNT."""
        sizes = [size for size in self._needs.group_sizes if 0 < size < 20]
        needed = max([3 * size for size in sizes] + [min(self._needs.rows_to_skip, 40) + 3])
        return min(max(style.rows, needed), MOST_ROWS)

    def _by_signature(self, column: Column, pool: Sequence[Value]) -> dict[tuple[bool, ...], list[Value]]:
        conditions = self._needs.conditions.get(column, [])
        affinity = self._affinity(column)
        found: dict[tuple[bool, ...], list[Value]] = {}
        for value in pool:
            signature = tuple(holds(condition, value, affinity) for condition in conditions)
            found.setdefault(signature, []).append(value)
        return found

    def _wanted(self, columns, signatures, count: int, style: Style) -> list[tuple]:
        """For each row the signature that each column shall have: all subsets first, where they are few."""
        choices = [sorted(signatures[c], reverse=True) for c in columns]
        subsets = 1
        for choice in choices:
            subsets *= len(choice)
        wanted = []
        if 1 < subsets <= MOST_SUBSETS and style.satisfied <= 0.6:
            wanted = list(itertools.product(*choices))
        while len(wanted) < count:
            is_met = self._rng.random() < style.satisfied
            wanted.append(tuple(self._signature(choice, is_met, style) for choice in choices))
        self._rng.shuffle(wanted)
        return wanted

    def _signature(self, choice, is_met: bool, style: Style):
        met = [signature for signature in choice if any(signature)]
        if met and (is_met or self._rng.random() < style.satisfied):
            most = max(map(sum, met))
            return self._rng.choice([signature for signature in met if sum(signature) == most])
        return self._rng.choice(choice)

    def _column_values(
        self, column: Column, by_signature, wanted, pools, uniques: set[Column], style: Style
    ) -> list[Value]:
        kind = self._tables[column.table].columns[column.name]
        if column in uniques:
            return self._unique_values(column, by_signature, wanted, pools)
        is_key = len(self._families[column]) > 1
        if kind.is_required:
            by_signature = {s: [v for v in vs if v is not None] or [""] for s, vs in by_signature.items()}
        values = [self._pick(by_signature[signature], style) for signature in wanted]
        if kind.is_required or is_key and self._rng.random() < 0.8:
            return values
        return [None if self._rng.random() < style.nulls else value for value in values]

    def _pick(self, values: Sequence[Value], style: Style) -> Value:
        if style.is_skewed:
            return self._rng.choices(values, weights=[1 / (k + 1) for k in range(len(values))])[0]
        return self._rng.choice(values)

    def _unique_values(self, column: Column, by_signature, wanted, pools) -> list[Value]:
        pool = list(dict.fromkeys(pools[self._families[column]]))
        spare = [v for v in self._ordinary(self._families[column], STYLES[0]) if v not in pool]
        free, found = set(map(repr, pool)), []
        left = {
            signature: self._rng.sample(values, len(values)) for signature, values in by_signature.items()
        }
        others = self._rng.sample(pool, len(pool))
        for signature in wanted:
            candidates = left[signature] if signature in left else []
            value = next((v for v in (*candidates, *others, *spare) if repr(v) in free or v in spare), None)
            if value in spare:
                spare.remove(value)
            free.discard(repr(value))
            found.append(value)
        return found


def _families(columns: Sequence[Column], needs: Needs) -> dict[Column, tuple[Column, ...]]:
    """The columns that share values with each column, itself among them."""
    known = set(columns)
    found = {column: (column,) for column in columns}
    for linked in needs.linked:
        family = tuple(sorted(linked & known))
        found |= dict.fromkeys(family, family)
    return found


def _without_clashes(table: Table, rows: list[Row]) -> list[Row]:
    """The rows that keep the table's UNIQUE and PRIMARY KEY constraints."""
    names = list(table.columns)
    keys = [(n,) for n in names if table.columns[n].is_unique] + list(table.unique_together)
    places = [[names.index(name) for name in key] for key in keys]
    seen: set[tuple] = set()
    kept = []
    for row in rows:
        marks = {(i, *(row[p] for p in place)) for i, place in enumerate(places)}
        if not marks & seen:
            kept.append(row)
            seen |= marks
    return kept


def near_misses(column: Column, needs: Needs, affinity: str) -> list[Value]:
    """The constants that a column is compared with and values close to them, as the column stores them."""
    patterns = {
        c
        for condition in needs.conditions.get(column, [])
        if condition.operator is exp.Like
        for c in condition.constants
    }
    found: list[Value] = []
    for constant in needs.constants.get(column, []):
        if constant is None:
            found.append(None)
        elif constant in patterns:
            found += _near_pattern(str(constant))
        elif column in needs.dates:
            found += _near_date(str(constant))
        elif isinstance(constant, str):
            found += _near_text(constant)
        else:
            found += _near_number(constant)
    return list(dict.fromkeys(stored(value, affinity) for value in found))


def _near_number(number: float) -> list[Value]:
    if isinstance(number, int):
        return [number, number + 1, number - 1, number + 2, number - 2, -number, number * 10, number // 2]
    unit = 10.0 ** -len(f"{number:.10f}".rstrip("0").partition(".")[2])
    near = (number + unit, number - unit, number + unit / 10, number + 1, number - 1, -number)
    return [number, *(round(value, 8) for value in near)]


def _near_text(text: str) -> list[Value]:
    variants = [
        text,
        text.lower(),
        text.upper(),
        text.swapcase(),
        text + "x",
        "x" + text,
        text[:-1],
        text[1:],
        "",
    ]
    if text and text[-1].isdigit():
        variants += [text[:-1] + str((int(text[-1]) + step) % 10) for step in (1, -1)]
    elif text:
        variants.append(text[:-1] + chr(min(ord(text[-1]) + 1, 0x10FFFF)))
    numbers = _near_number(float(text) if "." in text else int(text)) if NUMBER.fullmatch(text) else []
    return variants + numbers


def _near_pattern(pattern: str) -> list[Value]:
    core = pattern.strip("%").replace("%", " mid ").replace("_", "o")
    return [
        core,
        core + "x",
        "x" + core,
        f"x{core}x",
        core.upper(),
        core.lower(),
        core + "y",
        core[:-1],
        core[1:],
        "other",
        pattern,
    ]


def _near_date(text: str) -> list[Value]:
    year = next(iter(re.findall(r"(?:19|20)\d\d", text)), "2015")
    found = [
        text,
        f"{year}-06-15",
        f"{int(year) + 1}-01-01",
        f"{int(year) - 1}-12-31",
        f"{year}-01-01",
        f"{year}-12-31",
    ]
    if re.fullmatch(r"\d\d", text):
        found += [f"2015-{text}-10", f"2016-01-{text}"]
    return found


def stored(value: Value, affinity: str) -> Value:
    """The value as a column of that affinity keeps it."""
    if affinity == "TEXT" and isinstance(value, int | float):
        return str(value)
    if affinity in ("INTEGER", "REAL", "NUMERIC") and isinstance(value, str) and NUMBER.fullmatch(value):
        return float(value) if "." in value else int(value)
    return value


def holds(condition: Condition, value: Value, affinity: str) -> bool:
    """Whether a stored value meets a condition, by SQLite's rules for comparing."""
    constants = [stored(constant, affinity) for constant in condition.constants]
    value = stored(value, affinity)
    operator = condition.operator
    if operator is exp.Is or value is None or None in constants:
        return value in constants
    if operator is exp.Like:
        return any(_like(str(constant), str(value)) for constant in constants)
    if operator in (exp.EQ, exp.In):
        return value in constants
    ranks = [_rank(constant) for constant in constants]
    if operator is exp.NEQ:
        return _rank(value) not in ranks
    if operator is exp.Between:
        return ranks[0] <= _rank(value) <= ranks[-1]
    if operator in (exp.LT, exp.LTE):
        return _rank(value) < ranks[0] or operator is exp.LTE and _rank(value) == ranks[0]
    return _rank(value) > ranks[0] or operator is exp.GTE and _rank(value) == ranks[0]


def _rank(value: Value) -> tuple:
    """SQLite sorts numbers before texts."""
    return (isinstance(value, str), value)


def _like(pattern: str, text: str) -> bool:
    parts = (".*" if c == "%" else "." if c == "_" else re.escape(c) for c in pattern)
    return re.fullmatch("".join(parts), text, re.IGNORECASE | re.DOTALL) is not None
