"""The run of a step: names of artifacts, tags and aliases, opening and ending runs, artifact URIs."""

import functools
import hashlib
import json
import logging
import os
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import mlflow
from mlflow.data.dataset import Dataset
from mlflow.entities import LoggedModelInput, Metric, Run, RunStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.environment_variables import (
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR,
    MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING,
)
from mlflow.exceptions import ExecutionException, MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_BRANCH,
    MLFLOW_GIT_COMMIT,
    MLFLOW_GIT_REPO_URL,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_PROJECT_BACKEND,
    MLFLOW_PROJECT_ENTRY_POINT,
    MLFLOW_PROJECT_ENV,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
)

from steps.text2sql import liveness, manifest, processes, ranks
from steps.text2sql.errors import UserError
from steps.text2sql.params import parse, users_folder

DATASET = "dataset"
REJECTED = "rejected.jsonl"
PROMPT = "prompt_template.txt"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
PREDICTIONS = "predictions.json"
ROWS = "rows"
ROWS_FILE = "rows.jsonl"
REPORT = "report.html"
SLICES = "slices.json"
SLICES_PICTURE = "slices.png"
COMPARISON = "comparison.json"
MODEL = "model"
TRIALS = "trials.json"
EVAL_LOSS = "eval_loss"
TRAINING_ROWS = "training_rows"

TRIES = 10
CHALLENGER = "challenger"
CHAMPION = "champion"

TAG_BASE_MODEL = "base_model"
TAG_DATASET = "dataset"
TAG_FAILURE = "failure_reason"
TAG_STOPPED_BY = "stopped_by"
TAG_FINGERPRINT = "fingerprint"
TAG_REUSED = "reused_"
TAG_RESUMED_FROM = "resumed_from"
TAG_RESUMED_STEP = "resumed_step"
TAG_MODEL_VERSION = "model_version"
TAG_MODEL_NAME = "registered_model_name"
TAG_EVALUATION_RUN = "evaluation_run_id"
TAG_EVALUATED_ROWS = "evaluated_rows_digest"
TAG_CODE = "code_digest"
TAG_REPLACED = "replaced_version"
TAG_REPLACED_BY = "replaced_by_version"
TAG_PROMOTED = "promoted"
TAG_GATE_REASON = "gate_reason"
# Before the names of the gate's numbers, as tags of a version.
GATE = "gate_"
# Before the number of a record, as tags of a registered model.
PROMOTION = "promotion/"
TAG_EXPORTED_TO = "exported_to"
TAG_DRY_RUN = "dry_run"
CHOSEN = "chosen"
LOST = "its process ended without a word: it was killed, or the machine went down"
# Where the project came from, as MLflow notes it.
SOURCE_TAGS = (MLFLOW_SOURCE_NAME, MLFLOW_GIT_COMMIT, MLFLOW_GIT_BRANCH, MLFLOW_GIT_REPO_URL)

# main tells a step its fingerprint so that the run has it from its start, however it ends.
FINGERPRINT_VARIABLE = "TEXT2SQL_FINGERPRINT"
PROJECT = Path(__file__).parents[2]
Params = TypeVar("Params")
Watch = Callable[[processes.Stopper], AbstractContextManager]


class Point(NamedTuple):
    """Metrics at one optimizer step, and when they were taken, in milliseconds since 1970."""

    metrics: dict[str, float]
    step: int
    time_ms: int


class Interrupted(Exception):
    """A signal, named by the message, stopped the step, and what was worth keeping is kept.

    `go_on` says how to go on.
    """

    def __init__(self, signal_name: str, go_on: str = "") -> None:
        super().__init__(signal_name)
        self.go_on = go_on


def run_step(
    params_class: type[Params],
    step: Callable[[Params], None],
    *,
    user_errors: tuple[type[Exception], ...] = (),
) -> None:
    """Parse the command line and call a step inside its run.

    A `UserError`, or another of `user_errors`, is printed as its message alone. Whatever ends the step, the
    run ends too: FINISHED, FAILED with the reason as a tag, or KILLED.
    """

    def body() -> None:
        step(parse(params_class, sys.argv[1:]))
        describe_step()

    run_in_run(body, user_errors=user_errors, measure=True)


