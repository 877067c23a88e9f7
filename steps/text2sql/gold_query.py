"""What a gold query says about the tables of its context: conditions, joined columns, sizes that matter.

Read from their parse trees. As in SQLite, a double-quoted name that is no column in reach is a constant.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from steps.text2sql.sql_execution import QueryError

Value = str | int | float | None

COMPARISONS = (exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Is)
PREDICATES = (*COMPARISONS, exp.Between, exp.In, exp.Like, exp.Glob)
ARITHMETIC = (exp.Sum, exp.Avg, exp.Add, exp.Sub, exp.Mul, exp.Div, exp.Mod, exp.Abs, exp.Round)
# How the other side sees a comparison: 5 < x is x > 5.
MIRRORED = {exp.GT: exp.LT, exp.GTE: exp.LTE, exp.LT: exp.GT, exp.LTE: exp.GTE}
DATE_FUNCTIONS = (exp.TimeToStr, exp.Date, exp.Time, exp.TsOrDsToTimestamp, exp.TsOrDsToDate, exp.Extract)
DATE_FUNCTION_NAMES = {"strftime", "julianday", "unixepoch", "datetime", "date", "time"}
GENERATED = (exp.ComputedColumnConstraint, exp.GeneratedAsIdentityColumnConstraint)
# SQLite takes these and sqlglot does not; which rows a table can hold is the same without them.
NOT_READ = re.compile(
    r"""\bON\s+CONFLICT\s+(?:ROLLBACK|ABORT|FAIL|IGNORE|REPLACE)\b
    | (?<=[\w"`\]])\s+(?:ASC|DESC)(?=\s*[,)])    # a column named desc has no name before it
    | (?<=\w)\[\d*\]
    | ,\s*WITHOUT\s+ROWID\b
    | \bWITHOUT\s+ROWID\b(?:\s*,)?""",
    re.IGNORECASE | re.VERBOSE,
)


# sqlglot underlines in its messages what it could not read.
UNDERLINED = re.compile(r"\x1b\[\d*m")
# Lengths of texts that are made for LENGTH, and what they are made of.
MOST_LETTERS, LETTERS = 100, "abcdefghijklmnopqrstuvwxyz" * 4


class Column(NamedTuple):
    """A column of a table, both in lower case."""

    table: str
    name: str


@dataclass(frozen=True)
class ColumnType:
    """What a column can hold: SQLite's affinity, and whether constraints forbid NULLs or repeated values.

    `collation` says which texts count as repeated, `is_rowid` that it may be the rowid: integers only.
    """

    affinity: str
    is_unique: bool = False
    is_required: bool = False
    is_date: bool = False
    collation: str = "BINARY"
    is_rowid: bool = False


@dataclass(frozen=True)
class Table:
    """A table as the context creates it: its columns in order, and those that are unique together.

    Generated columns are left out: no row gives a value for them.
    """

    name: str
    columns: dict[str, ColumnType]
    unique_together: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Condition:
    """A comparison of a column with constants, such as `age BETWEEN 3 AND 5`."""

    operator: type[exp.Expression]
    constants: tuple[Value, ...]


@dataclass
class Needs:
    """What rows must show for a gold query to be told from its neighbours.

    `linked` are sets of columns that are compared with each other or meet in a set operation, `keys` those of
    them that are compared, `listed` stand in SELECT as they are; `has_alternatives`: there is an OR;
    `group_sizes` are constants that a COUNT is compared with; `rows_to_skip` is LIMIT plus OFFSET.
    """

    constants: dict[Column, list[Value]] = field(default_factory=lambda: defaultdict(list))
    conditions: dict[Column, list[Condition]] = field(default_factory=lambda: defaultdict(list))
    linked: list[set[Column]] = field(default_factory=list)
    keys: set[Column] = field(default_factory=set)
    numeric: set[Column] = field(default_factory=set)
    dates: set[Column] = field(default_factory=set)
    grouped: set[Column] = field(default_factory=set)
    listed: set[Column] = field(default_factory=set)
    has_alternatives: bool = False
    group_sizes: list[int] = field(default_factory=list)
    rows_to_skip: int = 0

    def link(self, *columns: Column) -> None:
        """The columns share their values; joins the sets that they are in."""
        touched = [group for group in self.linked if group & set(columns)]
        self.linked = [group for group in self.linked if group not in touched]
        self.linked.append(set(columns).union(*touched))


def read_tables(context: str) -> dict[str, Table]:
    """The tables of a context by name in lower case.

    Raises:
        QueryError: the statements do not parse.
    """
    created = [statement for statement in _statements(context) if isinstance(statement, exp.Create)]
    schemas = [statement.this for statement in created if isinstance(statement.this, exp.Schema)]
    tables = {schema.this.name.lower(): _table(schema) for schema in schemas}
    for index in (s.this for s in created if isinstance(s.this, exp.Index) and s.args.get("unique")):
        table, params = index.args.get("table"), index.args.get("params")
        if table and params and table.name.lower() in tables:
            name = table.name.lower()
            tables[name] = _with_key(tables[name], params.args.get("columns") or [])
    return tables


def _statements(context: str) -> list[exp.Expression]:
    try:
        return [s for s in sqlglot.parse(NOT_READ.sub(" ", context), read="sqlite") if s]
    except (SqlglotError, RecursionError) as error:
        raise QueryError(f"context: {UNDERLINED.sub('', str(error))}") from error


def without_checks(context: str) -> str:
    """The statements without their CHECK constraints, which rows that are made may not meet."""
    if "check" not in context.lower():
        return context
    statements = _statements(context)
    for statement in statements:
        for check in list(statement.find_all(exp.CheckColumnConstraint)):
            is_of_column = isinstance(check.parent, exp.ColumnConstraint)
            (check.parent if is_of_column else check).pop()
    return "; ".join(statement.sql("sqlite") for statement in statements)


def _table(schema: exp.Schema) -> Table:
    columns, constraints = {}, []
    for part in schema.expressions:
        if isinstance(part, exp.Constraint):
            constraints += part.expressions
        elif not isinstance(part, exp.ColumnDef | exp.Identifier):
            constraints.append(part)
        elif not any(isinstance(kind, GENERATED) for kind in _constraint_kinds(part)):
            columns[part.name.lower()] = _column_type(part)
    table = Table(schema.this.name, columns)
    for constraint in constraints:
        if isinstance(constraint, exp.PrimaryKey):
            table = _with_key(table, constraint.expressions, is_primary=True)
        elif isinstance(constraint, exp.UniqueColumnConstraint) and constraint.this:
            table = _with_key(table, constraint.this.expressions)
    return table


def _with_key(table: Table, parts: Sequence[exp.Expression], *, is_primary: bool = False) -> Table:
    """The table with a PRIMARY KEY, UNIQUE or unique index over these parts."""
    columns = dict(table.columns)
    names = []
    for part in parts:
        name = (part.find(exp.Identifier) or part).name.lower()
        if name in columns:
            names.append(name)
            kind = columns[name]
            collation = _collation(part) or kind.collation
            columns[name] = replace(kind, is_required=kind.is_required or is_primary, collation=collation)
    if len(names) > 1:
        together = (*table.unique_together, tuple(names))
        return replace(table, columns=columns, unique_together=together)
    for name in names:
        is_rowid = columns[name].is_rowid or is_primary and columns[name].affinity == "INTEGER"
        columns[name] = replace(columns[name], is_unique=True, is_rowid=is_rowid)
    return replace(table, columns=columns)


def _constraint_kinds(column: exp.Expression) -> list[exp.Expression | None]:
    return [constraint.args.get("kind") for constraint in column.args.get("constraints") or []]


def _collation(part: exp.Expression) -> str:
    """The collation that a column or a part of a key names, empty if none."""
    clause = part.find(exp.Collate, exp.CollateColumnConstraint)
    if clause is None:
        return ""
    return (clause.expression if isinstance(clause, exp.Collate) else clause.this).name.upper()


def _column_type(part: exp.Expression) -> ColumnType:
    declared = part.args["kind"].sql().upper() if part.args.get("kind") else ""
    kinds = _constraint_kinds(part)
    is_key = any(isinstance(kind, exp.PrimaryKeyColumnConstraint) for kind in kinds)
    is_unique = is_key or any(isinstance(kind, exp.UniqueColumnConstraint) for kind in kinds)
    is_not_null = any(
        isinstance(k, exp.NotNullColumnConstraint) and not k.args.get("allow_null") for k in kinds
    )
    is_date = declared.startswith(("DATE", "TIMESTAMP"))
    affinity = _affinity(declared) if declared else "BLOB"
    return ColumnType(
        affinity,
        is_unique=is_unique,
        is_required=is_key or is_not_null,
        is_date=is_date,
        collation=_collation(part) or "BINARY",
        is_rowid=is_key and affinity == "INTEGER",
    )


def _affinity(declared: str) -> str:
    """SQLite's rules in SQLite's order (https://sqlite.org/datatype3.html, 3.1)."""
    for affinity, marks in (
        ("INTEGER", ("INT",)),
        ("TEXT", ("CHAR", "CLOB", "TEXT")),
        ("BLOB", ("BLOB",)),
        ("REAL", ("REAL", "FLOA", "DOUB")),
    ):
        if any(mark in declared for mark in marks):
            return affinity
    return "NUMERIC"


def parse_query(query: str) -> exp.Expression | None:
    """The parse tree, or None where sqlglot does not read what SQLite may still run."""
    try:
        return sqlglot.parse_one(query, read="sqlite")
    except (SqlglotError, RecursionError):
        return None


def read_needs(tables: dict[str, Table], gold: str) -> Needs:
    """What the rows of the tables must show for this gold query; constants alone where it does not parse."""
    tree = parse_query(gold)
    if tree is None:
        return _needs_by_words(tables, gold)
    needs, reader = Needs(), _Reader(tables)
    for node in tree.walk():
        if isinstance(node, PREDICATES):
            _read_predicate(node, reader, needs)
        elif isinstance(node, exp.Or):
            needs.has_alternatives = True
        elif isinstance(node, exp.SetOperation):
            for pair in zip(reader.outputs(node.left), reader.outputs(node.right), strict=False):
                _link_all(pair, needs)
        elif isinstance(node, exp.Join) and (node.args.get("using") or node.method == "NATURAL"):
            names = [name.name.lower() for name in node.args.get("using") or []]
            for name in names or {name for table in tables.values() for name in table.columns}:
                needs.link(*(Column(t, name) for t, table in tables.items() if name in table.columns))
        elif isinstance(node, exp.Column):
            _read_use(node, reader, needs)
        elif isinstance(node, exp.Limit | exp.Offset):
            needs.rows_to_skip += next((int(c) for c in _constants(node) if isinstance(c, int)), 0)
    return needs


def _needs_by_words(tables: dict[str, Table], gold: str) -> Needs:
    """Every constant in every column."""
    words = [text for _, text in re.findall(r"(['\"])(.*?)\1", gold)]
    numbers = [number_in(n) for n in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", gold)]
    needs = Needs()
    for table in tables.values():
        for name in table.columns:
            needs.constants[Column(table.name.lower(), name)] += [*words, *numbers]
    return needs


def _read_predicate(node: exp.Expression, reader: _Reader, needs: Needs) -> None:
    """A condition where a column meets constants, a link where it meets columns, a size where COUNT does."""
    operands = [part for part in node.iter_expressions() if not isinstance(part, exp.Subquery | exp.Query)]
    inner = [part for part in node.iter_expressions() if isinstance(part, exp.Subquery | exp.Query)]
    columns = [c for part in operands for c in reader.columns_below(part)]
    constants = [c for part in operands for c in reader.constants_below(part)]
    if any(part.find(exp.Count) for part in operands):
        needs.group_sizes += [int(c) for c in constants if isinstance(c, int | float) and math.isfinite(c)]
        return
    if any(part.find(exp.Length) for part in operands):
        sizes = [size for c in constants if isinstance(c, int) for size in (c - 1, c, c + 1)]
        constants = [LETTERS[:size] for size in sizes if 0 < size <= MOST_LETTERS]
    for column in columns:
        needs.constants[column] += constants
        if any(isinstance(c, int | float) for c in constants):
            needs.numeric.add(column)
    bare = [part for part in operands if reader.resolve(part)]
    if len(bare) == 1 and constants and len(columns) == 1:
        operator = type(node)
        if bare[0] is not operands[0] and bare[0] is node.args.get("expression"):
            operator = MIRRORED.get(operator, operator)
        needs.conditions[columns[0]].append(Condition(operator, tuple(constants)))
    for query in inner:
        outputs = reader.outputs(query)
        if columns and outputs and outputs[0]:
            _link_all((columns[:1], outputs[0]), needs)
            needs.keys |= {*columns[:1], *outputs[0]}
    if len(columns) > 1:
        needs.link(*columns)
        needs.keys |= set(columns)


def _link_all(sides: tuple[list[Column], list[Column]], needs: Needs) -> None:
    left, right = sides
    if left and right:
        needs.link(*left, *right)


def _read_use(node: exp.Column, reader: _Reader, needs: Needs) -> None:
    column = reader.resolve(node)
    if column is None:
        return
    if node.find_ancestor(*ARITHMETIC):
        needs.numeric.add(column)
    if isinstance(node.parent, DATE_FUNCTIONS) or (
        isinstance(node.parent, exp.Anonymous) and node.parent.name.lower() in DATE_FUNCTION_NAMES
    ):
        needs.dates.add(column)
    if isinstance(node.parent, exp.Group):
        needs.grouped.add(column)
    elif isinstance(node.parent, exp.Select):
        needs.listed.add(column)


class _Reader:
    """Names of a query resolved against the tables of its context."""

    def __init__(self, tables: dict[str, Table]) -> None:
        self._tables = tables

    def resolve(self, node: exp.Expression, depth: int = 0) -> Column | None:
        """The column that a node names, also through derived tables; None for a constant or an expression."""
        if not isinstance(node, exp.Column) or depth > 20:
            return None
        scope = node.find_ancestor(exp.Select)
        while scope is not None:
            for name, source in _sources(scope):
                if node.table and name != node.table.lower():
                    continue
                found = self._find(node.name.lower(), source, depth)
                if found:
                    return found
            scope = scope.find_ancestor(exp.Select)
        return None

    def _find(self, name: str, source: exp.Expression, depth: int) -> Column | None:
        if isinstance(source, exp.Table):
            table = source.name.lower()
            query = _common_table(source)
            if query is None:
                known = self._tables.get(table)
                return Column(table, name) if known and name in known.columns else None
            source = query
        for select in source.find_all(exp.Select):
            for projection in select.expressions:
                if projection.alias_or_name.lower() == name:
                    return self.resolve(projection.unalias(), depth + 1)
            return next(
                (f for _, s in _sources(select) if select.is_star and (f := self._find(name, s, depth + 1))),
                None,
            )
        return None

    def is_constant(self, node: exp.Expression) -> bool:
        """Whether a node is a double-quoted name that no table in reach has."""
        is_quoted = isinstance(node, exp.Column) and not node.table and node.this.args.get("quoted")
        return bool(is_quoted) and self.resolve(node) is None and not _is_alias(node)

    def columns_below(self, part: exp.Expression) -> list[Column]:
        """Columns in a part of a condition, those of nested queries left out."""
        return [c for node in _own_nodes(part) if (c := self.resolve(node))]

    def constants_below(self, part: exp.Expression) -> list[Value]:
        """Constants in a part of a condition, those of nested queries left out."""
        found = []
        for node in _own_nodes(part):
            if self.is_constant(node):
                found.append(node.name)
            elif isinstance(node, exp.Null):
                found.append(None)
            elif isinstance(node, exp.Boolean):
                found.append(int(node.this))
            elif isinstance(node, exp.Literal):
                found.append(_literal(node))
        return found

    def outputs(self, query: exp.Expression) -> list[list[Column]]:
        """The columns behind each output of a query: more than one for `a + b`, none for COUNT(*)."""
        select = query.find(exp.Select)
        if select is None:
            return []
        return [[] if p.find(exp.Count) else self.columns_below(p) for p in select.expressions]


def _own_nodes(part: exp.Expression) -> Iterator[exp.Expression]:
    return part.walk(prune=lambda node: isinstance(node, exp.Query))


def _sources(select: exp.Select) -> Iterator[tuple[str, exp.Expression]]:
    parts = [select.args.get("from_"), *(select.args.get("joins") or [])]
    for part in parts:
        if part is not None:
            source = part.this
            yield source.alias_or_name.lower(), source
            for join in source.args.get("joins") or []:
                yield join.this.alias_or_name.lower(), join.this


def _common_table(source: exp.Table) -> exp.Expression | None:
    """The query of WITH that a name in FROM stands for."""
    scope = source.parent_select
    while scope is not None:
        for table in scope.ctes:
            if table.alias.lower() == source.name.lower():
                return table.this
        scope = scope.parent if isinstance(scope.parent, exp.Query) else scope.find_ancestor(exp.Query)
    return None


def _is_alias(node: exp.Column) -> bool:
    select = node.find_ancestor(exp.Select)
    return select is not None and any(
        p.alias.lower() == node.name.lower() for p in select.expressions if p.alias
    )


def _constants(node: exp.Expression) -> Iterator[Value]:
    return (_literal(literal) for literal in node.find_all(exp.Literal))


def _literal(node: exp.Literal) -> Value:
    if node.is_string:
        return node.this
    negative = isinstance(node.parent, exp.Neg)
    try:
        number = number_in(node.this)
    except ValueError:  # 0x1F
        return node.this
    return -number if negative else number


def number_in(text: str) -> int | float:
    """The number that a text is: as in SQLite, what does not fit into 64 bits is a float, or infinite.

    Raises:
        ValueError: it is none.
    """
    try:
        number = int(text)
    except ValueError:  # 5.0, 1e9, or more digits than Python reads
        return float(text)
    return number if abs(number) < 2**63 else float(text)
