"""The process that runs SQL, and each of its guards with those in front of it switched off."""

import ast
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from steps.text2sql import sql_process, sql_worker
from steps.text2sql.sql_execution import MadeDatabase, QueryError, check_query, run_queries, run_query
from tests.conftest import PROJECT
from tests.hostile_sql import SLOW, N

T = MadeDatabase("CREATE TABLE t (a INTEGER, b TEXT)", {"t": [(1, "x"), (2, None)]})


def workers(parent: psutil.Process | None = None) -> list[psutil.Process]:
    """The processes that run SQL for a process, by default for this one."""
    children = (parent or psutil.Process()).children()
    return [child for child in children if sql_worker.__file__ in child.cmdline()]


def wait_until(is_so, *, seconds: float = 30) -> None:
    """Wait for a condition, with a limit."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def script(text: str) -> subprocess.Popen:
    """A Python process with the project's modules, whose output can be read."""
    return subprocess.Popen([sys.executable, "-c", text], cwd=PROJECT, stdout=subprocess.PIPE, text=True)


def test_one_process_serves_all_queries():
    run_query(T, "SELECT 1", timeout_seconds=10)
    (before,) = workers()
    for i in range(20):
        assert run_query(T, f"SELECT a + {i} FROM t", timeout_seconds=10) == [(1 + i,), (2 + i,)]
    assert workers() == [before]


def test_values_of_each_type_come_back_as_they_were():
    values = [(1, 2.5, "é\0\n'", b"\x00\xff", None), (-(2**63), 1e300, "", b"", 0.1)]
    made = MadeDatabase("CREATE TABLE hex (a, b, c, d, e)", {"hex": values})
    assert run_query(made, "SELECT * FROM hex", timeout_seconds=10) == values
    assert run_query(made, "SELECT 9e999, -9e999", timeout_seconds=10) == [(float("inf"), float("-inf"))]


def test_a_query_that_ends_the_process_takes_no_other_with_it():
    queries = ["SELECT a FROM t", f"SELECT {SLOW}", "SELECT b FROM t", "SELEC", "SELECT 3"]
    first, late, third, wrong, last = run_queries(T, queries, timeout_seconds=2)
    assert (first, third, last) == ([(1,), (2,)], [("x",), (None,)], [(3,)])
    assert str(late) == "took over 2 s"
    assert "syntax error" in str(wrong)


def test_sqlite_stops_by_itself_where_it_can_and_the_process_stays(monkeypatch):
    monkeypatch.setattr(sql_process, "GRACE_SECONDS", 30)  # a busy machine is late too
    run_query(T, "SELECT 1", timeout_seconds=10)
    before = workers()
    with pytest.raises(QueryError, match=r"took over 1 s"):
        run_query(T, f"{N} SELECT COUNT(*) FROM n", timeout_seconds=1)
    assert workers() == before


def test_no_queries_still_need_a_context_that_executes():
    assert run_queries(T, [], timeout_seconds=10) == []
    with pytest.raises(QueryError, match="context: incomplete input"):
        run_queries(MadeDatabase("CREATE", {}), [], timeout_seconds=10)


def test_each_query_has_the_limit_for_itself():
    heavy = f"{N} SELECT COUNT(*) FROM (SELECT x FROM n LIMIT 100000)"
    run_query(T, "SELECT 1", timeout_seconds=60)  # the process has started
    begin = time.monotonic()
    run_query(T, heavy, timeout_seconds=60)
    once = time.monotonic() - begin
    results = run_queries(T, [heavy] * 24, timeout_seconds=12 * once)
    assert results == [[(100000,)]] * 24


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV])
def test_a_process_that_was_hit_while_it_waited_is_replaced(number):
    run_query(T, "SELECT 1", timeout_seconds=10)
    (before,) = workers()
    before.send_signal(number)
    if number == signal.SIGSTOP:
        with pytest.raises(QueryError, match=r"took over 0\.2 s"):
            run_query(T, "SELECT 1", timeout_seconds=0.2)
    assert run_query(T, "SELECT 2", timeout_seconds=10) == [(2,)]
    (after,) = workers()
    assert after.pid != before.pid


