"""Every parameter of every entry point as Markdown, from MLproject and the dataclasses.

`python -m steps.text2sql.parameter_table` writes it into README.md between `BEGIN` and `END`.
"""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from steps.text2sql import mlproject
from steps.text2sql.params import STEPS, OwnMainParams

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- parameters -->\n", "<!-- end of parameters -->\n"
NOTES = {
    "main": "It also takes those of its five steps, and hands them on.",
    "sweep": "It also takes those of `prepare_data` and `train` that it does not search.",
}


def render() -> str:
    """A section for each entry point; what main hands on stands with the step that it belongs to."""
    kinds = {"main": OwnMainParams, **STEPS}
    return "\n".join(_section(name, kind) for name, kind in kinds.items())


def write(readme: Path = README) -> None:
    """Put the table in its place."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{render()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def _section(entry_point: str, kind: type) -> str:
    usual, hints = mlproject.defaults(entry_point), get_type_hints(kind, include_extras=True)
    rows = [
        f"| `{name}` | {_default(usual.get(name))} | {'; '.join(filter(None, _words(hint)))} |"
        for name, hint in hints.items()
    ]
    head = [f"`{entry_point}`", *([NOTES[entry_point]] if entry_point in NOTES else [])]
    return "\n".join(
        [". ".join(head), "", "| parameter | default | meaning |", "| --- | --- | --- |", *rows, ""]
    )


def _default(text: str | None) -> str:
    return "must be given" if text is None else f"`{text}`" if text else "empty"


def _words(hint: Any) -> tuple[str, str]:
    """What a parameter means, and which values it takes."""
    descriptions = [found.description for found in _fields(hint) if found.description]
    return "; ".join(descriptions), _accepted(hint)


def _fields(hint: Any) -> Iterator[FieldInfo]:
    if get_origin(hint) is Annotated:
        inner, *extras = get_args(hint)
        yield from _fields(inner)
        yield from (extra for extra in extras if isinstance(extra, FieldInfo))


def _accepted(hint: Any) -> str:
    """Words for a type and its limits; empty for a text, whose meaning says what it takes."""
    kind = get_origin(hint)
    if kind is Literal:
        return " or ".join(f"`{value}`" for value in get_args(hint))
    if kind in (Union, types.UnionType):
        return " or ".join(map(_accepted, get_args(hint)))
    if kind is Annotated:
        limits = [limit for found in _fields(hint) for limit in found.metadata]
        return _limited(limits) or _accepted(get_args(hint)[0])
    return ""


def _limited(limits: list[Any]) -> str:
    signs = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}
    known = ((one, *signs[type(one)]) for one in limits if type(one) in signs)
    return ", ".join(f"{sign} {getattr(one, name)}" for one, name, sign in known)


if __name__ == "__main__":
    write()
