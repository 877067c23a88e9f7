"""Every attempt of hostile_sql.py ends in time, in bounded memory, and changes nothing on disk."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import hostile_sql
from tests.conftest import PROJECT

SECONDS = 0.3
CORPUS = hostile_sql.attempts(Path("singers.sqlite"), seconds=SECONDS)


def report_of(folder: Path, *, seconds: float, only: str = "") -> dict[str, object]:
    """The corpus's report, from a process of its own, so that its memory can be told."""
    database = folder / "singers.sqlite"
    hostile_sql.make_database(database)
    before = state_of(folder)
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile_sql", str(database), str(seconds), only],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert state_of(folder) == before
    return json.loads(done.stdout)


def state_of(folder: Path) -> dict[Path, str]:
    """Hashes of all files in a folder."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """How the whole corpus ended under a limit of 0.3 s."""
    return report_of(tmp_path_factory.mktemp("hostile"), seconds=SECONDS)


@pytest.fixture(scope="module")
def ends(report):
    """How each attempt ended, by claim."""
    return {row["claim"]: row for row in report["report"]}


def test_the_corpus_has_at_least_60_queries_and_was_run_whole(ends):
    assert len(hostile_sql.QUERIES) >= 60
    assert list(ends) == list(CORPUS)


@pytest.mark.parametrize("claim", CORPUS)
def test_a_hostile_text_ends_in_time_and_for_its_reason(ends, claim):
    assert re.search(CORPUS[claim].end, ends[claim]["found"])
    assert ends[claim]["late"] < 0.2


def test_all_processes_together_stay_under_512_megabytes(report):
    assert sum(report["peak_bytes"]) < 512_000_000


@pytest.mark.parametrize("seconds", [0.5, 1, 2])
def test_the_deadline_holds_within_a_tenth_or_a_fifth_of_a_second(tmp_path, seconds):
    only = "query: counts an endless recursion|query: trims a long text|context: a CHECK that takes for ever"
    report = report_of(tmp_path, seconds=seconds, only=only)["report"]
    assert len(report) == 3
    for row in report:
        assert f"took over {seconds:g} s" in row["found"]
        assert -0.01 < row["late"] < max(0.2, seconds / 10)
