"""Which rows an evaluation scores, and that another one can score exactly these."""

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pandas
import pytest

from steps.text2sql import databases, dataset, sample_data, sample_domains, scored_rows, splits
from steps.text2sql.errors import UserError
from steps.text2sql.manifest import DatasetManifest
from tests.conftest import plain_rows, write_jsonl

TRAINED_ON = DatasetManifest(
    **dict.fromkeys(
        ("base_model", "base_commit", "base_license", "dataset", "dataset_source", "dataset_commit"), ""
    ),
    **dict.fromkeys(("dataset_config", "dataset_split", "dataset_digest", "tokenizer_fingerprint"), ""),
    **dict.fromkeys(("prompt_template", "prompt_style"), ""),
    max_length=512,
    split_by="schema",
    test_size=0.2,
    seed=42,
    counts={},
)


def read(name: object) -> pandas.DataFrame:
    """Rows of a dataset as evaluate reads them."""
    return scored_rows.of_dataset(dataset.resolve(str(name), base_is_hub=False), TRAINED_ON)


def refusal(name: object) -> str:
    with pytest.raises(UserError) as caught:
        read(name)
    return str(caught.value)


def make_database(path: Path, value: int) -> Path:
    """A database with one number in it."""
    path.parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"CREATE TABLE t AS SELECT {value} AS a")
        connection.commit()
    return path


def number_in(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT a FROM t").fetchone()[0]


def test_of_a_folder_the_test_rows_are_scored_or_all_that_have_no_other_use(tmp_path):
    rows = plain_rows(4)
    write_jsonl(tmp_path / "validation.jsonl", rows[:1])
    assert "has validation files alone; it needs rows to score" in refusal(tmp_path)
    write_jsonl(tmp_path / "more.jsonl", rows[1:3])
    assert read(tmp_path)["question"].to_list() == [row["question"] for row in rows[1:3]]
    write_jsonl(tmp_path / "test.jsonl", rows[3:])
    assert read(tmp_path)["question"].to_list() == [rows[3]["question"]]
    (tmp_path / "more.jsonl").unlink()
    assert read(tmp_path)["question"].to_list() == [rows[3]["question"]]


def test_all_sound_rows_of_a_file_are_read_and_repeated_ones_once(tmp_path):
    rows = plain_rows(10)
    file = write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[0]])
    assert read(file)[list(dataset.COLUMNS)].to_dict("records") == rows


