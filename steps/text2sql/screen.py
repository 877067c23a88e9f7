"""What main shows: the command of each step, and how it ended."""

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime

from steps.text2sql import scoring, tracking

# A question that also a shortly trained model should get right.
EXAMPLE = {
    "question": "What are the names of heads with age above 56?",
    "context": "CREATE TABLE heads (name TEXT, age INTEGER, born_state TEXT)",
}


def step_command(step: str, values: Mapping[str, str]) -> str:
    """The command that runs a step again alone, with every value that main gives it."""
    words = ["mlflow", "run", tracking.project_uri(), *tracking.project_version(), "--env-manager"]
    words += [tracking.env_manager(), "-e", step]
    words += [word for name, value in values.items() for word in ("-P", f"{name}={value}")]
    return shlex.join(words)


def reused(run_id: str, end_time_ms: int) -> str:
    """That a step is not run again, and how to have it run."""
    ended = datetime.fromtimestamp(end_time_ms / 1000).strftime("%Y-%m-%d %H:%M")
    return (
        f"reused: run {run_id} of {ended} had the same values, inputs, code and device "
        "(-P reuse=never runs it again)"
    )


def to_go_on(step: str, values: Mapping[str, str]) -> str:
    """What to type after a step was stopped."""
    return f"To go on:\n  {step_command(step, values)}"


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
    alias = tracking.CHAMPION if tracking.CHAMPION in aliases else tracking.CHALLENGER
    champion = f"is {'' if alias == tracking.CHAMPION else 'not '}champion: {gate}"
    uri = shlex.quote(f"models:/{name}@{alias}")
    manager = tracking.env_manager()
    store, page = tracking.run_page()
    ui = f"mlflow ui --backend-store-uri {shlex.quote(store)}"
    look = page if store.startswith("http") else f"{ui}, then {page}"
    lines = [
        "",
        f"{name} version {version} {champion}",
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