def run_in_run(
    body: Callable[[], None], *, user_errors: tuple[type[Exception], ...] = (), measure: bool = False
) -> None:
    """See `run_step`; for a body that reads its parameters itself.

    `measure` logs how busy CPU, memory, disk and GPUs are, unless the user's
    MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING says otherwise.
    """
    logging.basicConfig(level=logging.INFO if ranks.is_first() else logging.ERROR, format="%(message)s")
    _quiet()
    processes.stop_with_launchers()
    if ranks.has_launcher() or not ranks.is_first():
        _run_as_one_of_several(body, user_errors)
        return
    with processes.on_signals(processes.raise_interrupt):
        check_store()
        run = mlflow.start_run(
            log_system_metrics=None if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.is_set() else measure
        )
        with liveness.announced(run.info.run_id):
            _run(body, (UserError, *user_errors))


def _run(body: Callable[[], None], user_errors: tuple[type[Exception], ...]) -> None:
    try:
        begin()
        body()
    except user_errors as error:
        _end("FAILED", TAG_FAILURE, str(error))
        raise SystemExit(f"\nError: {error}{_way_on(error)}") from error
    except (KeyboardInterrupt, Interrupted) as error:
        name = str(error) or "SIGINT"
        _end("KILLED", TAG_STOPPED_BY, name)
        raise SystemExit(f"\nStopped by {name}.{_way_on(error)}") from error
    except BaseException as error:
        _end("FAILED", TAG_FAILURE, f"{type(error).__name__}: {error}")
        raise
    mlflow.end_run()


def begin() -> None:
    """What each run begins with: its origin and its fingerprint as tags, and an end for lost runs.

    Raises:
        Interrupted: main was killed while this process of it started.
    """
    if FINGERPRINT_VARIABLE in os.environ:
        mlflow.set_tag(TAG_FINGERPRINT, os.environ[FINGERPRINT_VARIABLE])
    name_run(_tags().get(MLFLOW_PROJECT_ENTRY_POINT, ""))
    parent = _tags().get(MLFLOW_PARENT_RUN_ID)
    if not parent:
        end_lost_runs()
    elif liveness.state(parent) == "gone":
        raise Interrupted("the end of main")
    else:
        take_source_of(parent)


def _run_as_one_of_several(body: Callable[[], None], user_errors: tuple[type[Exception], ...]) -> None:
    """Call a body in a process whose launcher owns the run, ends it, and says why."""
    with processes.on_signals(processes.raise_interrupt):
        try:
            if ranks.is_first():
                mlflow.start_run()
            else:
                ranks.be_silent()
            body()
        except Interrupted as error:  # all of them stopped together, which is no failure of this one
            ranks.tell_ending("stopped", str(error), error.go_on)
        except KeyboardInterrupt as error:
            ranks.tell_ending("stopped", str(error) or "SIGINT")
            raise SystemExit(1) from error
        except (UserError, *user_errors) as error:
            ranks.tell_ending("failed", str(error))
            raise SystemExit(1) from error
        except ranks.LeftAlone as error:
            ranks.tell_ending("left", str(error))
            raise SystemExit(1) from error
        except BaseException as error:
            if ranks.tell_ending("failed", f"process {ranks.index()}: {type(error).__name__}: {error}"):
                raise
            raise SystemExit(1) from error


def of_first_process(log: Callable[..., None]) -> Callable[..., None]:
    """Do nothing in all but the first of several processes: it alone talks to MLflow and to the user."""

    @functools.wraps(log)
    def logged(*given: Any, **named: Any) -> None:
        if ranks.is_first():
            log(*given, **named)

    return logged


def _way_on(error: BaseException) -> str:
    return f"\n\n{error.go_on}" if isinstance(error, Interrupted | UserError) and error.go_on else ""


def check_store() -> None:
    """Refuse a store whose file each process would look for in its own folder, before one is made there."""
    stores = {
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "MLFLOW_REGISTRY_URI": mlflow.get_registry_uri(),
    }
    for name, uri in stores.items():
        start, slashes, file = uri.partition(":///")
        if start.startswith("sqlite") and slashes and not Path(file).is_absolute():
            raise SystemExit(
                f"\nError: {name}={uri}: is a relative path, but steps run in the project's folder; "
                f"give the absolute form: {start}:///{users_folder() / file}"
            )


