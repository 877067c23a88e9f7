"""The judges of execution_match: rewrites return the same, mutants do not, random databases show it."""

import sqlite3
from contextlib import closing

import pytest

from tests import sql_mutations
from tests.random_databases import (
    RandomDatabases,
    constants,
    executes,
    is_equivalent,
    neighbours,
    orders,
    tables_of,
)
from tests.sql_mutations import MUTANTS, REWRITES, Query, is_applicable, label

CONTEXT = (
    "CREATE TABLE owners (id INTEGER, name TEXT, city TEXT, age INTEGER); "
    "CREATE TABLE pets (id INTEGER, owner_id INTEGER, name TEXT, weight REAL)"
)
# Sizes, names and keys overlap enough that each mutant below returns something else than its gold query.
ROWS = """
INSERT INTO owners VALUES (1, 'Ann', 'Bonn', 30), (2, 'Bob', 'Bonn', 40), (3, 'Cem', 'Rom', 50),
    (4, 'Dora', 'bonn', 50), (5, 'Ann', 'Rom', NULL);
INSERT INTO pets VALUES (1, 1, 'Rex', 5), (2, 1, 'Rex', 7.5), (3, 2, 'Mia', 9), (2, 3, 'Ann', NULL),
    (8, 9, 'Rey', 5), (6, 2, NULL, 1);
"""
NAMES = "SELECT name FROM owners"
JOINED = "FROM owners AS T1 JOIN pets AS T2 ON T1.id = T2.owner_id"
# One example of each kind of mutant: gold, and a mutant that it must find.
MUTATED = {
    "another selected column": (NAMES, "SELECT city FROM owners"),
    "another condition column": (f"{NAMES} WHERE age > 2", f"{NAMES} WHERE id > 2"),
    "another group or order column": (f"{NAMES} ORDER BY age", f"{NAMES} ORDER BY city"),
    "operator boundary": (f"{NAMES} WHERE age > 40", f"{NAMES} WHERE age >= 40"),
    "operator opposite": (f"{NAMES} WHERE NOT age IN (30, 40)", f"{NAMES} WHERE age IN (30, 40)"),
    "constant near": (f'{NAMES} WHERE city = "Bonm"', f'{NAMES} WHERE city = "Bonn"'),
    "constant far": (f"{NAMES} WHERE id < 2", f"{NAMES} WHERE id < 27"),
    "constant letter case": (f'{NAMES} WHERE city = "Bonn"', f'{NAMES} WHERE city = "bonn"'),
    "another aggregate": ("SELECT MAX(age) FROM owners", "SELECT MIN(age) FROM owners"),
    "aggregate dropped": ("SELECT MAX(age) FROM owners", "SELECT age FROM owners"),
    "count of other rows": ("SELECT COUNT(*) FROM owners", "SELECT COUNT(age) FROM owners"),
    "condition dropped": (f"{NAMES} WHERE age = 50 AND id < 4", f"{NAMES} WHERE id < 4"),
    "condition added": (f'{NAMES} WHERE city = "Bonn"', f'{NAMES} WHERE city = "Bonn" AND id > 2'),
    "and for or": (f"{NAMES} WHERE age = 50 AND id < 4", f"{NAMES} WHERE age = 50 OR id < 4"),
    "distinct dropped": ("SELECT DISTINCT name FROM owners", NAMES),
    "distinct added": (NAMES, "SELECT DISTINCT name FROM owners"),
    "order direction": (f"{NAMES} ORDER BY id", f"{NAMES} ORDER BY id DESC"),
    "order dropped": (f"{NAMES} ORDER BY age DESC LIMIT 2", f"{NAMES} LIMIT 2"),
    "limit changed": (f"{NAMES} LIMIT 2", f"{NAMES} LIMIT 3"),
    "limit dropped": (f"{NAMES} LIMIT 2", NAMES),
    "join key": (f"SELECT T1.name {JOINED}", f"SELECT T1.name {JOINED.replace('owner_id', 'id')}"),
    "join type": (f"SELECT T1.name {JOINED}", f"SELECT T1.name {JOINED.replace('JOIN', 'LEFT JOIN')}"),
    "group dropped": ("SELECT city, COUNT(*) FROM owners GROUP BY city", "SELECT city, COUNT(*) FROM owners"),
    "set operation": (f"{NAMES} EXCEPT SELECT name FROM pets", f"{NAMES} INTERSECT SELECT name FROM pets"),
}
REWRITTEN = {
    "same text": (f"{NAMES} WHERE id NOT IN (1)", f"{NAMES} WHERE NOT id IN (1)"),
    "table aliases": (f"{NAMES} WHERE id > 2", "SELECT q1.name FROM owners AS q1 WHERE q1.id > 2"),
    "conditions reordered": (f"{NAMES} WHERE age = 50 AND id < 4", f"{NAMES} WHERE id < 4 AND age = 50"),
    "sides swapped": (f"{NAMES} WHERE age > 40", f"{NAMES} WHERE 40 < age"),
    "count 1": ("SELECT COUNT(*) FROM owners", "SELECT COUNT(1) FROM owners"),
    "subquery around": (f"{NAMES} ORDER BY name", f"SELECT * FROM ({NAMES} ORDER BY name) ORDER BY 1"),
    "join as in": (
        f"SELECT DISTINCT T1.name {JOINED} WHERE T2.weight > 5 AND T1.age > 20",
        "SELECT DISTINCT T1.name FROM owners AS T1 WHERE T1.age > 20 AND "
        "T1.id IN (SELECT T2.owner_id FROM pets AS T2 WHERE T2.weight > 5)",
    ),
    "in as join": (
        f"{NAMES} WHERE age > 20 AND id IN (SELECT owner_id FROM pets)",
        "SELECT name FROM owners JOIN (SELECT DISTINCT owner_id AS matched FROM pets) AS m ON id = m.matched "
        "WHERE age > 20",
    ),
    "join reversed": (
        f"SELECT T1.name {JOINED}",
        "SELECT T1.name FROM pets AS T2 JOIN owners AS T1 ON T1.id = T2.owner_id",
    ),
    "join as condition": (
        f"SELECT T1.name {JOINED} WHERE T2.weight > 5",
        "SELECT T1.name FROM owners AS T1, pets AS T2 WHERE T2.weight > 5 AND T1.id = T2.owner_id",
    ),
    "distinct as group": ("SELECT DISTINCT name FROM owners", f"{NAMES} GROUP BY name"),
    "between as comparisons": (
        f"{NAMES} WHERE age BETWEEN 30 AND 40",
        f"{NAMES} WHERE (age >= 30 AND age <= 40)",
    ),
    "output names": (NAMES, "SELECT name AS output_1 FROM owners"),
    "other quotes": (f'{NAMES} WHERE city = "Bonn"', f"{NAMES} WHERE city = 'Bonn'"),
    "lower case": (f'{NAMES} WHERE city = "Bonn"', 'select name from owners where city = "Bonn"'),
    "upper case": (f'{NAMES} WHERE city = "Bonn"', 'SELECT NAME FROM OWNERS WHERE CITY = "Bonn"'),
    "white space": (NAMES, "SELECT\n  name\nFROM owners"),
    "semicolon": (NAMES, f"{NAMES} ;\n"),
    "inequality sign": (f"{NAMES} WHERE age <> 30", f"{NAMES} WHERE age != 30"),
}


