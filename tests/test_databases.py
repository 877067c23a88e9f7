"""SQLite files that a user's rows name: found, refused and copied."""

import sqlite3

import datasets
import pandas
import pytest

from steps.text2sql import databases, scoring
from steps.text2sql.errors import UserError


def make(path, *, rows=1, mode="delete"):
    """A database with a table `t` of so many numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA journal_mode={mode}")
        connection.execute("CREATE TABLE t (a INT)")
        connection.executemany("INSERT INTO t VALUES (?)", [(i,) for i in range(rows)])
    connection.close()
    return path


def absolute(folder, *cells):
    return databases.absolute(pandas.Series(cells, dtype=object), folder, problem="dataset=x").tolist()


def refusal(folder, *cells):
    with pytest.raises(UserError, match="^dataset=x: ") as caught:
        absolute(folder, *cells)
    return str(caught.value)


def test_a_relative_path_is_taken_from_the_folder_of_the_data_file(tmp_path):
    file = make(tmp_path / "db" / "shop.sqlite")
    assert absolute(tmp_path, "db/shop.sqlite", f" {file} ", "./db/shop.sqlite") == [str(file)] * 3


@pytest.mark.parametrize("cell", [None, "", " ", float("nan"), pandas.NA])
def test_an_empty_cell_is_no_database(tmp_path, cell):
    file = make(tmp_path / "shop.sqlite")
    assert absolute(tmp_path, cell, str(file)) == [None, str(file)]
    assert absolute(tmp_path, cell) == [None]


def test_missing_files_are_named_with_their_rows(tmp_path):
    make(tmp_path / "shop.sqlite")
    message = refusal(tmp_path, "shop.sqlite", "gone.sqlite", "shop.sqlite", "away.sqlite")
    assert f"row 1: {tmp_path}/gone.sqlite is no file" in message
    assert f"row 3: {tmp_path}/away.sqlite is no file" in message
    assert "row 0" not in message
    assert "and 2 more" in refusal(tmp_path, *["gone.sqlite"] * 7)


@pytest.mark.parametrize("content", [b"", b"SQLite", b"a,b\n1,2\n" * 9])
def test_a_file_that_is_no_sqlite_database_is_refused(tmp_path, content):
    (tmp_path / "rows.csv").write_bytes(content)
    assert "row 0: " in refusal(tmp_path, "rows.csv")
    assert "is no SQLite database" in refusal(tmp_path, "rows.csv")


@pytest.mark.parametrize("cell", [".", 7, ["a"], "a\x00b", "~a\x00b"])
def test_what_is_no_path_of_a_file_is_refused(tmp_path, cell):
    assert "is no file" in refusal(tmp_path, cell)


def test_a_column_of_long_texts_is_refused_without_repeating_them(tmp_path):
    message = refusal(tmp_path, "SELECT a FROM t " * 100)
    assert "row 0: " in message
    assert "cannot be read: File name too long" in message
    assert len(message) < 400


def test_the_home_of_a_user_who_does_not_exist_is_no_file(tmp_path):
    assert "~nosuchuser/x.sqlite is no file" in refusal(tmp_path, "~nosuchuser/x.sqlite")


def test_a_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = make(tmp_path / "home" / "shop.sqlite")
    assert absolute(tmp_path, "~/shop.sqlite") == [str(file)]


def test_a_database_with_rows_in_its_log_is_refused(tmp_path):
    connection = sqlite3.connect(tmp_path / "shop.sqlite")
    connection.execute("PRAGMA journal_mode=wal")
    connection.execute("CREATE TABLE t (a INT)")
    assert "a copy would lack what is in its -wal file" in refusal(tmp_path, "shop.sqlite")
    connection.close()


def test_a_log_is_found_beside_the_file_that_a_link_leads_to(tmp_path):
    (tmp_path / "link.sqlite").symlink_to(tmp_path / "shop.sqlite")
    connection = sqlite3.connect(tmp_path / "shop.sqlite")
    connection.execute("PRAGMA journal_mode=wal")
    connection.execute("CREATE TABLE t (a INT)")
    assert "a copy would lack what is in its -wal file" in refusal(tmp_path, "link.sqlite")
    connection.close()
    assert absolute(tmp_path, "link.sqlite") == [str(tmp_path / "link.sqlite")]


def test_a_database_amid_a_change_is_refused(tmp_path):
    make(tmp_path / "shop.sqlite", rows=5000)
    connection = sqlite3.connect(tmp_path / "shop.sqlite", isolation_level=None)
    connection.execute("PRAGMA cache_size=1")  # so that pages are written before the end of the change
    connection.execute("BEGIN")
    connection.execute("UPDATE t SET a = -1")
    assert "a copy would lack what is in its -journal file" in refusal(tmp_path, "shop.sqlite")
    connection.execute("ROLLBACK")
    connection.close()
    assert absolute(tmp_path, "shop.sqlite") == [str(tmp_path / "shop.sqlite")]


@pytest.mark.parametrize("page", [512, 4096, 65536])
def test_a_database_that_is_cut_short_is_refused(tmp_path, page):
    with sqlite3.connect(tmp_path / "shop.sqlite") as connection:
        connection.execute(f"PRAGMA page_size={page}")
        connection.execute("CREATE TABLE t (a INT)")
        connection.executemany("INSERT INTO t VALUES (?)", [(i,) for i in range(1000)])
    connection.close()
    whole = (tmp_path / "shop.sqlite").read_bytes()
    assert absolute(tmp_path, "shop.sqlite") == [str(tmp_path / "shop.sqlite")]
    (tmp_path / "shop.sqlite").write_bytes(whole[:-page])
    assert "is cut short" in refusal(tmp_path, "shop.sqlite")


def test_a_test_row_without_a_database_is_refused_by_its_number(tmp_path):
    rows = pandas.DataFrame({"database": [None, str(make(tmp_path / "shop.sqlite"))]}, index=[8, 9])
    with pytest.raises(UserError, match="1 of 2 test rows have no database.* rows 8, counted"):
        databases.check_test_rows(rows)
    databases.check_test_rows(rows[1:])


def test_more_bytes_than_the_limit_are_refused_before_anything_is_copied(tmp_path, monkeypatch):
    small, large = make(tmp_path / "small.sqlite"), make(tmp_path / "large.sqlite", rows=5000)
    rows = pandas.DataFrame({"database": [str(small), str(large), str(large)]})
    size = small.stat().st_size + large.stat().st_size
    monkeypatch.setattr(databases, "MAX_BYTES", size)
    databases.check_test_rows(rows)  # one file that many rows name counts once
    monkeypatch.setattr(databases, "MAX_BYTES", size - 1)
    with pytest.raises(UserError, match=f"2 databases of the test rows have {size:,} bytes.*{large}"):
        databases.check_test_rows(rows)


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_copies_answer_queries_and_files_of_one_name_stay_apart(tmp_path, mode):
    files = [make(tmp_path / name / "my shop.sqlite", rows=n, mode=mode) for name, n in (("a", 1), ("b", 3))]
    rows = datasets.Dataset.from_dict(
        {"answer": ["x", "y", "z"], "database": [str(files[i]) for i in (0, 1, 0)]}
    )
    (tmp_path / "out").mkdir()
    placed = databases.copy(rows, tmp_path / "out")
    assert placed["answer"] == rows["answer"]
    names = placed["database"]
    assert (names[0], len({*names})) == (names[2], 2)
    assert all(name.startswith("databases/my_shop-") and name.endswith(".sqlite") for name in names)
    for name, count in zip(names, (1, 3, 1), strict=True):
        gold, guess = "SELECT COUNT(*) FROM t", f"SELECT {count}"
        assert not scoring.execution_difference_on(tmp_path / "out" / name, gold, guess, timeout_seconds=5)
    assert len(list((tmp_path / "out" / "databases").glob("*.sqlite"))) == 2


def test_rows_without_databases_stay_as_they_are(tmp_path):
    rows = datasets.Dataset.from_dict({"answer": ["x"]})
    assert databases.copy(rows, tmp_path) is rows
    assert list(tmp_path.iterdir()) == []