def take_source_of(parent: str) -> None:
    """Note on a step's run where the project came from: main starts it from a folder, perhaps a clone."""
    tags = mlflow.get_run(parent).data.tags
    mlflow.set_tags({name: tags[name] for name in SOURCE_TAGS if name in tags})


def end_lost_runs() -> None:
    """Set runs of this experiment to FAILED whose process on this machine was killed before it could.

    With them the steps that they had just started. Runs of living processes, or of processes of which this
    machine does not know, stay as they are.
    """
    client = mlflow.MlflowClient()
    experiment = mlflow.active_run().info.experiment_id
    found = client.search_runs([experiment], "attributes.status = 'RUNNING'")
    for run in filter(_is_lost, found):
        run_id = run.info.run_id
        if client.get_run(run_id).info.status == "RUNNING":  # else it has ended meanwhile
            client.set_tag(run_id, TAG_FAILURE, LOST)
            client.set_terminated(run_id, "FAILED")
            print(f"\nRun {run_id} ({run.info.run_name}) is FAILED now: {LOST}.", flush=True)
    for run in found:
        if liveness.state(run.info.run_id) == "gone":
            liveness.forget(run.info.run_id)


def _is_lost(run: Run) -> bool:
    """Whether nobody is left to end a run: neither its own process nor, if main started it, main's."""
    own = liveness.state(run.info.run_id)
    main = liveness.state(run.data.tags.get(MLFLOW_PARENT_RUN_ID, ""))
    if own == "gone":
        return main != "alive"
    is_here = run.data.tags.get(MLFLOW_PROJECT_BACKEND) == "local"  # else main may have sent it elsewhere
    return own == "unknown" and main == "gone" and is_here


def newest_child(parent: str, step: str) -> str:
    """Id of the run `step` that a run started last, from any thread; empty if there is none."""
    client = mlflow.MlflowClient()
    found = client.search_runs(
        [client.get_run(parent).info.experiment_id],
        f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}' and tags.`{MLFLOW_PROJECT_ENTRY_POINT}` = '{step}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return found[0].info.run_id if found else ""


def curve(run: str, metric: str) -> list[float]:
    """All values of a metric that a run has logged so far, by step, from any thread."""
    history = mlflow.MlflowClient().get_metric_history(run, metric)
    return [point.value for point in sorted(history, key=lambda point: point.step)]


def rename(run: str, name: str) -> None:
    """Give a run another name, from any thread."""
    mlflow.MlflowClient().update_run(run, name=name)


def name_run(name: str) -> None:
    """Name this run in the place of MLflow's random words; a name that the user or main gave it stays."""
    if name and not is_chained() and "--run-name" not in processes.users_command():
        rename(run_id(), name)


def describe(text: str) -> None:
    """Set what the run's page shows as its description, Markdown."""
    mlflow.set_tag(MLFLOW_RUN_NOTE, text)


@of_first_process
def describe_step() -> None:
    """Describe a step by the model version that it is about, the run that started it, and what it chose.

    Links come first: the page shows five lines before "Show more".
    """
    run = mlflow.get_run(run_id())
    tags, lines = run.data.tags, []
    if TAG_MODEL_VERSION in tags:
        lines.append(f"* model: {version_link(tags[TAG_MODEL_NAME], tags[TAG_MODEL_VERSION])}")
    if MLFLOW_PARENT_RUN_ID in tags:
        lines.append(f"* started by {run_link(mlflow.get_run(tags[MLFLOW_PARENT_RUN_ID]))}")
    lines += [f"* {name}: {text}" for name, text in sorted(choices(run).items())]
    if lines:
        describe("\n".join(lines))


def describe_steps(headline: str, runs: Mapping[str, Run]) -> None:
    """Describe main's run by what came of it, and by links to its steps with their times."""
    steps = [
        f"{run_link(run, step)} ({(run.info.end_time - run.info.start_time) / 1000:.0f} s)"
        for step, run in runs.items()
    ]
    describe(f"{headline}\n\n{' → '.join(steps)}")


def run_link(run: Run, text: str = "") -> str:
    """Markdown link to a run's page, from any page of MLflow's user interface."""
    return f"[{text or run.info.run_name}](#/experiments/{run.info.experiment_id}/runs/{run.info.run_id})"