def test_a_process_that_dies_in_a_query_fails_that_query_only():
    run_query(T, "SELECT 1", timeout_seconds=10)
    (before,) = workers()
    used = before.cpu_times().user

    def kill_in_the_opcode() -> None:
        wait_until(lambda: before.cpu_times().user > used + 0.1)
        before.kill()

    threading.Thread(target=kill_in_the_opcode).start()
    with pytest.raises(QueryError, match="ended the process that ran it"):
        run_query(T, f"SELECT {SLOW}", timeout_seconds=60)
    assert run_query(T, "SELECT 2", timeout_seconds=10) == [(2,)]


def test_a_context_that_ends_the_process_is_a_query_error(monkeypatch):
    monkeypatch.setattr(sql_process.SqlProcess, "_send", lambda self, *_: self._process.kill())
    with pytest.raises(QueryError, match="context: ended the process that ran it"):
        check_query("CREATE TABLE t (a)", "SELECT 1", timeout_seconds=10)


@pytest.mark.parametrize("is_running", [True, False])
def test_an_interrupted_call_leaves_no_reply_for_the_next_one(monkeypatch, is_running):
    sql_process.PROCESS.stop()
    if is_running:
        run_query(T, "SELECT 1", timeout_seconds=10)
    with monkeypatch.context() as patch:
        patch.setattr(sql_process.SqlProcess, "_receive", interrupt)
        run_query_until_interrupted("SELECT 'old'")
    assert run_query(T, "SELECT 'new'", timeout_seconds=10) == [("new",)]


def test_what_a_stopped_process_said_is_not_read_any_more():
    run_query(T, "SELECT 1", timeout_seconds=10)
    sql_process.PROCESS._unread = b'["rows",[["old"]]]\n'
    sql_process.PROCESS.stop()
    assert run_query(T, "SELECT 'new'", timeout_seconds=10) == [("new",)]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def run_query_until_interrupted(query: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_query(T, query, timeout_seconds=10)


def test_threads_get_their_own_answers():
    answers: dict[int, list[object]] = {}

    def ask(number: int) -> None:
        answers[number] = [
            run_query(T, f"SELECT {number}, {i}, a FROM t LIMIT 1", timeout_seconds=10) for i in range(50)
        ]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: [[(number, i, 1)] for i in range(50)] for number in range(4)}


def test_a_forked_process_has_a_worker_of_its_own():
    text = """
import os
from steps.text2sql.sql_execution import MadeDatabase, run_query
from steps.text2sql.sql_process import PROCESS
ask = lambda query: run_query(MadeDatabase("", {}), query, timeout_seconds=10)
print(ask("SELECT 'before'"), PROCESS._process.pid, flush=True)
if os.fork() == 0:
    print(ask("SELECT 'child'"), PROCESS._process.pid, flush=True)
    os._exit(0)
os.wait()
print(ask("SELECT 'parent'"), PROCESS._process.pid, flush=True)
"""
    output, _ = script(text).communicate(timeout=120)
    (before, first), (child, second), (parent, third) = (line.rsplit(" ", 1) for line in output.splitlines())
    assert (before, child, parent) == ("[('before',)]", "[('child',)]", "[('parent',)]")
    assert first == third != second


def test_a_process_forked_while_a_query_runs_can_ask_too():
    asking = threading.Thread(target=lambda: run_queries(T, [f"SELECT {SLOW}"], timeout_seconds=1))
    asking.start()
    wait_until(sql_process.PROCESS.lock.locked)
    child = os.fork()
    if child == 0:
        try:
            is_right = run_query(T, "SELECT 7", timeout_seconds=10) == [(7,)]
            sql_process.PROCESS.stop()
        finally:
            os._exit(0 if is_right else 1)
    assert os.waitpid(child, 0)[1] == 0
    asking.join()


@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), 9)", "os._exit(0)", "raise SystemExit(1)"])
def test_the_worker_ends_with_the_process_that_started_it(end):
    text = f"""
import os
from steps.text2sql.sql_execution import MadeDatabase, run_query
from steps.text2sql.sql_process import PROCESS
run_query(MadeDatabase("", dict()), "SELECT 1", timeout_seconds=10)
print(PROCESS._process.pid, flush=True)
{end}
"""
    process = script(text)
    worker = int(process.stdout.readline())
    process.communicate(timeout=60)
    wait_until(lambda: not psutil.pid_exists(worker))


