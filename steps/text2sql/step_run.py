"""A step within its MLflow run: opening it, and ending it whatever ends the step."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import mlflow
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_PROJECT_ENTRY_POINT, MLFLOW_RUN_NOTE

from steps.text2sql import active_run, artifacts, liveness, processes, project_source, ranks
from steps.text2sql.command_line import parse
from steps.text2sql.errors import Interrupted, UserError
from steps.text2sql.lost_runs import end_lost_runs
from steps.text2sql.run_page import describe_step, name_run
from steps.text2sql.store_names import TAG_FAILURE, TAG_FINGERPRINT, TAG_STOPPED_BY

# main tells a step its fingerprint so that the run has it from its start, however it ends.
FINGERPRINT_VARIABLE = "TEXT2SQL_FINGERPRINT"
Params = TypeVar("Params")
logger = logging.getLogger(__name__)


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
        with ExitStack() as announced:
            with processes.held_signals() as held:  # a run that is just being made could not be ended
                run = mlflow.start_run(
                    log_system_metrics=None if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.is_set() else measure
                )
                announced.enter_context(liveness.announced(run.info.run_id))
            _run(body, (UserError, *user_errors), held)


def _run(body: Callable[[], None], user_errors: tuple[type[Exception], ...], held: list[str]) -> None:
    """Call a body in its run, and end that; `held` names a signal that came before."""
    try:
        if held:
            raise KeyboardInterrupt(held[0])
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
    with processes.held_signals():  # as above
        mlflow.end_run()


def begin() -> None:
    """What each run begins with: its origin and its fingerprint as tags, and an end for lost runs.

    Raises:
        Interrupted: main was killed while this process of it started.
        UserError: the run's artifacts cannot be written.
    """
    artifacts.check_location()
    if fingerprint := os.environ.pop(FINGERPRINT_VARIABLE, ""):  # a run that this one starts has another
        mlflow.set_tag(TAG_FINGERPRINT, fingerprint)
    tags = active_run.tags()
    name_run(tags.get(MLFLOW_PROJECT_ENTRY_POINT, ""))
    parent = tags.get(MLFLOW_PARENT_RUN_ID)
    if not parent:
        end_lost_runs()
    elif liveness.state(parent) == "gone":
        raise Interrupted("the end of main")
    else:
        project_source.take_source_of(parent)
    project_source.read()


def _end(status: str, tag: str, reason: str) -> None:
    """Write a run's end; a store that does not take it is said, and hides neither reason nor way on."""
    reason = reason.encode(errors="backslashreplace").decode()  # names of files need not be UTF-8
    tags = {tag: reason[:5000], MLFLOW_RUN_NOTE: f"{status}: {reason[:5000]}"}
    with processes.held_signals():  # the run has its end already
        for write in (lambda: mlflow.set_tags(tags), lambda: mlflow.end_run(status)):
            try:
                write()
            except Exception as error:  # whatever a store raises
                logger.error("\nThe store does not take the end of this run, %s: %s", status, error)


def _way_on(error: BaseException) -> str:
    return f"\n\n{error.go_on}" if isinstance(error, Interrupted | UserError) and error.go_on else ""


def _run_as_one_of_several(body: Callable[[], None], user_errors: tuple[type[Exception], ...]) -> None:
    """Call a body in a process whose launcher owns the run, ends it, and says why."""
    try:
        with processes.on_signals(processes.raise_interrupt):
            _run_and_tell(body, user_errors)
    except KeyboardInterrupt as error:  # perhaps while another error was told
        processes.ignore_terminations()
        ranks.tell_ending("stopped", str(error) or "SIGINT")
        raise SystemExit(1) from error


def _run_and_tell(body: Callable[[], None], user_errors: tuple[type[Exception], ...]) -> None:
    try:
        if ranks.is_first():
            mlflow.start_run()
            project_source.read()
        else:
            ranks.be_silent()
        body()
    except KeyboardInterrupt:
        raise
    except Interrupted as error:  # all of them stopped together, which is no failure of this one
        ranks.tell_ending("stopped", str(error), error.go_on)
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
                f"give the absolute form: {start}:///{processes.users_folder() / file}"
            )


def _quiet() -> None:
    # Each of these says at INFO or WARNING what a user can neither use nor change.
    for name in (
        "httpx",
        "alembic",
        "mlflow.projects",
        "mlflow.system_metrics",
        "mlflow.store.db.utils",
        "matplotlib",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    for start in ("The specified dataset source can be interpreted", ".*An input example was not provided"):
        warnings.filterwarnings("ignore", start)