def version_link(name: str, version: str) -> str:
    """Markdown link to a model version's page."""
    return f"[{name} version {version}](#/models/{quote(name, safe='')}/versions/{version})"


@of_first_process
def tag_data(*, base_model: str, dataset: str) -> None:
    """Let this run be found by its base model and its dataset."""
    mlflow.set_tags({TAG_BASE_MODEL: base_model, TAG_DATASET: dataset})


def tag_dry_run() -> None:
    """Let this run be told from those that did something."""
    mlflow.set_tag(TAG_DRY_RUN, "yes")


def _end(status: str, tag: str, reason: str) -> None:
    try:
        mlflow.set_tags({tag: reason[:5000], MLFLOW_RUN_NOTE: f"{status}: {reason[:5000]}"})
    finally:
        mlflow.end_run(status)


def end_child(step: str, *, stopped_by: str = "") -> str:
    """Set the end of this run's newest child `step`, whose process has ended without success.

    MLflow wrote FAILED, whatever the step itself had written; with `stopped_by` it becomes KILLED. The reason
    of the child's failure comes back.
    """
    client, found = mlflow.MlflowClient(), newest_child(run_id(), step)
    if not found:  # it was stopped before its run was made
        return ""
    child = client.get_run(found)
    if stopped_by:
        client.set_tag(child.info.run_id, TAG_STOPPED_BY, stopped_by)
        client.set_terminated(child.info.run_id, "KILLED")
        return ""
    reason = child.data.tags.get(TAG_FAILURE, "")
    if not reason:
        reason = "its process ended without saying why; the system kills one when memory runs out"
        client.set_tag(child.info.run_id, TAG_FAILURE, reason)
    return reason


def end_other(run: str, status: str, tags: Mapping[str, str]) -> None:
    """Set the end of a run whose process is elsewhere, unless it has set one itself and well."""
    client = mlflow.MlflowClient()
    for name, value in tags.items():
        client.set_tag(run, name, value)
    if status == "KILLED" or not RunStatus.is_terminated(
        RunStatus.from_string(client.get_run(run).info.status)
    ):
        client.set_terminated(run, status)


def _quiet() -> None:
    # Each of these says at INFO or WARNING what a user can neither use nor change.
    for name in (
        "httpx",
        "alembic",
        "mlflow.projects",
        "mlflow.system_metrics",
        "bitsandbytes.backends.cpu.ops",
        "mlflow.store.db.utils",
        "matplotlib",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    for start in ("The specified dataset source can be interpreted", ".*An input example was not provided"):
        warnings.filterwarnings("ignore", start)


def run_id() -> str:
    """Id of this step's run."""
    return mlflow.active_run().info.run_id


def store_uri() -> str:
    """Where runs go."""
    return mlflow.get_tracking_uri()


def run_child(step: str, values: Mapping[str, str], watch: Watch = nullcontext) -> Run:
    """Run a step as a child of this run, in this environment, a process of its own.

    A signal is passed on to all its processes. `watch` runs around it, and may stop it.

    Raises:
        UserError: it failed; its own message stands above on the screen.
        Interrupted: a signal came, and no process of the step is left.
    """
    stopper = processes.Stopper(announce=not is_chained())  # else main has said it
    try:
        with stopper.listening(), watch(stopper):
            submitted = mlflow.projects.run(
                uri=str(PROJECT),
                entry_point=step,
                parameters=dict(values),
                env_manager="local",
                run_name=step,
            )
    except ExecutionException as error:
        reason = end_child(step, stopped_by=stopper.stopped_by)
        if not stopper.stopped_by:
            raise UserError(f"{step} failed: {reason}") from error
    if stopper.stopped_by:
        raise Interrupted(stopper.stopped_by)
    return mlflow.get_run(submitted.run_id)


def is_chained() -> bool:
    """Whether main started this step."""
    return MLFLOW_PARENT_RUN_ID in _tags()


def artifact_uri(path: str) -> str:
    """`runs:/` URI of an artifact of this run."""
    return f"runs:/{run_id()}/{path}"


@contextmanager
def downloaded(uri: str, *, parameter: str, needs: str) -> Iterator[Path]:
    """Local copy of an artifact folder, removed at the end; `needs` is a file that it must have.

    Raises:
        UserError: no such run or artifact, or it is something else.
    """
    if Path(uri).is_dir():  # the copy would have their contents in the links' places
        manifest.refuse_links(Path(uri), source=f"{parameter}={uri}")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = download(uri, Path(scratch))
        except (
            MlflowException,
            OSError,
            ImportError,
        ) as error:  # ImportError: a store's client is not installed
            raise UserError(f"{parameter}={uri}: cannot be read: {error}. {_artifacts_of(uri)}") from error
        if not (path / needs).is_file():
            raise UserError(f"{parameter}={uri}: has no {needs}. {_artifacts_of(uri)}")
        if (path / manifest.FILE).is_file():
            manifest.check(path, source=f"{parameter}={uri}")
        yield path


def download(uri: str, folder: Path) -> Path:
    """Copy an artifact into a folder; its path there comes back."""
    return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))


