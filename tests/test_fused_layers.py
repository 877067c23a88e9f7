"""Fused layers compute what peft's and the model's own do, with fewer launches."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from steps.text2sql import adapter, fused_layers, sql_model

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = SHAPE | {"vocab_size": 50, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
LLAMA = LlamaConfig(**SMALL)
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
IDS = torch.arange(24).view(2, 12)
# Linear layers of a decoder layer, and norms in and behind two of them.
LINEAR, NORMS = 14, 5


def adapted(config_or_folder, *, dropout=0.0, **lora):
    """A base with an adapter that is not zero."""
    torch.manual_seed(0)
    if isinstance(config_or_folder, PreTrainedConfig):
        base = AutoModelForCausalLM.from_config(config_or_folder)
    else:
        base = sql_model.load_base(str(config_or_folder), "nf4")
    settings = adapter.lora_config(r=4, alpha=8, dropout=dropout, target_modules="all-linear")
    for name, value in lora.items():
        setattr(settings, name, value)
    model = adapter.attach(base, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
        elif parameter.dim() == 1 and "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model


def gradients(model, passes=1):
    """Loss of the last pass and all gradients, summed over so many passes."""
    for _ in range(passes):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
    found = torch.cat([one.grad.flatten() for one in model.parameters() if one.requires_grad])
    model.zero_grad()
    return loss.detach(), found


def fused(model):
    """How many modules have another forward than their class."""
    fused_layers.fuse(model)
    return sum("forward" in vars(module) for module in model.modules())


def apart(one, other):
    """Relative difference of two vectors."""
    return ((one - other).norm() / one.norm()).item()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, LINEAR + NORMS),
        (MistralConfig(**SMALL), LINEAR + NORMS),
        (Qwen2Config(**SMALL), LINEAR + NORMS),  # q, k and v have a bias
        (Gemma2Config(**SMALL), LINEAR),  # its norms scale by 1 + weight
        (GPT2, 0),  # Conv1D, LayerNorm
    ],
    ids=["llama", "mistral", "qwen2", "gemma2", "gpt2"],
)
@pytest.mark.parametrize("passes", [1, 2])
def test_loss_and_gradients_are_those_of_peft_and_the_model(config, expected, passes):
    model = adapted(config)
    usual = gradients(model, passes)
    assert fused(model) == expected
    found = gradients(model, passes)
    assert found[0].item() == pytest.approx(usual[0].item(), rel=1e-6)
    assert apart(usual[1], found[1]) < 2e-6


def test_norms_of_heads_are_fused_too():
    model = adapted(Qwen3Config(**SMALL))
    usual = gradients(model)
    assert fused(model) == LINEAR + NORMS + 4
    assert apart(usual[1], gradients(model)[1]) < 2e-6


def test_4_bit_weights_are_dequantized_as_bitsandbytes_does(tiny_base):
    model = adapted(tiny_base)
    usual = gradients(model)
    assert fused(model) == LINEAR + NORMS
    assert apart(usual[1], gradients(model)[1]) < 2e-6


class Products(TorchDispatchMode):
    """Counts matrix products with nothing added."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket is torch.ops.aten.mm
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("config", "of_the_base"),
    [
        (LLAMA, 6),  # keys and values are one
        (MistralConfig(**SMALL | {"num_key_value_heads": 4}), 7),  # as many outputs as inputs: each alone
    ],
    ids=["shared", "of their own"],
)
def test_layers_that_read_the_same_input_take_one_product_by_a(config, of_the_base):
    model = adapted(config)
    fused_layers.fuse(model)
    with Products() as forward:
        loss = model(input_ids=IDS, labels=IDS).loss
    by_a, output = 4, 1  # q, k and v; o; gate and up; down
    assert forward.count == 2 * (by_a + of_the_base) + output
    with Products() as backward:
        loss.backward()
    # By B, towards A and towards B; the first of each input's gradient; nothing towards the embeddings.
    assert backward.count == 2 * (7 + by_a + 7 + by_a) - 1 + output


def test_weights_that_do_not_follow_each_other_are_not_seen_as_one():
    model = adapted(LLAMA)
    usual = gradients(model)
    fused_layers.fuse(model)
    attention = adapter.decoder_layers(model)[0].self_attn
    key, value = attention.k_proj.base_layer.weight, attention.v_proj.base_layer.weight
    value.data, key.data = torch.cat([value, key]).detach().split([len(value), len(key)])  # in one block
    found = gradients(model)
    assert found[0].item() == pytest.approx(usual[0].item(), rel=1e-6)
    assert apart(usual[1], found[1]) < 2e-6


def test_in_16_bits_they_differ_by_rounding():
    model = adapted(LLAMA)
    exact = gradients(model)[1]
    with torch.autocast("cpu", torch.bfloat16):
        usual = gradients(model)[1]
        fused_layers.fuse(model)
        found = gradients(model)[1]
    assert 0 < apart(usual, found) < 0.03
    assert apart(exact, found) < 1.2 * apart(exact, usual)


def test_gradients_are_added_to_those_that_there_are():
    model = adapted(LLAMA)
    fused_layers.fuse(model)
    once = gradients(model)[1]
    for one in model.parameters():
        if one.requires_grad:
            one.grad = torch.ones_like(one)
    kept = [one.grad for one in model.parameters() if one.requires_grad]
    more = gradients(model)[1]
    torch.testing.assert_close(more, once + 1)
    assert all(torch.isfinite(one).all() for one in kept)


def test_what_the_optimizer_changes_counts_in_the_next_pass():
    model = adapted(LLAMA)
    fused_layers.fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        before = gradients(model)[0]
        for one in model.parameters():
            if one.requires_grad:
                one.data.mul_(3)
        after = gradients(model)[0]
    assert abs(after - before) > 1e-3
    plain = adapted(LLAMA)
    for one in plain.parameters():
        if one.requires_grad:
            one.data.mul_(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert gradients(plain)[0].item() == pytest.approx(after.item(), rel=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_are_computed_again_have_the_same_gradients(reentrant):
    model = adapted(LLAMA)
    usual = gradients(model)[1]
    fused_layers.fuse(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert apart(usual, gradients(model)[1]) < 2e-6


def test_without_gradients_every_bit_is_as_it_is_served():
    model = adapted(LLAMA).eval().to(torch.bfloat16)
    with torch.no_grad():
        usual = model(input_ids=IDS).logits
        fused_layers.fuse(model)
        assert torch.equal(model(input_ids=IDS).logits, usual)


@pytest.mark.parametrize("changed", [{"dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_layers_that_do_more_are_left_alone(changed):
    model = adapted(LLAMA, **changed)
    assert fused(model) == NORMS


def test_a_layer_with_a_second_adapter_is_left_alone():
    model = adapted(LLAMA)
    model.add_adapter("other", model.peft_config["default"])
    assert fused(model) == NORMS
