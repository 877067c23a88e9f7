"""The parameters of every step: types, meanings and limits. MLproject has the defaults.

`main` takes its own parameters and whatever one of its steps declares, and hands them on.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_type_hints

import psutil
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from steps.text2sql import launch_config, processes, prompt_template
from steps.text2sql.errors import UserError

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
DATA_NAMES = "JSONL, JSON, CSV or Parquet"
HUB_ID = r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?(@[A-Za-z0-9_][A-Za-z0-9_./-]*)?"
MODEL_NAME = r"[A-Za-z0-9_][A-Za-z0-9_. -]*"
SWEEP_FILE = "text2sql_sweep.db"
Auto = Literal["auto"]
Params = TypeVar("Params")


def users_folder() -> Path:
    """Folder where the user typed `mlflow run`: the steps themselves run in the project's folder."""
    for process in processes.mlflow_runs():
        with suppress(psutil.Error):  # processes of other users cannot be looked at everywhere
            return Path(process.cwd())
    return Path.cwd()


def _absolute(value: str) -> str:
    try:
        path = Path(value).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"cannot be looked up: {error}") from error
    if not path.is_absolute():
        raise ValueError(
            "is a relative path, but steps run in the project's folder; "
            f"give the absolute form: {users_folder() / value}"
        )
    return str(path)


def _looks_like_path(value: str) -> bool:
    try:
        return value.startswith(("/", "~", ".")) or (bool(value) and (users_folder() / value).exists())
    except OSError as error:  # a name too long for a file
        raise ValueError(f"cannot be looked up: {error}") from error


def _base_model(value: str) -> str:
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


def _dataset(value: str) -> str:
    return value if value == "auto" else _rows(value, "auto, sample")


def _rows(value: str, words: str = "sample") -> str:
    if value == "sample":
        return value
    if _looks_like_path(value) or value.endswith(DATA_SUFFIXES):
        path = Path(_absolute(value))
        if not path.is_dir():
            return _data_file(value)
        if not any(file.name.endswith(DATA_SUFFIXES) for file in path.iterdir()):
            raise ValueError(f"is a folder without files that end in {', '.join(DATA_SUFFIXES)}")
        return str(path)
    if value == "auto":
        raise ValueError("must be sample, a hub id or an absolute path: what auto means is for training")
    return _hub_id(
        value,
        f"{words}, a hub id, or an absolute path: a folder, or ending in {', '.join(DATA_SUFFIXES)}",
    )


def _data_file(value: str) -> str:
    file = _absolute(value)
    if not Path(file).is_file():
        raise ValueError("is no file")
    if not file.endswith(DATA_SUFFIXES):
        raise ValueError(f"must end in {', '.join(DATA_SUFFIXES)}")
    return file


def _optional_data_file(value: str) -> str:
    return _data_file(value) if value else value


def _prompt_template(value: str) -> str:
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


def _artifact_uri(value: str) -> str:
    if re.match(r"[a-z][a-z0-9+-]*:/", value):
        return value
    if not value:
        raise ValueError("must be an artifact URI (runs:/<run id>/<path>) or an absolute path")
    return _absolute(value)


def _new_folder(value: str) -> str:
    folder = Path(_absolute(value))
    if folder.exists():
        raise ValueError("exists already; nothing is written over")
    if not folder.parent.is_dir():
        raise ValueError(f"there is no folder {folder.parent}")
    return str(folder)


def _model_uri(value: str) -> str:
    if not re.fullmatch(rf"models:/{MODEL_NAME}(/\d+|@{MODEL_NAME})", value):
        raise ValueError("must be models:/<name>/<version> or models:/<name>@<alias>")
    return value


def _two(value: str) -> list[str]:
    ends = value.split(",")
    if len(ends) != 2:
        raise ValueError("must be two numbers, the lowest and the highest: low,high")
    return ends


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("must have the lowest first: low,high")
    return value


def _storage(value: str) -> str:
    if value == "auto":
        return str(users_folder() / SWEEP_FILE)
    file = Path(_absolute(value))
    if not file.parent.is_dir():
        raise ValueError(f"there is no folder {file.parent}")
    if file.is_dir():
        raise ValueError("is a folder; must be a file, which is made where there is none")
    return str(file)


def _launch(value: str) -> str:
    if value == "single":
        return value
    if value not in launch_config.OWN:
        if not _looks_like_path(value):
            words = "'single', 'ddp', 'fsdp' or the absolute path of an accelerate configuration"
            raise ValueError(f"must be {words}")
        value = _absolute(value)
    launch_config.read(value)
    return value


