"""How well `scoring.execution_match` tells right SQL from wrong: rewrites of gold against mutants of gold.

What is right is decided without it: a mutant counts as equivalent, and is set aside, only if it returns
what gold returns on 200 random databases (`tests/random_databases.py`) and on the real database, if any.

    python -m benchmarks.execution_match --rows validation.jsonl --spider spider_dev

`--rows` are JSONL rows with context and answer. `--spider` is a folder with `questions.jsonl` (db, question,
context, answer) and `db/<db>.sqlite`. `--predictions` are JSONL rows with question, db and prediction.
"""

import argparse
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from benchmarks.markdown import Table, print_table
from steps.text2sql import sample_data, scoring
from tests import sql_mutations
from tests.random_databases import RandomDatabases, executes, same_on

SAMPLE_ROWS, TIMED_ROWS, EXAMPLES = 500, 1_000, 20
SEED = 42


@dataclass(frozen=True)
class Row:
    """One gold query, and the database that it was written for, where there is one."""

    source: str
    context: str
    gold: str
    real_database: Path | None = None
    predictions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judged:
    """One query against gold: what `execution_match` says, and whether it is the same on other databases.

    `called_right` is None where it raised an error; `on_real` is None without a verdict of a real database.
    """

    kind: str
    sql: str
    called_right: bool | None
    first_difference: int | None
    on_real: bool | None

    @property
    def is_equivalent(self) -> bool:
        """Whether no other database shows a difference from gold."""
        return self.first_difference is None and self.on_real is not False


@dataclass
class Report:
    """All that was found out about one row."""

    row: Row
    executes: bool
    gold: Judged | None = None
    rewrites: list[Judged] = field(default_factory=list)
    mutants: list[Judged] = field(default_factory=list)
    predictions: list[Judged] = field(default_factory=list)
    applicable: set[str] = field(default_factory=set)

    def survivors(self) -> list[Judged]:
        """Mutants that are called right and are not equivalent."""
        return [mutant for mutant in self.mutants if mutant.called_right and not mutant.is_equivalent]


def main() -> None:
    """Judge all rows and print the tables."""
    options = parse()
    rows = {name: list(islice(found, options.limit)) for name, found in row_sets(options).items()}
    with ProcessPoolExecutor(options.processes) as pool:
        judging = partial(judge_row, per_kind=options.per_kind, seed=options.seed)
        judge_rows = partial(pool.map, judging, chunksize=4)
        reports = {name: list(judge_rows(found)) for name, found in rows.items()}
        seconds = list(timed(pool, [report for found in reports.values() for report in found]))
    found = [report for of_set in reports.values() for report in of_set]
    tables = gold_table(reports), rewrite_table(reports), mutant_table(found), set_table(reports)
    for lines in (*tables, agreement(found)):
        print_table(lines)
        print()
    print("\n".join(seconds))
    print_examples("Set aside as equivalent", ((report, m) for report in found for m in set_aside(report)))
    print_examples(
        "Set aside as equivalent, but called wrong",
        ((report, m) for report in found for m in set_aside(report) if not m.called_right),
    )
    print_examples("Survivors", ((report, m) for report in found for m in report.survivors()))
    if options.survivors:
        write_survivors(options.survivors, found)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="JSONL with context and answer")
    parser.add_argument("--spider", type=Path, required=True, help="folder with questions.jsonl and db/")
    parser.add_argument("--predictions", type=Path, help="JSONL with question, db and prediction")
    parser.add_argument("--limit", type=int, help="rows of each set")
    parser.add_argument("--per-kind", type=int, default=1, help="variants of a kind and row")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of mutants and rewrites")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--survivors", type=Path, help="JSONL to write, with a database that tells them apart"
    )
    return parser.parse_args()


