"""What a gold query returns on databases, and whether a prediction returns the same.

Sound about order: rows that tie under gold's ORDER BY may come in any order, and of rows that tie at its
LIMIT any may be returned. What depends on SQLite's choice of a row from a group is not compared, nor, on made
databases, what depends on the order in which tables happen to hold their rows.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlglot
from sqlglot import exp

from steps.text2sql.gold_query import parse_query
from steps.text2sql.order_keys import Block, keyed_query
from steps.text2sql.sql_execution import Database, MadeDatabase, QueryError, Row, run_queries

RELATIVE_TOLERANCE = 1e-9
# More columns than these are only compared in gold's order.
MOST_PERMUTED_COLUMNS = 5


@dataclass(frozen=True)
class Answer:
    """What gold returns on one database; only `columns` are compared where others are a matter of luck."""

    database: Database
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
            found = _part(found, self.columns)
        start = 0
        for block in self.blocks:
            if not _is_part(found[start : start + block.taken], block.rows):
                return False
            start += block.taken
        return True


def _is_part(found: Sequence[Row], rows: Sequence[Row]) -> bool:
    """Whether each found row is one of the rows, none more often than there."""
    found, rows = _unpaired(found, rows, key=tuple)
    if not any(isinstance(value, float) for row in found for value in row):
        return not found
    found, rows = _unpaired(found, rows, key=_rounded)  # nearly all: the rest is searched for one by one
    for row in found:
        match = next((i for i, other in enumerate(rows) if _is_close(row, other)), None)
        if match is None:
            return False
        del rows[match]
    return True


def _unpaired(
    found: Sequence[Row], rows: Sequence[Row], *, key: Callable[[Row], Row]
) -> tuple[list[Row], list[Row]]:
    """What is left of both without pairs of rows with the same key."""
    return _without(found, Counter(map(key, rows)), key), _without(rows, Counter(map(key, found)), key)


def _without(rows: Sequence[Row], others: Counter[Row], key: Callable[[Row], Row]) -> list[Row]:
    left = []
    for row in rows:
        if others[key(row)] > 0:
            others[key(row)] -= 1
        else:
            left.append(row)
    return left


def _rounded(row: Row) -> Row:
    return tuple(float(f"{value:.10e}") if isinstance(value, float) else value for value in row)


def _is_close(row: Row, other: Row) -> bool:
    return len(row) == len(other) and all(
        math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE)
        if isinstance(a, int | float) and isinstance(b, int | float)
        else a == b
        for a, b in zip(row, other, strict=True)
    )


def _depends_on_storage(tree: exp.Expression) -> bool:
    """Whether the order of the tables' rows may show: at a LIMIT, or in a value from any row of a group."""
    if tree.find(exp.Limit, exp.Group, exp.Window, exp.GroupConcat, exp.Anonymous):
        return True
    return any(
        any(p.find(exp.AggFunc) for p in select.expressions)
        and not all(p.find(exp.AggFunc) for p in select.expressions)
        for select in tree.find_all(exp.Select)
    )


def _with_chosen_rows(tree: exp.Expression, choice: str) -> str | None:
    """The query with `choice` in place of each column that SQLite takes from any row of a group.

    None where there is no such column. Beside a lone MIN or MAX there is none: its row is taken
    (https://sqlite.org/lang_select.html#bareagg).
    """
    tree, is_changed = tree.copy(), False
    for select in tree.find_all(exp.Select):
        for column in _bare_columns(select):
            column.replace(sqlglot.parse_one(choice.replace("?", column.sql("sqlite")), read="sqlite"))
            is_changed = True
    return tree.sql("sqlite") if is_changed else None


def _bare_columns(select: exp.Select) -> list[exp.Column]:
    group = select.args.get("group")
    parts = [*select.expressions, select.args.get("having"), select.args.get("order")]
    own = [n for part in parts if part for n in part.walk() if n.parent_select is select]
    aggregates = [node for node in own if isinstance(node, exp.AggFunc) and not _is_over_window(node)]
    has_lone_extreme = sum(isinstance(node, exp.Min | exp.Max) for node in aggregates) == 1
    if has_lone_extreme or not (group or aggregates):
        return []
    known = {p.alias.lower() for p in select.expressions if p.alias}
    known |= {column.name.lower() for column in (group.find_all(exp.Column) if group else ())}
    return [
        node
        for node in own
        if isinstance(node, exp.Column)
        and not isinstance(node.this, exp.Star)
        and node.name.lower() not in known
        and not node.find_ancestor(exp.AggFunc)
    ]


def _is_over_window(aggregate: exp.AggFunc) -> bool:
    parent = aggregate.parent
    return isinstance(parent.parent if isinstance(parent, exp.Filter) else parent, exp.Window)


# The smallest value of a group, NULL before all, and the largest: the same where any row will do.
CHOICES = ("CASE WHEN COUNT(?) = COUNT(*) THEN MIN(?) END", "MAX(?)")


