"""Pictures of a run."""

from steps.text2sql import figures


def test_a_single_point_can_be_seen_and_steps_are_whole_numbers():
    [axes] = figures.loss_curve([(5, 1.2)], [(1, 0.8), (2, 0.6), (3, 0.5)]).axes
    assert all(line.get_marker() in ("o", ".") for line in axes.lines)
    assert all(tick == int(tick) for tick in axes.get_xticks())
