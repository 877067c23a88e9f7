"""From an adapter to a logged model, checked in a fresh process before anyone can ask for it."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlflow
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models.model import MLMODEL_FILE_NAME, Model, ModelInfo
from mlflow.models.signature import ModelSignature
from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

from steps.text2sql import manifest, sql_model, transformers_flavor
from steps.text2sql.errors import UserError
from steps.text2sql.manifest import AdapterManifest
from steps.text2sql.screen import EXAMPLE

PYTHON_ENV = Path(__file__).parents[2] / "python_env.yaml"
# What the served file imports.
SERVING = {
    "accelerate",
    "bitsandbytes",
    "huggingface_hub",
    "mlflow",
    "pandas",
    "peft",
    "safetensors",
    "torch",
    "transformers",
}
# What fetches and reads the embedded base.
EMBEDDED_BASE_ALONE = {"pip", "gguf"}
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "question"), ColSpec("string", "context", required=False)]),
    outputs=Schema([ColSpec("string")]),
    params=ParamSchema(
        [
            ParamSpec("max_new_tokens", "long", sql_model.USUAL_NEW_TOKENS),
            ParamSpec("repetition_penalty", "double", 1.0),
            ParamSpec("return_full_text", "boolean", False),
            ParamSpec("repair", "boolean", True),
        ]
    ),
)
# Loads the package as a user would, where nothing of this project is on the path.
ASK = """\
import json, sys
import mlflow
uri, row = sys.argv[1], json.loads(sys.argv[2])
print("ANSWER " + json.dumps(mlflow.pyfunc.load_model(uri).predict([row])))
"""
ASK_TIMEOUT_SECONDS = 1800


def requirements(base_model: str) -> list[str]:
    """What the served file needs, as python_env.yaml pins it: what was trained with is what serves."""
    pins = yaml.safe_load(PYTHON_ENV.read_text(encoding="utf-8"))["dependencies"]
    needed = SERVING | (EMBEDDED_BASE_ALONE if base_model == sql_model.EMBEDDED_BASE else set())
    return [pin for pin in pins if pin.split("==")[0] in needed]


def log_model(adapter: Path, described: AdapterManifest, *, name: str, card: str) -> ModelInfo:
    """Log an adapter with its prompt template and its model card, and its base by reference.

    The package loads as `mlflow.pyfunc` and as `mlflow.transformers` model. `adapter` is a folder as
    `adapter.save` writes it.
    """
    source = described.of_dataset
    config = {
        "base_model": source.base_model,
        "quantization": described.quantization,
        "prompt_template": source.prompt_template,
        "prompt_style": source.prompt_style,
    }
    with tempfile.TemporaryDirectory() as scratch:
        # MLflow keeps the name of a folder, and a checkpoint has another one.
        named = shutil.copytree(adapter, Path(scratch) / Path(transformers_flavor.ADAPTER).name)
        license_file = Path(scratch) / "BASE_MODEL_LICENSE"
        license_file.write_text(source.base_license, encoding="utf-8")
        return Model.log(
            artifact_path=None,
            name=name,
            flavor=transformers_flavor,
            card=card,
            python_model=sql_model.__file__,
            artifacts={"adapter": str(named), "base_license": str(license_file)},
            model_config=config,
            signature=SIGNATURE,
            pip_requirements=requirements(source.base_model),
            metadata=config | {"base_commit": source.base_commit, "dataset_digest": source.dataset_digest},
        )


def load(package: Path, *, source: str) -> sql_model.SQLModel:
    """The model of a package as it would be served; `source` is the parameter and value of the package.

    Raises:
        UserError: its base or its adapter does not load.
    """
    try:
        return mlflow.pyfunc.load_model(str(package)).unwrap_python_model()
    # The package's own file has a BaseModelError of its own, and MLflow an error for one that does not run.
    except (RuntimeError, OSError, ValueError, MlflowException) as error:
        raise UserError(f"{source}: does not load: {error}") from error


def read_manifest(package: Path, *, source: str) -> AdapterManifest:
    """What the adapter of a package was made of; `source` as in `load`.

    Raises:
        UserError: it has no signature, or is no package of this project.
    """
    try:
        described = Model.load(str(package / MLMODEL_FILE_NAME))
    except (MlflowException, OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{source}: its {MLMODEL_FILE_NAME} cannot be read: {error}") from error
    if described.signature is None:
        raise UserError(f"{source}: has no signature; score a version that the step register made.")
    if "prompt_template" not in (described.metadata or {}):
        raise UserError(f"{source}: is no text-to-SQL package of this project; it has no prompt_template.")
    return manifest.read(AdapterManifest, package / "artifacts" / "adapter", source=source)


def model_id(package: Path) -> str:
    """Id of the logged model that a package is; the version of a SQLite registry does not know it."""
    return Model.load(str(package / MLMODEL_FILE_NAME)).model_id


def check_logged(logged: str, *, source: str) -> None:
    """Refuse a package whose logged model was deleted: no score could be logged with it.

    Raises:
        UserError: it was.
    """
    try:
        mlflow.get_logged_model(logged)
    except MlflowException as error:
        reason = error.message.rstrip(".")
        raise UserError(
            f"{source}: its logged model is gone: {reason}; register the adapter again."
        ) from error


def ask_in_fresh_process(model_uri: str, environment: dict[str, str]) -> str:
    """Load a logged model in another process and another folder, and ask it `EXAMPLE`.

    Raises:
        UserError: it cannot be loaded or does not answer with one string; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", ASK, model_uri, json.dumps(EXAMPLE)],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=ASK_TIMEOUT_SECONDS,
            check=False,
        )
    answers = [
        line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER ")
    ]
    if done.returncode or len(answers) != 1:
        raise UserError(
            f"{model_uri}: the package does not load and answer in a fresh process, "
            "so it is not registered:\n"
            f"{done.stderr.strip()[-2000:]}"
        )
    return json.loads(answers[0])[0]
