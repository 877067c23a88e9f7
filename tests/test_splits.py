"""Which rows go together, and where each group goes."""

import hashlib
import itertools
import math

import datasets
import numpy
import pandas
import pytest

from steps.text2sql import splits
from steps.text2sql.errors import UserError
from tests.conftest import plain_rows


def rows_of(contexts: list[str]) -> pandas.DataFrame:
    return pandas.DataFrame({"question": "q", "context": contexts, "answer": map(str, range(len(contexts)))})


def many(count: int) -> pandas.DataFrame:
    """As many rows as tables."""
    return rows_of([f"CREATE TABLE t{i} (a INT)" for i in range(count)])


def by_schema(
    rows: pandas.DataFrame, *, test_size: float = 0.2, seed: int = 42
) -> dict[str, pandas.DataFrame]:
    return splits.split(rows, by="schema", test_size=test_size, seed=seed)


def answers(part: pandas.DataFrame) -> set[str]:
    return set(part["answer"])


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ("CREATE TABLE head (age INTEGER, name VARCHAR)", {"head(age,name)"}),
        ("create  table\nHead(NAME text,Age int)", {"head(age,name)"}),
        ("CREATE TABLE IF NOT EXISTS head (age INTEGER)", {"head(age)"}),
        ('CREATE TABLE "My Head" ("The Age" INTEGER, "name")', {"my head(name,the age)"}),
        ("CREATE TABLE `head` (`age` INTEGER)", {"head(age)"}),
        ("CREATE TABLE [head] ([age] INTEGER)", {"head(age)"}),
        ("CREATE TABLE t (price DECIMAL(10,2), kind VARCHAR(20) NOT NULL)", {"t(kind,price)"}),
        ("CREATE TABLE t (a INT PRIMARY KEY, b INT REFERENCES u (x, y))", {"t(a,b)"}),
        ("CREATE TABLE t (a INT, b INT, PRIMARY KEY (a, b), FOREIGN KEY (b) REFERENCES u(c))", {"t(a,b)"}),
        ("CREATE TABLE t (a INT, CONSTRAINT k UNIQUE (a), CHECK (a > 0), unique (a))", {"t(a)"}),
        ("CREATE TABLE t (a INT, UNIQUE(a), CHECK(a>0))", {"t(a)"}),
        ('CREATE TABLE t (a INT, "primary" TEXT)', {"t(a,primary)"}),
        ("CREATE TABLE a (x INT); CREATE TABLE b (y INT)", {"a(x)", "b(y)"}),
        ("CREATE TABLE table_name_12 (b INT, a INT)", {"(a,b)"}),
        ("CREATE TABLE table_name (a INT)", {"table_name(a)"}),
        ("CREATE TABLE my_table_name_12 (a INT)", {"my_table_name_12(a)"}),
        (" Not A Table ", {"not a table"}),
        (
            "CREATE TABLE t (\n  id INT, -- Unique ID, of (one\n  name TEXT -- what it is called\n)",
            {"t(id,name)"},
        ),
        ("CREATE TABLE t (a INT /* one, (two */, b INT) -- CREATE TABLE u (c INT)", {"t(a,b)"}),
        ("CREATE TABLE t (a TEXT DEFAULT ') it''s (, --', b INT)", {"t(a,b)"}),
        ('CREATE TABLE "a--b" ("c\'s" INT, [d/*] INT, e\'s INT, f\'s INT)', {"a--b(c's,d/*,e's,f's)"}),
        ("CREATE TEMP TABLE t (a INT); CREATE TEMPORARY TABLE IF NOT EXISTS u (b)", {"t(a)", "u(b)"}),
    ],
)
def test_tables_are_their_name_and_sorted_columns(context, expected):
    assert splits.tables(context) == expected


def test_types_do_not_tell_tables_apart_but_columns_do():
    assert splits.tables("CREATE TABLE t (a INT)") == splits.tables("CREATE TABLE t (a TEXT)")
    assert splits.tables("CREATE TABLE t (a INT)") != splits.tables("CREATE TABLE t (a INT, b INT)")


def test_rows_that_share_a_table_through_others_are_one_group():
    a, b, c, d = (f"CREATE TABLE {name} (x INT)" for name in "abcd")
    group = splits.groups(pandas.Series([f"{a}; {b}", d, f"{b}; {c}", c, a]))
    assert group[0] == group[2] == group[3] == group[4]
    assert group[1] != group[0]


