"""Training in several processes: this one starts them with accelerate, passes signals on, and says the end.

It calls what `accelerate launch` calls and stays, rather than becoming that command: accelerate's own process
answers a failure or a signal with tracebacks, and a second signal leaves its children behind.
"""

import logging
import math
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import patch_environment
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from steps.text2sql import active_run, launch_config, processes, project_source, ranks, run_log
from steps.text2sql.errors import Interrupted, UserError
from steps.text2sql.launch_config import LaunchConfig


def is_due(launch: str) -> bool:
    """Whether the step has to start its processes; they themselves need not."""
    return launch != "single" and not ranks.is_launched()


def run(module: str, values: Mapping[str, object], *, launch: str) -> None:
    """Run a step's module in several processes, to the end of all.

    Raises:
        UserError: one failed, and none is left; with its reason.
        Interrupted: a signal came, here or to one of them, and none is left.
    """
    launch_config.check_gpus(launch, torch.cuda.device_count())
    config = launch_config.read(launch)
    if config.machine:
        run_log.log_choices(
            machine=f"{config.machine} of {config.machines}; adapter and curves are in the run of machine 0"
        )
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # says what is said below
    words = [*accelerate_words(config, gpus=torch.cuda.device_count()), "--module", module]
    words += [word for name, value in values.items() for word in (f"--{name}", str(value))]
    stopper = processes.Stopper(announce=False)
    with tempfile.TemporaryDirectory() as scratch:
        with patch_environment(**environment(config, Path(scratch))), stopper.listening():
            error = _launch(words)
        endings = ranks.endings(Path(scratch))
    if reason := _reason(error, endings, stopper.stopped_by, launch):
        raise reason


def accelerate_words(config: LaunchConfig, *, gpus: int) -> list[str]:
    """Words of `accelerate launch` before the step's own."""
    words = ["--quiet", "--config_file", str(config.file), "--mixed_precision", "no"]
    if config.processes is None:
        words += ["--num_processes", str(gpus)]
    if config.machines == 1:
        words += ["--main_process_port", "0"]  # any that is free
    if config.distributed_type == "MULTI_CPU":
        words += ["--multi_gpu"]  # accelerate would start one process, or need MPI
    return words


def environment(config: LaunchConfig, endings: Path) -> dict[str, str]:
    """What the processes find beside accelerate's own variables."""
    found = {
        ranks.ENDINGS_VARIABLE: str(endings),
        "MLFLOW_RUN_ID": active_run.run_id(),
        "MLFLOW_TRACKING_URI": active_run.store_uri(),
        # SIGINT and SIGTERM are this process's: torch would answer with an exception.
        "PET_SIGNALS_TO_HANDLE": "SIGHUP",
        # After one failed the others are asked to end, and killed after so many seconds.
        "PET_SHUTDOWN_TIMEOUT": "20",
        "PYTHONPATH": os.pathsep.join(
            [str(project_source.PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    return found | ({"CUDA_VISIBLE_DEVICES": ""} if config.use_cpu else {})


def _launch(words: Sequence[str]) -> Exception | None:
    """Run `accelerate launch`; what went wrong comes back."""
    try:
        launch_command(launch_command_parser().parse_args(words))
    except Exception as error:  # whatever accelerate and the rendezvous of the machines raise
        return error
    return None


def _reason(
    error: Exception | None, endings: Sequence[ranks.Ending], stopped_by: str, launch: str
) -> UserError | Interrupted | None:
    """Why the processes ended, if not well."""
    failed, stopped, left = (
        [one for one in endings if one.kind == kind] for kind in ("failed", "stopped", "left")
    )
    problem = _problem(error, {one.process: one for one in endings})
    if stopped_by or (stopped and not failed and not problem):
        go_on = next((one.go_on for one in stopped if one.go_on), "")
        return Interrupted(stopped_by or stopped[0].text, go_on)
    if failed:
        return UserError(failed[0].text)
    if problem:
        return UserError(f"launch={launch}: {'; '.join([problem, *(one.text for one in left[:1])])}")
    return None


def _problem(error: Exception | None, told: Mapping[int, ranks.Ending]) -> str:
    """What went wrong, in words; nothing where the process that ended the others was asked to stop."""
    if not isinstance(error, ChildFailedError):
        return f"{type(error).__name__}: {error}" if error else ""
    first = _first_to_end(error, told)
    is_stopped = first in told and told[first].kind == "stopped"
    return "" if is_stopped else _ended(first, error.failures[first])


def _first_to_end(error: ChildFailedError, told: Mapping[int, ranks.Ending]) -> int:
    """The process that ended all: once one has failed, torch asks the others to stop with SIGTERM.

    torch notes whole seconds, and may notice two at once: one that told nothing was the first then.
    """
    earliest = error.get_first_failure()[1].timestamp
    found = [process for process, one in error.failures.items() if one.timestamp <= earliest + 1]
    silent = [p for p in found if p not in told and error.failures[p].exitcode != -signal.SIGTERM]
    return (silent or sorted(found, key=lambda p: told[p].time if p in told else math.inf))[0]


def _ended(process: int, failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        name = failure.signal_name()
        return f"process {process} was killed by {name}; the system kills one when memory runs out"
    return f"process {process} ended with exit status {failure.exitcode}"
