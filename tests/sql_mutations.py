"""Variants of a gold query: rewrites, which return the same, and mutants, which return something else.

Each kind is a small function from a parsed query to all its variants of that kind; `rewrites` and `mutants`
draw a few of each that execute. Whether a mutant is by chance the same as gold is for
`tests.random_databases` to say. `is_applicable` tells from the plain text of a query whether a kind should
find something to do, so that a kind that misses its rows is seen.

SQLite takes a double-quoted token that is no column for a constant, sqlglot takes it for a column: `parse`
makes constants of these, and they are written in double quotes again.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice

import sqlglot
from sqlglot import exp

from tests.random_databases import executes, tables_of

DOUBLE_QUOTED = "double_quoted"
SETS = (exp.Union, exp.Intersect, exp.Except)
COMPARISONS = (exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE)
PREDICATES = (exp.Like, exp.In, exp.Between, exp.Is, exp.Exists)
AGGREGATES = (exp.Max, exp.Min, exp.Sum, exp.Avg, exp.Count)
BOUNDARY = {exp.GT: exp.GTE, exp.GTE: exp.GT, exp.LT: exp.LTE, exp.LTE: exp.LT, exp.EQ: exp.GTE}
OPPOSITE = {
    exp.EQ: exp.NEQ,
    exp.NEQ: exp.EQ,
    exp.GT: exp.LT,
    exp.GTE: exp.LTE,
    exp.LT: exp.GT,
    exp.LTE: exp.GTE,
}
OTHER_AGGREGATE = {exp.Max: exp.Min, exp.Min: exp.Max, exp.Avg: exp.Sum, exp.Sum: exp.Avg, exp.Count: exp.Max}


class Query:
    """A gold query, parsed, with the tables of its context."""

    def __init__(self, context: str, text: str) -> None:
        self.context, self.text = context, text
        self.tables = {
            table.lower(): {column.lower(): (column, kind) for column, kind in columns.items()}
            for table, columns in tables_of(context).items()
        }
        self.names = {name for columns in self.tables.values() for name in columns}
        self.tree = self._parsed()

    def _parsed(self) -> exp.Expression:
        tree = sqlglot.parse_one(self.text, read="sqlite")
        named = self.names | {alias.alias.lower() for alias in tree.find_all(exp.Alias)}
        for column in list(tree.find_all(exp.Column)):
            is_quoted = isinstance(column.this, exp.Identifier) and column.this.quoted
            if is_quoted and not column.table and column.name.lower() not in named:
                literal = exp.Literal.string(column.name)
                literal.meta[DOUBLE_QUOTED] = True
                column.replace(literal)
        return tree

    def sql(self, tree: exp.Expression, *, pretty: bool = False) -> str:
        """The text of a variant, constants in the quotes that they had."""

        def quoted(node: exp.Expression) -> exp.Expression:
            is_name = node.name.lower() in self.names
            if isinstance(node, exp.Literal) and node.meta.get(DOUBLE_QUOTED) and not is_name:
                return exp.column(exp.to_identifier(node.name, quoted=True))
            return node

        return tree.transform(quoted).sql("sqlite", pretty=pretty)

    @cached_property
    def selects(self) -> list[exp.Select]:
        """All SELECTs, the inner ones too."""
        return list(self.tree.find_all(exp.Select))

    @cached_property
    def conditions(self) -> list[exp.Expression]:
        """Parts of WHERE and HAVING between AND and OR."""
        return [leaf for clause in self.clauses for leaf in leaves(clause.this)]

    @cached_property
    def clauses(self) -> list[exp.Expression]:
        """All WHEREs and HAVINGs."""
        return list(self.tree.find_all(exp.Where, exp.Having))

    def columns_in(self, *parents: exp.Expression | None) -> Iterator[exp.Column]:
        """Columns under some nodes, without those of subqueries."""
        for parent in filter(None, parents):
            select = parent.find_ancestor(exp.Select, *SETS)
            for column in parent.find_all(exp.Column):
                if column.find_ancestor(exp.Select, *SETS) is select and column.name.lower() in self.names:
                    yield column

    def source(self, column: exp.Column) -> exp.Table | None:
        """The table that a column is of, as its own SELECT names it."""
        select = column.find_ancestor(exp.Select)
        for table in sources(select) if select else []:
            if column.table and column.table.lower() == table.alias_or_name.lower():
                return table
            if not column.table and column.name.lower() in self.columns_of(table):
                return table
        return None

    def columns_of(self, table: exp.Table) -> dict[str, tuple[str, str]]:
        """Name and declared type by lower-case name; empty for what is no table of the context."""
        return self.tables.get(table.name.lower(), {})

    def named(self, select: exp.Select, table: exp.Table, name: str) -> exp.Column:
        """A column of a table, qualified where the SELECT has several."""
        several = len(sources(select)) > 1
        return exp.column(name, table=table.alias_or_name if several else None)

    def others(self, column: exp.Column, *, same_table: bool = False) -> Iterator[exp.Column]:
        """Other columns that could stand there: those of its table, else those of the others in FROM."""
        select, own = column.find_ancestor(exp.Select), self.source(column)
        tables = [own] if own is not None else []
        if own is None or (len(self.columns_of(own)) < 2 and not same_table):
            tables = sources(select) if select else []
        equals = self.joined_with(column)
        for table in tables:
            for name, (spelled, _) in self.columns_of(table).items():
                if (table is not own or name != column.name.lower()) and (id(table), name) not in equals:
                    yield self.named(select, table, spelled)

    def joined_with(self, column: exp.Column) -> set[tuple[int, str]]:
        """Columns that an ON of the same SELECT sets equal to a column, as (id of table, lower-case name)."""
        select, found = column.find_ancestor(exp.Select), set()
        for join in (select.args.get("joins") or []) if select else []:
            for equality in join.find_all(exp.EQ):
                sides = [
                    (id(self.source(side)), side.name.lower())
                    for side in (equality.left, equality.right)
                    if isinstance(side, exp.Column)
                ]
                if (id(self.source(column)), column.name.lower()) in sides:
                    found |= set(sides)
        return found

    def wheres_and_ons(self, select: exp.Select) -> set[str]:
        """Lower-case names of columns that already have a condition."""
        ons = [join.args.get("on") for join in select.args.get("joins") or []]
        return {column.name.lower() for column in self.columns_in(select.args.get("where"), *ons)}


def sources(select: exp.Select) -> list[exp.Table]:
    """Tables in FROM and JOIN; subqueries are none."""
    first = [select.args["from_"].this] if select.args.get("from_") else []
    joined = [join.this for join in select.args.get("joins") or []]
    return [source for source in [*first, *joined] if isinstance(source, exp.Table)]


def leaves(condition: exp.Expression) -> Iterator[exp.Expression]:
    """The parts of a condition between AND and OR."""
    if isinstance(condition, exp.And | exp.Or):
        yield from leaves(condition.left)
        yield from leaves(condition.right)
    elif isinstance(condition, exp.Paren):
        yield from leaves(condition.this)
    else:
        yield condition


def twin(tree: exp.Expression, node: exp.Expression) -> exp.Expression:
    """The node of a fresh copy of the tree that stands where `node` stands."""
    number = next(i for i, other in enumerate(tree.walk()) if other is node)
    return next(islice(tree.copy().walk(), number, None))


def with_node(query: Query, node: exp.Expression, new: exp.Expression) -> exp.Expression:
    """The query with one node replaced."""
    if node is query.tree:
        return new
    place = twin(query.tree, node)
    place.replace(new)
    return new.root()


def without(query: Query, node: exp.Expression, *names: str) -> exp.Expression:
    """The query with some arguments of one node taken away."""
    place = twin(query.tree, node)
    for name in names:
        place.set(name, None)
    return place.root()


def bare(select: exp.Select) -> bool:
    """Whether it selects rows as they are: no aggregates, no groups."""
    aggregates = [aggregate for part in select.expressions for aggregate in part.find_all(*AGGREGATES)]
    return not aggregates and not select.args.get("group") and not select.args.get("distinct")


# Mutants


def another_selected_column(query: Query) -> Iterator[exp.Expression]:
    """SELECT a → SELECT b."""
    for select in query.selects:
        for column in query.columns_in(*select.expressions):
            for other in query.others(column):
                yield with_node(query, column, other)


def another_condition_column(query: Query) -> Iterator[exp.Expression]:
    """WHERE a = 1 → WHERE b = 1."""
    for column in query.columns_in(*query.clauses):
        for other in query.others(column):
            yield with_node(query, column, other)


def another_group_or_order_column(query: Query) -> Iterator[exp.Expression]:
    """GROUP BY a → GROUP BY b; ORDER BY a → ORDER BY b."""
    for clause in query.tree.find_all(exp.Group, exp.Order):
        for column in query.columns_in(clause):
            for other in query.others(column):
                yield with_node(query, column, other)


def operator_boundary(query: Query) -> Iterator[exp.Expression]:
    """> → >=, = → >=, BETWEEN without its lower end."""
    for leaf in query.conditions:
        if isinstance(leaf, exp.EQ) and isinstance(leaf.expression, exp.Subquery):
            # Nothing is above (SELECT MAX(a) …), but much is below.
            kind = exp.LTE if leaf.expression.find(exp.Max) else exp.GTE
            yield with_node(query, leaf, kind(this=leaf.this.copy(), expression=leaf.expression.copy()))
        elif type(leaf) in BOUNDARY:
            yield with_node(
                query, leaf, BOUNDARY[type(leaf)](this=leaf.this.copy(), expression=leaf.expression.copy())
            )
        if isinstance(leaf, exp.Between):
            subject, low, high = leaf.this, leaf.args["low"], leaf.args["high"]
            above = exp.GT(this=subject.copy(), expression=low.copy())
            below = exp.LTE(this=subject.copy(), expression=high.copy())
            yield with_node(query, leaf, exp.Paren(this=exp.And(this=above, expression=below)))


def operator_opposite(query: Query) -> Iterator[exp.Expression]:
    """= → <>, > → <, LIKE → NOT LIKE, NOT IN → IN."""
    for leaf in query.conditions:
        if type(leaf) in OPPOSITE:
            yield with_node(
                query, leaf, OPPOSITE[type(leaf)](this=leaf.this.copy(), expression=leaf.expression.copy())
            )
        elif isinstance(leaf, PREDICATES):
            yield with_node(query, leaf, exp.Not(this=leaf.copy()))
        elif isinstance(leaf, exp.Not):
            yield with_node(query, leaf, leaf.this.copy())


def compared_constants(query: Query) -> Iterator[exp.Literal]:
    """Constants in WHERE and HAVING."""
    for leaf in query.conditions:
        for literal in leaf.find_all(exp.Literal):
            if literal.find_ancestor(exp.Select) is leaf.find_ancestor(exp.Select):
                yield literal


def with_constant(query: Query, literal: exp.Literal, value: str) -> exp.Expression:
    """The query with another constant, in the same quotes."""
    new = literal.copy()
    new.set("this", value)
    return with_node(query, literal, new)


def constant_near(query: Query) -> Iterator[exp.Expression]:
    """5 → 6, 4.4 → 4.5, "west" → "wesu", "2021-%" → "2022-%"."""
    for literal in compared_constants(query):
        if literal.is_string:
            if (changed := next_text(literal.name)) != literal.name:
                yield with_constant(query, literal, changed)
        else:
            whole, dot, decimals = literal.name.partition(".")
            step = str(int(decimals) + 1).zfill(len(decimals)) if decimals.isdigit() else ""
            yield with_constant(query, literal, f"{whole}.{step}" if dot else str(int(whole) + 1))


def next_text(text: str) -> str:
    """The text with its last letter or digit replaced by the next one."""
    match = re.match(r"(.*)([^\W_])(.*)", text, re.DOTALL)
    if not match:
        return text
    before, last, after = match.groups()
    return before + {"z": "a", "Z": "A", "9": "0"}.get(last, chr(ord(last) + 1)) + after


def constant_far(query: Query) -> Iterator[exp.Expression]:
    """5 → 57; "west" → "other"; "%west%" → "%other%"."""
    for literal in compared_constants(query):
        if literal.is_string:
            first, last = literal.name[:1] == "%", literal.name[-1:] == "%"
            yield with_constant(query, literal, "%" * first + "other" + "%" * last)
        else:
            yield with_constant(query, literal, literal.name.partition(".")[0] + "7")


def constant_letter_case(query: Query) -> Iterator[exp.Expression]:
    """ "west" → "West", where = compares it."""
    for literal in compared_constants(query):
        if literal.is_string and isinstance(literal.parent, exp.EQ | exp.NEQ):
            swapped = re.sub("[A-Za-z]", lambda letter: letter[0].swapcase(), literal.name, count=1)
            if swapped != literal.name:
                yield with_constant(query, literal, swapped)


def another_aggregate(query: Query) -> Iterator[exp.Expression]:
    """MAX → MIN, AVG → SUM, COUNT(a) → MAX(a)."""
    for node in query.tree.find_all(*AGGREGATES):
        argument = node.this
        if isinstance(argument, exp.Distinct):
            argument = argument.expressions[0]
        if isinstance(argument, exp.Star):
            for column in columns_in_scope(query, node):
                yield with_node(query, node, exp.Max(this=column))
        else:
            yield with_node(query, node, OTHER_AGGREGATE[type(node)](this=argument.copy()))


def aggregate_dropped(query: Query) -> Iterator[exp.Expression]:
    """SELECT MAX(a) → SELECT a."""
    for select in query.selects:
        for node in (node for part in select.expressions for node in part.find_all(*AGGREGATES)):
            if node.find_ancestor(exp.Select) is not select:
                continue
            argument = node.this.expressions[0] if isinstance(node.this, exp.Distinct) else node.this
            if isinstance(argument, exp.Star):
                for column in columns_in_scope(query, node):
                    yield with_node(query, node, column)
            else:
                yield with_node(query, node, argument.copy())


def columns_in_scope(query: Query, node: exp.Expression) -> Iterator[exp.Column]:
    """All columns that could stand in place of a node."""
    select = node.find_ancestor(exp.Select)
    for table in sources(select):
        for name, _ in query.columns_of(table).values():
            yield query.named(select, table, name)


def count_of_other_rows(query: Query) -> Iterator[exp.Expression]:
    """COUNT(*) ↔ COUNT(a), where `a` may be NULL: no condition is on it."""
    for node in query.tree.find_all(exp.Count):
        taken = query.wheres_and_ons(node.find_ancestor(exp.Select))
        if isinstance(node.this, exp.Star):
            for column in columns_in_scope(query, node):
                if column.name.lower() not in taken:
                    yield with_node(query, node, exp.Count(this=column))
        elif isinstance(node.this, exp.Column) and node.this.name.lower() not in taken:
            yield with_node(query, node, exp.Count(this=exp.Star()))


def condition_dropped(query: Query) -> Iterator[exp.Expression]:
    """WHERE a = 1 AND b = 2 → WHERE a = 1; HAVING taken away."""
    for leaf in query.conditions:
        node = leaf
        while isinstance(node.parent, exp.Paren):
            node = node.parent
        parent = node.parent
        if isinstance(parent, exp.And | exp.Or):
            rest = parent.right if node is parent.left else parent.left
            yield with_node(query, parent, rest.copy())
        elif isinstance(parent, exp.Where | exp.Having):
            yield without(query, parent.parent, parent.arg_key)


def condition_added(query: Query) -> Iterator[exp.Expression]:
    """WHERE a = 1 → WHERE a = 1 AND b > 2, on a column without a condition where there is one."""
    for select in query.selects:
        columns = [
            (table, *column) for table in sources(select) for column in query.columns_of(table).values()
        ]
        free = [column for column in columns if column[1].lower() not in query.wheres_and_ons(select)]
        for table, name, kind in free or columns:
            column = query.named(select, table, name)
            is_number = kind.upper() in ("INTEGER", "REAL")
            added = (column > 2 if free else (column % 2).eq(1)) if is_number else column.eq("b")
            yield twin(query.tree, select).where(added, copy=False).root()


def and_for_or(query: Query) -> Iterator[exp.Expression]:
    """a AND b → a OR b, and back."""
    for clause in query.clauses:
        for node in clause.find_all(exp.And, exp.Or):
            other = exp.Or if isinstance(node, exp.And) else exp.And
            new: exp.Expression = other(this=node.left.copy(), expression=node.right.copy())
            # The tree holds `a AND b OR c` without parentheses; changed, it needs them.
            new = exp.Paren(this=new) if isinstance(node.parent, exp.And | exp.Or) else new
            yield with_node(query, node, new)


def distinct_dropped(query: Query) -> Iterator[exp.Expression]:
    """SELECT DISTINCT a → SELECT a; COUNT(DISTINCT a) → COUNT(a)."""
    for distinct in query.tree.find_all(exp.Distinct):
        if isinstance(distinct.parent, exp.Select):
            yield without(query, distinct.parent, "distinct")
        else:
            yield with_node(query, distinct, distinct.expressions[0].copy())


def distinct_added(query: Query) -> Iterator[exp.Expression]:
    """SELECT a → SELECT DISTINCT a where rows are selected as they are; COUNT(a), AVG(a) → of DISTINCT a."""
    tree = query.tree
    if isinstance(tree, exp.Select) and bare(tree) and limit_of(tree) != "1":
        yield tree.copy().distinct()
    for node in tree.find_all(exp.Count, exp.Sum, exp.Avg):
        if isinstance(node.this, exp.Column):
            yield with_node(query, node.this, exp.Distinct(expressions=[node.this.copy()]))


def limit_of(tree: exp.Expression) -> str:
    """Text of the LIMIT of the whole query, empty without one."""
    limit = tree.args.get("limit")
    return limit.expression.name if limit else ""


def order_direction(query: Query) -> Iterator[exp.Expression]:
    """ORDER BY a → ORDER BY a DESC, and back."""
    for ordered in query.tree.find_all(exp.Ordered):
        yield with_node(
            query,
            ordered,
            exp.Ordered(
                this=ordered.this.copy(), desc=(desc := not ordered.args.get("desc")), nulls_first=not desc
            ),
        )


def order_dropped(query: Query) -> Iterator[exp.Expression]:
    """ORDER BY a LIMIT 3 → LIMIT 3."""
    for order in query.tree.find_all(exp.Order):
        yield without(query, order.parent, "order")


def limit_changed(query: Query) -> Iterator[exp.Expression]:
    """LIMIT 3 → LIMIT 4."""
    for limit in query.tree.find_all(exp.Limit):
        yield with_node(query, limit.expression, exp.Literal.number(int(limit.expression.name) + 1))


def limit_dropped(query: Query) -> Iterator[exp.Expression]:
    """LIMIT 3 taken away."""
    for limit in query.tree.find_all(exp.Limit):
        yield without(query, limit.parent, "limit")


def join_key(query: Query) -> Iterator[exp.Expression]:
    """ON T1.id = T2.owner_id → ON T1.id = T2.id."""
    for join in query.tree.find_all(exp.Join):
        for column in query.columns_in(join.args.get("on")):
            for other in query.others(column, same_table=True):
                yield with_node(query, column, other)


def join_type(query: Query) -> Iterator[exp.Expression]:
    """The last JOIN → LEFT JOIN, where no condition is on the joined table."""
    for select in query.selects:
        join = (select.args.get("joins") or [None])[-1]
        if join is None or join.args.get("on") is None or join.side:
            continue
        conditions = query.columns_in(select.args.get("where"), select.args.get("having"))
        if not any(query.source(column) is join.this for column in conditions) and not skips_null_rows(
            query, select, join.this
        ):
            new = join.copy()
            new.set("side", "LEFT")
            yield with_node(query, join, new)


def skips_null_rows(query: Query, select: exp.Select, joined: exp.Table) -> bool:
    """Whether it only aggregates columns of the joined table: NULLs of a LEFT JOIN then change nothing."""
    return not select.args.get("group") and all(
        isinstance(part.unalias(), AGGREGATES)
        and (columns := list(query.columns_in(part)))
        and all(query.source(column) is joined for column in columns)
        for part in select.expressions
    )


def group_dropped(query: Query) -> Iterator[exp.Expression]:
    """GROUP BY a taken away, with its HAVING, and with an ORDER BY that needs the groups."""
    for group in query.tree.find_all(exp.Group):
        order = group.parent.args.get("order")
        needs_groups = order is not None and order.find(*AGGREGATES) is not None
        yield without(query, group.parent, "group", "having", *(["order"] if needs_groups else []))


def set_operation(query: Query) -> Iterator[exp.Expression]:
    """INTERSECT → EXCEPT, UNION → UNION ALL, a EXCEPT b → b EXCEPT a."""
    for node in query.tree.find_all(*SETS):
        left, right = node.this, node.expression
        for kind in SETS:
            if kind is not type(node):
                yield with_node(query, node, kind(this=left.copy(), expression=right.copy(), distinct=True))
        if isinstance(node, exp.Except):
            yield with_node(query, node, exp.Except(this=right.copy(), expression=left.copy(), distinct=True))
        if isinstance(node, exp.Union):
            every = not node.args.get("distinct")
            yield with_node(query, node, exp.Union(this=left.copy(), expression=right.copy(), distinct=every))


# Rewrites


def same_text(query: Query) -> Iterator[exp.Expression]:
    """Read and written again by sqlglot: <> for !=, NOT a IN for a NOT IN."""
    yield query.tree.copy()


def table_aliases(query: Query) -> Iterator[exp.Expression]:
    """FROM t → FROM t AS q1, every column qualified."""
    tree = query.tree.copy()
    if tree.find(exp.Join) and any(join.args.get("using") for join in tree.find_all(exp.Join)):
        return
    copy = Query(query.context, query.text)
    renamed, count = {}, 0
    for select in copy.selects:
        for table in sources(select):
            count += 1
            renamed[id(table)] = f"q{count}"
    for column in list(copy.tree.find_all(exp.Column)):
        if (table := outer_source(copy, column)) is not None:
            column.set("table", exp.to_identifier(renamed[id(table)]))
    for select in copy.selects:
        for table in sources(select):
            table.set("alias", exp.TableAlias(this=exp.to_identifier(renamed[id(table)])))
    yield copy.tree


def outer_source(query: Query, column: exp.Column) -> exp.Table | None:
    """The table of a column, also where a SELECT further out has it; None for the name of an output."""
    scope: exp.Expression | None = column.find_ancestor(exp.Select)
    while scope is not None:
        for table in sources(scope):
            is_of_it = not column.table and column.name.lower() in query.columns_of(table)
            if is_of_it or (column.table and column.table.lower() == table.alias_or_name.lower()):
                return table
        scope = scope.find_ancestor(exp.Select)
    return None


def conditions_reordered(query: Query) -> Iterator[exp.Expression]:
    """WHERE a AND b → WHERE b AND a."""
    for clause in query.clauses:
        for node in clause.find_all(exp.And, exp.Or):
            left, right = node.right.copy(), node.left.copy()
            if type(right) is type(node):
                right = exp.Paren(this=right)
            yield with_node(query, node, type(node)(this=left, expression=right))


def sides_swapped(query: Query) -> Iterator[exp.Expression]:
    """a > 5 → 5 < a, also in ON."""
    swapped = OPPOSITE | {exp.EQ: exp.EQ, exp.NEQ: exp.NEQ}
    for node in query.tree.find_all(*COMPARISONS):
        yield with_node(query, node, swapped[type(node)](this=node.right.copy(), expression=node.left.copy()))


def count_1(query: Query) -> Iterator[exp.Expression]:
    """COUNT(*) → COUNT(1)."""
    for node in query.tree.find_all(exp.Count):
        if isinstance(node.this, exp.Star):
            yield with_node(query, node, exp.Count(this=exp.Literal.number(1)))


def subquery_around(query: Query) -> Iterator[exp.Expression]:
    """SELECT * FROM (gold); its order outside once more, by place, where the keys are selected."""
    order = query.tree.args.get("order")
    outer = exp.select("*").from_(exp.Subquery(this=query.tree.copy()))
    if order is None:
        yield outer
    elif isinstance(query.tree, exp.Select):
        selected = [part.unalias().sql("sqlite") for part in query.tree.expressions]
        keys = [(ordered.this.sql("sqlite"), ordered.args.get("desc")) for ordered in order.expressions]
        if all(key in selected for key, _ in keys):
            places = [
                exp.Ordered(this=exp.Literal.number(selected.index(key) + 1), desc=desc, nulls_first=not desc)
                for key, desc in keys
            ]
            yield outer.order_by(*places)


def is_unordered(select: exp.Expression) -> bool:
    """Whether neither order nor groups depend on how its rows are found."""
    return isinstance(select, exp.Select) and not any(
        select.args.get(part) for part in ("order", "group", "limit")
    )


def join_as_in(query: Query) -> Iterator[exp.Expression]:
    """SELECT DISTINCT T1.a FROM t JOIN u ON … → … FROM t WHERE k IN (SELECT k FROM u).

    Only where it is no matter how often a row matches: under DISTINCT, in a set operation, in MAX and MIN.
    """
    for select in query.selects:
        if is_unordered(select) and ignores_repeats(select) and len(sources(select)) == 2:
            for kept, moved in (sources(select), sources(select)[::-1]):
                if (new := moved_into_in(query, select, kept, moved)) is not None:
                    yield with_node(query, select, new)


def ignores_repeats(select: exp.Select) -> bool:
    """Whether the result is the same when each row is found several times."""
    is_operand = isinstance(select.parent, SETS) and bool(select.parent.args.get("distinct"))
    only_extremes = all(isinstance(part.unalias(), exp.Max | exp.Min) for part in select.expressions)
    counts_distinct = all(
        isinstance(part.unalias(), exp.Count) and isinstance(part.unalias().this, exp.Distinct)
        for part in select.expressions
    )
    return bool(select.args.get("distinct")) or is_operand or only_extremes or counts_distinct


def moved_into_in(query: Query, select: exp.Select, kept: exp.Table, moved: exp.Table) -> exp.Select | None:
    """The join with one of its tables moved into an IN; None where the table is needed outside."""
    on = select.args["joins"][0].args.get("on")
    where = select.args.get("where")
    parts = list(where.this.flatten()) if where and isinstance(where.this, exp.And) else []
    parts = parts or ([where.this] if where else [])
    if not isinstance(on, exp.EQ) or any(isinstance(part, exp.Or) for part in parts):
        return None
    tables = [{id(query.source(column)) for column in query.columns_in(part)} for part in parts]
    outputs = {id(query.source(column)) for column in query.columns_in(*select.expressions)}
    keys = {id(query.source(side)): side for side in (on.left, on.right) if isinstance(side, exp.Column)}
    if select.is_star or outputs != {id(kept)} or len(keys) != 2 or any(len(found) != 1 for found in tables):
        return None
    inner = exp.select(keys[id(moved)].copy()).from_(moved.copy())
    outer = exp.select(*(part.copy() for part in select.expressions)).from_(kept.copy())
    outer.set("distinct", select.args["distinct"].copy() if select.args.get("distinct") else None)
    for part, found in zip(parts, tables, strict=True):
        inner, outer = (
            (inner.where(part.copy()), outer) if found == {id(moved)} else (inner, outer.where(part.copy()))
        )
    return outer.where(exp.In(this=keys[id(kept)].copy(), query=exp.Subquery(this=inner)))


def in_as_join(query: Query) -> Iterator[exp.Expression]:
    """WHERE k IN (SELECT k FROM u) → JOIN (SELECT DISTINCT k AS matched FROM u) ON k = matched."""
    select = query.tree
    if not is_unordered(select) or select.is_star or not (where := select.args.get("where")):
        return
    nodes = list(where.this.flatten()) if isinstance(where.this, exp.And) else [where.this]
    for node in nodes:
        inner = node.args.get("query") if isinstance(node, exp.In) else None
        inner = inner.this if isinstance(inner, exp.Subquery) else inner
        if (
            not isinstance(inner, exp.Select)
            or inner.args.get("limit")
            or not isinstance(node.this, exp.Column)
        ):
            continue
        matched = inner.copy().distinct()
        matched.set("expressions", [exp.alias_(inner.expressions[0].unalias().copy(), "matched")])
        rest = [other.copy() for other in nodes if other is not node]
        new = select.copy()
        new.set("where", exp.Where(this=exp.and_(*rest)) if rest else None)
        on = exp.EQ(this=node.this.copy(), expression=exp.column("matched", table="m"))
        yield new.join(exp.Subquery(this=matched, alias=exp.TableAlias(this=exp.to_identifier("m"))), on=on)


def join_reversed(query: Query) -> Iterator[exp.Expression]:
    """FROM t JOIN u ON … → FROM u JOIN t ON …, where rows have no order."""
    for select in query.selects:
        joins = select.args.get("joins") or []
        if len(joins) == 1 and is_unordered(select) and not select.is_star and not joins[0].side:
            new = select.copy()
            first, second = new.args["from_"].this, new.args["joins"][0].this
            new.args["from_"].set("this", second.copy())
            new.args["joins"][0].set("this", first.copy())
            yield with_node(query, select, new)


def join_as_condition(query: Query) -> Iterator[exp.Expression]:
    """FROM t JOIN u ON a = b → FROM t CROSS JOIN u WHERE a = b."""
    for select in query.selects:
        joins = select.args.get("joins") or []
        if len(joins) == 1 and joins[0].args.get("on") is not None and not joins[0].side:
            new = select.copy()
            on = new.args["joins"][0].args["on"].copy()
            new.set("joins", [exp.Join(this=joins[0].this.copy())])
            yield with_node(query, select, new.where(on))


def distinct_as_group(query: Query) -> Iterator[exp.Expression]:
    """SELECT DISTINCT a, b → SELECT a, b … GROUP BY a, b."""
    select = query.tree
    if is_unordered(select) and select.args.get("distinct") and not select.is_star:
        new = select.copy()
        new.set("distinct", None)
        if bare(new):
            yield new.group_by(*(part.unalias().copy() for part in select.expressions))


def between_as_comparisons(query: Query) -> Iterator[exp.Expression]:
    """a BETWEEN 1 AND 2 → (a >= 1 AND a <= 2)."""
    for node in query.tree.find_all(exp.Between):
        above = exp.GTE(this=node.this.copy(), expression=node.args["low"].copy())
        below = exp.LTE(this=node.this.copy(), expression=node.args["high"].copy())
        yield with_node(query, node, exp.Paren(this=exp.And(this=above, expression=below)))


def output_names(query: Query) -> Iterator[exp.Expression]:
    """SELECT a → SELECT a AS output_1."""
    select = query.tree
    if isinstance(select, exp.Select) and not select.is_star and not select.find(exp.Alias):
        new = select.copy()
        new.set("expressions", [exp.alias_(part, f"output_{i}") for i, part in enumerate(new.expressions, 1)])
        yield new


def other_quotes(query: Query) -> Iterator[exp.Expression]:
    """ "west" → 'west', and back."""
    tree = query.tree.copy()
    literals = [literal for literal in tree.find_all(exp.Literal) if literal.is_string]
    for literal in literals:
        literal.meta[DOUBLE_QUOTED] = not literal.meta.get(DOUBLE_QUOTED)
    if literals:
        yield tree


# Rewrites of the text


def outside_quotes(text: str, change: Callable[[str], str]) -> str:
    """The text changed everywhere but in quotes."""
    parts = re.split(r"""('(?:[^']|'')*'|"(?:[^"]|"")*")""", text)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def lower_case(query: Query) -> Iterator[str]:
    """select a from t; constants as they were."""
    yield outside_quotes(query.text, str.lower)