def artifacts(run: str, path: str = "") -> list[str]:
    """Paths of what lies in an artifact folder of a run; none where there is no such run or folder."""
    try:
        return [found.path for found in mlflow.MlflowClient().list_artifacts(run, path or None)]
    except MlflowException:
        return []


def is_complete(run: str, path: str) -> bool:
    """Whether a logged folder with a manifest has every file that it names, by name and size."""
    try:
        expected = json.loads(_manifest_of(f"runs:/{run}/{path}"))[manifest.FILES]
        sizes = dict(_sizes(run, path))
    except (MlflowException, OSError, ValueError, KeyError):
        return False
    return all(sizes.get(f"{path}/{name}") == one["bytes"] for name, one in expected.items())


def _sizes(run: str, path: str) -> Iterator[tuple[str, int]]:
    for found in mlflow.MlflowClient().list_artifacts(run, path):
        if found.is_dir:
            yield from _sizes(run, found.path)
        else:
            yield found.path, found.file_size


def digest_of(uri: str) -> str:
    """What names a result for good: the SHA-256 of a folder's manifest, a version with its source."""
    if uri.startswith("models:/"):
        return f"{uri} {model_version(*uri.removeprefix('models:/').split('/')).source}"
    return hashlib.sha256(_manifest_of(uri)).hexdigest()


def read_manifest(uri: str) -> dict[str, Any]:
    """The manifest of a logged folder, unchecked.

    Raises:
        UserError: there is none.
    """
    try:
        return json.loads(_manifest_of(uri))
    except (MlflowException, OSError, ValueError) as error:
        raise UserError(f"{uri}: cannot be read: {error}. {_artifacts_of(uri)}") from error


def _manifest_of(uri: str) -> bytes:
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)  # for a file of a few kilobytes
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return download(f"{uri}/{manifest.FILE}", Path(scratch)).read_bytes()
    finally:
        MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.unset()


def finished_before(step: str, fingerprint: str) -> Run | None:
    """The newest run with this fingerprint that had finished when this one began, if its results remain."""
    found = _with_fingerprint(fingerprint, "attributes.status = 'FINISHED'")
    began = mlflow.active_run().info.start_time
    return next((run for run in found if run.info.end_time < began and _remains(step, run)), None)


def unfinished_before(fingerprint: str) -> list[str]:
    """Ids of runs with this fingerprint that began before this run and did not finish, newest first.

    A run whose process is at work on this machine is not among them.
    """
    found = _with_fingerprint(fingerprint, "attributes.status != 'FINISHED'")
    began = mlflow.active_run().info.start_time
    earlier = [run.info.run_id for run in found if run.info.start_time < began]
    return [run_id for run_id in earlier if liveness.state(run_id) != "alive"]


def _with_fingerprint(fingerprint: str, status: str) -> list[Run]:
    return mlflow.MlflowClient().search_runs(
        [mlflow.active_run().info.experiment_id],
        f"tags.{TAG_FINGERPRINT} = '{fingerprint}' and {status}",
        order_by=["attributes.start_time DESC"],
    )


def _remains(step: str, run: Run) -> bool:
    run_id = run.info.run_id
    if step == "register":
        return _is_registered(run)
    if step == "evaluate":
        return PREDICTIONS in artifacts(run_id)
    return is_complete(run_id, {"prepare_data": DATASET, "train": ADAPTER}[step])


