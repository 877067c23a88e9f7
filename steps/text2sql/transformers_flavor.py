"""A package of two flavours: `python_function`, and `transformers` with the same adapter and the same base.

MLflow's own writer of the second one copies the base or stores an absolute path, and forgets how it was
quantized. Here config.json names `QuantizedBase` of the served file, which MLflow's reader then calls.
"""

import json
from pathlib import Path
from typing import Any

import mlflow
import transformers
from mlflow.models import Model
from transformers import AutoTokenizer

from steps.text2sql.model_card import FILE as CARD
from steps.text2sql.sql_model import QuantizedBase, greedy
from steps.text2sql.tokenization import for_filled_prompts

FLAVOR = "transformers"
ADAPTER = "artifacts/adapter"
# MLflow's reader looks for the tokenizer there and nowhere else.
TOKENIZER = "components/tokenizer"


def save_model(
    path: str,
    mlflow_model: Model,
    *,
    python_model: str,
    model_config: dict[str, str],
    card: str,
    **pyfunc: Any,
) -> None:
    """Write a package into a folder; MLflow's `Model.log` calls this.

    `python_model` is the served file. `model_config` is as in `SQLModel`.
    `pyfunc` are further arguments of `mlflow.pyfunc.save_model`, with an artifact `adapter`.
    """
    package = Path(path)
    mlflow.pyfunc.save_model(
        path=path, mlflow_model=mlflow_model, python_model=python_model, model_config=model_config, **pyfunc
    )
    tokenizer = AutoTokenizer.from_pretrained(package / ADAPTER, trust_remote_code=False)
    tokenizer = for_filled_prompts(tokenizer, model_config["prompt_style"])
    tokenizer.save_pretrained(package / TOKENIZER)
    max_new_tokens = {one.name: one.default for one in mlflow_model.signature.params}["max_new_tokens"]
    greedy(tokenizer, max_new_tokens=max_new_tokens).save_pretrained(package)
    (package / "config.json").write_text(
        json.dumps(base_by_reference(Path(python_model).stem, model_config), indent=2) + "\n",
        encoding="utf-8",
    )
    (package / CARD).write_text(card, encoding="utf-8")
    mlflow_model.add_flavor(FLAVOR, **configuration(type(tokenizer).__name__, model_config["base_model"]))
    mlflow_model.save(package / "MLmodel")


def base_by_reference(module: str, model_config: dict[str, str]) -> dict[str, Any]:
    """The config.json that makes transformers load a base with `QuantizedBase` of a module beside it."""
    name = QuantizedBase.__name__
    return {
        # transformers wants one that it knows; the base that is loaded has its own.
        "model_type": "llama",
        "architectures": [name],
        "auto_map": {"AutoModelForCausalLM": f"{module}.{name}"},
        "base_model": model_config["base_model"],
        "quantization": model_config["quantization"],
    }


def configuration(tokenizer_type: str, base_model: str) -> dict[str, Any]:
    """The flavour's entry in MLmodel, with the keys of mlflow.transformers.flavor_config.FlavorKey."""
    return {
        "transformers_version": transformers.__version__,
        "task": "text-generation",
        "instance_type": "TextGenerationPipeline",
        "pipeline_model_type": QuantizedBase.__name__,
        "source_model_name": base_model,
        "model_binary": ".",
        "peft_adaptor": ADAPTER,
        "components": ["tokenizer"],
        "tokenizer_type": tokenizer_type,
    }