def row_sets(options: argparse.Namespace) -> dict[str, Iterator[Row]]:
    """Rows by the name of their set."""
    predicted = defaultdict(list)
    for line in read(options.predictions) if options.predictions else []:
        predicted[line["db"], line["question"]].append(line["prediction"])
    sample = random.Random(SEED).sample(sample_data.generate(SEED), SAMPLE_ROWS)
    return {
        options.rows.stem: (
            Row(options.rows.stem, row["context"], row["answer"]) for row in read(options.rows)
        ),
        "spider": (
            Row(
                "spider",
                row["context"],
                row["answer"],
                options.spider / "db" / f"{row['db']}.sqlite",
                tuple(predicted[row["db"], row["question"]]),
            )
            for row in read(options.spider / "questions.jsonl")
            if "answer" in row
        ),
        "sample": (Row("sample", row["context"], row["answer"]) for row in sample),
    }


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def judge_row(row: Row, *, per_kind: int, seed: int) -> Report:
    """Gold against itself, its rewrites, its mutants and predictions."""
    if not executes(row.context, row.gold):
        return Report(row, executes=False)
    rewrites = sql_mutations.rewrites(row.context, row.gold, per_kind=per_kind, seed=seed)
    mutants = sql_mutations.mutants(row.context, row.gold, per_kind=per_kind, seed=seed)
    databases = RandomDatabases(row.context, [row.gold, *(sql for _, sql in mutants), *row.predictions])
    judged = partial(judge_query, row, databases)
    report = Report(
        row,
        executes=True,
        gold=judged("gold", row.gold),
        rewrites=[judged(*rewrite) for rewrite in rewrites],
        mutants=[judged(*mutant) for mutant in mutants],
        predictions=[judged("prediction", sql) for sql in row.predictions],
        applicable={
            kind
            for kind in map(sql_mutations.label, sql_mutations.MUTANTS)
            if sql_mutations.is_applicable(kind, row.context, row.gold)
        },
    )
    databases.close()
    return report


def judge_query(row: Row, databases: RandomDatabases, kind: str, sql: str) -> Judged:
    """What all judges say about one query; rewrites that are called right are believed."""
    called_right = verdict(row, sql)
    is_rewrite = kind in map(sql_mutations.label, sql_mutations.REWRITES)
    is_believed = kind == "gold" or (is_rewrite and called_right)
    return Judged(
        kind,
        sql,
        called_right,
        None if is_believed else databases.first_difference(row.gold, sql),
        same_on(row.real_database, row.gold, sql) if row.real_database and not is_rewrite else None,
    )


def verdict(row: Row, sql: str) -> bool | None:
    """What is measured here; None for an error, which is shown and counts as a wrong verdict."""
    try:
        return scoring.execution_match(row.context, row.gold, sql)
    except Exception as error:  # noqa: BLE001 an error of any kind is a finding, not the end
        print(f"ERROR {type(error).__name__}: {error} | {row.context} | {row.gold} | {sql}", flush=True)
        return None


def set_aside(report: Report) -> list[Judged]:
    """Mutants that no other database tells from gold."""
    return [mutant for mutant in report.mutants if mutant.is_equivalent]


def gold_table(reports: dict[str, list[Report]]) -> Table:
    """Gold against itself."""
    yield "rows", "all", "execute", "gold = gold"
    for name, found in reports.items():
        ran = [report for report in found if report.executes]
        yield (
            name,
            len(found),
            len(ran),
            share(sum(report.gold.called_right is True for report in ran), len(ran)),
        )


def rewrite_table(reports: dict[str, list[Report]]) -> Table:
    """Share of rewrites called right, by kind and set; one that is no rewrite is told apart."""
    yield "rewrite", *reports, "not the same"
    kinds = [*map(sql_mutations.label, sql_mutations.REWRITES), "all"]
    for kind in kinds:
        by_set = [
            [r for report in found for r in report.rewrites if kind in (r.kind, "all")]
            for found in reports.values()
        ]
        faults = sum(not rewrite.is_equivalent for of_set in by_set for rewrite in of_set)
        yield (
            kind,
            *(share(sum(r.called_right is True for r in of_set), len(of_set)) for of_set in by_set),
            faults,
        )


def mutant_table(found: list[Report]) -> Table:
    """By kind, over all sets: where it should apply, where it did, and what came of it."""
    yield "mutant", "rows it should apply to", "applied", "mutants", "set aside", "killed of the rest"
    for kind in map(sql_mutations.label, sql_mutations.MUTANTS):
        should = [report for report in found if kind in report.applicable]
        did = [report for report in should if any(mutant.kind == kind for mutant in report.mutants)]
        of_kind = [mutant for report in found for mutant in report.mutants if mutant.kind == kind]
        yield kind, len(should), share(len(did), len(should)), *killed(of_kind)


