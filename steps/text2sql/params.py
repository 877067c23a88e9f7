"""The parameters of every step: types, meanings and limits. MLproject has the defaults.

`main` takes its own parameters and whatever one of its steps declares, and hands them on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from steps.text2sql import parameter_checks
from steps.text2sql.errors import UserError
from steps.text2sql.parameter_checks import DATA_NAMES, MODEL_NAME, SWEEP_FILE

Auto = Literal["auto"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
DatasetUri = Annotated[
    str,
    AfterValidator(parameter_checks.artifact_uri),
    Field(description="`runs:/<prepare_data run>/dataset`"),
]
ModelUri = Annotated[
    str,
    AfterValidator(parameter_checks.model_uri),
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
        AfterValidator(parameter_checks.base_model),
        Field(description="auto, smollm2-135m, a hub id with optional @revision, or a local directory"),
    ]
    dataset: Annotated[
        str,
        AfterValidator(parameter_checks.dataset),
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
        AfterValidator(parameter_checks.optional_data_file),
        Field(description=f"a file of {DATA_NAMES}; empty: validation rows are taken out of train"),
    ]
    prompt_template: Annotated[
        str,
        AfterValidator(parameter_checks.template_file),
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
        int,
        AfterValidator(parameter_checks.steps),
        Field(description="optimizer steps; -1: num_train_epochs"),
    ]
    batch_size: Annotated[int, Field(ge=1, le=4096, description="rows an optimizer step, over all processes")]
    learning_rate: Annotated[Auto | Positive, Field(description="peak rate; auto: by size of base and steps")]
    lora_r: Annotated[Rank, Field(description="rank of the LoRA matrices")]
    lora_alpha: Annotated[
        Positive, Field(description="LoRA scale is lora_alpha / sqrt(lora_r); see use_rslora")
    ]
    lora_dropout: Annotated[float, Field(ge=0, lt=1, description="dropout before the LoRA matrices")]
    target_modules: Annotated[
        str,
        Field(pattern=parameter_checks.MODULES, description="all-linear, or a comma list of module names"),
    ]
    quantization: Annotated[Literal["nf4", "none"], Field(description="of the frozen base")]
    launch: Annotated[
        str,
        AfterValidator(parameter_checks.launch),
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
    max_grad_norm: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="longer gradients are cut to this norm; 0: none")
    ]
    use_rslora: Annotated[
        Literal["no", "yes"],
        Field(description="yes: LoRA scale is lora_alpha / sqrt(lora_r); no: lora_alpha / lora_r"),
    ]
    quantization_correction: Annotated[
        Literal["auto", "no", "yes"],
        Field(
            description="yes: a frozen term beside the adapter, of its rank, takes back most of what nf4 "
            "changes in the layers' outputs; the base is read once more for it, not quantized; auto: with "
            "nf4, for bases of up to 1e9 parameters"
        ),
    ]
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
    validation_rows: Annotated[
        Auto | Annotated[int, Field(ge=1)],
        Field(description="of each of 3 validations; auto: an eighth of the training's rows, 8 to 64"),
    ]
    keep_checkpoints: Annotated[int, Field(ge=1, description="newest checkpoints to keep")]
    resume_from: Annotated[
        str,
        Field(
            pattern=parameter_checks.RUN_ID, description="train run to go on with from its newest checkpoint"
        ),
    ]
    dry_run: Annotated[
        Literal["no", "yes"], Field(description="yes: print what the training would take, and stop there")
    ]
    project_backend: Annotated[
        str,
        AfterValidator(parameter_checks.project_backend),
        Field(description="MLflow project backend that main sends train to; local: this machine"),
    ]
    backend_config: Annotated[
        str,
        AfterValidator(parameter_checks.backend_config),
        Field(description="of that backend: JSON text or the absolute path of a .json file; empty: none"),
    ]


@dataclass(frozen=True)
class RegisterParams:
    """Parameters of register."""

    adapter_uri: Annotated[
        str,
        AfterValidator(parameter_checks.artifact_uri),
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
        AfterValidator(lambda value: value and parameter_checks.artifact_uri(value)),
        Field(description="a dataset of prepare_data, whose test rows are scored"),
    ]
    dataset: Annotated[
        str,
        AfterValidator(lambda value: value and parameter_checks.rows(value)),
        Field(
            description="rows to score: sample, a hub id with optional @revision, a file or folder of "
            + DATA_NAMES
        ),
    ]
    eval_rows: Annotated[int, Field(ge=1, description="rows to score, the same ones for every seed")]
    eval_batch_size: Annotated[
        Auto | Annotated[int, Field(ge=1, le=4096)],
        Field(description="rows generated at once; auto: by free memory"),
    ]
    query_timeout_seconds: Annotated[
        float,
        Field(
            gt=0,
            le=86_400,
            description="seconds for one query; without a database for all made ones together",
        ),
    ]

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
        Field(
            pattern=parameter_checks.RUN_ID,
            description="evaluate run to judge by; empty: a move by hand, no gate",
        ),
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
        str,
        AfterValidator(parameter_checks.new_folder),
        Field(description="absolute folder to make, for the merged model"),
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
        BeforeValidator(parameter_checks.two),
        AfterValidator(parameter_checks.ordered),
        Field(description="lowest and highest learning_rate, searched on a logarithmic scale"),
    ]
    lora_r_range: Annotated[
        tuple[Rank, Rank],
        BeforeValidator(parameter_checks.two),
        AfterValidator(parameter_checks.ordered),
        Field(description="lowest and highest lora_r; powers of two and the ends are tried"),
    ]
    max_steps_range: Annotated[
        tuple[PositiveInt, PositiveInt],
        BeforeValidator(parameter_checks.two),
        AfterValidator(parameter_checks.ordered),
        Field(description="lowest and highest max_steps, searched on a logarithmic scale"),
    ]
    storage: Annotated[
        str,
        AfterValidator(parameter_checks.storage),
        Field(
            description=f"SQLite file that keeps the search; auto: {SWEEP_FILE} where mlflow run was typed"
        ),
    ]
    dataset_uri: Annotated[
        str,
        AfterValidator(lambda value: value and parameter_checks.artifact_uri(value)),
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


def conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with values that are right one by one."""
    warmup, steps = values.get("warmup_steps"), values.get("max_steps", -1)
    steps, _ = values.get("max_steps_range", (steps, steps))
    if isinstance(warmup, int) and 0 < steps <= warmup:
        yield (
            f"warmup_steps={warmup}: the learning rate would not reach its value in {steps} steps; give "
            "fewer, or auto"
        )
    if values.get("quantization") == "none" and values.get("quantization_correction") == "yes":
        yield (
            "quantization_correction=yes: with quantization=none there is nothing to take back; "
            "give quantization_correction=no"
        )
