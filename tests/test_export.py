"""The merged model: what is written, that it answers as the version does, and what is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import torch
from mlflow.artifacts import load_dict
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from steps.text2sql import artifacts, base_model, manifest, merging, sql_model
from steps.text2sql.errors import UserError
from steps.text2sql.manifest import AdapterManifest
from tests.conftest import call_step, failure, tracking_at, write_tiny_base

FEW = {"compare_rows": 3}


@pytest.fixture(scope="module")
def exported(finished_chain, tmp_path_factory):
    """The chain's version as it was exported in fp32, and the run."""
    folder = tmp_path_factory.mktemp("export") / "merged"
    with tracking_at(finished_chain.store):
        run = call_step(
            "export", model_uri="models:/text2sql@champion", output=folder, dtype="float32", **FEW
        )
    return SimpleNamespace(folder=folder, run=run)


@pytest.fixture
def package(chain, tmp_path):
    """Folder of the registered model, to change."""
    return Path(mlflow.artifacts.download_artifacts("models:/text2sql/1", dst_path=tmp_path / "package"))


def test_exactly_the_usual_files_are_written_and_nothing_beside_them(exported):
    assert {path.name for path in exported.folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
        *("prompt_template.txt", "LICENSE", "README.md"),
    }
    assert [path.name for path in exported.folder.parent.iterdir()] == ["merged"]


def test_whoever_may_read_the_configuration_may_read_all_files(exported):
    expected = (exported.folder / "config.json").stat().st_mode
    assert {path.stat().st_mode for path in exported.folder.iterdir()} == {expected}


def test_the_configuration_is_a_plain_llamas_without_quantization_or_paths(exported, tiny_base):
    text = (exported.folder / "config.json").read_text()
    config = json.loads(text)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert "auto_map" not in config
    assert str(tiny_base) not in text


def test_eos_template_licence_and_card_are_there(exported):
    generation = json.loads((exported.folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["do_sample"], generation["max_new_tokens"]) == (
        2,
        False,
        256,
    )
    assert (exported.folder / "prompt_template.txt").read_text() == sql_model.PROMPT_TEMPLATE
    assert (exported.folder / "LICENSE").read_text() == "Licence of the tiny base\n"
    card = (exported.folder / "README.md").read_text()
    assert card.startswith("# text2sql\n")
    assert "merged, in float32" in card


def test_merged_weights_are_the_dequantized_ones_and_the_scaled_product_of_the_adapter(
    exported, package, tiny_base
):
    name = "model.layers.0.self_attn.q_proj"
    base = sql_model.load_base(str(tiny_base), "nf4").dequantize()
    adapter = load_file(package / "artifacts/adapter/adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{letter}.weight"].float() for letter in "AB")
    expected = base.get_submodule(name).weight + b @ a * (8 / 4**0.5)  # lora_alpha / sqrt(lora_r)
    merged = load_file(exported.folder / "model.safetensors")
    assert torch.allclose(merged[f"{name}.weight"], expected, atol=1e-6)
    original = load_file(tiny_base / "model.safetensors")
    assert not torch.allclose(merged[f"{name}.weight"], original[f"{name}.weight"], atol=1e-3)
    assert torch.equal(merged["lm_head.weight"], original["lm_head.weight"])