def upper_case(query: Query) -> Iterator[str]:
    """SELECT A FROM T; constants as they were."""
    yield outside_quotes(query.text, str.upper)


def white_space(query: Query) -> Iterator[str]:
    """Line breaks and indents, as a formatter or as nobody writes them."""
    yield query.sql(query.tree, pretty=True)
    yield "\n " + outside_quotes(query.text, lambda part: part.replace(" ", " \n\t ")) + "  "


def semicolon(query: Query) -> Iterator[str]:
    """The query; with its semicolon."""
    yield query.text.rstrip().rstrip(";") + " ;\n"


def inequality_sign(query: Query) -> Iterator[str]:
    """<> → !=, and back."""
    signs = {"<>": "!=", "!=": "<>"}
    yield outside_quotes(query.text, lambda part: re.sub("<>|!=", lambda sign: signs[sign[0]], part))


Kind = Callable[[Query], Iterator[exp.Expression | str]]
MUTANTS: tuple[Kind, ...] = (
    another_selected_column,
    another_condition_column,
    another_group_or_order_column,
    operator_boundary,
    operator_opposite,
    constant_near,
    constant_far,
    constant_letter_case,
    another_aggregate,
    aggregate_dropped,
    count_of_other_rows,
    condition_dropped,
    condition_added,
    and_for_or,
    distinct_dropped,
    distinct_added,
    order_direction,
    order_dropped,
    limit_changed,
    limit_dropped,
    join_key,
    join_type,
    group_dropped,
    set_operation,
)
REWRITES: tuple[Kind, ...] = (
    same_text,
    table_aliases,
    conditions_reordered,
    sides_swapped,
    count_1,
    subquery_around,
    join_as_in,
    in_as_join,
    join_reversed,
    join_as_condition,
    distinct_as_group,
    between_as_comparisons,
    output_names,
    other_quotes,
    lower_case,
    upper_case,
    white_space,
    semicolon,
    inequality_sign,
)


