"""Pictures that are logged with the runs."""

from collections.abc import Sequence

from matplotlib.figure import Figure


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
    for points, style, name in ((train, "-", "train"), (validation, "o--", "validation")):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name)
    axes.set(xlabel="optimizer step", ylabel="loss (nats an answer token)", title="Loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
