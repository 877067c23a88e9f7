"""One page about an evaluation that needs nothing beside itself: no script, no file, no network."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import jinja2
import pandas
from matplotlib.figure import Figure

from steps.text2sql import failures, scoring

TEMPLATE = Path(__file__).with_name("report.html")
EXAMPLES = 10


def render(
    title: str,
    *,
    metrics: Mapping[str, float],
    predictions: pandas.DataFrame,
    picture: Figure,
) -> str:
    """HTML with the scores, the picture of the slices, the failures, ten right and ten wrong rows.

    `predictions` as `evaluation.predictions` makes them; execution accuracy says which rows are right. All
    that comes from rows and models is escaped.
    """
    is_right = predictions[scoring.EXECUTION_ACCURACY].astype(bool)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        rows=len(predictions),
        scores=_scores(metrics),
        picture=_png(picture),
        failures=_failures(metrics),
        right=predictions[is_right].head(EXAMPLES).to_dict("records"),
        wrong=predictions[~is_right].head(EXAMPLES).to_dict("records"),
    )


def _scores(metrics: Mapping[str, float]) -> list[dict[str, object]]:
    def with_bounds(name: str) -> list[float]:
        return [metrics[f"{name}{bound}"] for bound in ("", "_low", "_high")]

    return [
        {"name": name, "base": with_bounds(scoring.BASE_PREFIX + name), "tuned": with_bounds(name)}
        for name in scoring.METRICS
        if name in metrics
    ]


def _failures(metrics: Mapping[str, float]) -> list[dict[str, object]]:
    names = {reason: failures.metric_name(reason) for reason in failures.REASONS}
    return [
        {"reason": reason, "base": int(metrics[scoring.BASE_PREFIX + name]), "tuned": int(metrics[name])}
        for reason, name in names.items()
    ]


def _png(picture: Figure) -> str:
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
