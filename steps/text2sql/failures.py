"""Why a prediction is wrong: a few reasons that can be counted, out of many messages."""

import re

NO_ANSWER = "no answer"
DOES_NOT_PARSE = "does not parse"
DID_NOT_STOP = "did not stop"
OTHER = "other error"
# The row's fault, not the model's: no prediction can be right.
CANNOT_BE_JUDGED = "cannot be judged"
# What the rest of a message of SQLite or sql_execution means; the first that is found counts.
PATTERNS = {
    "unknown column": r"no such column",
    "unknown table": r"no such table",
    "time limit": r"took over",
    "wrong rows": r"other rows than gold",
    DOES_NOT_PARSE: r"syntax error|incomplete input|unrecognized token|one statement|is no query",
}
REASONS = (*PATTERNS, NO_ANSWER, DID_NOT_STOP, CANNOT_BE_JUDGED, OTHER)


def classify(message: str, *, predicted: str, stopped: bool) -> str:
    """The reason behind a message, one of `REASONS`; empty for an empty message.

    Text that does not parse since the model wrote on until it was cut did not stop.
    """
    if not message:
        return ""
    if message.startswith(("context: ", "gold: ")):
        return CANNOT_BE_JUDGED
    if not predicted.strip().strip(";"):
        return NO_ANSWER if stopped else DID_NOT_STOP
    found = next((reason for reason, pattern in PATTERNS.items() if re.search(pattern, message)), OTHER)
    return DID_NOT_STOP if found == DOES_NOT_PARSE and not stopped else found


def metric_name(reason: str) -> str:
    """Name of the metric that counts a reason, without the prefix of the base."""
    return f"failures/{reason.replace(' ', '_')}"