def label(kind: Kind) -> str:
    """The kind's name as words."""
    return kind.__name__.replace("_", " ")


def variants(
    query: Query, kinds: Sequence[Kind], *, per_kind: int, seed: int = 0
) -> Iterator[tuple[str, str]]:
    """Up to `per_kind` executable variants of each kind, drawn by the seed, as (kind, SQL)."""
    for kind in kinds:
        texts = (found if isinstance(found, str) else query.sql(found) for found in kind(query))
        distinct = [text for text in dict.fromkeys(texts) if text != query.text]
        random.Random(f"{seed} {label(kind)} {query.text}").shuffle(distinct)
        runnable = (text for text in distinct if executes(query.context, text))
        for text in islice(runnable, per_kind):
            yield label(kind), text


def mutants(context: str, gold: str, *, per_kind: int = 1, seed: int = 0) -> list[tuple[str, str]]:
    """Mutants of a gold query as (kind, SQL)."""
    query = Query(context, gold)
    same = query.sql(query.tree)
    return [
        variant for variant in variants(query, MUTANTS, per_kind=per_kind, seed=seed) if variant[1] != same
    ]


def rewrites(context: str, gold: str, *, per_kind: int = 1, seed: int = 0) -> list[tuple[str, str]]:
    """Rewrites of a gold query as (kind, SQL)."""
    return list(variants(Query(context, gold), REWRITES, per_kind=per_kind, seed=seed))


