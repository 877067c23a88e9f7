"""Work for a store that is slow or away."""

import threading

from steps.text2sql.background import Background

LIMIT_SECONDS = 30


def test_tasks_are_done_in_their_order_and_waited_for():
    done = []
    background = Background()
    for name in "abc":
        background.submit(name, lambda name=name: done.append(name))
    assert background.close(LIMIT_SECONDS) == []
    assert done == ["a", "b", "c"]


def tries_until_done(failures, *, first_pause_seconds):
    """How often a task is tried that fails so many times."""
    tries = []

    def fails():
        tries.append(1)
        if len(tries) <= failures:
            raise ConnectionError("away")

    background = Background(first_pause_seconds=first_pause_seconds)
    background.submit("metrics", fails)
    assert background.close(LIMIT_SECONDS) == []
    return len(tries)


def test_a_task_that_fails_is_tried_again_until_it_is_done_and_said_once(caplog):
    assert tries_until_done(3, first_pause_seconds=0.001) == 4
    said = [record.message for record in caplog.records]
    assert [text for text in said if "away" in text] == said[:1]


def test_what_is_not_done_is_named():
    def fails():
        raise ConnectionError("away")

    background = Background(first_pause_seconds=0.001)
    background.submit("checkpoint", fails)
    assert background.close(0.05) == ["checkpoint"]


def test_a_task_that_hangs_is_named():
    hang = threading.Event()
    background = Background()
    background.submit("checkpoint", hang.wait)
    assert background.close(0.05) == ["checkpoint"]
    hang.set()


def test_a_store_that_is_away_for_long_is_still_tried_again():
    assert tries_until_done(1100, first_pause_seconds=0.0) == 1101


def test_a_task_that_fails_after_the_end_is_not_tried_again():
    tries, begun, go_on, done = [], threading.Event(), threading.Event(), threading.Event()

    def fails_late():
        tries.append(1)
        begun.set()
        go_on.wait(LIMIT_SECONDS)
        raise ConnectionError("away")

    background = Background(first_pause_seconds=0.001)
    background.submit("checkpoint", fails_late)
    assert begun.wait(LIMIT_SECONDS)
    assert background.close(0.05) == ["checkpoint"]
    # If it were tried again, that would be between these two.
    background.submit("next", lambda: background.submit("last", done.set))
    go_on.set()
    assert done.wait(LIMIT_SECONDS)
    assert tries == [1]


def test_a_newer_task_takes_the_place_of_one_that_waits():
    done, begin = [], threading.Event()
    background = Background()
    background.submit("first", lambda: begin.wait(LIMIT_SECONDS))
    for number in range(3):
        background.submit("checkpoint", lambda number=number: done.append(number))
    begin.set()
    assert background.close(LIMIT_SECONDS) == []
    assert done == [2]
