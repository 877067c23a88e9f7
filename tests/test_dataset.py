"""Reading rows from files, taking out what cannot teach, and pinning where rows come from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pandas
import pytest

from steps.text2sql import dataset, hub
from steps.text2sql.errors import UserError
from tests.conftest import PROJECT, plain_rows, write_jsonl

HEADER = ",".join(dataset.COLUMNS)


COLUMNS = dataset.Columns("question", "context", "answer", "")


def resolve(
    value: str, *, base_is_hub: bool = False, config: str = "", split: str = ""
) -> dataset.DatasetSource:
    return dataset.resolve(value, base_is_hub=base_is_hub, config=config, split=split)


def read_file(path: Path, **columns: str) -> pandas.DataFrame:
    return dataset.read(resolve(str(path)), columns=COLUMNS._replace(**columns), seed=42)["train"]


def read_text(path: Path, content: str | bytes) -> pandas.DataFrame:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_file(path)


def refusal(path: Path, content: str | bytes) -> str:
    """Message of a file that cannot be read; every one names the parameter and the file."""
    with pytest.raises(UserError) as caught:
        read_text(path, content)
    assert f"dataset={path}" in str(caught.value)
    return str(caught.value)


def frame(*rows: tuple[object, object, object], index: list[int] | None = None) -> pandas.DataFrame:
    return pandas.DataFrame(rows, columns=list(dataset.COLUMNS), index=index)


def test_the_four_file_formats_give_the_same_rows(tmp_path):
    rows = [*plain_rows(5), {"question": 'Say "é, ü"\nplease', "context": "C", "answer": "SELECT '\\n'"}]
    table = pandas.DataFrame(rows)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    table.to_csv(tmp_path / "rows.csv", index=False)
    table.to_parquet(tmp_path / "rows.parquet")
    for suffix in ("jsonl", "json", "csv", "parquet"):
        assert read_file(tmp_path / f"rows.{suffix}").to_dict("records") == rows, suffix


def test_other_columns_are_left_out_and_the_order_of_columns_does_not_matter(tmp_path):
    rows = read_text(tmp_path / "rows.csv", "id,answer,source,question,context\n7,a,d,q,c\n")
    assert rows.to_dict("records") == [{"question": "q", "context": "c", "answer": "a"}]


def test_csv_cells_stay_text(tmp_path):
    rows = read_text(tmp_path / "rows.csv", f"{HEADER}\nNA,007,1.0\nnull,True,\n")
    assert rows.values.tolist() == [["NA", "007", "1.0"], ["null", "True", ""]]


def test_a_csv_cell_may_be_longer_than_the_csv_modules_limit(tmp_path):
    question = "x" * (128 * 1024 + 1)
    assert read_text(tmp_path / "rows.csv", f"{HEADER}\n{question},c,a\n")["question"][0] == question


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"question": "q", "context": "c", "answer": "a"}'),
        ("rows.json", '[{"question": "q", "context": "c", "answer": "a"}]'),
        ("rows.csv", f"{HEADER}\r\nq,c,a\r\n"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, name, content):
    rows = read_text(tmp_path / name, b"\xef\xbb\xbf" + content.encode())
    assert rows.values.tolist() == [["q", "c", "a"]]


def test_blank_json_lines_are_skipped_and_a_line_separator_in_a_string_is_no_line_end(tmp_path):
    content = '\n{"question": "a\u2028b", "context": "c", "answer": "a"}\n  \n'
    assert read_text(tmp_path / "rows.jsonl", content)["question"].tolist() == ["a\u2028b"]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("b.jsonl", "\n\n"), ("c.json", "[]"), ("d.csv", f"{HEADER}\n")]
)
def test_a_file_without_rows_is_refused(tmp_path, name, content):
    assert "no rows" in refusal(tmp_path / name, content)


def test_missing_columns_are_named_beside_those_that_were_found(tmp_path):
    message = refusal(tmp_path / "rows.csv", "question,schema,query\nq,c,a\n")
    assert "lacks the columns context, answer;" in message
    assert "found: question, schema, query" in message


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_file_in_another_encoding_is_refused_with_the_byte_and_the_way_out(tmp_path, name):
    message = refusal(
        tmp_path / name, f"{HEADER}\nna\N{LATIN SMALL LETTER I WITH DIAERESIS}ve".encode("latin-1")
    )
    assert f"byte {len(HEADER) + 3}" in message
    assert "save it as UTF-8" in message


def test_the_byte_that_is_not_utf8_is_counted_from_the_start_of_a_long_csv_file(tmp_path):
    start = f"{HEADER}\n".encode() + b"q,c,a\n" * 3000
    assert f"byte {len(start)};" in refusal(tmp_path / "rows.csv", start + b"\xff,c,a\n")


GOOD_LINE = '{"question": "q", "context": "c", "answer": "a"}\n'


def test_a_broken_json_line_is_named_by_its_number(tmp_path):
    message = refusal(tmp_path / "rows.jsonl", GOOD_LINE * 2 + '{"question": \n' + GOOD_LINE)
    assert "line 3:" in message
    assert "line 4:" not in message


def test_several_broken_json_lines_are_in_one_message_and_the_rest_is_counted(tmp_path):
    message = refusal(tmp_path / "rows.jsonl", GOOD_LINE + "{\n" * 7)
    assert all(f"line {number}:" in message for number in range(2, 7))
    assert "line 7:" not in message
    assert "and 2 more" in message


@pytest.mark.parametrize("line", ["[1, 2]", '"text"', "7", "null"])
def test_a_json_line_that_is_no_object_is_refused_by_its_number(tmp_path, line):
    message = refusal(tmp_path / "rows.jsonl", f"{GOOD_LINE}{line}\n")
    assert "line 2: not an object" in message


@pytest.mark.parametrize(
    "content", ["{", '{"question": "q"}', "[1]", "", pytest.param("[" * 100_000, id="deep")]
)
def test_a_json_file_that_is_no_list_of_objects_is_refused(tmp_path, content):
    assert "is not valid JSON" in refusal(tmp_path / "rows.json", content)


def test_an_open_quote_in_csv_is_refused(tmp_path):
    assert "is not valid CSV" in refusal(tmp_path / "rows.csv", f'{HEADER}\nq,"c,a\n')


def test_a_csv_row_with_more_cells_than_columns_is_not_read_shifted(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"{HEADER}\nHow many?,CREATE TABLE t (a INT, b INT),SELECT a FROM t\n")
    try:
        kept, _ = dataset.check(read_file(path))
    except UserError:
        return
    assert kept.empty


def test_a_csv_row_with_fewer_cells_than_columns_is_rejected(tmp_path):
    kept, reasons = dataset.check(read_text(tmp_path / "rows.csv", f"{HEADER}\nq,c\nq,c,a\n"))
    assert list(kept.index) == [1]
    assert "answer" in reasons[0]


@pytest.mark.parametrize("content", [b"", b"PAR1 no parquet PAR1"])
def test_a_broken_parquet_file_is_refused(tmp_path, content):
    assert "is not valid PARQUET" in refusal(tmp_path / "rows.parquet", content)


def test_a_file_that_is_gone_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_file(tmp_path / "gone.jsonl")


def test_the_built_in_rows_name_their_database_and_follow_the_seed():
    source = resolve("sample", base_is_hub=True)
    rows, again, other = (dataset.read(source, columns=COLUMNS, seed=seed)["train"] for seed in (1, 1, 2))
    assert list(rows.columns) == ["question", "context", "answer", "database"]
    assert dataset.digest(rows) == dataset.digest(again)
    assert dataset.digest(rows) != dataset.digest(other)


@pytest.mark.parametrize("column", dataset.COLUMNS)
@pytest.mark.parametrize("value", [None, float("nan"), 7, ["q"], "", " \n\t "])
def test_a_row_with_a_column_that_is_no_text_is_taken_out_with_the_columns_name(column, value):
    rows = frame(("q", "c", "a"), ("q2", "c2", "a2"), index=[10, 20]).astype(object)
    rows.at[20, column] = value
    kept, reasons = dataset.check(rows)
    assert list(kept.index) == [10]
    assert reasons.to_dict() == {20: f"{column} is missing, empty or not text"}


@pytest.mark.parametrize("value", [None, 1, 1.5])
def test_a_column_without_any_text_takes_out_every_row(value):
    kept, reasons = dataset.check(frame(("q", "c", value), ("q2", "c", value)))
    assert kept.empty
    assert list(reasons.index) == [0, 1]


def test_of_repeated_rows_the_first_stays():
    rows = frame(
        ("q", "c", "a"), ("other", "c", "a"), ("q", "c", "a"), ("q", "c", " a\n"), index=[4, 3, 2, 1]
    )
    kept, reasons = dataset.check(rows)
    assert list(kept.index) == [4, 3]
    assert reasons.to_dict() == dict.fromkeys([2, 1], "duplicate of an earlier row")


def test_of_contradictory_rows_none_stays_not_even_repeated_ones():
    rows = frame(("q", "c", "a"), ("q", "c", "a"), ("q", "c", "b"), ("q", "other", "a"), ("p", "c", "b"))
    kept, reasons = dataset.check(rows)
    assert list(kept.index) == [3, 4]
    assert list(reasons.index) == [0, 1, 2]
    assert reasons.str.startswith("contradiction").all()


def test_an_incomplete_row_contradicts_nothing():
    kept, _ = dataset.check(frame(("q", "c", "a"), ("q", "c", None)))
    assert list(kept.index) == [0]


def test_sound_rows_lose_their_outer_white_space_and_nothing_else():
    text = "SELECT  \"É\" ,\n\t'x  y' FROM t ;"
    rows = frame((f" {text}\n", text, f"\t{text} "), ("NA", "null", "0"))
    kept, reasons = dataset.check(rows)
    assert kept.values.tolist() == [[text] * 3, ["NA", "null", "0"]]
    assert reasons.empty
    assert rows.iat[0, 0] == f" {text}\n"  # the raw rows stay as they were


def test_a_check_of_no_rows_gives_no_rows():
    kept, reasons = dataset.check(frame())
    assert (len(kept), len(reasons)) == (0, 0)


def test_the_digest_changes_with_one_character_and_with_the_order_of_rows():
    rows = frame(("q", "c", "a"), ("p", "c", "b"))
    others = [
        frame(("q", "c", "a"), ("p", "c", "B")),
        frame(("p", "c", "b"), ("q", "c", "a")),
        frame(("qc", "", "a"), ("p", "c", "b")),
        frame(("q", "c", "a")),
    ]
    assert len({dataset.digest(one) for one in [rows, *others]}) == 5


def test_the_digest_does_not_depend_on_index_or_further_columns():
    rows = frame(("q", "c", "a"))
    assert dataset.digest(rows) == dataset.digest(rows.assign(database="d").set_index(pandas.Index([9])))


def test_the_digest_is_the_same_in_another_process(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*plain_rows(3), {"question": "é", "context": None}])
    code = (
        "import sys; from pathlib import Path; from steps.text2sql import dataset as d;"
        "columns = d.Columns('question', 'context', 'answer', '');"
        "print(d.digest(d.read_file(Path(sys.argv[1]), columns=columns, parameter='dataset')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=PROJECT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == dataset.digest(read_file(path))


@pytest.fixture
def hub_calls(monkeypatch):
    """Instead of the hub: what was looked up, and a fixed commit for it."""
    calls = []

    def resolve(value, **settings):
        calls.append((value, settings))
        name, _, revision = value.partition("@")
        return hub.HubRepository(name, revision if len(revision) == 40 else "f" * 40, {}, "cc-by-4.0")

    monkeypatch.setattr(hub, "resolve", resolve)
    return calls


def test_auto_is_the_built_in_rows_where_the_base_is_local(hub_calls):
    source = resolve("auto", base_is_hub=False)
    assert (source.kind, source.name, source.commit) == ("sample", "sample", "")
    assert source.reason.startswith("auto:")
    assert hub_calls == []


def test_auto_is_the_pinned_hub_dataset_where_the_base_is_on_the_hub(hub_calls):
    source = resolve("auto", base_is_hub=True)
    commit = "9d80a6a118b838d9defc3798d659a54a2ac2ff37"
    assert (source.kind, source.name, source.commit) == ("hub", "b-mc2/sql-create-context", commit)
    assert source.reason.startswith("auto:")
    assert [value for value, _ in hub_calls] == [f"b-mc2/sql-create-context@{commit}"]


@pytest.mark.parametrize("base_is_hub", [True, False])
def test_a_given_dataset_does_not_depend_on_the_base(hub_calls, tmp_path, base_is_hub):
    given = [resolve(v, base_is_hub=base_is_hub) for v in ("sample", "a/b@main", str(tmp_path / "r.csv"))]
    assert [(s.kind, s.name, s.commit, s.reason) for s in given] == [
        ("sample", "sample", "", "as given"),
        ("hub", "a/b", "f" * 40, "as given"),
        ("file", "r.csv", "", "as given"),
    ]
    settings = hub_calls[0][1]
    assert (settings["parameter"], settings["kind"]) == ("dataset", "dataset")
    assert "dataset=sample" in settings["instead"]


def test_hub_rows_are_read_at_their_commit(monkeypatch):
    asked = []

    def load_dataset(path, **settings):
        asked.append((path, settings))
        return dataset.datasets.Dataset.from_list([{"context": "c", "answer": "a", "question": "q"}])

    monkeypatch.setattr(dataset.datasets, "load_dataset", load_dataset)
    source = dataset.DatasetSource("a/b", "hub", "a/b", "f" * 40, "", "small", "train[:10%]")
    rows = dataset.read(source, columns=COLUMNS, seed=1)["train"]
    assert rows.values.tolist() == [["q", "c", "a"]]
    assert asked == [("a/b", {"name": "small", "revision": "f" * 40, "split": "train[:10%]"})]


# Columns, folders and hub settings of the user's


def test_columns_are_read_under_the_names_that_the_user_gives(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question,sql query,schema\nq,a,c\n")
    rows = read_file(path, context="schema", answer="sql query")
    assert rows.to_dict("records") == [{"question": "q", "context": "c", "answer": "a"}]


def test_missing_columns_are_named_with_the_parameters_that_name_them(tmp_path):
    message = refusal(tmp_path / "rows.csv", "question,schema,query\nq,c,a\n")
    assert message.endswith("Name yours with context_column, answer_column.")


def test_columns_of_one_name_in_a_csv_are_refused(tmp_path):
    message = refusal(tmp_path / "rows.csv", "question,context,answer,answer\nq,c,a,b\n")
    assert "has several columns named answer" in message


def test_what_a_parquet_file_has_as_pandas_index_does_not_count(tmp_path):
    rows = frame(("q", "c", "a"), ("r", "c", "b"))
    for number, index in enumerate([[7, 7], pandas.MultiIndex.from_tuples([(1, 2), (3, 4)]), ["x", "y"]]):
        rows.set_axis(index).to_parquet(tmp_path / f"{number}.parquet")
        assert list(read_file(tmp_path / f"{number}.parquet").index) == [0, 1]
    rows.set_index("question").to_parquet(tmp_path / "named.parquet")
    assert list(read_file(tmp_path / "named.parquet")["question"]) == ["q", "r"]


def test_columns_without_a_name_do_not_count(tmp_path):
    rows = read_text(tmp_path / "rows.csv", f"{HEADER},,\nq,c,a,,\n")
    assert rows[list(dataset.COLUMNS)].values.tolist() == [["q", "c", "a"]]


def test_the_line_of_a_csv_that_is_broken_is_named(tmp_path):
    message = refusal(tmp_path / "rows.csv", f'{HEADER}\nq,c,a\nq,c,"a" b\nq,c,a\n')
    assert "line 3: ',' expected after '\"'; between cells stands a comma" in message


def test_a_column_of_categories_may_have_gaps():
    rows = frame(("q", "c", "a"), ("r", None, "b")).astype({"context": "category"})
    kept, rejected = dataset.check(rows)
    assert kept.values.tolist() == [["q", "c", "a"]]
    assert rejected.tolist() == ["context is missing, empty or not text"]


def test_a_column_of_categories_may_have_one_value_alone():
    rows = frame(("q", "c", "a"), ("r", "c", "b")).astype({"context": "category"})
    kept, reasons = dataset.check(rows)
    assert list(kept["context"]) == ["c", "c"]
    assert reasons.empty


def test_one_column_for_two_things_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"{HEADER}\nq,c,a\n")
    with pytest.raises(UserError, match="one column is given for two things: .*answer_column=context"):
        read_file(path, answer="context")


def read_folder(folder: Path, **columns: str) -> dict[str, list[str]]:
    """Questions by split."""
    parts = dataset.read(resolve(str(folder)), columns=COLUMNS._replace(**columns), seed=42)
    return {name: rows["question"].tolist() for name, rows in parts.items()}


def write_rows(path: Path, *questions: str) -> None:
    write_jsonl(path, [{"question": question, "context": "c", "answer": "a"} for question in questions])


def test_all_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    write_rows(tmp_path / "b.jsonl", "3")
    write_rows(tmp_path / "a.jsonl", "1", "2")
    (tmp_path / "c.csv").write_text(f"{HEADER}\n4,c,a\n")
    (tmp_path / "notes.txt").write_text("no rows")
    assert read_folder(tmp_path) == {"train": ["1", "2", "3", "4"]}


def test_files_named_as_splits_stay_splits(tmp_path, capsys):
    hashed = "test-00000-of-00001-a09b74b3ef9c3b56"
    for name in ("train-00000-of-00002", "train-00001-of-00002", "Dev", "test", hashed, "tests_of_mine"):
        write_rows(tmp_path / f"{name}.jsonl", name)
    write_rows(tmp_path / "val.JSONL", "val")
    assert read_folder(tmp_path) == {
        "validation": ["Dev", "val"],
        "test": [hashed, "test"],
        "train": ["tests_of_mine", "train-00000-of-00002", "train-00001-of-00002"],
    }
    assert capsys.readouterr().out.splitlines() == [
        "  validation: rows of Dev.jsonl, val.JSONL",
        f"  test: rows of {hashed}.jsonl, test.jsonl",
        "  train: rows of tests_of_mine.jsonl, train-00000-of-00002.jsonl, train-00001-of-00002.jsonl",
    ]


def test_a_folder_without_a_file_of_rows_is_refused(tmp_path):
    (tmp_path / ".jsonl").write_text("{}")  # a name without an ending
    with pytest.raises(UserError, match=rf"dataset={tmp_path}: has no files .*\.jsonl"):
        read_folder(tmp_path)


def test_a_broken_file_of_a_folder_is_named(tmp_path):
    write_rows(tmp_path / "a.jsonl", "1")
    (tmp_path / "b.jsonl").write_text("{")
    with pytest.raises(UserError, match=f"dataset={tmp_path}/b.jsonl: "):
        read_folder(tmp_path)


@pytest.mark.parametrize("value", ["sample", "auto", "/rows.csv"])
@pytest.mark.parametrize("setting", [{"config": "small"}, {"split": "validation"}])
def test_configuration_and_split_belong_to_a_hub_dataset(value, setting):
    with pytest.raises(
        UserError, match="^dataset_(config=small|split=validation): counts for a dataset of the hub"
    ):
        resolve(value, **setting)


def test_a_hub_dataset_is_read_from_train_unless_another_split_is_given(hub_calls):
    assert (resolve("a/b").config, resolve("a/b").split) == ("", "train")
    source = resolve("a/b", config="small", split="validation")
    assert (source.config, source.split) == ("small", "validation")


@pytest.mark.parametrize(
    "error", [ValueError("Unknown split"), datasets.exceptions.DatasetNotFoundError("gone")]
)
def test_a_configuration_or_split_that_the_hub_does_not_have_is_the_users_error(monkeypatch, error):
    def load_dataset(path, **settings):
        raise error

    monkeypatch.setattr(dataset.datasets, "load_dataset", load_dataset)
    source = dataset.DatasetSource("a/b", "hub", "a/b", "f" * 40, "", "small", "dev")
    with pytest.raises(UserError, match=f"dataset=a/b, dataset_config=small, dataset_split=dev: .*{error}"):
        dataset.read(source, columns=COLUMNS, seed=1)


@pytest.mark.parametrize("kind", ["hub", "sample"])
def test_database_files_belong_to_a_dataset_of_files(kind):
    source = dataset.DatasetSource("a/b", kind, "a/b", "", "")
    with pytest.raises(UserError, match="database_column=file: needs a dataset of files"):
        dataset.read(source, columns=COLUMNS._replace(database="file"), seed=1)
