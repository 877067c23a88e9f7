"""Values for the columns of made databases: constants of gold, what is close to them, and ordinary ones."""

from __future__ import annotations

import random
import re
from collections.abc import Collection

from sqlglot import exp

from steps.text2sql.gold_query import Column, ColumnType, Condition, Needs, Value, number_in

NUMBER = re.compile(r"\s*[+-]?\d+(\.\d+)?\s*")
# Enough for a column of the largest table without repeating one.
ORDINARY_VALUES = 62


def ordinary_numbers(rng: random.Random, start: int, *, with_fractions: bool) -> list[Value]:
    """Different numbers, 0 and a negative one early among them; another `start` gives other numbers."""
    first = start + 1 if rng.random() < 0.75 else -9
    values: list[Value] = rng.sample(range(first, first + 90), ORDINARY_VALUES - 2)
    values[3:3] = [-values[0], 0]
    return [value + rng.choice((0, 0.5, 0.25)) for value in values] if with_fractions else values


def ordinary_words(rng: random.Random, name: str) -> list[Value]:
    """Different texts, an empty one and two that differ in letter case early among them."""
    words = [f"{name} {letter}{tail}" for tail in ("", "a", "z") for letter in "abcdefghijklmnopqrst"]
    rng.shuffle(words)
    words[2:2] = [words[0].upper(), ""]
    return words


def ordinary_dates(rng: random.Random) -> list[Value]:
    """Different days."""
    days = rng.sample(range(12 * 28 * 16), ORDINARY_VALUES)
    return [f"20{10 + d // 336}-{1 + d // 28 % 12:02}-{1 + d % 28:02}" for d in days]


def near_misses(column: Column, needs: Needs, affinity: str) -> list[Value]:
    """The constants that a column is compared with and values close to them, as the column stores them."""
    likes = [c for c in needs.conditions.get(column, []) if c.operator is exp.Like]
    patterns = {constant for condition in likes for constant in condition.constants}
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
            found += _near_number(constant, with_fractions=affinity != "INTEGER")
    return list(dict.fromkeys(stored(value, affinity) for value in found))


def _near_number(number: float, *, with_fractions: bool) -> list[Value]:
    if isinstance(number, int):
        near = [number + 1, number - 1, number + 2, number - 2, -number, number * 10, number // 2]
        return [number, *near, *((number + 0.05, number - 0.5) if with_fractions else ())]
    unit = 10.0 ** -len(f"{number:.10f}".rstrip("0").partition(".")[2])
    near = [number + unit, number - unit, number + unit / 10, number + 0.5, number - 0.5]
    near += [number + 1, number - 1, 2 * number, -number]
    return [number, *(round(value, 8) for value in near)]


def _near_text(text: str) -> list[Value]:
    """Other letter case, a letter more or less, the next in order, the extremes; numbers where it is one."""
    near = [text, text.lower(), text.upper(), text.swapcase(), text + "x", text + " ", "x" + text]
    near += [text[:-1], text[1:], "", "A", "zz"]
    if text and text[-1].isdecimal():
        near += [text[:-1] + str((int(text[-1]) + step) % 10) for step in (1, -1)]
    elif text:
        near.append(text[:-1] + chr(min(ord(text[-1]) + 1, 0xD7FF)))
    if NUMBER.fullmatch(text):
        near += _near_number(number_in(text), with_fractions=True)
    return near


def _near_pattern(pattern: str) -> list[Value]:
    """What begins with, ends with, contains and just misses the text of a LIKE pattern."""
    core = pattern.strip("%").replace("%", " mid ").replace("_", "o")
    near = [core, core + "x", core + "y", "x" + core, f"x{core}x", core.upper(), core.lower()]
    if "_" in pattern:  # where one letter stands, none and two
        near += [pattern.replace("%", "").replace("_", letters) for letters in ("", "oo")]
    return [*near, core[:-1], core[1:], "other", pattern]


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
    if isinstance(value, int) and abs(value) >= 2**63:
        value = float(value)
    if affinity == "TEXT" and isinstance(value, int | float):
        return str(value)
    if affinity in ("INTEGER", "REAL", "NUMERIC") and isinstance(value, str) and NUMBER.fullmatch(value):
        return number_in(value)
    return value


def told_apart(value: Value, kind: ColumnType) -> Value:
    """What a unique column tells the value from others by: it as stored, less what its collation ignores."""
    value = stored(value, kind.affinity)
    if not isinstance(value, str):
        return value
    value = value.lower() if kind.collation == "NOCASE" else value
    return value.rstrip(" ") if kind.collation == "RTRIM" else value


def constants_of(condition: Condition, affinity: str) -> Collection[Value]:
    """A condition's constants as a column of that affinity keeps them, each once, in their order."""
    return dict.fromkeys(stored(constant, affinity) for constant in condition.constants).keys()


def holds(operator: type[exp.Expression], constants: Collection[Value], value: Value) -> bool:
    """Whether a value meets a condition, by SQLite's rules for comparing; all as a column keeps them."""
    if operator is exp.Is or value is None or None in constants:
        return value in constants
    if operator is exp.Like:
        return any(_like(str(constant), str(value)) for constant in constants)
    if operator in (exp.EQ, exp.In):
        return value in constants
    ranks = [rank(constant) for constant in constants]
    if operator is exp.NEQ:
        return rank(value) not in ranks
    if operator is exp.Between:
        return ranks[0] <= rank(value) <= ranks[-1]
    if operator in (exp.LT, exp.LTE):
        return rank(value) < ranks[0] or operator is exp.LTE and rank(value) == ranks[0]
    return rank(value) > ranks[0] or operator is exp.GTE and rank(value) == ranks[0]


def rank(value: Value) -> tuple[bool, Value]:
    """Key that sorts values as SQLite does: numbers before texts."""
    return (isinstance(value, str), value)


def _like(pattern: str, text: str) -> bool:
    parts = (".*" if c == "%" else "." if c == "_" else re.escape(c) for c in pattern)
    return re.fullmatch("".join(parts), text, re.IGNORECASE | re.DOTALL) is not None
