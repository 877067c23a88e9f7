"""The goals of execution_match on built-in rows: gold is right, rewrites are, mutants are not."""

import random

import pytest

from steps.text2sql import sample_data, scoring
from tests import sql_mutations
from tests.random_databases import is_equivalent

ROWS = 40


@pytest.mark.slow
def test_gold_and_its_rewrites_are_right_and_its_mutants_are_wrong():
    rows = random.Random(42).sample(sample_data.generate(42), ROWS)
    wrong_rewrites, rewrite_count, survivors, killed_count = [], 0, [], 0
    for row in rows:
        context, gold = row["context"], row["answer"]
        assert scoring.execution_match(context, gold, gold), gold
        rewrites, mutants = sql_mutations.rewrites(context, gold), sql_mutations.mutants(context, gold)
        wrong_rewrites += [r for r in rewrites if not scoring.execution_match(context, gold, r[1])]
        called_right = [m for m in mutants if scoring.execution_match(context, gold, m[1])]
        survivors += [m for m in called_right if not is_equivalent(context, gold, m[1])]
        rewrite_count += len(rewrites)
        killed_count += len(mutants) - len(called_right)
    assert killed_count > 5 * ROWS
    assert len(wrong_rewrites) <= 0.01 * rewrite_count, wrong_rewrites
    assert len(survivors) <= 0.02 * (killed_count + len(survivors)), survivors
