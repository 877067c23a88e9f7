"""What a gold query returns on made databases, and whether a prediction returns the same.

Sound about order: rows that tie under gold's ORDER BY may come in any order, and of rows that tie at its LIMIT
any may be returned. What depends on the order in which the tables happen to hold their rows is not compared.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlglot import exp

from steps.text2sql.gold_query import parse_query
from steps.text2sql.sql_execution import MadeDatabase, QueryError, Row, run_queries

RELATIVE_TOLERANCE = 1e-9
# More columns than these are only compared in gold's order.
MOST_PERMUTED_COLUMNS = 5


@dataclass(frozen=True)
class Block:
    """Rows of which `taken`, in any order, come next: all of them, or some where a LIMIT cuts a tie."""

    rows: tuple[Row, ...]
    taken: int


@dataclass(frozen=True)
class Answer:
    """What gold returns on one database; only `columns` are compared where others are a matter of luck."""

    database: MadeDatabase
    blocks: tuple[Block, ...]
    width: int = 0
    columns: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """Rows that gold returns."""
        return sum(block.taken for block in self.blocks)

    def matches(self, found: Sequence[Row]) -> bool:
        """Whether a prediction's rows are an answer too."""
        if len(found) != self.length:
            return False
        if self.columns is not None:
            found = [tuple(row[i] for i in self.columns) for row in found]
        start = 0
        for block in self.blocks:
            if not _is_part(found[start : start + block.taken], block.rows):
                return False
            start += block.taken
        return True


