"""Search learning rate, rank and number of steps over trainings on the same data, by validation loss."""

import sys
from functools import partial
from pathlib import Path

import mlflow
import pandas

from steps.main import run_step
from steps.text2sql import (
    active_run,
    artifacts,
    child_runs,
    mlproject,
    resume,
    reuse,
    run_page,
    screen,
    step_run,
    store_names,
    validations,
)
from steps.text2sql.command_line import MainParams, SweepCall, parse_sweep
from steps.text2sql.errors import Interrupted, UserError
from steps.text2sql.params import OwnMainParams
from steps.text2sql.search import Search, ShouldStop, Space, open_storage
from steps.text2sql.watcher import STOPPED_EARLY, Watcher


def main(call: SweepCall) -> None:
    """Prepare the data once, try values on them, and show the best."""
    try:
        open_storage(Path(call.own.storage))  # before the data are prepared
        dataset_uri = call.own.dataset_uri or prepare(call)
        check_validation(dataset_uri)
        search = open_search(call, dataset_uri)
        search.run(call.own.trials, partial(train, call, dataset_uri))
    except (KeyboardInterrupt, Interrupted) as error:
        raise Interrupted(str(error), screen.to_go_on("sweep", call.given)) from error
    except UserError as error:
        raise UserError(str(error), screen.to_go_on("sweep", call.given)) from error
    finish(call, search, dataset_uri)


def as_main(call: SweepCall) -> MainParams:
    """What main would be called with to start the same steps."""
    return MainParams(call.given, OwnMainParams(promotion="never", resume="auto", reuse="auto"), call.steps)


def prepare(call: SweepCall) -> str:
    """URI of the dataset that all trials share."""
    prepared = run_step("prepare_data", as_main(call), title="data")
    return f"runs:/{prepared.info.run_id}/{store_names.DATASET}"


def check_validation(dataset_uri: str) -> None:
    """Refuse a dataset by which no trial could be measured."""
    if not artifacts.read_manifest(dataset_uri).get("counts", {}).get("rows_validation"):
        raise UserError(
            f"dataset_uri={dataset_uri}: has no validation rows, by whose loss trials are compared; give "
            "validation_dataset, or more rows."
        )


def open_search(call: SweepCall, dataset_uri: str) -> Search:
    """The search for these data, limits and fixed values, also where an earlier sweep left it."""
    own = call.own
    space = Space(own.learning_rate_range, own.lora_r_range, own.max_steps_range)
    fixed = reuse.fingerprint(
        "train",
        call.steps["train"] | validation_rows(call) | {"dataset_uri": dataset_uri},
        upstream={"dataset_uri": artifacts.digest_of(dataset_uri)},
        device=reuse.device_kind(),
        code=reuse.code_digest(),
    )
    search = Search(Path(own.storage), f"{fixed[:16]} {space}", space, seed=own.seed)
    if search.done():
        print(f"\nGoes on after {len(search.done())} trials that {own.storage} keeps.", flush=True)
    return search


def train(
    call: SweepCall, dataset_uri: str, number: int, values: dict[str, str], should_stop: ShouldStop
) -> float | None:
    """Train with these values as a child of this run; the last validation's loss, or None if stopped."""
    title, told = f"trial {number} of {call.own.trials}", recipe(call, values)
    print(f"\n{title}: {', '.join(f'{name} {value}' for name, value in told.items())}", flush=True)
    watcher = Watcher(active_run.run_id(), should_stop, name=f"trial {number}")
    try:
        run = run_step(
            "train",
            as_main(call),
            title=title,
            watch=watcher.watching,
            dataset_uri=dataset_uri,
            **validation_rows(call),
            **told,
        )
    except Interrupted as error:
        if str(error) != STOPPED_EARLY:
            raise
        resume.forget(watcher.child)  # its checkpoint
        print(f"  stopped early: {store_names.EVAL_LOSS} was above the median of the others", flush=True)
        return None
    except UserError:
        child = child_runs.newest_child(active_run.run_id(), "train")
        if not has_diverged(child):
            raise
        resume.forget(child)
        return None
    loss = run.data.metrics[store_names.EVAL_LOSS]
    mlflow.log_metric(store_names.EVAL_LOSS, loss, step=number)
    print(f"  {store_names.EVAL_LOSS} {loss:.4f}", flush=True)
    return loss


def has_diverged(run_id: str) -> bool:
    """Whether a training ended since its loss was no number."""
    metrics = mlflow.get_run(run_id).data.metrics if run_id else {}
    # NaN is not less either; MLflow keeps infinity as the largest number.
    losses = (metrics.get(name, 0.0) for name in ("train_loss", store_names.EVAL_LOSS))
    return not all(loss < sys.float_info.max for loss in losses)


def validation_rows(call: SweepCall) -> dict[str, str]:
    """Rows of a validation: the same in all trials, however short, or their losses were no comparison."""
    given = call.given.get("validation_rows", "auto")
    return {"validation_rows": str(validations.ROWS) if given == "auto" else given}


def recipe(call: SweepCall, values: dict[str, str]) -> dict[str, str]:
    """A trial's values. Without rsLoRA, whose alpha fits every rank (arXiv 2312.03732), they get an alpha
    with the defaults' lora_alpha / lora_r, unless the user has fixed it."""
    usual = mlproject.defaults("train")
    is_stabilized = call.given.get("use_rslora", usual["use_rslora"]) == "yes"
    if is_stabilized or "lora_alpha" in call.given:
        return values
    alpha = int(values["lora_r"]) * int(usual["lora_alpha"]) // int(usual["lora_r"])
    return values | {"lora_alpha": str(alpha)}


def finish(call: SweepCall, search: Search, dataset_uri: str) -> None:
    """Log all trials and the best of them, and show the command that makes a model of it."""
    trials, best = search.table(), search.best()
    values = recipe(call, best.values)
    mlflow.log_table(pandas.DataFrame(trials), store_names.TRIALS)
    mlflow.log_metric(f"best_{store_names.EVAL_LOSS}", best.loss)
    mlflow.log_params({f"best/{name}": value for name, value in values.items()})
    step, next_values = next_command(call, values, dataset_uri)
    text = screen.best_trial(trials, best.number, screen.step_command(step, next_values))
    run_page.describe(text)
    print(text, flush=True)


def next_command(call: SweepCall, values: dict[str, str], dataset_uri: str) -> tuple[str, dict[str, str]]:
    """What makes a model of the best: main, which takes the trial's run as it is, or, where the user had
    prepared the data, the step train."""
    handed_on = {name: value for step in call.steps.values() for name, value in step.items()}
    handed_on |= validation_rows(call)
    if call.own.dataset_uri:
        return "train", mlproject.without_defaults("train", handed_on | values | {"dataset_uri": dataset_uri})
    handed_on.pop("dataset_uri", None)
    return "main", mlproject.without_defaults("main", handed_on | values)


if __name__ == "__main__":
    step_run.run_in_run(lambda: main(parse_sweep(sys.argv[1:])))