def _project_backend(value: str) -> str:
    if value == "kubernetes":
        raise ValueError("needs a project with docker_env, and this one has python_env")
    installed = {"local", "databricks", *entry_points(group="mlflow.project_backend").names}
    if value not in installed:
        raise ValueError(f"is not installed; there are: {', '.join(sorted(installed))}")
    return value


def _backend_config(value: str) -> str:
    if value.startswith("{"):
        json.loads(value)  # its error is a ValueError
        return value
    if value and not (Path(_absolute(value)).is_file() and value.endswith(".json")):
        raise ValueError("must be JSON text, {…}, or the absolute path of a file that ends in .json")
    return _absolute(value) if value else value


def _steps(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("must be at least 1, or -1 to train for num_train_epochs")
    return value


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
DatasetUri = Annotated[
    str, AfterValidator(_artifact_uri), Field(description="`runs:/<prepare_data run>/dataset`")
]
ModelUri = Annotated[
    str,
    AfterValidator(_model_uri),
    Field(description="`models:/<name>/<version>` or `models:/<name>@<alias>`"),
]
ModelName = Annotated[
    str,
    Field(pattern=f"^{MODEL_NAME}$", max_length=250, description="name in the model registry"),
]
PositiveInt = Annotated[int, Field(ge=1)]
Rank = Annotated[int, Field(ge=1, le=1024)]
Column = Annotated[str, Field(min_length=1, description="name of the column in the dataset")]
Seed = Annotated[int, Field(ge=0, lt=2**32, description="seed of sampling, initialization and row order")]


@dataclass(frozen=True)
class PrepareDataParams:
    """Parameters of prepare_data."""

    base_model: Annotated[
        str,
        AfterValidator(_base_model),
        Field(description="auto, smollm2-135m, a hub id with optional @revision, or a local directory"),
    ]
    dataset: Annotated[
        str,
        AfterValidator(_dataset),
        Field(
            description=f"auto, sample, a hub id with optional @revision, or a file or folder of {DATA_NAMES}"
        ),
    ]
    max_length: Annotated[
        int, Field(ge=16, le=32768, description="tokens of prompt and answer; longer rows are rejected")
    ]
    test_size: Annotated[
        float, Field(gt=0, lt=1, description="share of the table groups, or of the rows, kept for testing")
    ]
    split_by: Annotated[
        Literal["schema", "random"], Field(description="schema: no test table occurs in training")
    ]
    seed: Seed
    dataset_config: Annotated[str, Field(description="configuration of a hub dataset; empty: its default")]
    dataset_split: Annotated[
        str,
        Field(
            pattern=r"^[\w.+:%\[\]-]*$", description="split of a hub dataset to take rows from; empty: train"
        ),
    ]
    question_column: Column
    context_column: Column
    answer_column: Column
    database_column: Annotated[
        str,
        Field(description="paths of SQLite files, absolute or from the data file's folder; empty: none"),
    ]
    validation_dataset: Annotated[
        str,
        AfterValidator(_optional_data_file),
        Field(description=f"a file of {DATA_NAMES}; empty: validation rows are taken out of train"),
    ]
    prompt_template: Annotated[
        str,
        AfterValidator(_prompt_template),
        Field(description="default, or a text file with {context} and {question}; other braces doubled"),
    ]
    prompt_style: Annotated[
        Literal["plain", "chat"], Field(description="chat: in the chat form of an instruct model")
    ]


@dataclass(frozen=True)
class TrainParams:
    """Parameters of train; the names are those of transformers.TrainingArguments and peft.LoraConfig."""

    dataset_uri: DatasetUri
    max_steps: Annotated[
        int, AfterValidator(_steps), Field(description="optimizer steps; -1: num_train_epochs")
    ]
    batch_size: Annotated[int, Field(ge=1, le=4096, description="rows an optimizer step, over all processes")]
    learning_rate: Annotated[Auto | Positive, Field(description="peak rate; auto: by the size of the base")]
    lora_r: Annotated[Rank, Field(description="rank of the LoRA matrices")]
    lora_alpha: Annotated[Positive, Field(description="LoRA scale is lora_alpha / lora_r")]
    lora_dropout: Annotated[float, Field(ge=0, lt=1, description="dropout before the LoRA matrices")]
    target_modules: Annotated[
        str, Field(pattern=r"^[\w.-]+(,[\w.-]+)*$", description="all-linear, or a comma list of module names")
    ]
    quantization: Annotated[Literal["nf4", "none"], Field(description="of the frozen base")]
    launch: Annotated[
        str,
        AfterValidator(_launch),
        Field(
            description="single: one process; ddp, fsdp: all visible GPUs, with fsdp the base is divided "
            "among them; or the absolute path of an accelerate configuration"
        ),
    ]
    seed: Seed
    num_train_epochs: Annotated[
        Positive, Field(description="passes over the rows; counts where max_steps is -1")
    ]
    warmup_steps: Annotated[
        Auto | Annotated[int, Field(ge=0)], Field(description="auto: a twentieth of the steps")
    ]
    lr_scheduler_type: Annotated[
        Literal["cosine", "linear", "constant", "constant_with_warmup"],
        Field(description="learning rate schedule"),
    ]
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False, description="of AdamW")]
    optim: Annotated[
        Literal["auto", "paged_adamw_8bit", "adamw_8bit", "adamw_torch", "adamw_torch_fused"],
        Field(description="auto: adamw_torch_fused on CUDA, adamw_torch elsewhere"),
    ]
    gradient_checkpointing: Annotated[
        Literal["auto", "yes", "no"], Field(description="auto: on a CUDA GPU that would be short of memory")
    ]
    micro_batch_tokens: Annotated[
        Auto | Annotated[int, Field(ge=16)],
        Field(description="tokens computed at once; auto: what the memory holds"),
    ]
    torch_compile: Annotated[
        Literal["auto", "yes", "no"],
        Field(description="compile the layers; auto: on a CUDA GPU where the training is long enough to win"),
    ]
    save_steps: Annotated[int, Field(ge=1, description="steps between checkpoints")]
    logging_steps: Annotated[int, Field(ge=1, description="steps between points of the loss curve")]
    keep_checkpoints: Annotated[int, Field(ge=1, description="newest checkpoints to keep")]
    resume_from: Annotated[
        str, Field(pattern=r"^[0-9a-f]*$", description="train run to go on with from its newest checkpoint")
    ]
    dry_run: Annotated[
        Literal["no", "yes"], Field(description="yes: print what the training would take, and stop there")
    ]
    project_backend: Annotated[
        str,
        AfterValidator(_project_backend),
        Field(description="MLflow project backend that main sends train to; local: this machine"),
    ]
    backend_config: Annotated[
        str,
        AfterValidator(_backend_config),
        Field(description="of that backend: JSON text or the absolute path of a .json file; empty: none"),
    ]


