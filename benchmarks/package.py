"""The price of the package: answers of the served model against those of the model that was trained.

Trains the embedded base by the project's recipe, answers rows of a file with the model as training leaves
it, logs it as the step register does into a store of its own, loads that as a user would, and asks for the
same rows:

    python -m benchmarks.package --rows train.jsonl --validation validation.jsonl --steps 60 [--answers 200]
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

import mlflow
import pandas
from peft import PeftModel

from benchmarks import recipe
from benchmarks.markdown import Table, print_table
from steps.text2sql import adapter, packaging, scoring
from steps.text2sql.device import describe_device
from steps.text2sql.manifest import AdapterManifest, DatasetManifest
from steps.text2sql.sql_model import (
    EMBEDDED_BASE,
    PROMPT_TEMPLATE,
    ROWS_PER_BATCH,
    TOKENS_PER_BATCH,
    load_base_tokenizer,
)

SEED = 0
DEFAULTS = recipe.Recipe()


def describe(steps: int) -> AdapterManifest:
    """A manifest with what a package reads of it."""
    of_dataset = dict.fromkeys([field.name for field in dataclasses.fields(DatasetManifest)], "") | {
        "base_model": EMBEDDED_BASE,
        "prompt_template": PROMPT_TEMPLATE,
        "prompt_style": "plain",
    }
    return AdapterManifest(DEFAULTS.quantization, steps, steps, of_dataset)


def packaged(model: PeftModel, *, steps: int) -> mlflow.pyfunc.PyFuncModel:
    """The same model, logged and loaded again."""
    folder = Path(tempfile.mkdtemp())
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    experiment = mlflow.create_experiment("package", artifact_location=(folder / "artifacts").as_uri())
    described = describe(steps)
    adapter.save(model, load_base_tokenizer(EMBEDDED_BASE), described, folder / "adapter")
    with mlflow.start_run(experiment_id=experiment):
        logged = packaging.log_model(folder / "adapter", described, name="model", card="")
    return mlflow.pyfunc.load_model(logged.model_uri)


def table(rows: pandas.DataFrame, in_memory: list[str], served: list[str]) -> Table:
    """Exact match of both, and how many answers are the same text."""
    same = sum(one == other for one, other in zip(in_memory, served, strict=True))
    yield "answers", "exact match", "same SQL"
    for name, found in {"trained model": in_memory, "package": served}.items():
        right = statistics.mean(map(scoring.exact_match, rows["answer"], found))
        yield name, f"{right:.1%}", "" if found is in_memory else f"{same} of {len(rows)}"


def main() -> None:
    """Train, answer twice and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--answers", type=int, default=200, help="rows of --validation to answer")
    given = parser.parse_args()
    data = recipe.prepared(pandas.read_json(given.rows, lines=True), DEFAULTS)
    model = recipe.train(DEFAULTS, data, steps=given.steps, seed=SEED)
    rows = pandas.read_json(given.validation, lines=True).head(given.answers)
    batches = {"batch_size": ROWS_PER_BATCH, "max_batch_tokens": TOKENS_PER_BATCH}  # as the package does
    answered = recipe.answers(model, load_base_tokenizer(EMBEDDED_BASE), {"rows": rows}, **batches)["rows"]
    in_memory = recipe.repaired(answered["generated"], rows)
    served = packaged(model, steps=given.steps).predict(
        rows[["question", "context"]], params={"max_new_tokens": recipe.MAX_NEW_TOKENS}
    )
    print(f"\n{describe_device()}, {given.steps} steps, {len(rows)} rows\n")
    print_table(table(rows, in_memory, served))


if __name__ == "__main__":
    main()
