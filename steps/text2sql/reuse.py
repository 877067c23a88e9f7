"""What a step's result depends on, as one fingerprint: with the same one it need not run again."""

import functools
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steps.text2sql import manifest, mlproject
from steps.text2sql.command_line import parse
from steps.text2sql.params import CHAIN, SET_BY_MAIN

PROJECT = Path(__file__).parents[2]
ALWAYS_RUN = {"promote"}
# Where a training goes on, how many checkpoints it leaves, in how many processes: no other result.
WITHOUT_EFFECT = {"resume_from", "keep_checkpoints", "launch"}
# In a process of its own: main does not load torch.
ASK_DEVICES = "import torch; [print(torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]"


def fingerprint(
    step: str, values: Mapping[str, str], *, upstream: Mapping[str, str], device: str, code: str
) -> str:
    """SHA-256 of all that decides what a step makes, 64 hexadecimal digits.

    `values` are those that main gives; the others have their defaults of MLproject. `upstream` are digests of
    the artifacts that the values of `SET_BY_MAIN` name. Files and folders count by their contents.
    """
    own = {name: value for name, value in resolved(step, values).items() if name not in SET_BY_MAIN}
    used = {name: _content(value) for name, value in own.items() if name not in WITHOUT_EFFECT}
    return _digest([step, used, dict(upstream), device, code])


def resolved(step: str, values: Mapping[str, str]) -> dict[str, Any]:
    """Typed values of a step, those that main does not give by their defaults in MLproject."""
    given = mlproject.defaults(step) | dict(values)
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    return vars(parse(CHAIN[step], words))


def code_digest(project: Path = PROJECT) -> str:
    """SHA-256 of `steps/` and `python_env.yaml`, whatever the commit says."""
    files = [
        path for path in (project / "steps").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    files.append(project / "python_env.yaml")
    return _digest({path.relative_to(project).as_posix(): manifest.sha256(path) for path in files})


def may_have_moved(step: str, values: Mapping[str, str], *, device: str) -> bool:
    """Whether only prepare_data can look up what a value names: a state of the hub, or rows' databases."""
    if step != "prepare_data":
        return False
    values = mlproject.defaults(step) | dict(values)
    if values.get("database_column"):
        return True
    here = {"auto", "sample", "smollm2-135m"}
    names = [value for name, value in values.items() if name in ("base_model", "dataset")]
    on_hub = [value for value in names if value not in here and not Path(value).is_absolute()]
    unpinned = [value for value in on_hub if not re.search("@[0-9a-f]{40}$", value)]
    return bool(unpinned) or (values["base_model"] == "auto" and device != "cpu")


def device_kind() -> str:
    """`cpu` or the name of the GPU."""
    return next(iter(gpus()), "cpu")


@functools.cache
def gpus() -> list[str]:
    """Names of the visible GPUs, asked in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", ASK_DEVICES], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def _content(value: Any) -> Any:
    """A value, with the state of the file or folder that it names.

    Weights count by name, size and time: reading a large base would take minutes.
    """
    path = Path(str(value))
    if not path.is_absolute() or not path.exists():
        return value
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [str(value), [[file.relative_to(path).as_posix(), _state(file)] for file in files]]


def _state(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return [file.stat().st_size, file.stat().st_mtime_ns]
    return manifest.sha256(file)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