@dataclass(frozen=True)
class RegisterParams:
    """Parameters of register."""

    adapter_uri: Annotated[
        str,
        AfterValidator(_artifact_uri),
        Field(description="`runs:/<train run>/adapter`, or a checkpoint of it"),
    ]
    dataset_uri: DatasetUri
    registered_model_name: ModelName


@dataclass(frozen=True)
class EvaluateParams:
    """Parameters of evaluate; exactly one of `dataset_uri` and `dataset` is given."""

    model_uri: ModelUri
    dataset_uri: Annotated[
        str,
        AfterValidator(lambda value: value and _artifact_uri(value)),
        Field(description="a dataset of prepare_data, whose test rows are scored"),
    ]
    dataset: Annotated[
        str,
        AfterValidator(lambda value: value and _rows(value)),
        Field(description=f"rows to score: sample, a hub id with optional @revision, a file of {DATA_NAMES}"),
    ]
    eval_rows: Annotated[int, Field(ge=1, description="rows to score, the same ones for every seed")]
    eval_batch_size: Annotated[
        Auto | Annotated[int, Field(ge=1, le=4096)],
        Field(description="rows generated at once; auto: by free memory"),
    ]
    query_timeout_seconds: Annotated[Positive, Field(description="limit of one query")]

    def __post_init__(self) -> None:
        """Refuse both or none.

        Raises:
            UserError: always then.
        """
        if bool(self.dataset_uri) == bool(self.dataset):
            raise UserError(
                f"dataset_uri={self.dataset_uri}, dataset={self.dataset}: give exactly one of them: "
                "dataset_uri=runs:/<prepare_data run>/dataset for test rows, or dataset=<file, hub id or "
                "sample> for any rows."
            )