def result(query):
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(CONTEXT + ";" + ROWS)
        rows = connection.execute(query).fetchall()
        return rows if orders(query) else sorted(rows, key=repr)


def found(kinds, kind, gold):
    query = Query(CONTEXT, gold)
    (function,) = (function for function in kinds if label(function) == kind)
    return [text if isinstance(text, str) else query.sql(text) for text in function(query)]


@pytest.mark.parametrize("kind", map(label, MUTANTS))
def test_each_kind_of_mutant_makes_what_its_name_says_and_that_returns_something_else(kind):
    gold, mutant = MUTATED[kind]
    assert mutant in found(MUTANTS, kind, gold)
    assert result(mutant) != result(gold)
    assert is_applicable(kind, CONTEXT, gold)


@pytest.mark.parametrize("kind", map(label, REWRITES))
def test_each_kind_of_rewrite_makes_what_its_name_says_and_that_returns_the_same(kind):
    gold, rewrite = REWRITTEN[kind]
    assert rewrite in found(REWRITES, kind, gold)
    assert result(rewrite) == result(gold)
    assert result(gold)


@pytest.mark.parametrize("gold", sorted({gold for gold, _ in (MUTATED | REWRITTEN).values()}))
def test_every_rewrite_of_a_query_returns_the_same_on_random_databases(gold):
    databases = RandomDatabases(CONTEXT, [gold], count=25)
    for kind, rewrite in sql_mutations.rewrites(CONTEXT, gold, per_kind=3):
        assert is_equivalent(CONTEXT, gold, rewrite, databases=databases), (kind, rewrite)
    databases.close()


