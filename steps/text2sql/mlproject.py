"""MLproject, as it is written: which parameters an entry point declares, and their defaults."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).parents[2] / "MLproject"


@functools.cache
def entry_points() -> dict[str, dict[str, Any]]:
    """Each entry point's declaration, by name."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))["entry_points"]


def defaults(entry_point: str) -> dict[str, str]:
    """The text of every default that an entry point declares."""
    declared = entry_points()[entry_point].get("parameters", {})
    return {name: str(kind["default"]) for name, kind in declared.items() if "default" in kind}


def without_defaults(entry_point: str, values: Mapping[str, str]) -> dict[str, str]:
    """Values that say something else than the defaults do: what a person would type."""
    usual = defaults(entry_point)
    return {name: value for name, value in values.items() if not _is_same(usual.get(name, ""), value)}


def _is_same(text: str, other: str) -> bool:
    """Whether two texts of a value say the same: 64 and 64.0 do."""
    try:
        return float(text) == float(other)
    except ValueError:
        return text == other
