"""Which rows a model was trained on: hashes that travel with every version, without the rows themselves."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from steps.text2sql.errors import UserError

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


def read(folder: Path, *, source: str) -> frozenset[str]:
    """Hashes that `write` wrote into a folder.

    Raises:
        UserError: it holds something else, or nothing; naming the `source`.
    """
    found = (folder / FILE).read_text(encoding="ascii", errors="replace").split()
    if not found or not all(re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", one) for one in found):
        raise UserError(f"{source}: its {FILE} has no hashes of training rows; register the adapter again.")
    return frozenset(found)