def test_numbered_tables_with_the_same_columns_are_one_group_and_with_others_another():
    group = splits.groups(
        pandas.Series([f"CREATE TABLE table_name_{i} ({c} INT)" for i, c in [(1, "a"), (2, "a"), (3, "b")]])
    )
    assert group[0] == group[1] != group[2]


@pytest.mark.parametrize("by", ["schema", "random"])
def test_every_row_is_in_exactly_one_split_and_keeps_its_index(by):
    rows = many(400).set_index(pandas.RangeIndex(1000, 1400))
    parts = splits.split(rows, by=by, test_size=0.2, seed=42)
    assert list(parts) == ["train", "validation", "test"]
    assert sorted(i for part in parts.values() for i in part.index) == list(range(1000, 1400))
    pandas.testing.assert_frame_equal(pandas.concat(parts.values()).sort_index(), rows)


def test_a_group_is_never_in_two_splits():
    random = numpy.random.default_rng(0)
    pairs = random.integers(0, 900, (900, 2))  # chains of tables, some long
    rows = rows_of([f"CREATE TABLE t{a} (x INT); CREATE TABLE t{b} (x INT)" for a, b in pairs])
    rows = pandas.concat([rows, rows_of([f"CREATE TABLE s{i % 90} (x INT)" for i in range(900)])])
    parts = by_schema(rows.reset_index(drop=True))
    found = {
        name: {t for c in part["context"] for t in splits.tables(c)}
        for name, part in parts.items()
        if len(part)
    }
    assert len(found) == 3
    assert sum(map(len, found.values())) == len(set().union(*found.values()))


def test_a_group_is_test_when_the_hash_of_its_tables_falls_under_test_size():
    def share(i: int) -> float:
        return int(hashlib.sha256(f"t{i}(a)".encode()).hexdigest()[:16], 16) / 16**16

    expected = {str(i) for i in range(200) if share(i) < 0.3}
    assert answers(by_schema(many(200), test_size=0.3)["test"]) == expected


def test_another_seed_has_the_same_test_rows():
    rows = many(200)
    assert answers(by_schema(rows, seed=1)["test"]) == answers(by_schema(rows, seed=2)["test"])


def test_shuffled_rows_have_the_same_splits():
    rows = pandas.DataFrame(plain_rows(600, tables=200))
    shuffled = rows.sample(frac=1, random_state=3).reset_index(drop=True)
    first, second = by_schema(rows), by_schema(shuffled)
    assert {name: answers(part) for name, part in first.items()} == {
        name: answers(part) for name, part in second.items()
    }


def test_a_smaller_test_size_takes_a_part_of_the_same_test_rows():
    rows = many(300)
    assert answers(by_schema(rows, test_size=0.1)["test"]) < answers(by_schema(rows, test_size=0.3)["test"])


@pytest.mark.parametrize("test_size", [0.1, 0.2, 0.5])
def test_the_share_of_test_rows_over_many_tables_is_near_test_size(test_size):
    count = 4000
    deviation = math.sqrt(test_size * (1 - test_size) / count)
    assert abs(len(by_schema(many(count), test_size=test_size)["test"]) / count - test_size) < 4 * deviation


def test_validation_is_five_percent_of_what_is_not_test_and_whole_tables():
    rows = pandas.DataFrame(plain_rows(2000, tables=1000))  # two rows a table
    parts = by_schema(rows)
    rest = len(rows) - len(parts["test"])
    assert rest * 0.05 - 2 <= len(parts["validation"]) <= rest * 0.05
    assert set(parts["validation"]["context"].value_counts()) == {2}
    assert set(parts["validation"]["context"]).isdisjoint(parts["train"]["context"])


@pytest.mark.parametrize("by", ["schema", "random"])
def test_validation_has_no_more_than_500_rows(by):
    parts = splits.split(many(14_000), by=by, test_size=0.2, seed=42)
    assert len(parts["validation"]) == 500


def test_a_table_too_large_for_validation_stays_in_train():
    large = rows_of(["CREATE TABLE large (a INT)"] * 500)
    parts = by_schema(pandas.concat([large, many(100)], ignore_index=True), test_size=0.1)
    assert 0 < len(parts["validation"]) <= 30
    assert "CREATE TABLE large (a INT)" not in set(parts["validation"]["context"])


