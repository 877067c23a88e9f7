"""The search itself, with trainings that only return a loss."""

import math

import pytest
from optuna.trial import TrialState

from steps.text2sql.errors import UserError
from steps.text2sql.search import UNSTOPPED_TRIALS, Search, Space, ranks

SPACE = Space((1e-4, 1e-2), (4, 32), (10, 100))


@pytest.fixture
def search(tmp_path):
    """Opens the search of this test's file."""
    return lambda name="a", space=SPACE, seed=1: Search(tmp_path / "sweep.db", name, space, seed=seed)


def distance(_, values, __):
    """A loss that is lowest at a learning rate of 1e-3."""
    return abs(math.log10(float(values["learning_rate"])) + 3)


def test_values_are_within_their_limits_and_short_enough_to_type(search):
    seen = []
    search().run(10, lambda number, values, _: seen.append(values) or 1.0)
    for values in seen:
        assert 1e-4 <= float(values["learning_rate"]) <= 1e-2
        assert len(values["learning_rate"]) <= 8
        assert int(values["lora_r"]) in (4, 8, 16, 32)
        assert 10 <= int(values["max_steps"]) <= 100


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(8, 64, [8, 16, 32, 64]), (6, 20, [6, 8, 16, 20]), (10, 12, [10, 12]), (5, 5, [5])],
)
def test_ranks_are_powers_of_two_and_the_ends(low, high, found):
    assert ranks(low, high) == found


def test_the_best_is_the_trial_of_lowest_loss(search):
    found = search()
    found.run(8, distance)
    losses = {row["trial"]: row["loss"] for row in found.table()}
    best = found.best()
    assert losses[best.number] == best.loss == min(losses.values())
    assert distance(0, best.values, None) == best.loss


def test_a_search_opened_again_goes_on_and_counts_what_is_done(search):
    search().run(3, distance)
    seen = []
    search().run(5, lambda number, *_: seen.append(number) or 1.0)
    assert seen == [4, 5]
    search().run(5, lambda *_: pytest.fail("all trials are done"))


def test_another_search_in_the_same_file_starts_anew(search):
    search().run(2, distance)
    assert search("b").done() == []


class Killed(BaseException):
    """Ends a process in the midst of a trial."""


def test_an_interrupted_trial_is_tried_again_with_the_same_values(search):
    tried = []

    def interrupted(number, values, _):
        tried.append(values)
        if number == 5:  # the first ones are drawn at random, this one follows from their losses
            raise Killed
        return distance(number, values, None)

    with pytest.raises(Killed):
        search().run(6, interrupted)
    search().run(6, lambda number, values, _: tried.append(values) or distance(number, values, None))
    assert len(tried) == 7
    assert tried[4] == tried[5]
    assert [row["trial"] for row in search().table()] == [1, 2, 3, 4, 5, 6]


def test_an_interrupted_search_tries_what_it_would_have_tried(search):
    def values_of(name, stops):
        seen = []
        for trials in stops:
            search(name).run(trials, lambda _, values, __: seen.append(values) or 1.0)
        return seen

    at_once = values_of("a", [6])
    assert at_once == values_of("b", [2, 4, 6])
    assert len({values["learning_rate"] for values in at_once}) == 6


def test_a_trial_above_the_median_is_stopped_and_good_ones_are_not(search):
    stopped = []

    def train(number, values, should_stop):
        loss = 9.0 if number > UNSTOPPED_TRIALS and number % 2 else float(number)
        for position in (1, 2):
            if should_stop(position, loss):
                stopped.append((number, position))
                return None
        return loss

    found = search()
    found.run(5, train)
    # The fourth is above the median of 1, 2 and 3 too.
    assert stopped == [(4, 1), (5, 1)]
    assert [row["state"] for row in found.table()] == ["finished"] * 3 + ["stopped early"] * 2
    assert found.best().number == 1


@pytest.mark.parametrize(("steps", "validations"), [(90, 3), (4, 2), (1, 1)])
def test_a_trial_is_not_stopped_at_its_last_validation(search, steps, validations):
    stopped = []

    def train(number, values, should_stop):
        loss = 9.0 if number > UNSTOPPED_TRIALS else float(number)
        found = [position for position in range(1, validations + 1) if should_stop(position, loss)]
        stopped.append(found)
        return loss

    search(space=Space((1e-4, 1e-2), (4, 32), (steps, steps))).run(4, train)
    assert stopped == [[]] * UNSTOPPED_TRIALS + [[*range(1, validations)]]


def test_the_first_trials_are_never_stopped_but_for_a_loss_that_is_no_number(search):
    asked = []

    def train(number, values, should_stop):
        asked.append(should_stop(1, 100.0 * number))
        return float(number)

    search().run(UNSTOPPED_TRIALS, train)
    assert asked == [False] * UNSTOPPED_TRIALS
    search("b").run(1, lambda number, values, should_stop: asked.append(should_stop(1, math.nan)) or math.nan)
    assert asked[-1]


def test_losses_that_are_no_numbers_make_no_best(search):
    found = search()
    found.run(2, lambda *_: math.nan)
    with pytest.raises(UserError, match="no trial ended with a finite validation loss"):
        found.best()


def test_a_training_that_fails_is_a_trial_once_another_has_succeeded(search):
    def train(number, values, should_stop):
        if number == 2:
            raise UserError("out of memory")
        return float(number)

    found = search()
    found.run(3, train)
    assert [row["state"] for row in found.table()] == ["finished", "failed", "finished"]


def test_a_first_training_that_fails_ends_the_search(search):
    def train(*_):
        raise UserError("dataset_uri=x: cannot be read")

    with pytest.raises(UserError, match="cannot be read"):
        search().run(3, train)
    assert search().study.get_trials(states=[TrialState.COMPLETE]) == []


def test_the_largest_seed_serves_for_every_trial(search):
    found = search(seed=2**32 - 1)
    found.run(2, lambda number, values, should_stop: 1.0 / number)
    assert len(found.done()) == 2