def test_a_query_of_a_daemon_thread_does_not_outlive_the_process():
    text = f"""
import threading
from steps.text2sql.sql_execution import MadeDatabase, run_query
from steps.text2sql.sql_process import PROCESS
run_query(MadeDatabase("", {{}}), "SELECT 1", timeout_seconds=10)
ask = lambda: run_query(MadeDatabase("", {{}}), {f"SELECT {SLOW}"!r}, timeout_seconds=300)
threading.Thread(target=ask, daemon=True).start()
print(PROCESS._process.pid, flush=True)
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", text], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    worker = psutil.Process(int(process.stdout.readline()))
    used = worker.cpu_times().user
    wait_until(lambda: worker.cpu_times().user > used + 0.1)  # it is in the opcode
    process.communicate("\n", timeout=60)
    wait_until(lambda: not worker.is_running())


def test_a_worker_that_is_alone_in_a_long_opcode_ends_soon_after_its_deadline():
    text = f"""
from steps.text2sql.sql_execution import MadeDatabase, run_query
run_query(MadeDatabase("", {{}}), "SELECT 1", timeout_seconds=10)
print("ready", flush=True)
run_query(MadeDatabase("", {{}}), {f"SELECT {SLOW}"!r}, timeout_seconds=1)
"""
    process = script(text)
    process.stdout.readline()
    (worker,) = workers(psutil.Process(process.pid))
    used = worker.cpu_times().user
    wait_until(lambda: worker.cpu_times().user > used + 0.1)  # it is in the opcode
    process.kill()
    process.communicate()
    wait_until(lambda: not worker.is_running(), seconds=1 + sql_worker.ORPHAN_SECONDS + 5)


def test_the_worker_needs_the_standard_library_only():
    tree = ast.parse(Path(sql_worker.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


# Each guard below, with the authorizer switched off, which would refuse these before it.


class Everything(set):
    """A set that has all in it."""

    def __contains__(self, _: object) -> bool:
        return True


@pytest.fixture
def replies(monkeypatch):
    """The worker's replies, in this process, with all guards but the authorizer and the limits on memory."""
    monkeypatch.setattr(sql_worker, "READING", Everything())
    monkeypatch.setattr(sql_worker, "FORBIDDEN_FUNCTIONS", set())
    # It would hold for this process from now on.
    monkeypatch.setattr(sql_worker, "SETTINGS", sql_worker.SETTINGS.replace("hard_heap_limit", "heap"))
    monkeypatch.setattr(sql_worker.signal, "setitimer", lambda *_: None)

    def answer(database: dict[str, object], *queries: str) -> list[str]:
        opened, *found = sql_worker.Worker().replies(database, "run", list(queries), seconds=10)
        assert opened == sql_worker.READY
        return found

    return answer


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A file with one table of one row."""
    path = tmp_path / "one.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (a)")
        connection.execute("INSERT INTO t VALUES (1)")
        connection.commit()
    return path


def test_a_made_database_is_for_reading_only_when_it_is_made(replies):
    made = {"context": T.context, "rows": {}}
    found = replies(made, "INSERT INTO t VALUES (1, 'x')", "SELECT COUNT(*) FROM t")
    assert found == ['["error","attempt to write a readonly database"]', '["rows",[[0]]]']


def test_a_file_is_opened_for_reading_only(replies, database):
    found = replies(
        {"uri": database.as_uri()}, "PRAGMA query_only = OFF", "DELETE FROM t", "SELECT COUNT(*) FROM t"
    )
    assert found[1:] == ['["error","attempt to write a readonly database"]', '["rows",[[1]]]']


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("ATTACH ':memory:' AS other", "too many attached databases - max 0"),
        ("SELECT 1" + " + 1" * 101, "Expression tree is too large (maximum depth 100)"),
        (" UNION ALL ".join(["SELECT 1"] * 21), "too many terms in compound SELECT"),
        (f"SELECT 'x' LIKE '{'%' * 1_001}'", "LIKE or GLOB pattern too complex"),
        (f"SELECT '{'x' * 100_000}'", "query string is too large"),
        ("SELECT length(zeroblob(1000001))", "string or blob too big"),
    ],
)
def test_the_limits_of_sqlite_hold_behind_the_authorizer(replies, query, reason):
    assert replies({"context": "", "rows": {}}, query) == [f'["error","{reason}"]']


@pytest.mark.parametrize("action", ["load_extension('x')", "fts3_tokenizer('simple')"])
def test_some_functions_are_forbidden_although_functions_are_allowed(action):
    with pytest.raises(QueryError, match="not authorized"):
        run_query(T, f"SELECT {action}", timeout_seconds=10)


def test_a_process_with_limits_writes_no_file_and_takes_no_more_memory(tmp_path):
    text = f"""