def test_a_random_split_draws_the_rows_of_train_test_split():
    rows = many(500)
    parts = splits.split(rows, by="random", test_size=0.2, seed=7)
    expected = datasets.Dataset.from_pandas(rows).train_test_split(test_size=0.2, seed=7)
    assert answers(parts["test"]) == set(expected["test"]["answer"])
    assert answers(parts["train"]) | answers(parts["validation"]) == set(expected["train"]["answer"])
    assert len(parts["validation"]) == 20  # 5 % of 400


def test_rows_that_ask_the_same_are_on_one_side_of_a_random_split():
    rows = pandas.concat([many(60)] * 2, ignore_index=True)
    rows.loc[60:, "answer"] = rows.loc[60:, "answer"].where(rows.index[60:] % 2 == 0, "SELECT 1")
    parts = splits.split(rows, by="random", test_size=0.2, seed=7)
    assert sum(map(len, parts.values())) == 120
    assert len(parts["test"]) == 24
    for name, other in itertools.permutations(parts, 2):
        assert splits.shared_rows(parts[name], parts[other]) == 0


def test_a_random_split_follows_the_seed():
    first, second = (splits.split(many(100), by="random", test_size=0.2, seed=s)["test"] for s in (1, 2))
    assert answers(first) != answers(second)


def test_the_tutorials_rows_are_split_as_in_the_tutorial():
    questions = [str(i) for i in range(78_577)]
    rows = pandas.DataFrame({"question": questions, "context": "CREATE TABLE t (a INT)"})
    parts = splits.split(rows, by="random", test_size=0.2, seed=42)
    assert len(parts["train"]) + len(parts["validation"]) == 62_861
    assert len(parts["test"]) == 15_716
    assert len(parts["validation"]) == 500


@pytest.mark.parametrize("test_size", [0.001, 0.999])
def test_one_table_cannot_be_split_by_schema(test_size):
    rows = rows_of(["CREATE TABLE t (a INT)"] * 50)
    with pytest.raises(UserError) as caught:
        by_schema(rows, test_size=test_size)
    message = str(caught.value)
    assert f"split_by=schema, test_size={test_size}" in message
    assert ("for test" if test_size < 0.5 else "for train") in message
    assert "split_by=random" in message


def test_too_few_rows_for_a_random_split_are_refused_with_the_parameters():
    with pytest.raises(UserError, match="split_by=random, test_size=0.2"):
        splits.split(many(1), by="random", test_size=0.2, seed=42)


def test_rows_without_a_context_are_split_too():
    rows = pandas.concat([many(60), rows_of([None, None, float("nan"), 7])], ignore_index=True)
    assert sum(map(len, by_schema(rows).values())) == 64


def test_a_context_that_has_no_utf8_form_does_not_end_the_split():
    rows = pandas.concat([many(60), rows_of(["CREATE TABLE t\ud800 (a INT)"])], ignore_index=True)
    try:
        parts = by_schema(rows)
    except UserError:
        return
    assert sum(map(len, parts.values())) == 61


@pytest.mark.parametrize("by", ["schema", "random"])
@pytest.mark.parametrize("names", [["validation"], ["test"], ["validation", "test"]])
def test_splits_of_the_users_own_stay_and_no_rows_are_taken_for_them(by, names):
    given = {name: rows_of([f"CREATE TABLE {name} (a INT)"]) for name in names}
    parts = splits.split(many(100), by=by, test_size=0.2, seed=42, given=given)
    for name in names:
        assert parts[name] is given[name]
    without = splits.split(many(100), by=by, test_size=0.2, seed=42)
    taken = {name: 0 if name in names else len(without[name]) for name in ("validation", "test")}
    if by == "random" or "test" not in names:
        others = [len(parts[name]) for name in taken if name not in names]
        assert len(parts["train"]) + sum(others) == 100
        assert ("test" in names) or others[-1] == taken["test"]


def test_shared_rows_ask_the_same_question_of_the_same_context():
    rows = pandas.DataFrame({"question": ["a", "b", "a"], "context": ["x", "x", "y"]})
    others = pandas.DataFrame({"question": ["a", "c", "a"], "context": ["x", "y", "x"]})
    assert splits.shared_rows(rows, others) == 1
    assert splits.shared_rows(rows, rows) == 3
    assert splits.shared_rows(rows[:0], others) == splits.shared_rows(rows, others[:0]) == 0
