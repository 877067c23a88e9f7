"""The whole chain: one child run a step, each a process of its own, passing artifact URIs."""

import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext

import mlflow
from mlflow.entities import Run

from steps.text2sql import (
    artifacts,
    child_runs,
    earlier_runs,
    launch_config,
    mlproject,
    prompt_registry,
    remote_step,
    resume,
    reuse,
    run_log,
    run_page,
    screen,
    step_run,
    store_names,
)
from steps.text2sql.command_line import MainParams, parse_main
from steps.text2sql.errors import Interrupted, UserError
from steps.text2sql.params import CHAIN

# Parameters of train that are for main alone.
ELSEWHERE = ("project_backend", "backend_config")


def main(params: MainParams) -> None:
    """Prepare, train, register, evaluate and promote."""
    try:
        chain(params)
    except (KeyboardInterrupt, Interrupted) as error:
        raise Interrupted(str(error), screen.to_go_on("main", params.given)) from error
    except UserError as error:
        raise UserError(str(error), screen.to_go_on("main", params.given)) from error


def chain(params: MainParams) -> None:
    """Run the steps, each with what the ones before it found out."""
    check_devices(params.steps["train"])
    of_register = mlproject.defaults("register") | params.steps["register"]
    prompt_registry.check_model_name(of_register["registered_model_name"])
    runs = {"prepare_data": run_step("prepare_data", params)}
    tags = runs["prepare_data"].data.tags
    run_log.tag_data(base_model=tags[store_names.TAG_BASE_MODEL], dataset=tags[store_names.TAG_DATASET])
    dataset_uri = f"runs:/{runs['prepare_data'].info.run_id}/{store_names.DATASET}"
    runs["train"] = run_step("train", params, dataset_uri=dataset_uri)
    if params.steps["train"].get("dry_run") == "yes":
        finish_dry_run(params, runs, dataset_uri)
        return
    adapter_uri = f"runs:/{runs['train'].info.run_id}/{store_names.ADAPTER}"
    runs["register"] = run_step("register", params, adapter_uri=adapter_uri, dataset_uri=dataset_uri)
    made = runs["register"].data.tags
    name, version = made[store_names.TAG_MODEL_NAME], made[store_names.TAG_MODEL_VERSION]
    runs["evaluate"] = run_step(
        "evaluate", params, model_uri=f"models:/{name}/{version}", dataset_uri=dataset_uri
    )
    gate = "promotion=never"
    if params.own.promotion != "never":
        evaluation_run_id = runs["evaluate"].info.run_id
        runs["promote"] = run_step("promote", params, version=version, evaluation_run_id=evaluation_run_id)
        gate = runs["promote"].data.tags[store_names.TAG_GATE_REASON]
        mlflow.set_tag(store_names.TAG_PROMOTED, runs["promote"].data.tags[store_names.TAG_PROMOTED])
    finish(runs, name=name, version=version, gate=gate)


def check_devices(given: Mapping[str, str]) -> None:
    """Refuse a training in several processes that this machine has no GPUs for, before any step runs."""
    values = mlproject.defaults("train") | given
    if values["launch"] != "single" and values["project_backend"] == "local":
        launch_config.check_gpus(values["launch"], len(reuse.gpus()))


def run_step(
    step: str, params: MainParams, *, title: str = "", watch: child_runs.Watch = nullcontext, **found: str
) -> Run:
    """Run a step as a child of this run, or take a run that finished with the same result.

    `found` are values of the steps before; `watch` runs around the step's process, and may stop it.
    """
    values = params.steps[step] | found
    print(f"\n[{title or f'{list(CHAIN).index(step) + 1}/{len(CHAIN)}'}] {step}", flush=True)
    device = reuse.device_kind()
    fingerprint = reuse.fingerprint(
        step,
        values,
        upstream={name: artifacts.digest_of(uri) for name, uri in found.items() if name.endswith("_uri")},
        device=device,
        code=reuse.code_digest(),
    )
    reusable = params.own.reuse == "auto" and step not in reuse.ALWAYS_RUN
    if reusable and not reuse.may_have_moved(step, values, device=device):
        earlier = earlier_runs.finished_before(step, fingerprint)
        if earlier:
            mlflow.set_tag(f"{store_names.TAG_REUSED}{step}", earlier.info.run_id)
            print(f"  {screen.reused(earlier.info.run_id, earlier.info.end_time)}", flush=True)
            return earlier
    if step == "train" and params.own.resume == "auto" and not values.get("resume_from"):
        unfinished = next(filter(resume.can_go_on, earlier_runs.unfinished_before(fingerprint)), None)
        values |= {"resume_from": unfinished} if unfinished else {}
    return start_step(step, values, fingerprint, watch)


def start_step(
    step: str, values: dict[str, str], fingerprint: str, watch: child_runs.Watch = nullcontext
) -> Run:
    """Run a step as a child of this run, here or where `project_backend` says; `watch` counts here alone.

    Raises:
        UserError: it failed; its own message stands above on the screen.
        Interrupted: a signal came, and no process of the step is left.
    """
    usual = mlproject.defaults("train")
    backend, config = (values.pop(name, usual[name]) for name in ELSEWHERE)
    print(f"  {screen.step_command(step, values)}", flush=True)
    os.environ[step_run.FINGERPRINT_VARIABLE] = fingerprint
    if backend != "local":
        return remote_step.run(step, values, backend=backend, config=config, fingerprint=fingerprint)
    return child_runs.run(step, values, watch)


def finish_dry_run(params: MainParams, runs: dict[str, Run], dataset_uri: str) -> None:
    """Show what the training would take; nothing is registered, so there is nothing more to run."""
    run_log.tag_dry_run()
    run_page.name_run("dry run")
    run_page.describe_steps("Dry run: nothing was trained.", runs)
    typed = mlproject.without_defaults("main", params.given)
    chosen = run_log.choices(runs["train"])
    print(screen.plan(prepared_uri=dataset_uri, chosen=chosen, given=typed), flush=True)


def finish(runs: dict[str, Run], *, name: str, version: str, gate: str) -> None:
    """Log what there is to compare on the parent run, and show the closing screen."""
    prepared, evaluated = runs["prepare_data"], runs["evaluate"]
    mlflow.log_metrics({name: value for name, value in evaluated.data.metrics.items() if "/" not in name})
    mlflow.set_tags({store_names.TAG_MODEL_NAME: name, store_names.TAG_MODEL_VERSION: version})
    aliases = mlflow.MlflowClient().get_model_version(name, version).aliases
    run_page.name_run(f"{name} v{version}")
    model = run_page.version_link(name, version)
    run_page.describe_steps(f"{model} {screen.standing(aliases, gate)}", runs)
    print(
        screen.closing(
            chosen=run_log.choices(prepared),
            metrics=evaluated.data.metrics,
            name=name,
            version=version,
            aliases=aliases,
            gate=gate,
        ),
        flush=True,
    )


if __name__ == "__main__":
    step_run.run_in_run(lambda: main(parse_main(sys.argv[1:])))