# What a kind should apply to, from the text alone

CONSTANT = r"""("[^"]*"|'[^']*'|(?<![\w.])-?\d[\d.]*)"""
COMPARED = r"(=|<|>|\bLIKE\b|\bBETWEEN\b|\bIN\s*\()\s*"


def is_applicable(kind: str, context: str, gold: str) -> bool:
    """Whether a kind of mutant should find something to do, by a plain look at the texts."""
    tables = {table.lower(): {name.lower() for name in found} for table, found in tables_of(context).items()}
    text = re.sub(CONSTANT, lambda constant: '"c"' if constant[0][0] in "'\"" else "0", gold)
    condition = "".join(re.findall(r"\b(?:WHERE|HAVING)\b.*", text, re.I | re.S))
    has = {
        "condition": bool(condition),
        "constant": bool(re.search(r"\b(WHERE|HAVING)\b.*" + COMPARED + CONSTANT, gold, re.I | re.S)),
        "aggregate": bool(re.search(r"\b(MAX|MIN|SUM|AVG|COUNT)\s*\(", text, re.I)),
        "limit": bool(re.search(r"\bLIMIT\b", text, re.I)),
        "order": bool(re.search(r"\bORDER BY\b", text, re.I)),
    }
    selected = re.search(r"\bSELECT\b(.*?)\bFROM\b", text, re.I | re.S)
    plain = not has["aggregate"] and not re.search(
        r"DISTINCT|GROUP BY|UNION|EXCEPT|INTERSECT|LIMIT 1\b|LIMIT 0", text, re.I
    )
    used = {name for name, columns in tables.items() if re.search(rf"\b{re.escape(name)}\b", text, re.I)}
    can_swap = any(len(tables[name]) > 1 for name in used)

    def names_column(part: str) -> bool:
        words = {word.lower() for word in re.findall(r"\w+", part)}
        return any(len(tables[name]) > 1 and words & tables[name] for name in used)

    by_kind = {
        "another selected column": bool(selected and names_column(selected[1])),
        "another condition column": names_column(re.split(r"GROUP BY|ORDER BY", condition)[0]),
        "another group or order column": names_column(
            " ".join(re.findall(r"\b(?:GROUP|ORDER) BY\b([^()]*)", text, re.I))
        ),
        "operator boundary": bool(re.search(r"(?<![<!])[=<>](?![=>])|[<>]=|BETWEEN", condition, re.I)),
        "operator opposite": has["condition"],
        "constant near": has["constant"],
        "constant far": has["constant"],
        "constant letter case": bool(
            re.search(r"""\b(WHERE|HAVING)\b.*[=>]\s*("[^"]*[A-Za-z]|'[^']*[A-Za-z])""", gold, re.I | re.S)
        ),
        "another aggregate": has["aggregate"],
        "aggregate dropped": bool(selected and re.search(r"(MAX|MIN|SUM|AVG|COUNT)\s*\(", selected[1], re.I)),
        "count of other rows": bool(re.search(r"\bCOUNT\s*\((?!\s*DISTINCT)", text, re.I))
        and has_free_column(text, tables, used),
        "condition dropped": has["condition"],
        "condition added": True,
        "and for or": bool(re.search(r"\b(AND|OR)\b", re.sub(r"BETWEEN.*?AND", "", condition), re.I)),
        "distinct dropped": bool(re.search(r"\bDISTINCT\b", text, re.I)),
        "distinct added": plain or bool(re.search(r"\b(COUNT|SUM|AVG)\s*\((?!\s*(DISTINCT|\*))", text, re.I)),
        "order direction": has["order"],
        "order dropped": has["order"],
        "limit changed": has["limit"],
        "limit dropped": has["limit"],
        "join key": bool(re.search(r"\bJOIN\b", text, re.I)) and can_swap,
        "join type": bool(re.search(r"\bJOIN\b", text, re.I)) and not has["condition"],
        "group dropped": bool(re.search(r"\bGROUP BY\b", text, re.I)),
        "set operation": bool(re.search(r"\b(UNION|INTERSECT|EXCEPT)\b", text, re.I)),
    }
    return by_kind[kind]


def has_free_column(text: str, tables: dict[str, set[str]], used: set[str]) -> bool:
    """Whether a table of the query has a column that no WHERE and no ON names."""
    conditions = re.findall(r"\b(?:WHERE|ON)\b(.*?)(?=GROUP BY|ORDER BY|HAVING|$)", text, re.I | re.S)
    words = {word.lower() for word in re.findall(r"\w+", " ".join(conditions))}
    return any(tables[name] - words for name in used)