def _is_registered(run: Run) -> bool:
    """Whether the version that a run registered is still that very one; a name can be made anew."""
    try:
        version = model_version(run.data.tags[TAG_MODEL_NAME], run.data.tags[TAG_MODEL_VERSION])
    except (UserError, KeyError):
        return False
    return version.run_id == run.info.run_id


def _artifacts_of(uri: str) -> str:
    if not uri.startswith("runs:/"):
        return ""
    run = uri.removeprefix("runs:/").split("/")[0]
    try:
        found = [artifact.path for artifact in mlflow.MlflowClient().list_artifacts(run)]
    except MlflowException as error:
        return str(error.message)
    return f"Run {run} has: {', '.join(found) or 'no artifacts'}."


@contextmanager
def logged_folder(path: str) -> Iterator[Path]:
    """Scratch folder whose contents become the artifact folder `path` when the block ends well."""
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        mlflow.log_artifacts(scratch, path)


def log_folder(run: str, folder: Path, path: str) -> None:
    """Log a folder's files as the artifact folder `path` of a run, from any thread."""
    mlflow.MlflowClient().log_artifacts(run, str(folder), path)


def log_points(run: str, points: Sequence[Point]) -> None:
    """Log points of curves in one request, from any thread."""
    metrics = [
        Metric(name, value, point.time_ms, point.step)
        for point in points
        for name, value in point.metrics.items()
    ]
    mlflow.MlflowClient().log_batch(run, metrics=metrics)


def keep_newest(run: str, path: str, keep: int, *, age: Callable[[str], int]) -> None:
    """Delete all but the `keep` folders of highest `age` in an artifact folder, if its store can delete."""
    old = sorted(artifacts(run, path), key=age, reverse=True)[keep:]
    repository = get_artifact_repository(mlflow.get_run(run).info.artifact_uri)
    try:
        for folder in old:
            repository.delete_artifacts(folder)
    except (MlflowException, NotImplementedError, OSError) as error:
        _say_once(f"\nOlder {path} stay in the store, which did not delete them: {error}")


@functools.cache
def _say_once(text: str) -> None:
    print(text, flush=True)


@of_first_process
def note_resumed(run: str, step: int) -> None:
    """Say and keep which run's training this run goes on with, and after how many steps."""
    print(f"\nGoes on after step {step} of run {run}.", flush=True)
    mlflow.set_tags({TAG_RESUMED_FROM: run, TAG_RESUMED_STEP: step})