def test_any_transformers_program_gets_the_logits_of_base_and_adapter(exported, package, tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    ids = tokenizer("How many farms are there?", return_tensors="pt")["input_ids"]
    base = sql_model.load_base(str(tiny_base), "nf4")
    adapted = PeftModel.from_pretrained(base, package / "artifacts/adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(exported.folder)
    with torch.inference_mode():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)


def test_the_run_has_the_comparison_and_names_version_and_folder(exported, chain):
    metrics = exported.run.data.metrics
    assert (metrics["same_sql"], metrics["compared_rows"]) == (1.0, 3)
    assert 0 <= metrics["max_logit_difference"] < 1e-3
    table = load_dict(f"runs:/{exported.run.info.run_id}/comparison.json")
    assert table["columns"] == ["question", "context", "served", "merged"]
    tags = exported.run.data.tags
    assert (tags["registered_model_name"], tags["model_version"]) == ("text2sql", "1")
    assert tags["exported_to"] == str(exported.folder)


@pytest.mark.parametrize(("dtype", "written"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_the_weights_have_the_dtype_asked_for(chain, tmp_path, dtype, written):
    call_step(
        "export", model_uri="models:/text2sql/1", output=tmp_path / "m", dtype=dtype, min_same_sql=0, **FEW
    )
    [weights] = {w.dtype for w in load_file(tmp_path / "m/model.safetensors").values()}
    assert weights == getattr(torch, written)


def test_weights_in_float32_are_not_rounded_to_what_a_gpu_computes_in(chain, monkeypatch, tmp_path):
    adapter = artifacts.download(f"runs:/{chain.train.info.run_id}/adapter", tmp_path)
    base = manifest.read(AdapterManifest, adapter, source="x").of_dataset.base_model
    monkeypatch.setattr(sql_model, "pick_device", lambda: ("cpu", torch.bfloat16))
    weights = {
        dtype: merging.merge(adapter, base, "none", dtype).model.layers[0].mlp.up_proj.weight
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert {dtype: weight.dtype for dtype, weight in weights.items()} == {dtype: dtype for dtype in weights}
    exact = weights[torch.float32]
    assert not torch.equal(exact, exact.bfloat16().float())


def test_a_merged_model_that_answers_otherwise_is_refused_and_removed(chain, tmp_path, monkeypatch):
    def without_adapter(adapter, reference, quantization, dtype):
        model = sql_model.load_base(reference, quantization).dequantize()
        model.lm_head.weight.data = model.lm_head.weight.data.roll(1, dims=0)
        return model.to(dtype)

    monkeypatch.setattr(merging, "merge", without_adapter)
    message, run = failure("export", model_uri="models:/text2sql/1", output=tmp_path / "m", **FEW)
    assert "min_same_sql=0.9: the merged model gives the same SQL on 0.0% of 3 rows only" in message
    assert run.data.metrics["same_sql"] == 0
    assert run.info.status == "FAILED"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_export_that_is_cut_short_leaves_nothing(tmp_path, error):
    def cut_short():
        with merging.made_at_once(tmp_path / "m") as folder:
            folder.mkdir()
            (folder / "half").write_text("half")
            raise error

    with pytest.raises(error):
        cut_short()
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_nothing_is_refused_before_anything_is_merged(chain, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    message, _ = failure("export", model_uri="models:/text2sql/1", output=tmp_path / "link", **FEW)
    assert f"output={tmp_path / 'link'}: exists already" in message


def test_a_folder_that_exists_is_refused_and_untouched(chain, tmp_path):
    (tmp_path / "mine").write_text("mine")
    message, _ = failure("export", model_uri="models:/text2sql/1", output=tmp_path, **FEW)
    assert f"output={tmp_path}: exists already" in message
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("output", "words"),
    [("merged", "give the absolute form"), ("/no/such/merged", "there is no folder /no/such")],
)
def test_an_output_that_cannot_be_is_refused_with_the_way_out(store, output, words):
    assert words in failure("export", model_uri="models:/text2sql/1", output=output, **FEW)[0]


def test_a_version_or_alias_that_is_not_there_is_refused(chain, tmp_path):
    for uri in ("models:/text2sql/99", "models:/text2sql@nobody", "models:/nothing/1"):
        message, _ = failure("export", model_uri=uri, output=tmp_path / "m", **FEW)
        assert uri.split("/")[-1].split("@")[-1] in message
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_is_gone_is_refused(chain, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        base_model, "locate_base", lambda _: {"pretrained_model_name_or_path": "/no/such/base"}
    )
    message, run = failure("export", model_uri="models:/text2sql/1", output=tmp_path / "merged")
    assert f"base_model={tiny_base}: is no language model that can be loaded: " in message
    assert run.info.status == "FAILED"
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_refused_before_any_work(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    monkeypatch.setattr(merging, "merge", lambda *_: pytest.fail("merged"))
    message, _ = failure("export", model_uri="models:/text2sql/1", output=tmp_path / "m", **FEW)
    assert f"output={tmp_path / 'm'}: the merged model needs 0.1 GiB and 0.1 GiB are free" in message


@pytest.mark.parametrize(("tied", "modules"), [(True, ["q_proj", "lm_head"])])
def test_an_adapter_on_a_tied_output_layer_is_refused(tiny_base, tmp_path, tied, modules):
    base = write_tiny_base(
        tmp_path / "base", sql_model.load_base_tokenizer(str(tiny_base)), tie_word_embeddings=tied
    )
    settings = {"target_modules": modules, "modules_to_save": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="lm_head is tied to the embeddings"):
        merging.check_mergeable(tmp_path, str(base))
    merging.check_mergeable(tmp_path, str(tiny_base))
