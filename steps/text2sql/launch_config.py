"""What `launch` names: one process, this project's own configurations of accelerate, or a user's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from steps.text2sql.errors import UserError

FOLDER = Path(__file__).parents[1] / "launch"
OWN = {"ddp": FOLDER / "ddp.yaml", "fsdp": FOLDER / "fsdp.yaml"}
TYPES = ("MULTI_GPU", "FSDP", "MULTI_CPU")


@dataclass(frozen=True)
class LaunchConfig:
    """A configuration of accelerate; `processes` is the number on all machines, None for all visible GPUs.

    `machine` is this one's number, from 0.
    """

    file: Path
    distributed_type: str
    processes: int | None
    machines: int
    machine: int
    use_cpu: bool

    @property
    def processes_here(self) -> int | None:
        """Processes on one machine."""
        return self.processes and self.processes // self.machines


def read(launch: str) -> LaunchConfig:
    """The configuration that `ddp`, `fsdp` or an absolute path names.

    Raises:
        ValueError: naming all that this project cannot run with.
    """
    file = OWN.get(launch, Path(launch))
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            "is no configuration of accelerate; make one with: accelerate config --config_file …"
        )
    if not isinstance(values.get("fsdp_config") or {}, dict):
        raise ValueError("fsdp_config: must be a mapping of names to values")
    problems = _problems(values, own=launch in OWN)
    if problems:
        raise ValueError("; ".join(problems))
    kind = values["distributed_type"]
    return LaunchConfig(
        file,
        kind,
        values.get("num_processes"),
        values.get("num_machines") or 1,
        values.get("machine_rank") or 0,
        use_cpu=kind == "MULTI_CPU" or bool(values.get("use_cpu")),
    )


def _problems(values: dict[str, Any], *, own: bool) -> list[str]:
    kind, processes = values.get("distributed_type"), values.get("num_processes")
    machines, fsdp = values.get("num_machines") or 1, values.get("fsdp_config") or {}
    rules = {
        f"distributed_type={kind}: must be {', '.join(TYPES)}": kind in TYPES,
        "compute_environment: must be LOCAL_MACHINE": values.get("compute_environment", "LOCAL_MACHINE")
        == "LOCAL_MACHINE",
        f"num_processes={processes}: must be 2 or more, over all machines": own or _is_count(processes, 2),
        f"num_machines={machines}: must divide num_processes={processes}": own
        or not _is_count(processes, 2)
        or (_is_count(machines, 1) and processes % machines == 0),
        "main_process_ip and main_process_port: needed with several machines": machines == 1
        or bool(values.get("main_process_ip") and values.get("main_process_port")),
        "fsdp_version: must be 2": kind != "FSDP" or fsdp.get("fsdp_version") == 2,
        # By default true: transformers would leave the base empty in all processes but the first.
        "fsdp_cpu_ram_efficient_loading: must be false": kind != "FSDP"
        or fsdp.get("fsdp_cpu_ram_efficient_loading") is False,
        "fsdp_offload_params: is not supported": not fsdp.get("fsdp_offload_params"),
    }
    return [problem for problem, holds in rules.items() if not holds]


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and value >= least


def check_gpus(launch: str, gpus: int) -> None:
    """Refuse to launch more processes on GPUs than this machine has visible ones.

    Raises:
        UserError: naming both numbers.
    """
    if launch == "single":
        return
    config = read(launch)
    needed = config.processes_here or 2
    if not config.use_cpu and gpus < needed:
        raise UserError(
            f"launch={launch}: needs {needed} GPUs{'' if config.processes else ' or more'} on this machine, "
            f"and {gpus} {'is' if gpus == 1 else 'are'} visible; give launch=single, or an accelerate "
            "configuration of your own (with use_cpu: true for processes on the CPU)."
        )