@dataclass(frozen=True)
class PromoteParams:
    """Parameters of promote."""

    version: Annotated[int, Field(ge=1, description="model version to make champion")]
    evaluation_run_id: Annotated[
        str,
        Field(pattern=r"^[0-9a-f]*$", description="evaluate run to judge by; empty: a move by hand, no gate"),
    ]
    min_execution_accuracy: Annotated[float, Field(ge=0, le=1, description="floor of the gate")]
    gate_alpha: Annotated[
        float, Field(gt=0, le=1, description="McNemar's p against the champion must be under it")
    ]
    registered_model_name: ModelName


@dataclass(frozen=True)
class ExportParams:
    """Parameters of export."""

    model_uri: ModelUri
    output: Annotated[
        str, AfterValidator(_new_folder), Field(description="absolute folder to make, for the merged model")
    ]
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Field(description="of the merged weights; auto: that of the base's own weights"),
    ]
    compare_rows: Annotated[
        int,
        Field(
            ge=1, description="built-in questions that both models answer before the merged one is offered"
        ),
    ]
    min_same_sql: Annotated[
        float, Field(ge=0, le=1, description="share of them that must get the same SQL from both")
    ]


@dataclass(frozen=True)
class SweepParams:
    """Parameters of sweep, which takes those of prepare_data and train too, and hands them on."""

    trials: Annotated[int, Field(ge=1, le=1000, description="trainings in all, also those of earlier sweeps")]
    learning_rate_range: Annotated[
        tuple[Positive, Positive],
        BeforeValidator(_two),
        AfterValidator(_ordered),
        Field(description="lowest and highest learning_rate, searched on a logarithmic scale"),
    ]
    lora_r_range: Annotated[
        tuple[Rank, Rank],
        BeforeValidator(_two),
        AfterValidator(_ordered),
        Field(description="lowest and highest lora_r; powers of two and the ends are tried"),
    ]
    max_steps_range: Annotated[
        tuple[PositiveInt, PositiveInt],
        BeforeValidator(_two),
        AfterValidator(_ordered),
        Field(description="lowest and highest max_steps, searched on a logarithmic scale"),
    ]
    storage: Annotated[
        str,
        AfterValidator(_storage),
        Field(
            description=f"SQLite file that keeps the search; auto: {SWEEP_FILE} where mlflow run was typed"
        ),
    ]
    dataset_uri: Annotated[
        str,
        AfterValidator(lambda value: value and _artifact_uri(value)),
        Field(description="a dataset of prepare_data; empty: prepared first, once for all trials"),
    ]
    seed: Seed


@dataclass(frozen=True)
class OwnMainParams:
    """Parameters that belong to main alone; all others belong to the steps."""

    promotion: Annotated[Literal["auto", "never"], Field(description="never: register and evaluate only")]
    resume: Annotated[
        Literal["auto", "never"],
        Field(description="auto: go on with an unfinished training of the same inputs"),
    ]
    reuse: Annotated[
        Literal["auto", "never"], Field(description="auto: skip steps that finished with the same inputs")
    ]


CHAIN: dict[str, type] = {
    "prepare_data": PrepareDataParams,
    "train": TrainParams,
    "register": RegisterParams,
    "evaluate": EvaluateParams,
    "promote": PromoteParams,
}
# All steps with a command of their own; those beside the chain are never started by main.
STEPS: dict[str, type] = CHAIN | {"export": ExportParams, "sweep": SweepParams}
# What one step finds out for the next: main sets these, a user of main cannot.
SET_BY_MAIN = frozenset({"dataset_uri", "adapter_uri", "model_uri", "version", "evaluation_run_id"})
# What a sweep finds out or searches, by what to say of it to a user who gives it.
SET_BY_SWEEP = {
    "learning_rate": "sweep searches it; give learning_rate_range",
    "lora_r": "sweep searches it; give lora_r_range",
    "max_steps": "sweep searches it; give max_steps_range",
    "num_train_epochs": "sweep counts steps; give max_steps_range",
    "resume_from": "sweep goes on with its unfinished trainings itself",
    "dry_run": "sweep has none; give it to main",
    "project_backend": "sweep trains here, where it can stop a training early",
    "backend_config": "sweep trains here, where it can stop a training early",
}
# What a step takes only where a user runs it alone, though main has a parameter of that name.
NOT_FROM_MAIN = {"evaluate": frozenset({"dataset"})}


class MainParams(NamedTuple):
    """Checked parameters of main: all as given, its own, and the text of those to hand on, by step."""

    given: dict[str, str]
    own: OwnMainParams
    steps: dict[str, dict[str, str]]