class GoldQuery:
    """A gold query with the further queries that show what in its result is a matter of luck."""

    def __init__(self, text: str) -> None:
        tree = parse_query(text)
        self.text = text
        self._is_ordered = tree is not None and tree.args.get("order") is not None
        self._is_settled = tree is not None and not _depends_on_storage(tree)
        self._keyed = keyed_query(tree) if tree is not None else None
        queries = [node for node in tree.find_all(exp.Query) if node is not tree] if tree is not None else []
        self._inner = [k for node in queries if node.args.get("limit") and (k := keyed_query(node))]
        chosen = [_with_chosen_rows(tree, choice) for choice in CHOICES] if tree is not None else []
        self._chosen = [query for query in chosen if query]
        outputs = tree.selects if isinstance(tree, exp.Query) else []
        names = [p.alias or (p.name if isinstance(p, exp.Column) else p.sql()) for p in outputs]
        self.may_permute = len(set(names)) == len(names)

    def answer_from(self, file: Path, *, timeout_seconds: float) -> Answer:
        """What gold returns from a database of its own contents, whose rows have only the order they have.

        Raises:
            QueryError: gold returns no result, or the database cannot be opened.
        """
        answer, own, others, is_lucky = self._run(file, timeout_seconds)
        return answer if is_lucky else _settled(answer, own, others) or answer

    def answer(self, database: MadeDatabase, *, timeout_seconds: float) -> Answer | None:
        """What gold returns; None where so much of it is a matter of luck that nothing can be compared.

        Raises:
            QueryError: gold returns no result, or the database cannot be made.
        """
        answer, own, others, is_lucky = self._run(database, timeout_seconds)
        if is_lucky:
            return None
        if self._is_settled:
            return answer
        turned = MadeDatabase(database.context, {t: rows[::-1] for t, rows in database.rows.items()})
        (other,) = run_queries(turned, [self.text], timeout_seconds=timeout_seconds)
        return _settled(answer, own, [*others, *_results_but(answer, [other])])

    def _run(
        self, database: Database, timeout_seconds: float
    ) -> tuple[Answer, list[Row], list[list[Row]], bool]:
        """The answer, its rows, other results that gold could have, and whether an inner LIMIT cuts a tie."""
        keyed = [self._keyed] if self._keyed else []
        queries = [self.text, *(k.text for k in (*keyed, *self._inner)), *self._chosen]
        own, *further = run_queries(database, queries, timeout_seconds=timeout_seconds)
        if isinstance(own, QueryError):
            raise own
        by_keys = further.pop(0) if keyed else None
        inner = [further.pop(0) for _ in self._inner]
        is_lucky = any(
            isinstance(r, list) and k.cuts_a_tie(r) for k, r in zip(self._inner, inner, strict=True)
        )
        answer = Answer(database, self._blocks(own, by_keys), width=len(own[0]) if own else 0)
        return answer, own, _results_but(answer, further), is_lucky

    def _blocks(self, own: list[Row], by_keys: list[Row] | QueryError | None) -> tuple[Block, ...]:
        if not self._is_ordered:
            return (Block(tuple(own), len(own)),)
        if self._keyed and isinstance(by_keys, list):
            blocks = self._keyed.blocks(by_keys)
            if Answer(None, blocks).matches(own):
                return blocks
        return tuple(Block((row,), 1) for row in own)


def _results_but(answer: Answer, results: Sequence[list[Row] | QueryError]) -> list[list[Row]]:
    return [rows for rows in results if isinstance(rows, list) and not answer.matches(rows)]


def _settled(answer: Answer, own: list[Row], others: Sequence[list[Row]]) -> Answer | None:
    """The answer, or the columns of it that are the same in all other results that gold could have."""
    if not others:
        return answer
    if any(len(other) != len(own) for other in others):
        return None
    columns = tuple(i for i in range(answer.width) if all(_same_part(own, other, (i,)) for other in others))
    if not all(_same_part(own, other, columns) for other in others):
        return None
    blocks = tuple(Block(_part(block.rows, columns), block.taken) for block in answer.blocks)
    tied = Answer(answer.database, blocks, answer.width, columns)
    if all(tied.matches(rows) for rows in (own, *others)):
        return tied
    left = _part(own, columns)
    return Answer(answer.database, (Block(left, len(left)),), answer.width, columns)


def _same_part(own: Sequence[Row], other: Sequence[Row], columns: tuple[int, ...]) -> bool:
    return _is_part(_part(other, columns), _part(own, columns))


def _part(rows: Sequence[Row], columns: tuple[int, ...]) -> tuple[Row, ...]:
    return tuple(tuple(row[i] for i in columns) for row in rows)


class Comparison:
    """Compares a prediction's rows with gold's, database by database.

    Columns may come in another order, as in Zhong et al., if it is the same one on all databases and gold's
    columns have different names, so that a reader can tell them apart. Names themselves are not compared.
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
