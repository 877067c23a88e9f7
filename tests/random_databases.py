"""The second opinion on two queries: what each returns on 200 random databases made for their context.

It judges `scoring.execution_match`, so it shares no code with the product. Databases here are random where
those of `execution_match` are built: sizes, pools of values, NULLs and duplicates are drawn anew for each.

Only for queries that this project trusts: they run in this process, bounded in time and rows alone.
"""

import random
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Value = str | int | float | None
Row = tuple[Value, ...]
Result = list[Row] | None  # None: it returned no result

DATABASES = 200
SECONDS_PER_QUERY = 1.0
MAX_ROWS = 50_000
SIZES = (0, 1, 2, 3, 4, 5, 7, 10, 14, 20, 35)
# Joins multiply: four tables of 9 rows that all match are 6,561.
SIZES_OF_MANY_TABLES = (1, 2, 3, 4, 5, 6, 7, 9)
CONSTANT = re.compile(r"""'((?:[^']|'')*)'|"((?:[^"]|"")*)"|(?<![\w.])(-?\d+(?:\.\d+)?)(?!\w)|(\w+)""")
NUMERIC = ("INT", "REAL", "FLOA", "DOUB", "NUM", "DEC")


class RandomDatabases:
    """Databases for one context, made when first needed and kept for all queries on it.

    `queries` are those that will be compared, gold first: their constants go into the pools of values, and
    gold's again and again, so that its conditions hold together often enough.
    """

    def __init__(
        self, context: str, queries: Sequence[str], *, count: int = DATABASES, seed: int = 0
    ) -> None:
        self.context, self.count, self.seed = context, count, seed
        self.tables = tables_of(context)
        self.pools = pools(self.tables, queries)
        self.targets = pools(self.tables, queries[:1], near=targets)
        self._connections: list[sqlite3.Connection] = []
        self._results: dict[tuple[str, int], Result] = {}

    def first_difference(self, gold: str, other: str) -> int | None:
        """Number of the first database on which the two return something else; None: on no one."""
        for number in range(self.count):
            expected = self._result(gold, number)
            if expected is not None and not same(expected, run(self._connection(number), other), gold):
                return number
        return None

    def contents(self, number: int) -> dict[str, list[Row]]:
        """Rows of one database by table."""
        connection = self._connection(number)
        return {table: connection.execute(f'SELECT * FROM "{table}"').fetchall() for table in self.tables}

    def close(self) -> None:
        """Give the memory of all databases back."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def _result(self, gold: str, number: int) -> Result:
        if (gold, number) not in self._results:
            self._results[gold, number] = run(self._connection(number), gold)
        return self._results[gold, number]

    def _connection(self, number: int) -> sqlite3.Connection:
        while len(self._connections) <= number:
            rng = random.Random(f"{self.seed} {len(self._connections)} {self.context}")
            self._connections.append(self._filled(rng))
        return self._connections[number]

    def _filled(self, rng: random.Random) -> sqlite3.Connection:
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        connection.executescript(self.context)
        style = Style.drawn(rng)
        sizes = SIZES if len(self.tables) < 3 else SIZES_OF_MANY_TABLES
        connection.execute("BEGIN")
        for table, columns in self.tables.items():
            rows = self._rows(columns, rng.choice(sizes), style, rng)
            places = ", ".join("?" * len(columns))
            connection.executemany(f'INSERT INTO "{table}" VALUES ({places})', rows)
        connection.execute("COMMIT")
        return connection

    def _rows(self, columns: dict[str, str], size: int, style: "Style", rng: random.Random) -> list[Row]:
        has_keys = style.has_keys and rng.random() < 0.5
        by_column = [
            rng.sample(range(1, size + 2), size)
            if has_keys and name.lower().endswith("id")
            else self._values(name.lower(), declared, size, style, rng)
            for name, declared in columns.items()
        ]
        rows = list(zip(*by_column, strict=True))
        share_of_duplicates = rng.choice((0, 0, 0.2, 0.5))
        for i in range(1, len(rows)):
            if rng.random() < share_of_duplicates:
                rows[i] = rng.choice(rows[:i])
        return rows

    def _values(
        self, column: str, declared: str, size: int, style: "Style", rng: random.Random
    ) -> list[Value]:
        pool = self._pool(column, declared, style, rng)
        targets = self.targets[column] or pool
        null_share = rng.choice((0, 0, 0.1, 0.3))
        aim = rng.choice((0, 0.3, 0.6, 0.85)) if style.aim is None else style.aim

        def value() -> Value:
            if rng.random() < null_share:
                return None
            return rng.choice(targets if rng.random() < aim else pool)

        return [value() for _ in range(size)]

    def _pool(self, column: str, declared: str, style: "Style", rng: random.Random) -> list[Value]:
        own, elsewhere = self.pools[column], self.pools[""]
        pool: list[Value] = list(rng.sample(own, min(len(own), rng.randint(0, 4))))
        pool += rng.sample(style.common, rng.randint(0 if pool else 1, len(style.common)))
        if elsewhere and rng.random() < 0.2:
            pool.append(rng.choice(elsewhere))
        if rng.random() < 0.4:
            numbers = [rng.randint(-3, 150), rng.randint(0, 99) / 4, rng.randint(0, 3000)]
            is_number = any(word in declared.upper() for word in NUMERIC)
            pool += numbers if is_number else [*numbers, "a", "b", "Ab", ""]
        return pool


@dataclass(frozen=True)
class Style:
    """What the tables of one database have in common.

    `common` are values that any column may have, so that any two join: few of them where nearly every row is
    to find another. `aim` is the share of values that gold's conditions want, None for one of its own in each
    column.
    """

    common: list[int]
    has_keys: bool
    aim: float | None

    @classmethod
    def drawn(cls, rng: random.Random) -> "Style":
        """A random style."""
        is_dense = rng.random() < 0.5
        common = rng.sample(range(8), rng.randint(1, 2 if is_dense else 4))
        return cls(common, has_keys=not is_dense, aim=rng.choice((None, None, 0.95)))


def is_equivalent(
    context: str,
    gold: str,
    mutant: str,
    real_database: Path | None = None,
    *,
    databases: RandomDatabases | None = None,
) -> bool:
    """Whether a mutant returns what gold returns on all random databases and on the real one.

    A real database that lacks a column of the context cannot judge: it is left out where one of the two
    fails on it. `databases`, made for a whole set of mutants, saves making them again.
    """
    found = databases or RandomDatabases(context, [gold, mutant])
    if found.first_difference(gold, mutant) is not None:
        return False
    return real_database is None or same_on(real_database, gold, mutant) is not False


def same_on(real_database: Path, gold: str, other: str) -> bool | None:
    """Whether two queries return the same on a database file; None where one of them fails on it."""
    connection = sqlite3.connect(f"file:{real_database.absolute()}?mode=ro", uri=True)
    connection.text_factory = lambda raw: raw.decode("utf-8", errors="replace")
    try:
        expected, found = run(connection, gold), run(connection, other)
    finally:
        connection.close()
    return None if expected is None or found is None else same(expected, found, gold)


def tables_of(context: str) -> dict[str, dict[str, str]]:
    """Declared types by column by table, as SQLite reads a context."""
    connection = sqlite3.connect(":memory:")
    connection.executescript(context)
    names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {
        name: {column: kind for _, column, kind, *_ in connection.execute(f'PRAGMA table_info("{name}")')}
        for name in names
    }
    connection.close()
    return found


def executes(context: str, query: str) -> bool:
    """Whether a query is one that runs on the context's empty tables."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(context)
        return connection.execute(query).description is not None
    except (sqlite3.Error, sqlite3.Warning):
        return False
    finally:
        connection.close()


