"""LoRA on a base: what is trained, what stays, what is saved."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM, MistralConfig

from steps.text2sql import adapter, prepared_data, sql_model
from steps.text2sql.errors import UserError
from steps.text2sql.manifest import AdapterManifest, DatasetManifest
from steps.text2sql.tokenization import fingerprint

TUTORIAL = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,lm_head"
DESCRIBED = AdapterManifest(
    quantization="nf4",
    global_step=3,
    max_steps=6,
    dataset={
        "base_model": "owner/base@0123abc",
        "base_commit": "0123abc",
        "base_license": "free",
        "dataset": "sample",
        "dataset_source": "steps.text2sql.sample_data",
        "dataset_commit": "",
        "dataset_config": "",
        "dataset_split": "",
        "dataset_digest": "f00",
        "tokenizer_fingerprint": "ba4",
        "prompt_template": "{context}{question}",
        "prompt_style": "plain",
        "max_length": 512,
        "split_by": "schema",
        "test_size": 0.2,
        "seed": 42,
        "counts": {"rows_train": 1},
    },
)


def lora(target_modules: str = "all-linear", *, r: int = 32):
    return adapter.lora_config(r=r, alpha=64, dropout=0.0, target_modules=target_modules)


def small_llama(*, tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )


@pytest.fixture
def mistral():
    """Mistral-7B-v0.1 without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(MistralConfig(), dtype=torch.bfloat16)


@pytest.fixture
def saved(tiny_base, tmp_path):
    """Folder with a saved adapter on the tiny base in nf4, and its model."""
    model = adapter.attach(sql_model.load_base(str(tiny_base), "nf4"), lora(r=4))
    adapter.save(model, sql_model.load_base_tokenizer(str(tiny_base)), DESCRIBED, tmp_path)
    return tmp_path, model


# A matrix of (out, in) gets r * (in + out) parameters; r is 32, and there are 32 layers. q and o are
# 4096 x 4096, k and v 1024 x 4096, gate, up and down 14336 x 4096 either way.
SEVEN_LINEAR = 32 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))


def test_the_tutorials_eight_modules_train_85041152_parameters_of_mistral_7b(mistral):
    count = adapter.count_parameters(adapter.attach(mistral, lora(TUTORIAL)))
    assert count.trainable == SEVEN_LINEAR + 32 * (4096 + 32000) == 85_041_152
    assert count.share == count.trainable / count.all


def test_all_linear_leaves_the_output_layer_out(mistral):
    model = adapter.attach(mistral, lora())
    assert adapter.count_parameters(model).trainable == SEVEN_LINEAR == 83_886_080
    assert not any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)


def test_settings_reach_peft_under_their_names():
    config = adapter.lora_config(r=8, alpha=24, dropout=0.1, target_modules="q_proj,v_proj")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (8, 24, 0.1, "none")
    assert not config.use_rslora
    assert config.target_modules == {"q_proj", "v_proj"}


def test_the_scale_is_alpha_over_r():
    model = adapter.attach(
        small_llama(), adapter.lora_config(r=4, alpha=6, dropout=0.0, target_modules="q_proj")
    )
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": 1.5}


def test_unknown_modules_are_refused_naming_those_there_are():
    with pytest.raises(UserError) as caught:
        adapter.attach(small_llama(), lora("q_proj,query_key_value,Wqkv"))
    assert "no linear layers Wqkv, query_key_value;" in str(caught.value)
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(caught.value)


def test_the_embedding_is_no_linear_layer():
    with pytest.raises(UserError, match="no linear layers embed_tokens"):
        adapter.attach(small_llama(), lora("embed_tokens"))


def test_an_output_layer_tied_to_the_embeddings_is_refused():
    with pytest.raises(UserError, match="lm_head is tied to the embeddings"):
        adapter.attach(small_llama(tied=True), lora("q_proj,lm_head"))


def test_an_output_layer_of_its_own_is_trained():
    model = adapter.attach(small_llama(), lora("q_proj,lm_head", r=2))
    assert adapter.count_parameters(model).trainable == 2 * (16 + 16) + 2 * (16 + 100)


def test_all_linear_works_on_tied_embeddings_without_the_output_layer():
    model = adapter.attach(small_llama(tied=True), lora(r=2))
    assert adapter.count_parameters(model).trainable == 2 * (4 * (16 + 16) + 3 * (16 + 32))


def test_the_base_is_frozen_and_keeps_its_dtype():
    base = small_llama().to(torch.bfloat16)
    dtypes = {name: p.dtype for name, p in base.named_parameters()}
    model = adapter.attach(base, lora(r=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    kept = {
        re.sub(r"^base_model\.model\.|\.base_layer", "", name): p.dtype
        for name, p in model.named_parameters()
        if ".lora_" not in name
    }
    assert kept == dtypes


def test_exactly_these_files_are_saved(saved):
    assert {path.name for path in saved[0].iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_saved_weights_are_those_of_the_adapter_and_none_of_the_base(saved):
    folder, model = saved
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in weights)
    assert sum(w.numel() for w in weights.values()) == adapter.count_parameters(model).trainable


def test_saved_settings_name_the_base_and_no_path_of_this_machine(saved, tiny_base):
    text = (saved[0] / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == "owner/base@0123abc"
    assert str(tiny_base) not in text


def test_the_saved_tokenizer_neither_pads_nor_cuts(saved):
    tokenizer = json.loads((saved[0] / "tokenizer.json").read_text())
    assert (tokenizer["padding"], tokenizer["truncation"]) == (None, None)


def test_padding_and_cutting_in_the_bases_tokenizer_are_not_saved(tiny_base, tmp_path):
    tokenizer = sql_model.load_base_tokenizer(str(tiny_base))
    tokenizer.backend_tokenizer.enable_padding(length=8)
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.save_pretrained(tmp_path / "base")
    loaded = prepared_data.load_tokenizer(
        DatasetManifest(
            **DESCRIBED.dataset
            | {"base_model": str(tmp_path / "base"), "tokenizer_fingerprint": fingerprint(tokenizer)}
        ),
        "runs:/x/dataset",
    )
    adapter.save(adapter.attach(small_llama(), lora(r=2)), loaded, DESCRIBED, tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (written["padding"], written["truncation"]) == (None, None)


def test_the_manifest_says_what_the_adapter_belongs_to(saved):
    manifest = json.loads((saved[0] / "manifest.json").read_text())
    assert (manifest["quantization"], manifest["global_step"], manifest["max_steps"]) == ("nf4", 3, 6)
    assert manifest["dataset"] == DESCRIBED.dataset


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (GPT2Config(n_embd=64, n_layer=3, n_head=4), "GPT2Block"),
        (LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4), "LlamaDecoderLayer"),
    ],
)
def test_the_layers_of_a_decoder_are_found_whatever_they_are_called(config, kind):
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    model = adapter.attach(base, adapter.lora_config(r=2, alpha=4, dropout=0.0, target_modules="all-linear"))
    assert [type(layer).__name__ for layer in adapter.decoder_layers(model)] == [kind] * 3


@pytest.mark.parametrize("modules", ["all-linear", "c_attn,c_fc"])
def test_the_size_of_an_adapter_on_gpt_2_is_known_before_it_is_made(modules):
    lora = adapter.lora_config(r=2, alpha=4, dropout=0.0, target_modules=modules)
    base = AutoModelForCausalLM.from_config(GPT2Config(n_embd=64, n_layer=3, n_head=4))
    expected = adapter.size(base, lora)
    assert adapter.count_parameters(adapter.attach(base, lora)).trainable == expected > 0
