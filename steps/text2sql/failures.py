"""Why a prediction is wrong: a few reasons that can be counted, out of many messages."""

import re

NO_ANSWER = "no answer"
DOES_NOT_PARSE = "does not parse"
DID_NOT_STOP = "did not stop"
OTHER = "other error"
# What the rest of a message of SQLite or sql_execution means; the first that is found counts.
PATTERNS = {
    "unknown column": r"no such column",
    "unknown table": r"no such table",
    "time limit": r"took over",
    "wrong rows": r"other rows than gold",
    DOES_NOT_PARSE: r"syntax error|incomplete input|unrecognized token|one statement|is no query",
}
REASONS = (*PATTERNS, NO_ANSWER, DID_NOT_STOP, OTHER)


def classify(message: str, *, predicted: str, stopped: bool) -> str:
    """The reason behind a message, one of `REASONS`; empty for an empty message.

    Text that does not parse since the model wrote on until it was cut did not stop. A context that does not
    execute is another error: it is the row's, not the model's.
    """
    if not message:
        return ""
    if not predicted.strip().strip(";"):
        return NO_ANSWER if stopped else DID_NOT_STOP
    matching = (reason for reason, pattern in PATTERNS.items() if re.search(pattern, message))
    found = OTHER if message.startswith("context: ") else next(matching, OTHER)
    return DID_NOT_STOP if found == DOES_NOT_PARSE and not stopped else found


def metric_name(reason: str) -> str:
    """Name of the metric that counts a reason, without the prefix of the base."""
    return f"failures/{reason.replace(' ', '_')}"