@pytest.mark.parametrize("kind", map(label, MUTANTS))
def test_random_databases_tell_each_example_of_a_mutant_from_its_gold_query(kind):
    assert not is_equivalent(CONTEXT, *MUTATED[kind])


def test_variants_execute_differ_in_text_and_are_the_same_in_each_draw():
    gold = f'SELECT T1.name {JOINED} WHERE T1.city = "Bonn" AND T2.weight > 5'
    drawn = sql_mutations.mutants(CONTEXT, gold, per_kind=2)
    assert drawn == sql_mutations.mutants(CONTEXT, gold, per_kind=2)
    assert all(executes(CONTEXT, mutant) and mutant != gold for _, mutant in drawn)
    assert max(sum(other == kind for other, _ in drawn) for kind, _ in drawn) == 2


def test_turning_an_order_back_adds_no_word_about_nulls():
    assert found(MUTANTS, "order direction", f"{NAMES} ORDER BY id DESC") == [f"{NAMES} ORDER BY id ASC"]


def test_a_rewrite_that_leaves_the_text_as_it_was_is_none():
    kinds = [kind for kind, _ in sql_mutations.rewrites(CONTEXT, "SELECT NAME FROM OWNERS")]
    assert "lower case" in kinds
    assert "upper case" not in kinds


def test_double_quoted_constants_stay_constants_in_double_quotes():
    gold = 'SELECT "name" FROM owners WHERE city = "Bonn" AND "age" > 30'
    query = Query(CONTEXT, gold)
    assert query.sql(query.tree) == gold
    (mutant,) = found(MUTANTS, "constant near", gold.replace(' AND "age" > 30', ""))
    assert mutant.endswith('city = "Bono"')


def test_a_constant_that_became_the_name_of_a_column_gets_single_quotes():
    gold = f'{NAMES} WHERE city = "Namd"'
    assert found(MUTANTS, "constant near", gold) == [f"{NAMES} WHERE city = 'Name'"]


def test_a_changed_and_keeps_its_place_among_or():
    mutants = found(MUTANTS, "and for or", f"{NAMES} WHERE id = 1 AND age = 2 OR city = 'x'")
    assert mutants == [
        f"{NAMES} WHERE id = 1 AND age = 2 AND city = 'x'",
        f"{NAMES} WHERE (id = 1 OR age = 2) OR city = 'x'",
    ]


@pytest.mark.parametrize(
    ("kind", "gold"),
    [
        ("constant far", NAMES),
        ("distinct added", "SELECT city, COUNT(*) FROM owners GROUP BY city"),
        ("and for or", f"{NAMES} WHERE age BETWEEN 1 AND 2"),
        ("join key", NAMES),
        ("limit changed", f"{NAMES} ORDER BY age"),
    ],
)
def test_a_kind_without_anything_to_change_is_not_applicable(kind, gold):
    assert not is_applicable(kind, CONTEXT, gold)
    assert found(MUTANTS, kind, gold) == []


def test_a_join_is_no_in_where_repeated_rows_count():
    assert found(REWRITES, "join as in", f"SELECT T1.name {JOINED}") == []