def set_table(reports: dict[str, list[Report]]) -> Table:
    """All kinds, by set."""
    yield "rows", "mutants", "set aside", "killed of the rest", "set aside but called wrong"
    sets = reports | {"all": [report for found in reports.values() for report in found]}
    for name, found in sets.items():
        mutants = [mutant for report in found for mutant in report.mutants]
        yield name, *killed(mutants), sum(m.is_equivalent and not m.called_right for m in mutants)


def killed(mutants: list[Judged]) -> tuple[object, str, str]:
    """Number of mutants, share set aside, share of the others that is called wrong."""
    rest = [mutant for mutant in mutants if not mutant.is_equivalent]
    aside = len(mutants) - len(rest)
    return (
        len(mutants),
        share(aside, len(mutants)),
        share(sum(m.called_right is False for m in rest), len(rest)),
    )


def agreement(found: list[Report]) -> Table:
    """The verdict from the context alone against the verdict on the real database.

    A query that fails on one of them has no verdict there. Many a wrong query is right on one real database
    by luck, so of these the share that differs on a random database is given, too.
    """
    yield (
        "against the real database",
        "both right",
        "both wrong",
        "only context right",
        "only real right",
        "of these, random differ",
        "agree",
    )
    groups: dict[str, Callable[[Report], list[Judged]]] = {
        "golds": lambda report: [report.gold] if report.gold else [],
        "mutants": lambda report: report.mutants,
        "predictions": lambda report: report.predictions,
    }
    for name, judged_of in groups.items():
        judged = [query for report in found for query in judged_of(report) if query.on_real is not None]
        cells = Counter((query.called_right is True, query.on_real) for query in judged)
        lucky = [query for query in judged if not query.called_right and query.on_real]
        differ = sum(query.first_difference is not None for query in lucky)
        counts = [cells[True, True], cells[False, False], cells[True, False], cells[False, True]]
        yield name, *counts, share(differ, len(lucky)), share(counts[0] + counts[1], len(judged))


def timed(pool: ProcessPoolExecutor, reports: list[Report]) -> Iterator[str]:
    """Seconds of `execution_match` alone: gold against itself, where nothing ends early, and a mutant."""
    rows = [report for report in reports if report.executes and report.mutants]
    rows = random.Random(SEED).sample(rows, min(TIMED_ROWS, len(rows)))
    pairs = {
        "gold against gold": [(report.row, report.row.gold) for report in rows],
        "gold against a mutant": [
            (r.row, random.Random(i).choice(r.mutants).sql) for i, r in enumerate(rows)
        ],
    }
    for name, calls in pairs.items():
        begin = time.monotonic()
        list(pool.map(verdict, *zip(*calls, strict=True), chunksize=8))
        yield f"{name}: {len(calls):,} rows in {time.monotonic() - begin:.1f} s"


def share(part: int, whole: int) -> str:
    """Part of a whole as a percentage and as it is."""
    return f"{part / whole:.1%} ({part:,} of {whole:,})" if whole else "-"


def print_examples(title: str, found: Iterable[tuple[Report, Judged]]) -> None:
    """Print a seeded choice of mutants beside their gold."""
    pairs = list(found)
    print(f"\n{title}: {len(pairs)}, of these {min(EXAMPLES, len(pairs))}\n")
    print("| rows | kind | gold | mutant |\n| --- | --- | --- | --- |")
    for report, mutant in random.Random(SEED).sample(pairs, min(EXAMPLES, len(pairs))):
        cells = report.row.source, mutant.kind, f"`{report.row.gold}`", f"`{mutant.sql}`"
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")


def write_survivors(path: Path, found: list[Report]) -> None:
    """Write each survivor with the contents of a random database on which it differs from gold."""
    with path.open("w") as file:
        for report in found:
            row, queries = (
                report.row,
                [report.row.gold, *(m.sql for m in report.mutants), *report.row.predictions],
            )
            for mutant in report.survivors():
                databases, number = RandomDatabases(row.context, queries), mutant.first_difference
                line = {
                    "rows": row.source,
                    "kind": mutant.kind,
                    "context": row.context,
                    "gold": row.gold,
                    "mutant": mutant.sql,
                    "database": databases.contents(number) if number is not None else str(row.real_database),
                }
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
