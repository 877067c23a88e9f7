"""How late the hostile queries and contexts of tests/hostile_sql.py end, and in how much memory.

python -m benchmarks.hostile_sql
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.markdown import Table, print_table
from tests import hostile_sql

LIMITS = (0.5, 1, 2)


def main() -> None:
    """Run the whole corpus under each limit and print a Markdown table."""
    print(f"{len(hostile_sql.QUERIES)} queries, run and prepared, and {len(hostile_sql.CONTEXTS)} contexts\n")
    print_table(table())


def table() -> Table:
    """A line for each limit, as soon as it was measured."""
    yield "limit", "ended by it", "other than expected", "latest", "memory of all processes"
    for seconds in LIMITS:
        with tempfile.TemporaryDirectory() as folder:
            database = Path(folder) / "singers.sqlite"
            hostile_sql.make_database(database)
            command = [sys.executable, "-m", "tests.hostile_sql", str(database), str(seconds), ""]
            done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        report = done["report"]
        ended = sum("took over" in row["found"] for row in report)
        other = sum(not re.search(row["end"], row["found"]) for row in report)
        latest = max(report, key=lambda row: row["late"])
        memory = f"{sum(done['peak_bytes']) / 1e6:.0f} MB"
        yield f"{seconds:g} s", ended, other, f"{latest['late']:.3f} s ({latest['claim']})", memory


if __name__ == "__main__":
    main()