def test_rows_without_gold_are_an_error_that_names_them(tmp_path):
    rows = plain_rows(5)
    rows[1]["answer"], rows[3]["answer"] = "", None
    message = refusal(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert message.startswith(
        f"dataset={tmp_path / 'rows.jsonl'}: 2 of 5 rows cannot be scored (row 1: answer is"
    )
    assert "row 3: answer is missing" in message
    assert "counted from 0); mend" in message


def test_a_file_without_the_column_of_gold_is_an_error(tmp_path):
    rows = [{"question": "q", "context": "c"}]
    message = refusal(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert "lacks the columns answer; found: question, context. Rename yours in the file." in message


def test_a_database_that_is_not_there_is_named_by_its_column(tmp_path):
    rows = [row | {"database": "no.sqlite"} for row in plain_rows(2)]
    message = refusal(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert f"dataset={tmp_path / 'rows.jsonl'}, column database: " in message


def test_rows_that_all_contradict_each_other_leave_nothing_to_score(tmp_path):
    rows = [plain_rows(1)[0] | {"answer": f"SELECT {i}"} for i in range(2)]
    assert "no row is left to score" in refusal(write_jsonl(tmp_path / "rows.jsonl", rows))


def test_sample_is_the_test_split_that_the_version_never_saw():
    found = read("sample")
    everything = pandas.DataFrame(sample_data.generate(42))
    parts = splits.split(everything, by="schema", test_size=0.2, seed=42)
    assert 0 < len(found) <= len(parts["test"])
    assert set(found["context"]) <= set(parts["test"]["context"])
    assert not set(found["context"]) & set(parts["train"]["context"])


def test_databases_are_found_beside_the_file_and_by_absolute_path(tmp_path):
    beside, elsewhere = (
        make_database(tmp_path / "db" / "x.sqlite", 1),
        make_database(tmp_path / "o" / "x.db", 2),
    )
    rows = plain_rows(4)
    rows[0]["database"], rows[1]["database"], rows[2]["database"] = "db/x.sqlite", str(elsewhere), ""
    found = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert list(found["database"]) == [str(beside), str(elsewhere), None, None]


def test_databases_that_do_not_exist_are_one_error(tmp_path):
    rows = [row | {"database": f"db/{i % 2}.sqlite"} for i, row in enumerate(plain_rows(4))]
    message = refusal(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert f"column database: row 0: {tmp_path}/db/0.sqlite is no file; " in message
    assert message.count(".sqlite is no file") == 4


def test_the_same_rows_are_chosen_whatever_their_order():
    rows = pandas.DataFrame(plain_rows(30))
    chosen = scored_rows.choose(rows, 7)
    assert len(chosen) == 7
    assert scored_rows.choose(rows.sample(frac=1, random_state=1), 7).equals(chosen)
    assert len(scored_rows.choose(rows, 99)) == 30


def test_written_rows_are_read_again_as_the_same_rows_with_their_own_databases(tmp_path):
    one, two = make_database(tmp_path / "a" / "x.sqlite", 1), make_database(tmp_path / "b" / "X.sqlite", 2)
    rows = [r | {"database": d} for r, d in zip(plain_rows(3), (str(one), str(two), None), strict=True)]
    chosen = scored_rows.choose(read(write_jsonl(tmp_path / "rows.jsonl", rows)), 3)
    folder = tmp_path / "kept"
    folder.mkdir()
    kept = scored_rows.write(chosen, folder, seed=0)
    digest = scored_rows.digest(chosen, folder)
    one.unlink(), two.unlink()
    again = scored_rows.choose(read(folder / "rows.jsonl"), 3)
    assert scored_rows.digest(again, folder) == scored_rows.digest(kept, folder) == digest
    numbers = {
        row["question"]: row["database"] and number_in(Path(row["database"]))
        for row in again.to_dict("records")
    }
    assert list(map(numbers.get, (row["question"] for row in rows))) == [1, 2, None]
    lines = (folder / "rows.jsonl").read_text().splitlines()
    assert not any(Path(json.loads(line)["database"] or "").is_absolute() for line in lines)


def test_files_of_one_name_stay_apart_where_letter_case_does_not_count(tmp_path):
    names = [str(make_database(tmp_path / folder / "x.sqlite", 1)) for folder in "ab"]
    names.append(str(make_database(tmp_path / "c" / "X.sqlite", 3)))
    assert len({path.lower() for path in databases.write(names, tmp_path, seed=0)}) == 3


def test_a_file_whose_name_is_no_utf_8_gets_a_name_that_can_be_written(tmp_path):
    file = make_database(tmp_path / os.fsdecode(b"caf\xe9 1.sqlite"), 1)
    [path] = databases.write([str(file)], tmp_path, seed=0)
    assert path == "databases/caf__1.sqlite"
    assert (tmp_path / path).read_bytes() == file.read_bytes()


def test_a_built_in_domain_gets_its_database(tmp_path):
    domain = sample_domains.DOMAINS[0].name
    paths = databases.write([domain, None, domain], tmp_path, seed=42)
    assert paths == [f"databases/{domain}.sqlite", None, f"databases/{domain}.sqlite"]
    assert (tmp_path / paths[0]).is_file()


def test_rows_without_databases_leave_no_folder_for_them(tmp_path):
    scored_rows.write(pandas.DataFrame(plain_rows(2)), tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_another_answer_is_another_digest(tmp_path):
    rows = pandas.DataFrame(plain_rows(2))
    assert scored_rows.digest(rows, tmp_path) != scored_rows.digest(rows.assign(answer="SELECT 1"), tmp_path)


def test_another_database_is_another_digest(tmp_path):
    rows = pandas.DataFrame(plain_rows(2))
    found = {scored_rows.digest(rows, tmp_path)}
    for number in (1, 2):  # the same name, with other contents
        file = make_database(tmp_path / str(number) / "x.sqlite", number)
        for of_rows in ([file.name, None], [None, file.name], [file.name] * 2):
            found.add(scored_rows.digest(rows.assign(database=of_rows), file.parent))
    assert len(found) == 7
