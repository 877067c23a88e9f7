"""Small databases made for a gold query, so that a query that means something else returns something else.

In the spirit of test suites for SQL (Zhong, Yu, Klein 2020, https://arxiv.org/abs/2010.02840), but from the
context and the gold query alone: its constants occur with near misses, each subset of its conditions holds
for some row, columns that it joins share values. A prediction has no part in it, so all are judged alike.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from steps.text2sql.column_values import (
    constants_of,
    holds,
    near_misses,
    ordinary_dates,
    ordinary_numbers,
    ordinary_words,
    rank,
    stored,
    told_apart,
)
from steps.text2sql.gold_query import (
    Column,
    ColumnType,
    Needs,
    Table,
    Value,
    read_needs,
    read_tables,
    without_checks,
)
from steps.text2sql.sql_execution import MadeDatabase, Row

DATABASES = 24
# More subsets of conditions than these are sampled.
MOST_SUBSETS = 32
MOST_ROWS = 60

# Values to choose from, those that meet the same conditions together; those that meet most come first.
Choices = list[list[Value]]


class Style(NamedTuple):
    """How the rows of one database are drawn.

    `plan` says which conditions rows meet: `subsets` has each subset of them, `sweep` each near miss of one
    condition where the others are met, `misses_above` and `misses_below` those that do not meet it, beside a
    row that meets all and has the smallest or largest values in the other columns; `chance` has neither. In
    further rows, `rows` in all or beside the misses, all are met with the probability `met`.

    `keys` ordinary values are shared by columns that are compared, `variety` are in any other column; `nulls`
    is a probability. `is_keyed`: one of the compared columns is unique. `has_gaps`: each column draws from a
    part of its values. `is_skewed`: some values are drawn more often. `has_copies`: rows repeat.
    """

    plan: str
    rows: int
    met: float
    keys: int
    variety: int
    nulls: float
    is_keyed: bool
    has_gaps: bool
    is_skewed: bool
    has_copies: bool

    @property
    def has_misses(self) -> bool:
        """Whether nearly all rows of a table miss a condition."""
        return self.plan.startswith("misses")


STYLES = (
    Style("subsets", 12, 0.5, 4, 12, 0.0, True, False, False, False),
    Style("misses_above", 1, 1.0, 20, 60, 0.0, True, True, False, False),
    Style("chance", 8, 0.9, 3, 3, 0.1, False, False, True, True),
    Style("subsets", 16, 0.6, 5, 6, 0.1, True, False, True, False),
    Style("chance", 10, 0.8, 3, 20, 0.2, True, True, True, False),
    Style("misses_below", 1, 1.0, 8, 60, 0.1, False, False, False, False),
    Style("chance", 6, 0.7, 2, 1, 0.0, False, True, True, False),
    Style("subsets", 20, 0.4, 6, 4, 0.2, True, True, True, True),
    Style("misses_above", 1, 1.0, 14, 60, 0.0, True, False, False, False),
    Style("chance", 14, 0.7, 20, 20, 0.1, False, True, True, False),
    Style("sweep", 10, 0.9, 3, 5, 0.1, True, False, True, True),
    Style("chance", 9, 0.95, 10, 8, 0.5, True, False, True, False),
)


# Beside a table whose rows miss a condition, the rows of others meet theirs, or none would be joined.
ALL_MET = Style("chance", 12, 1.0, 20, 60, 0.0, True, False, False, False)


def make_databases(context: str, gold: str, *, seed: int = 0, count: int = DATABASES) -> list[MadeDatabase]:
    """Databases for one gold query: the same ones for the same arguments, on every machine.

    Raises:
        QueryError: the context does not parse. Whether it executes shows when the databases are opened.
    """
    tables = read_tables(context)
    rng = random.Random(f"{seed}\n{context}\n{gold}")
    maker = _Maker(tables, read_needs(tables, gold), rng)
    styles = itertools.islice(itertools.cycle(STYLES), count)
    created = without_checks(context)
    return [MadeDatabase(created, maker.rows(style)) for style in styles]


class _Maker:
    """Draws rows for the tables of one context."""

    def __init__(self, tables: dict[str, Table], needs: Needs, rng: random.Random) -> None:
        self._tables, self._needs, self._rng = tables, needs, rng
        self._columns = [Column(t, name) for t, table in tables.items() for name in table.columns]
        self._families = _families(self._columns, needs)
        self._near = {family: self._near_misses(family) for family in self._families.values()}

    def _type(self, column: Column) -> ColumnType:
        return self._tables[column.table].columns[column.name]

    def _near_misses(self, family: tuple[Column, ...]) -> list[Value]:
        return [v for c in family for v in near_misses(c, self._needs, self._type(c).affinity)]

    def rows(self, style: Style) -> dict[str, list[Row]]:
        """Rows of all tables for one database."""
        uniques = self._choose_uniques(style)
        pools = {family: self._pool(family, style) for family in dict.fromkeys(self._families.values())}
        conditioned = sorted({column.table for column in self._needs.conditions}) or [""]
        missed = self._rng.choice(conditioned)
        return {
            table.name: self._table_rows(
                name, pools, uniques, style if not style.has_misses or name == missed else ALL_MET
            )
            for name, table in self._tables.items()
        }

    def _choose_uniques(self, style: Style) -> set[Column]:
        """Columns that identify their rows: by constraint, and one of those that are compared.

        Where gold lists columns beside the one that it groups by, that one identifies what is listed.
        """
        uniques = {c for c in self._columns if self._type(c).is_unique}
        if not style.is_keyed:
            return uniques
        listed = {c.table for c in self._needs.listed - self._needs.grouped}
        for column in sorted(self._needs.grouped):
            keys = [c for c in self._families[column] if c.table in listed]
            if keys and self._rng.random() < 0.8:
                uniques.add(self._rng.choice(keys))
        for family in dict.fromkeys(self._families.values()):
            if len({c.table for c in family}) > 1 and not uniques & set(family):
                uniques.add(self._rng.choice(family))
        return uniques

    def _pool(self, family: tuple[Column, ...], style: Style) -> list[Value]:
        """Values that the columns of a family draw from."""
        size = style.keys if len(family) > 1 else style.variety
        if self._needs.rows_to_skip:
            size = max(size, self._needs.rows_to_skip + 2)
        return list(dict.fromkeys(self._near[family] + self._ordinary(family)[:size]))

    def _ordinary(self, family: tuple[Column, ...]) -> list[Value]:
        types = [self._type(c) for c in family]
        number = self._columns.index(family[0])
        if self._needs.dates & set(family) or any(kind.is_date for kind in types):
            return ordinary_dates(self._rng)
        is_number = bool(self._needs.numeric & set(family)) or any(
            kind.affinity not in ("TEXT", "BLOB") for kind in types
        )
        # Texts may be numbers, which sort otherwise than numbers do.
        if is_number or self._rng.random() < 0.25:
            is_real = any(kind.affinity == "REAL" for kind in types)
            return ordinary_numbers(self._rng, 13 * number, with_fractions=is_real)
        return ordinary_words(self._rng, family[0].name)

    def _table_rows(
        self, table: str, pools: dict[tuple, list[Value]], uniques: set[Column], style: Style
    ) -> list[Row]:
        columns = [Column(table, name) for name in self._tables[table].columns]
        allowed = [self._allowed(c, pools[self._families[c]]) for c in columns]
        choices = [self._choices(c, pool, style) for c, pool in zip(columns, allowed, strict=True)]
        plans = self._plans(columns, choices, style)
        drawn = [
            self._unique_values(c, [plan[i] for plan in plans], allowed[i])
            if c in uniques
            else self._values(c, [plan[i] for plan in plans], style)
            for i, c in enumerate(columns)
        ]
        if style.has_misses:
            self._put_apart([d for c, d in zip(columns, drawn, strict=True) if self._is_free(c)], style)
        rows = list(zip(*drawn, strict=True))
        if style.has_copies:
            rows += self._rng.sample(rows, min(3, len(rows)))
        self._rng.shuffle(rows)
        return _without_clashes(self._tables[table], rows)

    def _is_free(self, column: Column) -> bool:
        return column not in self._needs.conditions and len(self._families[column]) == 1

    def _put_apart(self, drawn: list[list[Value]], style: Style) -> None:
        """Gives the last row, which meets all conditions, the extreme value of each column.

        A row that a wrong condition lets in then changes MIN, MAX and the first of an order.
        """
        extreme = min if style.plan == "misses_above" else max
        for values in drawn:
            known = [value for value in values if value is not None]
            if known:
                place = values.index(extreme(known, key=rank))
                values[-1], values[place] = values[place], values[-1]

    def _allowed(self, column: Column, pool: list[Value]) -> list[Value]:
        kind = self._type(column)
        if kind.is_required:
            pool = [value for value in pool if value is not None]
        if kind.is_rowid:
            pool = [value for value in pool if isinstance(value, int)] or list(range(1, MOST_ROWS))
        return pool

    def _choices(self, column: Column, pool: list[Value], style: Style) -> Choices:
        kind, conditions = self._type(column), self._needs.conditions.get(column, [])
        if style.has_gaps and not conditions:
            pool = self._rng.sample(pool, math.ceil(0.6 * len(pool)))
        asked = [(one.operator, constants_of(one, kind.affinity)) for one in conditions]
        found: dict[tuple[bool, ...], list[Value]] = {}
        for value in pool:
            kept = stored(value, kind.affinity)
            met = tuple(holds(operator, constants, kept) for operator, constants in asked)
            found.setdefault(met, []).append(value)
        return [found[met] for met in sorted(found, key=lambda met: (-sum(met), met))]

    def _plans(self, columns: list[Column], choices: list[Choices], style: Style) -> list[list[list[Value]]]:
        """For each row the values to choose from, by column."""
        plans: list[list[list[Value]]] = []
        count = self._row_count(style)
        if style.has_misses:
            plans = self._sweep(columns, choices, first=1)
            count += len(plans)
        elif style.plan == "sweep":
            plans = self._sweep(columns, choices, first=0)
        elif style.plan == "subsets" and 1 < math.prod(map(len, choices)) <= MOST_SUBSETS:
            plans = [list(plan) for plan in itertools.product(*choices)]
        plans += [self._chance(choices, style) for _ in range(count - len(plans))]
        return plans

    def _sweep(self, columns: list[Column], choices: list[Choices], *, first: int) -> list[list[list[Value]]]:
        plans = []
        for i, column in enumerate(columns):
            if column in self._needs.conditions:
                for value in itertools.chain(*choices[i][first:]):
                    # Where an OR would let a row in all the same, no condition is met.
                    is_unmet = first and self._needs.has_alternatives and self._rng.random() < 0.5
                    plan = [choice[-1] if is_unmet else self._most_met(choice) for choice in choices]
                    plan[i] = [value]
                    plans.append(plan)
        return self._rng.sample(plans, min(len(plans), MOST_ROWS))

    def _chance(self, choices: list[Choices], style: Style) -> list[list[Value]]:
        all_met = self._rng.random() < style.met
        return [
            self._most_met(choice) if all_met or self._rng.random() < style.met else self._rng.choice(choice)
            for choice in choices
        ]

    def _most_met(self, choice: Choices) -> list[Value]:
        """Values that meet conditions of a column: one of the ways where it cannot meet all."""
        return choice[0] if len(choice) < 3 else self._rng.choice(choice[:-1])

    def _row_count(self, style: Style) -> int:
        """Rows enough to cut by a LIMIT, and to make groups on both sides of a HAVING COUNT."""
        if style.has_misses:
            return min(style.rows + self._needs.rows_to_skip, MOST_ROWS)
        sizes = [3 * size for size in self._needs.group_sizes if 0 < size <= MOST_ROWS]
        return min(max(style.rows, 5, self._needs.rows_to_skip + 3, *sizes), 3 * MOST_ROWS)

    def _values(self, column: Column, choices: Choices, style: Style) -> list[Value]:
        values = [self._pick(choice, style) for choice in choices]
        is_without_nulls = column in self._needs.keys and self._rng.random() < 0.8
        if self._type(column).is_required or is_without_nulls:
            return values
        return [None if self._rng.random() < style.nulls else value for value in values]

    def _pick(self, values: Sequence[Value], style: Style) -> Value:
        if style.is_skewed:
            return self._rng.choices(values, weights=[1 / (k + 1) for k in range(len(values))])[0]
        return self._rng.choice(values)

    def _unique_values(self, column: Column, choices: Choices, pool: list[Value]) -> list[Value]:
        """Different values, those that a row may choose from where some are left."""
        ordinary = self._allowed(column, self._ordinary(self._families[column]))
        spare = [value for value in ordinary if value not in pool]
        free = dict.fromkeys(self._rng.sample(pool, len(pool)) + spare)
        found = []
        for choice in choices:
            left = [value for value in choice if value in free]
            value = self._rng.choice(left) if left else next(iter(free), None)
            free.pop(value, None)
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
    """The rows that keep the table's UNIQUE and PRIMARY KEY constraints and unique indexes."""
    names = list(table.columns)
    keys = [(n,) for n in names if table.columns[n].is_unique] + list(table.unique_together)
    places = [[names.index(name) for name in key] for key in keys]
    seen: set[tuple] = set()
    kept = []
    for row in rows:
        told = [told_apart(value, kind) for value, kind in zip(row, table.columns.values(), strict=True)]
        marks = {(i, *(told[p] for p in place)) for i, place in enumerate(places)}
        if not marks & seen:
            kept.append(row)
            seen |= marks
    return kept
