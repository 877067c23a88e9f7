"""Pictures that are logged with the runs."""

from collections.abc import Sequence

import numpy
import pandas
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter


def token_lengths(lengths: Sequence[int], *, max_length: int) -> Figure:
    """Histogram of the tokens a row (prompt and answer), with the limit as a line."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, bins=40, color="tab:blue")
    axes.axvline(max_length, color="tab:red", linestyle="--", label=f"max_length = {max_length}")
    axes.set(xlabel="tokens of prompt and answer", ylabel="training rows", title="Token lengths")
    axes.legend()
    return figure


def loss_curve(train: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]]) -> Figure:
    """Training and validation loss, each as (step, mean negative log likelihood of an answer token)."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for points, style, name in (
        (train, ".-" if len(train) < 50 else "-", "train"),
        (validation, "o--", "validation"),
    ):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name)
    axes.set(xlabel="optimizer step", ylabel="loss (nats an answer token)", title="Loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def slice_accuracy(slices: pandas.DataFrame, *, base_prefix: str, metric: str) -> Figure:
    """Base against tuned in every slice, with 95 % intervals; `slices` as `slices.table` makes it."""
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(slices)), layout="constrained")
    axes = figure.subplots()
    places = numpy.arange(len(slices))
    for prefix, name, color, shift in (("", "tuned", "tab:blue", -0.19), (base_prefix, "base", "0.65", 0.19)):
        share = slices[f"{prefix}accuracy"]
        # An end may lie past the share by a rounding error.
        errors = numpy.clip([share - slices[f"{prefix}low"], slices[f"{prefix}high"] - share], 0, None)
        style = {"ecolor": "0.2", "elinewidth": 1, "capsize": 2}
        axes.barh(places + shift, share, height=0.36, xerr=errors, error_kw=style, color=color, label=name)
    texts = [
        f"{one['dimension']}: {one['slice'].replace('_', ' ')} ({one['rows']})"
        for one in slices.to_dict("records")
    ]
    axes.set_yticks(places, texts)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel=f"{metric.replace('_', ' ')}, with 95 % intervals (rows in parentheses)")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2)
    return figure