@of_first_process
def log_choices(**choices: str) -> None:
    """Print what a step chose and why, and keep it as parameters `chosen/…`."""
    width = max(map(len, choices))
    print("\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in choices.items()) + "\n", flush=True)
    mlflow.log_params({f"{CHOSEN}/{name}": text for name, text in choices.items()})


@of_first_process
def log_metrics(**metrics: float) -> None:
    """Log single numbers."""
    mlflow.log_metrics(metrics)


@of_first_process
def log_figure(figure: Any, file: str) -> None:
    """Log a picture."""
    mlflow.log_figure(figure, file)


@of_first_process
def log_settings(prefix: str, settings: Mapping[str, Any]) -> None:
    """Log every setting as `prefix/name` and read them back, since MLflow can drop parameters silently.

    Raises:
        RuntimeError: naming those that did not arrive as they were.
    """
    sent = {f"{prefix}/{name}": str(value) for name, value in settings.items()}
    mlflow.log_params(sent)
    arrived = mlflow.get_run(run_id()).data.params
    lost = sorted(name for name, value in sent.items() if arrived.get(name) != value)
    if lost:
        raise RuntimeError(f"MLflow did not keep these parameters: {', '.join(lost)}")


def choices(run: Run) -> dict[str, str]:
    """What `log_choices` kept on a run."""
    prefix = f"{CHOSEN}/"
    return {
        name.removeprefix(prefix): text for name, text in run.data.params.items() if name.startswith(prefix)
    }


def run_page() -> tuple[str, str]:
    """The tracking URI, and this run in its user interface: that of `mlflow ui` for a local store."""
    store = mlflow.get_tracking_uri()
    host = store.rstrip("/") if store.startswith("http") else "http://127.0.0.1:5000"
    return store, f"{host}/#/experiments/{mlflow.active_run().info.experiment_id}/runs/{run_id()}"


def env_manager() -> str:
    """Environment manager that `mlflow run` was given for this run."""
    return _tags().get(MLFLOW_PROJECT_ENV, "local")


def project_uri() -> str:
    """What `mlflow run` takes to run this project again: the git URL it came from, or this folder."""
    source = _tags().get(MLFLOW_SOURCE_NAME, "")
    return source if re.match(r"(https?|ssh|git)://|git@", source) else str(PROJECT)


def project_version() -> list[str]:
    """`-v <commit>` for a git URL, nothing for a folder, where it would check that commit out."""
    return ["-v", git_commit()] if project_uri() != str(PROJECT) else []


def _tags() -> dict[str, str]:
    return mlflow.get_run(run_id()).data.tags


def log_input(data: Dataset, context: str, model: LoggedModelInput | None = None) -> None:
    """Log a dataset as an input of this run, also while another run logs the same one for the first time.

    Raises:
        MlflowException: it failed `TRIES` times; two that log a dataset for the first time collide.
    """
    _tried_again(lambda: mlflow.log_input(data, context=context, model=model))


def register_version(model_uri: str, name: str, tags: Mapping[str, str]) -> ModelVersion:
    """Register a logged model, also while others register versions of the same name.

    MLflow takes the next free number and, where others take it first, gives up after three tries of its own.

    Raises:
        MlflowException: it failed `TRIES` times.
    """
    return _tried_again(lambda: mlflow.register_model(model_uri, name, tags=dict(tags)))


def point_to_newest(name: str, alias: str) -> None:
    """Set an alias to the newest version; looking again afterwards, so that the last of several is right.

    Raises:
        MlflowException: it failed `TRIES` times; two that set an alias for the first time collide.
    """
    client = mlflow.MlflowClient()
    pointed, newest = 0, _newest(name)
    while pointed != newest:
        _tried_again(functools.partial(client.set_registered_model_alias, name, alias, str(newest)))
        pointed, newest = newest, _newest(name)


def _tried_again(call: Callable[[], Any]) -> Any:
    for _ in range(TRIES - 1):
        with suppress(MlflowException):
            return call()
        time.sleep(random.uniform(0, 1))
    return call()


def _newest(name: str) -> int:
    return max(int(one.version) for one in mlflow.MlflowClient().search_model_versions(f'name = "{name}"'))


def model_version(name: str, version: int | str) -> ModelVersion:
    """Look up a version of a registered model.

    Raises:
        UserError: naming the versions that exist.
    """
    try:
        return mlflow.MlflowClient().get_model_version(name, str(version))
    except MlflowException as error:
        found = _versions(name)
        if str(version) in found:
            raise
        raise UserError(
            f"registered_model_name={name}: has no version {version}; there are: "
            f"{', '.join(found) or 'none'}."
        ) from error


def _versions(name: str) -> list[str]:
    found = []
    with suppress(MlflowException):  # a name that MLflow does not allow
        found = mlflow.MlflowClient().search_model_versions(f'name = "{name}"')
    return [str(number) for number in sorted(int(one.version) for one in found)]


def find_version(model_uri: str) -> ModelVersion:
    """The registered version behind `models:/name/version` or `models:/name@alias`.

    Raises:
        UserError: there is no such model, version or alias.
    """
    name, _, alias = model_uri.removeprefix("models:/").partition("@")
    if not alias:
        try:
            return model_version(*name.split("/"))
        except UserError as error:
            raise UserError(f"model_uri={model_uri}: {error}") from error
    try:
        return mlflow.MlflowClient().get_model_version_by_alias(name, alias)
    except MlflowException as error:
        raise UserError(f"model_uri={model_uri}: {error.message}") from error


def git_commit() -> str:
    """Commit of the project as MLflow noted it on this run; empty outside a git checkout."""
    return _tags().get(MLFLOW_GIT_COMMIT, "")


def clear_run_id() -> dict[str, str]:
    """Environment for a process that must not find this run."""
    return {name: value for name, value in os.environ.items() if name != "MLFLOW_RUN_ID"}
