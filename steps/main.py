"""The whole chain: one child run a step, each a process of its own, passing artifact URIs."""

import sys

import mlflow
from mlflow.entities import Run

from steps.text2sql import screen, tracking
from steps.text2sql.params import CHAIN, MainParams, parse_main


def main(params: MainParams) -> None:
    """Prepare, train, register, evaluate and promote."""
    prepared = run_step("prepare_data", params)
    dataset_uri = f"runs:/{prepared.info.run_id}/{tracking.DATASET}"
    trained = run_step("train", params, dataset_uri=dataset_uri)
    adapter_uri = f"runs:/{trained.info.run_id}/{tracking.ADAPTER}"
    registered = run_step("register", params, adapter_uri=adapter_uri, dataset_uri=dataset_uri)
    name, version = (
        registered.data.tags[tag] for tag in (tracking.TAG_MODEL_NAME, tracking.TAG_MODEL_VERSION)
    )
    model_uri = f"models:/{name}/{version}"
    evaluated = run_step("evaluate", params, model_uri=model_uri, dataset_uri=dataset_uri)
    gate = "promotion=never"
    if params.own.promotion != "never":
        promoted = run_step("promote", params, version=version, evaluation_run_id=evaluated.info.run_id)
        gate = promoted.data.tags[tracking.TAG_GATE_REASON]
    finish(prepared, evaluated, name=name, version=version, gate=gate)


def run_step(step: str, params: MainParams, **found: str) -> Run:
    """Run a step as a child of this run, in this environment; `found` are values of the steps before.

    Raises:
        UserError: it failed; its own message stands above on the screen.
    """
    values = params.steps[step] | found
    number = f"{list(CHAIN).index(step) + 1}/{len(CHAIN)}"
    print(f"\n[{number}] {step}\n  {screen.step_command(step, values)}", flush=True)
    return tracking.run_child(step, values)


def finish(prepared: Run, evaluated: Run, *, name: str, version: str, gate: str) -> None:
    """Log what there is to compare on the parent run, and show the closing screen."""
    mlflow.log_metrics({name: value for name, value in evaluated.data.metrics.items() if "/" not in name})
    mlflow.set_tags({tracking.TAG_MODEL_NAME: name, tracking.TAG_MODEL_VERSION: version})
    aliases = mlflow.MlflowClient().get_model_version(name, version).aliases
    print(
        screen.closing(
            chosen=tracking.choices(prepared),
            metrics=evaluated.data.metrics,
            name=name,
            version=version,
            aliases=aliases,
            gate=gate,
        ),
        flush=True,
    )


if __name__ == "__main__":
    tracking.run_in_run(lambda: main(parse_main(sys.argv[1:])))
