"""Which rows a model was trained on: hashes that travel with every version, without the rows themselves."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

FILE = "hashes.txt"
# 64 bits: 62,861 rows are 1 MB, and a row that was not seen passes for seen with a chance of 1 in 3e14.
DIGITS = 16


def row_hash(question: str, context: str) -> str:
    """Hash of a row without regard to white space and letter case: a respaced row is still known."""
    text = "\x00".join(" ".join(part.split()).lower() for part in (question, context))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:DIGITS]


def hashes(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Sorted hashes of (question, context) pairs."""
    return sorted({row_hash(*row) for row in rows})


def write(found: Iterable[str], folder: Path) -> None:
    """Write hashes into a folder, one a line."""
    (folder / FILE).write_text("".join(f"{one}\n" for one in found), encoding="ascii")


def read(folder: Path) -> frozenset[str]:
    """Hashes that `write` wrote into a folder."""
    return frozenset((folder / FILE).read_text(encoding="ascii").split())
