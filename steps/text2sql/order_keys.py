"""Which rows of a query tie under its ORDER BY, found by asking for the keys too."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from sqlglot import exp

from steps.text2sql.sql_execution import Row


@dataclass(frozen=True)
class Block:
    """Rows of which `taken`, in any order, come next: all of them, or some where a LIMIT cuts a tie."""

    rows: tuple[Row, ...]
    taken: int


@dataclass(frozen=True)
class KeyedQuery:
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


def keyed_query(query: exp.Expression) -> KeyedQuery | None:
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
            extra.append(_without_aliases(_without_collation(ordered.this), outputs))
        places.append(place)
    if extra and not isinstance(bare, exp.Select):
        return None
    appended = iter(range(-len(extra), 0))
    keys = tuple(next(appended) if place is None else place for place in places)
    if extra:
        bare.set("expressions", [*outputs, *(exp.alias_(e.copy(), f"key_{i}") for i, e in enumerate(extra))])
    return KeyedQuery(bare.sql("sqlite"), keys, len(extra), limit, offset)


def _output(key: exp.Expression, outputs: Sequence[exp.Expression]) -> int | None:
    """The place of the output that a key of ORDER BY names, by number, by alias or by writing it again."""
    number = _integer(key)
    if number is not None:
        return number - 1
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


def _without_aliases(key: exp.Expression, outputs: Sequence[exp.Expression]) -> exp.Expression:
    """A key in an output of its own, where the names of the others are not known."""
    named = {output.alias.lower(): output.unalias() for output in outputs if output.alias}

    def written_out(node: exp.Expression) -> exp.Expression:
        is_alias = isinstance(node, exp.Column) and not node.table and node.name.lower() in named
        return exp.paren(named[node.name.lower()].copy()) if is_alias else node

    return key.copy().transform(written_out)


def _number(clause: exp.Expression | None, missing: int | None) -> int | None:
    if clause is None:
        return missing
    number = _integer(clause.expression)
    return NotImplemented if number is None else number


def _integer(node: exp.Expression) -> int | None:
    if not isinstance(node, exp.Literal) or node.is_string:
        return None
    try:
        return int(node.this)
    except ValueError:  # 5.0, 1e1, or more digits than Python reads
        return None
