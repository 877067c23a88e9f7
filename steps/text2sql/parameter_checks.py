"""Checks of single parameters, each a value as typed: what a step can work with comes back.

Raises:
    ValueError: saying what the value must be; `command_line` puts name and value before it.
"""

import json
import os
import re
from importlib.metadata import entry_points
from pathlib import Path

from steps.text2sql import launch_config, processes, prompt_template

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
DATA_NAMES = "JSONL, JSON, CSV or Parquet"
RUN_ID = r"^[0-9a-f]*$"
MODULES = r"^[\w.-]+(,[\w.-]+)*$"
HUB_ID = r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?(@[A-Za-z0-9_][A-Za-z0-9_./-]*)?"
MODEL_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_. -]*[A-Za-z0-9_.-])?"
# Patterns of values, and what a value must be that does not match.
FORMS = {
    RUN_ID: "must be the id of a run as MLflow shows it, of digits and the letters a to f",
    f"^{MODEL_NAME}$": "must be letters, digits, dots, dashes, underscores and spaces between them, and "
    "begin with a letter, a digit or an underscore",
    MODULES: "must be all-linear, or names of modules with commas and no spaces between",
}
SWEEP_FILE = "text2sql_sweep.db"


def base_model(value: str) -> str:
    """`auto`, the embedded base, a model directory or a hub id."""
    if value in ("auto", "smollm2-135m"):
        return value
    if _looks_like_path(value):
        folder = _absolute(value)
        if not (Path(folder) / "config.json").is_file():
            raise ValueError("is no model directory: it has no config.json")
        return folder
    return _hub_id(
        value, "auto, smollm2-135m, a hub id (owner/name, owner/name@revision) or an absolute directory"
    )


def dataset(value: str) -> str:
    """`auto`, or what `rows` takes."""
    return value if value == "auto" else rows(value, "auto, sample")


def rows(value: str, words: str = "sample") -> str:
    """`sample`, a file or folder of rows, or a hub id."""
    if value == "sample":
        return value
    if _looks_like_path(value) or value.lower().endswith(DATA_SUFFIXES):
        path = Path(_absolute(value))
        if not path.is_dir():
            return data_file(value)
        if not any(file.name.lower().endswith(DATA_SUFFIXES) for file in path.iterdir()):
            raise ValueError(f"is a folder without files that end in {', '.join(DATA_SUFFIXES)}")
        return str(path)
    if value == "auto":
        raise ValueError("must be sample, a hub id or an absolute path: what auto means is for training")
    return _hub_id(
        value,
        f"{words}, a hub id, or an absolute path: a folder, or ending in {', '.join(DATA_SUFFIXES)}",
    )


def data_file(value: str) -> str:
    """An absolute path of a file of rows."""
    file = _absolute(value)
    if not Path(file).is_file():
        raise ValueError("is no file")
    if not file.lower().endswith(DATA_SUFFIXES):
        raise ValueError(f"must end in {', '.join(DATA_SUFFIXES)}")
    return file


def optional_data_file(value: str) -> str:
    """As `data_file`, or nothing."""
    return data_file(value) if value else value


def template_file(value: str) -> str:
    """`default`, or an absolute path of a template that can be filled in."""
    if value == "default":
        return value
    file = _absolute(value)
    if not value or not Path(file).is_file():
        raise ValueError("is no file; must be default or the absolute path of a text file")
    prompt_template.read(Path(file))
    return file


def _hub_id(value: str, accepted: str) -> str:
    if not re.fullmatch(HUB_ID, value):
        raise ValueError(f"must be {accepted}")
    return value


def artifact_uri(value: str) -> str:
    """A URI of any scheme, or an absolute path."""
    if re.match(r"[a-z][a-z0-9+-]*:/", value):
        return value
    if not value:
        raise ValueError("must be an artifact URI (runs:/<run id>/<path>) or an absolute path")
    return _absolute(value)


def new_folder(value: str) -> str:
    """An absolute path where there is nothing yet, in a folder that there is."""
    folder = Path(_absolute(value))
    if os.path.lexists(folder):  # a link to nothing too
        raise ValueError("exists already; nothing is written over")
    if not folder.parent.is_dir():
        raise ValueError(f"there is no folder {folder.parent}")
    return str(folder)


def model_uri(value: str) -> str:
    """A version of a registered model, by number or alias."""
    if not re.fullmatch(rf"models:/{MODEL_NAME}(/\d+|@{MODEL_NAME})", value):
        raise ValueError("must be models:/<name>/<version> or models:/<name>@<alias>")
    return value


def two(value: str) -> list[str]:
    """The two words of `low,high`."""
    ends = value.split(",")
    if len(ends) != 2:
        raise ValueError("must be two numbers, the lowest and the highest: low,high")
    return ends


def ordered(value: tuple[float, float]) -> tuple[float, float]:
    """Two numbers of which the first is not the larger."""
    if value[0] > value[1]:
        raise ValueError("must have the lowest first: low,high")
    return value


def storage(value: str) -> str:
    """`auto`, or an absolute path of a file to make or go on with."""
    if value == "auto":
        return str(processes.users_folder() / SWEEP_FILE)
    file = Path(_absolute(value))
    if not file.parent.is_dir():
        raise ValueError(f"there is no folder {file.parent}")
    if file.is_dir():
        raise ValueError("is a folder; must be a file, which is made where there is none")
    return str(file)


def launch(value: str) -> str:
    """How many processes train: a word, or a configuration of accelerate that can be read."""
    if value == "single":
        return value
    if value not in launch_config.OWN:
        if not _looks_like_path(value):
            words = "'single', 'ddp', 'fsdp' or the absolute path of an accelerate configuration"
            raise ValueError(f"must be {words}")
        value = _absolute(value)
    launch_config.read(value)
    return value


def project_backend(value: str) -> str:
    """A backend of MLflow that is installed and takes this project."""
    if value == "kubernetes":
        raise ValueError("needs a project with docker_env, and this one has python_env")
    installed = {"local", "databricks", *entry_points(group="mlflow.project_backend").names}
    if value not in installed:
        raise ValueError(f"is not installed; there are: {', '.join(sorted(installed))}")
    return value


def backend_config(value: str) -> str:
    """JSON text, an absolute path of a file of it, or nothing."""
    if value.startswith("{"):
        json.loads(value)  # its error is a ValueError
        return value
    if value and not (Path(_absolute(value)).is_file() and value.endswith(".json")):
        raise ValueError("must be JSON text, {…}, or the absolute path of a file that ends in .json")
    return _absolute(value) if value else value


def steps(value: int) -> int:
    """At least 1, or -1."""
    if value != -1 and value < 1:
        raise ValueError("must be at least 1, or -1 to train for num_train_epochs")
    return value


def _absolute(value: str) -> str:
    try:
        path = Path(value).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"cannot be looked up: {error}") from error
    if not path.is_absolute():
        raise ValueError(
            "is a relative path, but steps run in the project's folder; "
            f"give the absolute form: {processes.users_folder() / value}"
        )
    return str(path)


def _looks_like_path(value: str) -> bool:
    try:
        return value.startswith(("/", "~", ".")) or (
            bool(value) and (processes.users_folder() / value).exists()
        )
    except OSError as error:  # a name too long for a file
        raise ValueError(f"cannot be looked up: {error}") from error
