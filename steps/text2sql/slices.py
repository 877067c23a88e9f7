"""Kinds of gold queries, so that a score can be read by what a question asks for.

Everything is read from the syntax of the gold query alone. A constant in double quotes, which sqlglot reads
as a name in the sqlite dialect, changes nothing here: no count looks at which names are columns.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import pandas
from sqlglot import exp

from steps.text2sql.gold_query import parse_query
from steps.text2sql.scoring import wilson_interval

DIMENSIONS = ("hardness", "tables", "joins", "aggregates", "conditions", "nesting")
UNKNOWN = "unknown"
# In the order in which they are shown; counts end with the one that holds all above.
ORDER = ("easy", "medium", "hard", "extra", "0", "1", "2", "3_or_more", "flat", "nested", UNKNOWN)
MOST = 3


def describe(gold: str) -> dict[str, str]:
    """The slice of a gold query in each of `DIMENSIONS`; `unknown` everywhere where it does not parse.

    tables: distinct names in all FROM clauses; joins: tables beyond the first, over all FROM clauses;
    aggregates: their calls; conditions: comparisons and the like in WHERE and HAVING, of subqueries too;
    nesting: nested where it has a second SELECT; hardness: as `hardness`.
    """
    query = parse_query(gold)
    if not isinstance(query, exp.Query) or query.find(exp.Select) is None:
        return dict.fromkeys(DIMENSIONS, UNKNOWN)
    defined = {cte.alias_or_name.lower() for cte in query.find_all(exp.CTE)}
    tables = {table.name.lower() for table in query.find_all(exp.Table)} - defined
    clauses = query.find_all(exp.Where, exp.Having)
    return {
        "hardness": hardness(query),
        "tables": _bucket(len(tables)),
        "joins": _bucket(sum(1 for _ in query.find_all(exp.Join))),
        "aggregates": _bucket(sum(1 for _ in query.find_all(exp.AggFunc))),
        "conditions": _bucket(sum(len(_parts(clause.this)[0]) for clause in clauses)),
        "nesting": "nested" if len(list(query.find_all(exp.Select))) > 1 else "flat",
    }


def _bucket(count: int) -> str:
    return str(count) if count < MOST else f"{MOST}_or_more"


def _parts(clause: exp.Expression | None) -> tuple[list[exp.Expression], list[exp.Connector]]:
    """The conditions of a WHERE, HAVING or ON, and the AND and OR between them; subqueries stay closed."""
    if clause is None:
        return [], []
    between = exp.Connector | exp.Paren | exp.Not
    parts = list(clause.walk(prune=lambda part: not isinstance(part, between)))
    conditions = [part for part in parts if not isinstance(part, between)]
    return conditions, [part for part in parts if isinstance(part, exp.Connector)]


def hardness(query: exp.Query) -> Literal["easy", "medium", "hard", "extra"]:
    """Spider's hardness (Yu et al. 2018, arXiv 1809.08887), by the rules of its evaluation.py.

    Three counts decide. First, of clauses: WHERE, GROUP BY, ORDER BY, LIMIT, tables beyond the first, OR,
    LIKE. Second, of nesting: subqueries in conditions, and a set operation. Third, how many of these are
    more than one: aggregates, columns of SELECT, conditions of WHERE, keys of GROUP BY. Only the outer (for
    a set operation the first) SELECT is looked at. As in evaluation.py, aggregates are those of SELECT and
    ORDER BY; a negated condition, and each AND or OR of HAVING, counts as one more.
    """
    main = query
    while isinstance(main, exp.Query) and not isinstance(main, exp.Select):
        main = main.this
    if not isinstance(main, exp.Select):  # VALUES
        return "extra"
    clauses, nested, others = _count_clauses(main), _count_subqueries(main), _count_others(main)
    nested += isinstance(query, exp.SetOperation)
    if nested == 0:
        if clauses <= 1 and others == 0:
            return "easy"
        if (clauses <= 1 and others <= 2) or (clauses <= 2 and others < 2):
            return "medium"
        if (clauses <= 2 and others > 2) or (clauses == 3 and others <= 2):
            return "hard"
    elif nested == 1 and clauses <= 1 and others == 0:
        return "hard"
    return "extra"


def _where(select: exp.Select) -> exp.Expression | None:
    return select.args["where"].this if select.args.get("where") else None


def _having(select: exp.Select) -> exp.Expression | None:
    return select.args["having"].this if select.args.get("having") else None


def _all_parts(select: exp.Select) -> tuple[list[exp.Expression], list[exp.Connector]]:
    joined = [join.args.get("on") for join in select.args.get("joins") or []]
    found = [_parts(clause) for clause in (_where(select), _having(select), *joined)]
    return [part for parts, _ in found for part in parts], [part for _, parts in found for part in parts]


def _count_clauses(select: exp.Select) -> int:
    conditions, connectors = _all_parts(select)
    return (
        sum(select.args.get(name) is not None for name in ("where", "group", "order", "limit"))
        + len(select.args.get("joins") or [])
        + sum(isinstance(part, exp.Or) for part in connectors)
        + sum(isinstance(part, exp.Like) for part in conditions)
    )


def _count_subqueries(select: exp.Select) -> int:
    queries = exp.Select | exp.SetOperation
    inside = (
        part
        for condition in _all_parts(select)[0]
        for part in condition.walk(prune=lambda part: isinstance(part, queries))
    )
    return sum(isinstance(part, queries) for part in inside)


def _count_others(select: exp.Select) -> int:
    order, group = select.args.get("order"), select.args.get("group")
    conditions, (of_having, connectors) = _parts(_where(select))[0], _parts(_having(select))
    aggregates = (
        sum(column.find(exp.AggFunc) is not None for column in select.expressions)
        + (sum(1 for _ in order.find_all(exp.AggFunc)) if order else 0)
        + sum(_is_negated(condition) for condition in (*conditions, *of_having))
        + len(connectors)
    )
    counts = (aggregates, len(select.expressions), len(conditions), len(group.expressions) if group else 0)
    return sum(count > 1 for count in counts)


def _is_negated(condition: exp.Expression) -> bool:
    return isinstance(condition.parent, exp.Not) or bool(condition.args.get("negate"))


def table(golds: Sequence[str], right: Mapping[str, Sequence[bool]]) -> pandas.DataFrame:
    """Share of right rows by slice, with the bounds of its 95 % interval, for each model (by prefix).

    Columns: dimension, slice, rows; then `<prefix>accuracy`, `<prefix>low`, `<prefix>high` of each model.
    """
    described = pandas.DataFrame([describe(gold) for gold in golds])
    found = []
    for dimension in DIMENSIONS:
        for name in sorted(described[dimension].unique(), key=ORDER.index):
            members = (described[dimension] == name).to_numpy().nonzero()[0]
            row = {"dimension": dimension, "slice": name, "rows": len(members)}
            for prefix, verdicts in right.items():
                count = sum(bool(verdicts[i]) for i in members)
                low, high = wilson_interval(count, len(members))
                values = {"accuracy": count / len(members), "low": low, "high": high}
                row |= {f"{prefix}{what}": value for what, value in values.items()}
            found.append(row)
    return pandas.DataFrame(found)


def metrics(found: pandas.DataFrame, *, metric: str, prefixes: Sequence[str]) -> dict[str, float]:
    """A `table` as metrics: `<prefix><metric>[_low|_high]/<dimension>/<slice>`, and `rows/…`."""
    named = {}
    for row in found.to_dict("records"):
        where = f"{row['dimension']}/{row['slice']}"
        named[f"rows/{where}"] = row["rows"]
        for prefix in prefixes:
            named[f"{prefix}{metric}/{where}"] = row[f"{prefix}accuracy"]
            named[f"{prefix}{metric}_low/{where}"] = row[f"{prefix}low"]
            named[f"{prefix}{metric}_high/{where}"] = row[f"{prefix}high"]
    return named