def _is_part(found: Sequence[Row], rows: Sequence[Row]) -> bool:
    """Whether each found row is one of the rows, none more often than there."""
    if not Counter(found) - Counter(rows):
        return True
    if not any(isinstance(value, float) for row in found for value in row):
        return False
    left = list(rows)
    for row in found:
        match = next((i for i, other in enumerate(left) if _is_close(row, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _is_close(row: Row, other: Row) -> bool:
    return len(row) == len(other) and all(
        math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE)
        if isinstance(a, int | float) and isinstance(b, int | float)
        else a == b
        for a, b in zip(row, other, strict=True)
    )


def _depends_on_storage(tree: exp.Expression) -> bool:
    """Whether the order of the tables' rows may show: in a LIMIT, or in a value taken from any row of a group."""
    if tree.find(exp.Limit, exp.Group, exp.Window, exp.GroupConcat, exp.Anonymous, exp.Distinct):
        return True
    return any(
        any(p.find(exp.AggFunc) for p in select.expressions)
        and not all(p.find(exp.AggFunc) for p in select.expressions)
        for select in tree.find_all(exp.Select)
    )


class GoldQuery:
    """A gold query with the further queries that show its ties."""

    def __init__(self, text: str) -> None:
        self.text = text
        tree = parse_query(text)
        self._keyed = _keyed(tree) if tree is not None else None
        self._is_stable = tree is not None and not _depends_on_storage(tree)
        self._is_ordered = tree is not None and tree.args.get("order") is not None
        self._inner = [
            keyed
            for node in (tree.find_all(exp.Query) if tree is not None else ())
            if node is not tree and node.args.get("limit") and (keyed := _keyed(node))
        ]
        names = [p.alias_or_name or p.sql() for p in tree.selects] if isinstance(tree, exp.Query) else []
        self.has_names = len(set(names)) == len(names)

    def answer(self, database: MadeDatabase, *, timeout_seconds: float) -> Answer | None:
        """What gold returns; None where a LIMIT inside of it cuts a tie, so that it could return other things.

        Raises:
            QueryError: gold returns no result, or the database cannot be made.
        """
        further = [*([self._keyed] if self._keyed else []), *self._inner]
        results = run_queries(
            database, [self.text, *(k.text for k in further)], timeout_seconds=timeout_seconds
        )
        own, *rest = results
        if isinstance(own, QueryError):
            raise own
        keyed = rest.pop(0) if self._keyed else None
        if any(
            not isinstance(r, QueryError) and k.cuts_a_tie(r) for k, r in zip(self._inner, rest, strict=True)
        ):
            return None
        return self._stable(database, own, self._blocks(own, keyed), timeout_seconds)

    def _blocks(self, own: list[Row], keyed: list[Row] | QueryError | None) -> tuple[Block, ...]:
        if not self._is_ordered:
            return (Block(tuple(own), len(own)),)
        if self._keyed and isinstance(keyed, list):
            blocks = self._keyed.blocks(keyed)
            if Answer(None, blocks).matches(own):
                return blocks
        return tuple(Block((row,), 1) for row in own)

    def _stable(
        self, database: MadeDatabase, own: list[Row], blocks: tuple[Block, ...], timeout_seconds: float
    ) -> Answer:
        """The answer, or what is left of it when the tables hold their rows the other way round."""
        width = len(own[0]) if own else 0
        answer = Answer(database, blocks, width)
        if self._is_stable:
            return answer
        turned = MadeDatabase(database.context, {t: rows[::-1] for t, rows in database.rows.items()})
        (other,) = run_queries(turned, [self.text], timeout_seconds=timeout_seconds)
        if isinstance(other, QueryError) or answer.matches(other):
            return answer
        stable = tuple(
            i for i in range(width) if Counter(row[i] for row in own) == Counter(row[i] for row in other)
        )
        left = tuple(tuple(row[i] for i in stable) for row in own)
        if len(own) != len(other) or Counter(left) != Counter(tuple(r[i] for i in stable) for r in other):
            return None
        return Answer(database, (Block(left, len(left)),), width, stable)


@dataclass(frozen=True)
class _Keyed:
    """A query with its LIMIT taken away and the keys of its ORDER BY among its columns."""

    text: str
    keys: tuple[int, ...]
    appended: int
    limit: int | None
    offset: int

    def blocks(self, rows: Sequence[Row]) -> tuple[Block, ...]:
        """The rows that the LIMIT leaves, those that tie in one block."""
        end = len(rows) if self.limit is None else min(len(rows), self.offset + self.limit)
        found, start = [], 0
        for _, tied in itertools.groupby(rows, key=self._key):
            block = tuple(tied)
            stop = start + len(block)
            taken = min(stop, end) - max(start, self.offset)
            if taken > 0:
                cut = len(block[0]) - self.appended
                found.append(Block(tuple(row[:cut] for row in block), taken))
            start = stop
        return tuple(found)

    def cuts_a_tie(self, rows: Sequence[Row]) -> bool:
        """Whether the LIMIT keeps some of several different rows that tie."""
        return any(block.taken < len(block.rows) and len(set(block.rows)) > 1 for block in self.blocks(rows))

    def _key(self, row: Row) -> tuple[object, ...]:
        return tuple(row[i] for i in self.keys)


def _keyed(query: exp.Expression) -> _Keyed | None:
    """None where the query has no ORDER BY, or its keys cannot be shown."""
    order = query.args.get("order")
    limit, offset = _number(query.args.get("limit"), None), _number(query.args.get("offset"), 0)
    if order is None or limit is NotImplemented or offset is NotImplemented:
        return None
    bare = query.copy()
    bare.set("limit", None)
    bare.set("offset", None)
    outputs = bare.selects
    places, extra = [], []
    for ordered in bare.args["order"].expressions:
        place = _output(ordered.this, outputs)
        if place is None:
            extra.append(_without_collation(ordered.this))
        places.append(place)
    if extra and (not isinstance(bare, exp.Select) or bare.args.get("distinct")):
        return None
    appended = iter(range(-len(extra), 0))
    keys = tuple(next(appended) if place is None else place for place in places)
    if extra:
        bare.set("expressions", [*outputs, *(exp.alias_(e.copy(), f"key_{i}") for i, e in enumerate(extra))])
    return _Keyed(bare.sql("sqlite"), keys, len(extra), limit, offset)


def _output(key: exp.Expression, outputs: Sequence[exp.Expression]) -> int | None:
    """The place of the output that a key of ORDER BY names, by number, by alias or by writing it again."""
    if isinstance(key, exp.Literal) and not key.is_string:
        return int(key.this) - 1
    if any(output.is_star for output in outputs):
        return None
    names = [output.alias.lower() for output in outputs]
    if isinstance(key, exp.Column) and not key.table and key.name.lower() in names:
        return names.index(key.name.lower())
    texts = [output.unalias().sql("sqlite").lower() for output in outputs]
    return texts.index(key.sql("sqlite").lower()) if key.sql("sqlite").lower() in texts else None


def _without_collation(key: exp.Expression) -> exp.Expression:
    """COLLATE NOCASE ties what differs in case only."""
    return exp.Lower(this=key.this.copy()) if isinstance(key, exp.Collate) else key


def _number(clause: exp.Expression | None, missing: int | None) -> int | None:
    if clause is None:
        return missing
    value = clause.expression
    return int(value.this) if isinstance(value, exp.Literal) and not value.is_string else NotImplemented


class Comparison:
    """Compares a prediction's rows with gold's, database by database.

    Columns may come in another order, if it is the same one on all databases and gold's columns have different
    names: then the header of the result tells them apart. Names themselves are not compared.
    """

    def __init__(self, *, may_permute: bool) -> None:
        self._may_permute = may_permute
        self._orders: list[tuple[int, ...]] | None = None

    def agrees(self, answer: Answer, found: Sequence[Row]) -> bool:
        """Whether the rows match on this database, in an order of columns that matched on those before."""
        if len(found) != answer.length:
            return False
        if not found:
            return True
        if len(found[0]) != answer.width:
            return False
        if self._orders is None:
            self._orders = list(self._possible_orders(answer.width))
        self._orders = [
            order for order in self._orders if answer.matches([tuple(row[i] for i in order) for row in found])
        ]
        return bool(self._orders)

    def _possible_orders(self, width: int) -> Iterator[tuple[int, ...]]:
        if self._may_permute and width <= MOST_PERMUTED_COLUMNS:
            return itertools.permutations(range(width))
        return iter([tuple(range(width))])
