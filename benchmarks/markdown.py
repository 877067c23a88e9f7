"""Tables as Markdown."""

from collections.abc import Iterable, Sequence

Table = Iterable[Sequence[object]]


def print_table(lines: Table) -> None:
    """Print rows of cells, the first as the head."""
    for i, cells in enumerate(lines):
        print("| " + " | ".join(map(str, cells)) + " |")
        if i == 0:
            print("| --- " * len(cells) + "|")
