"""The second flavour of the package: what `mlflow.transformers` makes of it."""

import json
import shutil
from pathlib import Path

import bitsandbytes
import mlflow
import pytest
import torch
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TextGenerationPipeline

from steps.text2sql import sample_data, sql_model
from tests.conftest import call_step

ROWS = [{name: row[name] for name in ("question", "context")} for row in sample_data.generate(1)[:100]]
LIMIT = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def trained(finished_chain, tmp_path_factory):
    """The package with an adapter so strong that questions get different answers; 6 steps do not do that."""
    mlflow.set_tracking_uri(finished_chain.store)
    folder = Path(download_artifacts("models:/text2sql/1", dst_path=tmp_path_factory.mktemp("package")))
    file = folder / "artifacts" / "adapter" / "adapter_model.safetensors"
    torch.manual_seed(0)
    weights = {n: torch.randn_like(w) / 2 if "lora_B" in n else w for n, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pipeline(trained):
    """As a user would load it."""
    return mlflow.transformers.load_model(str(trained))


def prompts(rows):
    return [sql_model.render_prompt(sql_model.PROMPT_TEMPLATE, **row) for row in rows]


def sql(pipeline, rows, **settings):
    answers = pipeline(prompts(rows), return_full_text=False, **LIMIT, **settings)
    return [sql_model.extract_sql(answer["generated_text"]) for [answer] in answers]


def test_the_registered_version_loads_as_a_native_pipeline_quantized_as_trained(chain):
    loaded = mlflow.transformers.load_model("models:/text2sql@champion")
    assert type(loaded) is TextGenerationPipeline
    quantized = [m for m in loaded.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(quantized) == 2 * 7
    assert {m.weight.quant_state.quant_type for m in quantized} == {"nf4"}


@pytest.mark.parametrize("batch_size", [1, 8])
def test_both_flavours_give_the_same_sql_on_100_rows(trained, pipeline, batch_size):
    expected = mlflow.pyfunc.load_model(str(trained)).predict(ROWS, params=LIMIT | {"repair": False})
    assert sql(pipeline, ROWS, batch_size=batch_size) == expected
    assert len(set(expected)) > 50


@pytest.mark.slow
def test_a_checkpoint_is_packaged_like_the_adapter_of_the_end(chain):
    checkpoint = f"runs:/{chain.train.info.run_id}/checkpoints/checkpoint-2"
    settings = {"dataset_uri": chain.dataset_uri, "registered_model_name": "of_a_checkpoint"}
    call_step("register", adapter_uri=checkpoint, **settings)
    assert len(sql(mlflow.transformers.load_model("models:/of_a_checkpoint/1"), ROWS[:1])) == 1


def test_the_adapter_is_on_it(trained, pipeline):
    with pipeline.model.disable_adapter():
        assert sql(pipeline, ROWS[:5]) != sql(mlflow.transformers.load_model(str(trained)), ROWS[:5])


def test_it_writes_greedily_until_eos_whatever_the_base_prefers(pipeline):
    settings = pipeline.generation_config
    assert (settings.do_sample, settings.eos_token_id, settings.max_new_tokens) == (False, 2, 256)


def test_the_packages_signature_and_its_generation_config_agree(trained):
    written = json.loads((trained / "generation_config.json").read_text())
    params = {one.name: one.default for one in mlflow.models.get_model_info(str(trained)).signature.params}
    assert written["max_new_tokens"] == params["max_new_tokens"]
    assert written["repetition_penalty"] == params["repetition_penalty"]


def test_a_device_that_mlflow_names_is_taken_as_on_a_gpu(trained):
    assert mlflow.transformers.load_model(str(trained), device="cpu").device == torch.device("cpu")


def test_two_versions_in_one_process_run_their_own_served_file(trained, tmp_path):
    other = shutil.copytree(trained, tmp_path / "other")
    served = (other / "sql_model.py").read_text()
    changed = served.replace("config.quantization)", '"none")', 1)
    assert changed != served
    (other / "sql_model.py").write_text(changed)
    for folder, quantized in ((trained, True), (other, False), (trained, True)):
        modules = mlflow.transformers.load_model(str(folder)).model.modules()
        assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in modules) == quantized


def test_other_models_of_that_architecture_load_as_ever_afterwards(pipeline, tiny_base):
    assert type(AutoModelForCausalLM.from_pretrained(tiny_base)) is LlamaForCausalLM


def test_a_base_that_is_gone_is_an_error_that_names_it(trained, tmp_path):
    package = shutil.copytree(trained, tmp_path / "package")
    config = json.loads((package / "config.json").read_text())
    (package / "config.json").write_text(json.dumps(config | {"base_model": "/no/such/base"}))
    with pytest.raises(RuntimeError, match="base model /no/such/base"):
        mlflow.transformers.load_model(str(package))


def test_mlflows_argument_for_a_moved_base_is_refused_rather_than_ignored(trained, tiny_base):
    with pytest.raises(MlflowException, match="base_model_path"):
        mlflow.transformers.load_model(str(trained), base_model_path=str(tiny_base))