def run(connection: sqlite3.Connection, query: str) -> Result:
    """Rows of a query, floats rounded so that the order of a sum is no matter; None where it fails."""
    deadline = time.monotonic() + SECONDS_PER_QUERY
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
    try:
        rows = connection.execute(query).fetchmany(MAX_ROWS)
    except (sqlite3.Error, sqlite3.Warning):
        return None
    return [tuple(float(f"{v:.10g}") if isinstance(v, float) else v for v in row) for row in rows]


def same(expected: list[Row], found: Result, gold: str) -> bool:
    """Whether two results are the same rows as often, in order where gold orders."""
    if found is None or len(expected) != len(found):
        return False
    return expected == found or (not orders(gold) and Counter(expected) == Counter(found))


def orders(query: str) -> bool:
    """Whether an ORDER BY stands outside of all parentheses and constants."""
    text = re.sub(r"""'(?:[^']|'')*'|"(?:[^"]|"")*\"""", "c", query)
    while (shorter := re.sub(r"\([^()]*\)", "p", text)) != text:
        text = shorter
    return re.search(r"\border\s+by\b", text, re.IGNORECASE) is not None


def pools(
    tables: dict[str, dict[str, str]],
    queries: Sequence[str],
    *,
    near: Callable[[Value], list[Value]] | None = None,
) -> dict[str, list[Value]]:
    """Values near the constants of the queries by lower-case column, and those of all columns under ""."""
    near = near or neighbours
    columns = {name.lower() for table in tables.values() for name in table}
    found: dict[str, dict[Value, None]] = {name: {} for name in [*columns, ""]}
    for query in queries:
        for column, constant in constants(query, columns):
            values = dict.fromkeys(near(constant))
            found[column] |= values
            found[""] |= values
    return {name: list(values) for name, values in found.items()}


def constants(query: str, columns: set[str]) -> Iterator[tuple[str, Value]]:
    """Constants of a query, each with the column named last before it, "" for none."""
    column = ""
    for single, double, number, word in CONSTANT.findall(query):
        name = (double or word).lower()
        if name in columns or name in ("count", "limit"):
            column = name if name in columns else ""  # what is counted is compared with no column
        elif number:
            yield column, float(number) if "." in number else int(number)
        elif not word:
            yield column, single.replace("''", "'") or double.replace('""', '"')


def neighbours(constant: Value) -> list[Value]:
    """The constant and what lies close to it: one off, other letter case, what LIKE finds."""
    if not isinstance(constant, str):
        return [*targets(constant), constant + 0.1, constant + 10, constant * 10]
    if "%" in constant or "_" in constant:
        matching = targets(constant)
        return [*matching, constant, matching[0][:-1], f"x{matching[0]}", f"{matching[0]}x"]
    return [constant, constant.swapcase(), constant + "x", constant[:-1], " " + constant]


def targets(constant: Value) -> list[Value]:
    """What a condition with that constant most likely wants: itself, or what its LIKE pattern finds."""
    if not isinstance(constant, str):
        # The last two stand before and after most numbers where a VARCHAR column compares them as text.
        return [constant, constant, constant - 1, constant + 1, 0, 99]
    if "%" in constant or "_" in constant:
        return [constant.replace("%", filling).replace("_", "q") for filling in ("", "x", "Ab")]
    return [constant]
