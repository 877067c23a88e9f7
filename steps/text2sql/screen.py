"""What main shows: the command of each step, and how it ended."""

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from steps.text2sql import active_run, mlproject, project_source, run_page, scoring, store_names

# A question that also a shortly trained model should get right.
EXAMPLE = {
    "question": "What are the names of heads with age above 56?",
    "context": "CREATE TABLE heads (name TEXT, age INTEGER, born_state TEXT)",
}


def step_command(step: str, values: Mapping[str, str]) -> str:
    """The command that runs a step again alone, with every value that main gives it."""
    words = ["mlflow", "run", project_source.uri(), *project_source.version(), "--env-manager"]
    words += [project_source.env_manager(), *_experiment(), "-e", step]
    words += [word for name, value in values.items() for word in ("-P", f"{name}={value}")]
    return shlex.join(words)


def _experiment() -> list[str]:
    """Where earlier runs are looked for; `mlflow run` takes experiment 0 without being told."""
    found = active_run.experiment_id()
    return ["--experiment-id", found] if found != "0" else []


def reused(run_id: str, end_time_ms: int) -> str:
    """That a step is not run again, and how to have it run."""
    ended = datetime.fromtimestamp(end_time_ms / 1000).strftime("%Y-%m-%d %H:%M")
    return (
        f"reused: run {run_id} of {ended} had the same values, inputs, code and device "
        "(-P reuse=never runs it again)"
    )


def to_go_on(step: str, values: Mapping[str, str]) -> str:
    """What to type after a step was stopped; values that are defaults are left out."""
    return f"To go on:\n  {step_command(step, mlproject.without_defaults(step, values))}"


def estimates(
    *, rows: int, rows_to_train_on: int, peak_bytes: int, download_bytes: int, seconds: float
) -> dict[str, str]:
    """What a training would take, in words by name."""
    return {
        "rows": f"{rows_to_train_on} in all, out of {rows} ({rows_to_train_on / rows:.2g} epochs)",
        "peak_memory": f"about {peak_bytes / 2**30:.1f} GiB",
        "download": f"{download_bytes / 2**30:.1f} GiB of weights" if download_bytes else "none",
        "time": f"about {duration(seconds)} of training at the speed that this device shows now",
    }


def duration(seconds: float) -> str:
    """A time to the two digits that an estimate is worth."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plan(*, prepared_uri: str, chosen: Mapping[str, str], given: Mapping[str, str]) -> str:
    """How a dry run ends: what the training would take, and the command that does it."""
    told = ("memory", "rows", "steps", "peak_memory", "download", "time")
    words = {name: value for name, value in given.items() if name != "dry_run"}
    lines = [
        "",
        "Dry run: the data are prepared, nothing is trained.",
        "",
        *(f"  {name:<12}{chosen[name]}" for name in told),
        "",
        f"  dataset     {prepared_uri}, which the real run takes as it is",
        f"  train       {step_command('main', words)}",
        "",
    ]
    return "\n".join(lines)


def best_trial(trials: Sequence[Mapping[str, Any]], best: int, command: str) -> str:
    """How a sweep ends, as Markdown: every trial, and the command that goes on with the best."""
    names = list(trials[0])
    rows = [f"| {' | '.join(_cell(one[name]) for name in names)} |" for one in trials]
    head = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    return "\n".join(
        ["", *head, *rows, "", f"Best is trial {best}. A model of it:", "", f"    {command}", ""]
    )


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def standing(aliases: Sequence[str], gate: str) -> str:
    """Whether a version with these aliases is champion, and why."""
    return f"is {'' if store_names.CHAMPION in aliases else 'not '}champion: {gate}"


def closing(
    *,
    chosen: Mapping[str, str],
    metrics: Mapping[str, float],
    name: str,
    version: str,
    aliases: Sequence[str],
    gate: str,
) -> str:
    """What was chosen and why, scores of base and tuned model, and three commands to go on."""
    alias = store_names.CHAMPION if store_names.CHAMPION in aliases else store_names.CHALLENGER
    uri = shlex.quote(f"models:/{name}@{alias}")
    manager = project_source.env_manager()
    store, page = run_page.address()
    ui = f"mlflow ui --backend-store-uri {shlex.quote(store)}"
    look = page if store.startswith("http") else f"{ui}, then {page}"
    lines = [
        "",
        f"{name} version {version} {standing(aliases, gate)}",
        "",
        *(f"  {what:<12}{text}" for what, text in chosen.items()),
        "",
        f"Scores on {metrics['evaluated_rows']:.0f} test rows",
        scoring.comparison(metrics, base_prefix=scoring.BASE_PREFIX),
        "",
        f"  model       models:/{name}/{version} (also models:/{name}@{alias})",
        f"  look        {look}",
        f"  ask         echo {shlex.quote(json.dumps({'dataframe_records': [EXAMPLE]}))} | \\\n"
        f"              mlflow models predict -m {uri} --env-manager {manager} -t json",
        f"  serve       mlflow models serve -m {uri} --env-manager {manager} --port 5001",
        "",
    ]
    return "\n".join(lines)