def test_random_databases_are_the_same_for_a_seed_and_others_for_another():
    first, again, other = (RandomDatabases(CONTEXT, [NAMES], count=5, seed=seed) for seed in (1, 1, 2))
    assert [first.contents(i) for i in range(5)] == [again.contents(i) for i in range(5)]
    assert [first.contents(i) for i in range(5)] != [other.contents(i) for i in range(5)]


def test_200_random_databases_differ_and_hold_nulls_and_empty_tables():
    databases = RandomDatabases(CONTEXT, [NAMES])
    contents = [databases.contents(i) for i in range(200)]
    tables = [rows for content in contents for rows in content.values()]
    assert len({repr(content) for content in contents}) > 190
    assert [] in tables
    assert any(None in row for rows in tables for row in rows)


def test_whole_rows_repeat_in_many_random_databases():
    columns = ", ".join(f"c{i} TEXT" for i in range(12))
    databases = RandomDatabases(f"CREATE TABLE wide ({columns})", ["SELECT c1 FROM wide"])
    tables = [databases.contents(i)["wide"] for i in range(200)]
    assert sum(len(set(rows)) < len(rows) for rows in tables) > 50


def test_random_databases_hold_the_constants_of_gold_and_mutants_and_their_neighbours():
    queries = [f'{NAMES} WHERE city = "Bonn" AND age > 40', f"{NAMES} WHERE city LIKE '%Rom%'"]
    databases = RandomDatabases(CONTEXT, queries)
    owners = [row for i in range(200) for row in databases.contents(i)["owners"]]
    assert {"Bonn", "bONN", "Rom", "xRomx"} <= {city for _, _, city, _ in owners}
    assert {39, 40, 41} <= {age for *_, age in owners}
    assert any(city == "Bonn" and age == 41 for _, _, city, age in owners)


def test_constants_belong_to_the_column_before_them_and_counts_to_none():
    query = 'SELECT city FROM owners WHERE name = "Ann" AND age > 30.5 GROUP BY city HAVING COUNT(*) > 2'
    columns = set(tables_of(CONTEXT)["owners"])
    assert list(constants(query, columns)) == [("name", "Ann"), ("age", 30.5), ("", 2)]


def test_neighbours_of_a_pattern_match_it_or_just_do_not():
    assert {"East", "xEastx", "Eas"} <= set(neighbours("%East%"))


def test_order_counts_only_where_the_whole_query_is_ordered():
    assert orders("SELECT a FROM t order  by a")
    assert not orders("SELECT a FROM (SELECT a FROM t ORDER BY a) WHERE a = ' ORDER BY '")
    assert not is_equivalent(CONTEXT, f"{NAMES} ORDER BY id", f"{NAMES} ORDER BY id DESC")
    assert is_equivalent(CONTEXT, NAMES, f"SELECT * FROM ({NAMES} ORDER BY id DESC)")


def test_a_query_that_fails_is_not_equivalent():
    assert not is_equivalent(CONTEXT, NAMES, "SELECT nothing FROM owners")


def test_the_real_database_has_a_say(tmp_path):
    path = tmp_path / "real.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(CONTEXT + ";" + ROWS)
    gold, mutant = f"{NAMES} WHERE id < 9", f"{NAMES} WHERE id < 9 AND city <> 'bonn' COLLATE BINARY"
    none = RandomDatabases(CONTEXT, [gold], count=0)
    assert is_equivalent(CONTEXT, gold, mutant, databases=none)
    assert is_equivalent(CONTEXT, gold, gold, path, databases=none)
    assert not is_equivalent(CONTEXT, gold, mutant, path, databases=none)
    assert is_equivalent(CONTEXT, gold, "SELECT nothing FROM owners", path, databases=none)


def test_a_query_is_stopped_after_its_time(monkeypatch):
    monkeypatch.setattr("tests.random_databases.SECONDS_PER_QUERY", 0.05)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT COUNT(*) FROM n"
    databases = RandomDatabases(CONTEXT, [NAMES], count=1)
    assert databases.first_difference(NAMES, endless) == 0