from steps.text2sql import sql_worker
before = open({str(tmp_path / "before")!r}, "wb", buffering=0)
sql_worker.limit_process()
for name, act in dict(write=lambda: before.write(b"x"), memory=lambda: bytearray(250_000_000)).items():
    try:
        print(name, act())
    except (OSError, MemoryError) as error:
        print(name, type(error).__name__)
import resource
print(resource.getrlimit(resource.RLIMIT_CORE))
"""
    output, _ = script(text).communicate(timeout=60)
    assert output.splitlines() == ["write OSError", "memory MemoryError", "(0, 0)"]


def test_results_in_the_making_are_held_by_the_limit_of_the_process():
    wide = ", ".join(["hex(zeroblob(490000))"] * 50)
    with pytest.raises(QueryError, match="takes too much memory"):
        run_query(T, f"{N} SELECT {wide} FROM n", timeout_seconds=60)


@pytest.mark.parametrize(
    "query",
    [
        f"{N} SELECT COUNT(DISTINCT randomblob(900000)) FROM n",
        f"{N} SELECT randomblob(90000) b FROM n ORDER BY b",
        f"{N} SELECT COUNT(*) FROM (SELECT randomblob(90000) b FROM n UNION SELECT x'')",
    ],
)
def test_sqlite_has_a_limit_on_its_own_memory_and_the_process_serves_on(query):
    sql_process.PROCESS.stop()
    with pytest.raises(QueryError, match="takes too much memory"):
        run_query(T, query, timeout_seconds=60)
    (worker,) = workers()
    assert worker.memory_info().rss < 60_000_000
    if sys.platform == "linux":
        peak = Path(f"/proc/{worker.pid}/status").read_text().split("VmHWM:")[1].split()[0]
        assert 90_000 < int(peak) < 140_000
    assert run_query(T, "SELECT a FROM t", timeout_seconds=10) == [(1,), (2,)]


def test_sorting_more_than_the_cache_holds_needs_no_file():
    query = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 20000) "
    rows = run_query(T, f"{query} SELECT x FROM n ORDER BY hex(randomblob(250))", timeout_seconds=60)
    assert sorted(rows) == [(x,) for x in range(1, 20_001)]


# Files that are made to do harm, or are in use.


def test_a_database_in_wal_mode_is_read_without_a_file_beside_it(database):
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("INSERT INTO t VALUES (2)")
        connection.commit()
        with pytest.raises(QueryError, match=r"one\.sqlite has changes in one\.sqlite-wal"):
            run_query(database, "SELECT a FROM t", timeout_seconds=10)
    before = database.read_bytes()
    assert run_query(database, "SELECT a FROM t", timeout_seconds=10) == [(1,), (2,)]
    assert (list(database.parent.iterdir()), database.read_bytes()) == ([database], before)


@pytest.mark.parametrize(
    ("made", "reason", "seconds"),
    [
        (f"CREATE VIEW v AS {N} SELECT x FROM n", "took over", 0.3),
        (f"CREATE VIEW v AS SELECT {SLOW} AS x", "took over", 0.3),
        ("CREATE VIEW v AS SELECT load_extension('x') AS x", "not authorized|unsafe use", 10),
        ("CREATE VIEW v AS SELECT name AS x FROM pragma_database_list", "not authorized|vtable", 10),
        ("CREATE TABLE v (a, x AS (zeroblob(1000001))); INSERT INTO v DEFAULT VALUES", "too big", 10),
    ],
)
def test_a_file_made_to_do_harm_is_held_by_the_same_limits(database, made, reason, seconds):
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript(made)
    run_query(T, "SELECT 1", timeout_seconds=60)  # the process has started
    begin = time.monotonic()
    with pytest.raises(QueryError, match=reason):
        run_query(database, "SELECT COUNT(x) FROM v WHERE x > 0", timeout_seconds=seconds)
    assert time.monotonic() - begin < seconds + 2


def test_a_schema_that_is_damaged_is_a_query_error(database):
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET sql = 'CREATE TABLE t (' || hex(zeroblob(99999))")
        connection.commit()
    with pytest.raises(QueryError, match="malformed|too big"):
        run_query(database, "SELECT 1", timeout_seconds=10)


def test_a_pipe_a_folder_and_nothing_are_no_databases(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none" / "none.sqlite"):
        with pytest.raises(QueryError, match=r"unable to open|disk I/O|took over 0\.3 s"):
            run_query(path, "SELECT 1", timeout_seconds=0.3)