def parse(params_class: type[Params], argv: Sequence[str]) -> Params:
    """Build a step's parameters from `--name value` words, without abbreviations.

    Raises:
        UserError: naming every unknown, missing or wrong parameter at once.
    """
    given = _pairs(argv)
    types = get_type_hints(params_class, include_extras=True)
    problems = [*_unknown(given, types), *(f"{name}: missing" for name in types if name not in given)]
    values = _checked(given, types, problems)
    return params_class(**values)


class SweepCall(NamedTuple):
    """Checked parameters of sweep: as `MainParams`."""

    given: dict[str, str]
    own: SweepParams
    steps: dict[str, dict[str, str]]


def parse_main(argv: Sequence[str]) -> MainParams:
    """Check main's own parameters and those of all steps, before the first of them starts.

    Raises:
        UserError: naming every unknown or wrong parameter at once.
    """
    refused = dict.fromkeys(SET_BY_MAIN, "main finds this out itself")
    return MainParams(*_with_handed_on(argv, OwnMainParams, list(CHAIN), refused))


def parse_sweep(argv: Sequence[str]) -> SweepCall:
    """Check sweep's own parameters and those of the steps that it starts.

    Raises:
        UserError: naming every unknown or wrong parameter at once; or a prepared dataset and values that it
            would have to be prepared with.
    """
    call = SweepCall(*_with_handed_on(argv, SweepParams, ["prepare_data", "train"], SET_BY_SWEEP))
    others = sorted(call.steps["prepare_data"].keys() - get_type_hints(SweepParams).keys())
    if call.own.dataset_uri and others:
        raise UserError(
            f"dataset_uri={call.own.dataset_uri}: is prepared already, so {', '.join(others)} would change "
            "nothing; leave them out, or leave dataset_uri out."
        )
    return call


def _with_handed_on(
    argv: Sequence[str], own_class: type[Params], steps: list[str], refused: Mapping[str, str]
) -> tuple[dict[str, str], Params, dict[str, dict[str, str]]]:
    """All as given, an entry point's own parameters, and what it hands on, by step.

    `refused` are names that no user may give here, and why.
    """
    given = _pairs(argv)
    by_step = {step: _taken_from_main(step) for step in steps}
    own = get_type_hints(own_class, include_extras=True)
    handed_on = {name: hint for hints in by_step.values() for name, hint in hints.items()}
    types = {name: hint for name, hint in (handed_on | own).items() if name not in refused}
    problems = [f"{name}: {refused[name]}" for name in refused.keys() & given.keys()]
    problems += [f"{name}: missing" for name in own if name not in given]
    others = {name: value for name, value in given.items() if name not in refused}
    values = _checked(others, types, [*_unknown(others, types), *problems])
    own_params = own_class(**{name: values[name] for name in own})
    found = {step: {n: given[n] for n in hints if n in given} for step, hints in by_step.items()}
    return given, own_params, found


def _taken_from_main(step: str) -> dict[str, Any]:
    hints = get_type_hints(CHAIN[step], include_extras=True)
    return {name: hint for name, hint in hints.items() if name not in NOT_FROM_MAIN.get(step, ())}


def _pairs(argv: Sequence[str]) -> dict[str, str]:
    """Words to {name: value}. Not argparse: MLflow writes every parameter as two words, whatever the value.

    A value may begin with a dash, and a shortened name must not be completed.
    """
    names, values = argv[0::2], argv[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise UserError(f"parameters must come as --name value pairs, got: {' '.join(argv)}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError("\n".join(f"{name.removeprefix('--')}: given more than once" for name in repeated))
    return {name.removeprefix("--"): value for name, value in zip(names, values, strict=True)}


def _unknown(given: Mapping[str, str], types: Mapping[str, Any]) -> Iterator[str]:
    for name in given.keys() - types.keys():
        near = difflib.get_close_matches(name, types, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(types))}"
        yield f"{name}={given[name]}: no such parameter; {hint}"


def _checked(given: Mapping[str, str], types: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    values = {}
    for name in given.keys() & types.keys():
        try:
            values[name] = TypeAdapter(types[name]).validate_python(given[name])
        except ValidationError as error:
            problems.append(f"{name}={given[name]}: {_message(error)}")
    if problems:
        raise UserError("\n".join(sorted(problems)))
    return values


def _message(error: ValidationError) -> str:
    texts = [problem["msg"].removeprefix("Value error, ") for problem in error.errors()]
    return " or ".join(texts).replace("Input should be ", "must be ").replace(" or must be ", " or ")
