"""The model card: what a version was made of, how well it does, where its limits are, and how to use it."""

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from steps.text2sql import scoring
from steps.text2sql.manifest import AdapterManifest, DatasetManifest

FILE = "README.md"
# A server's database keeps so many characters of a version's description (MLflow's column is String(5000)).
MAX_CHARACTERS = 5000


class Score(NamedTuple):
    """A share of rows, 0 to 1: of the version with the ends of its 95 % interval, and of its base alone."""

    tuned: float
    low: float
    high: float
    base: float


def render(
    described: AdapterManifest,
    lora: Mapping[str, Any],
    *,
    name: str,
    version: str = "",
    scores: Mapping[str, Score] | None = None,
    evaluated_rows: int = 0,
    evaluation_run: str = "",
) -> str:
    """The card as Markdown, under `MAX_CHARACTERS` long; lists of versions show its first line.

    `lora` is what peft wrote as adapter_config.json, `name` the registered model's; its
    `version` is not known when the package is logged. `scores` are by metric and from `evaluated_rows` rows
    of an evaluate run, named or linked in Markdown by `evaluation_run`.
    """
    source = described.of_dataset
    uri = f"models:/{name}/{version}" if version else f"models:/{name}@champion"
    scored = _scores(scores, evaluated_rows, evaluation_run) if scores else "Not evaluated yet."
    sections = {
        "Base": _base(source, described.quantization),
        "Data": _data(source),
        "Recipe": _recipe(described, lora),
        "Scores": scored,
        "Limits": LIMITS,
        "Use": USE.format(uri=uri, quoted=shlex.quote(uri)),
    }
    intro = "Writes an SQL query for a question and, as context, the `CREATE TABLE` statements of its tables."
    title = " ".join(filter(None, [name, version and f"version {version}", scores and _headline(scores)]))
    parts = [f"# {title}", intro, *(f"## {title}\n\n{text}" for title, text in sections.items())]
    card = "\n\n".join(parts) + "\n"
    return card if len(card) < MAX_CHARACTERS else card[: MAX_CHARACTERS - 3] + "…\n"


def scores_of(metrics: Mapping[str, float]) -> dict[str, Score]:
    """Scores by metric, out of the metrics of an evaluation."""
    return {
        name: Score(
            metrics[name],
            metrics[f"{name}_low"],
            metrics[f"{name}_high"],
            metrics[f"{scoring.BASE_PREFIX}{name}"],
        )
        for name in scoring.METRICS
        if name in metrics
    }


LIMITS = """\
* Nothing checks the SQL: it can be wrong, slow, or change data. Run it with an account that may only read.
* It sees the context alone, no rows and nothing that the statements do not say, and each question by itself.
* It knows questions and tables of the kind that the data has; scores on others will differ.
* The adapter was trained on the base as it is quantized here; on another form of it the answers differ."""

USE = """\
```python
import mlflow

model = mlflow.pyfunc.load_model("{uri}")
model.predict([{{"question": "How many heads are there?", "context": "CREATE TABLE head (age INTEGER)"}}])

pipeline = mlflow.transformers.load_model("{uri}")  # takes filled prompt templates
```

`mlflow models serve -m {quoted} --env-manager uv` serves it."""


def license_name(text: str) -> str:
    """The first two lines of a licence that are not empty, where its name stands."""
    return ", ".join([line.strip() for line in text.splitlines() if line.strip()][:2])[:200]


def _base(source: DatasetManifest, quantization: str) -> str:
    commit = f", {source.base_commit}" if source.base_commit else ""
    return _list(
        f"`{source.base_model}`{commit}; not part of the package, loaded by this reference",
        f"quantization: {quantization}",
        f"licence: {license_name(source.base_license)} (in full in `artifacts/BASE_MODEL_LICENSE`)",
    )


def _data(source: DatasetManifest) -> str:
    counts = ", ".join(f"{count} {what}" for what, count in _rows(source.counts).items())
    commit = f", commit {source.dataset_commit}" if source.dataset_commit else ""
    return _list(
        f"`{source.dataset}` (`{source.dataset_source}`{commit})",
        f"rows: {counts}",
        f"split by {source.split_by}, test_size {source.test_size}, seed {source.seed}",
        f"digest of the prepared rows: `{source.dataset_digest}`",
    )


def _rows(counts: Mapping[str, int]) -> dict[str, int]:
    wanted = ("train", "validation", "test")
    return {name: int(counts[f"rows_{name}"]) for name in wanted if f"rows_{name}" in counts}


def _recipe(described: AdapterManifest, lora: Mapping[str, Any]) -> str:
    layers = ", ".join(sorted({name.split(".")[-1] for name in lora["target_modules"]}))
    halves = f"; half of the rank is trained, half takes back what {described.quantization} changes"
    return _list(
        f"LoRA of rank {lora['r']}, alpha {lora['lora_alpha']:g}, dropout {lora['lora_dropout']:g}"
        + (", rank-stabilized" if lora["use_rslora"] else "")
        + (halves if described.corrected else ""),
        f"on {layers}",
        f"{described.global_step} of {described.max_steps} optimizer steps, rows of at most "
        f"{described.of_dataset.max_length} tokens",
        "loss on the answer alone, which ends with EOS",
    )


def _scores(scores: Mapping[str, Score], evaluated_rows: int, evaluation_run: str) -> str:
    rows = [
        f"| {name}&nbsp; | {score.base:.1%} | {score.tuned:.1%} | {score.low:.1%} to {score.high:.1%} |"
        for name, score in scores.items()
    ]
    # MLflow's page draws tables without any space between columns.
    titles = ["metric", *(f"&nbsp;{title}&nbsp;" for title in ("base", "this version", "95 % interval"))]
    head = [f"| {' | '.join(titles)} |", "| --- | --- | --- | --- |"]
    where = f" (in run {evaluation_run}, with every prediction)" if evaluation_run else ""
    return "\n".join([f"On {evaluated_rows} rows{where}, greedy:", "", *head, *rows])


def _headline(scores: Mapping[str, Score]) -> str:
    return f"({scoring.EXECUTION_ACCURACY} {scores[scoring.EXECUTION_ACCURACY].tuned:.1%})"


def _list(*lines: str) -> str:
    return "\n".join(f"* {line}" for line in lines)
