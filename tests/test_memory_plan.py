"""What a training does with the memory there is."""

import pytest
import torch
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, OPTConfig

from steps.text2sql import memory_plan, sql_model
from steps.text2sql.errors import UserError

MISTRAL = memory_plan.Shape.of(MistralConfig(), torch.bfloat16)
# Mistral-7B: LoRA r=32 on all linear layers of the decoder, and the weights that are quantized.
COUNTS = {"trainable": 83_886_080, "four_bit": 6_979_321_856}
LOADED_BYTES = 4.2 * 2**30


def plan(card_gib, **named):
    """Plan for Mistral-7B, loaded in 4 bits, on a card of so many GiB."""
    usual = {"longest": 512, "step_tokens": 1040, "gradient_checkpointing": "auto", "device": "cuda"}
    free = int(card_gib * 2**30 - LOADED_BYTES)
    return memory_plan.make(MISTRAL, free=free, **COUNTS, **(usual | named))


def test_a_layers_activations_are_its_linear_inputs_norms_and_attention():
    # 4 x 4096 + 2 x 4096 + 2 x 1024 + 3 x 14336 values of 2 bytes, and a quarter more.
    assert MISTRAL.layer_bytes == 69_632 * 2 * 1.25


def test_head_sizes_count_where_they_are_not_hidden_size_over_heads():
    shape = memory_plan.Shape.of(MistralConfig(head_dim=256), torch.bfloat16)
    assert (shape.queries, shape.keys) == (32 * 256, 8 * 256)


@pytest.mark.parametrize(
    ("card_gib", "recompute", "dequantize"),
    [(8, True, False), (10, True, False), (16, False, False), (24, False, True), (80, False, True)],
)
def test_the_more_memory_the_less_is_computed_twice(card_gib, recompute, dequantize):
    found = plan(card_gib)
    assert (found.recompute, found.dequantize) == (recompute, dequantize)
    assert found.tokens >= 1024


def test_a_plan_says_why_activations_are_recomputed():
    assert plan(8).reason.endswith("GiB free, short: activations are recomputed")
    asked = plan(80, gradient_checkpointing="yes").reason
    assert asked.endswith("GiB free, gradient_checkpointing=yes: activations are recomputed")


def test_a_plan_fits_in_what_is_free():
    for card_gib in range(8, 81, 4):
        found = plan(card_gib)
        used = LOADED_BYTES + COUNTS["trainable"] * 18
        used += COUNTS["four_bit"] * 1.484 if found.dequantize else 0
        used += found.tokens * MISTRAL.token_bytes(recompute=found.recompute)
        assert used < card_gib * 2**30


def test_more_memory_never_gives_fewer_tokens_in_the_same_way():
    found = [plan(card_gib) for card_gib in range(8, 81)]
    for way in {(one.recompute, one.dequantize) for one in found}:
        tokens = [one.tokens for one in found if (one.recompute, one.dequantize) == way]
        assert tokens == sorted(tokens)


def test_more_than_8192_tokens_at_once_are_never_taken():
    assert plan(300).tokens == 8192


def test_a_step_of_few_tokens_needs_no_recomputation_where_it_fits_whole():
    assert not plan(10, step_tokens=400, longest=300).recompute
    assert plan(10).recompute


def test_a_user_decides_on_recomputation_and_tokens():
    assert plan(80, gradient_checkpointing="yes").recompute
    assert not plan(14, gradient_checkpointing="no").recompute
    assert plan(80, micro_batch_tokens=600).tokens == 600


def test_the_longest_row_fits_whatever_the_user_asks_for():
    assert plan(80, micro_batch_tokens=100).tokens == 512


def test_weights_that_are_not_in_4_bits_are_not_dequantized():
    shape = memory_plan.Shape.of(MistralConfig(), torch.bfloat16)
    found = memory_plan.make(
        shape,
        free=60 * 2**30,
        device="cuda",
        trainable=1,
        four_bit=0,
        longest=9,
        step_tokens=9,
        gradient_checkpointing="auto",
    )
    assert not found.dequantize


def test_too_little_memory_is_an_error_with_ways_out():
    with pytest.raises(UserError, match=r"0\.8 GiB .* 512 tokens .*max_length"):
        plan(5)


def test_half_of_a_plan_has_half_the_tokens_of_what_did_not_fit():
    assert plan(80, micro_batch_tokens=600).halved(largest=600).tokens == 300
    assert plan(80).halved(largest=1000).tokens == 500


def test_a_plan_says_what_it_does():
    said = memory_plan.describe(plan(80, micro_batch_tokens=600), step_tokens=1040, device="cuda")
    assert said == (
        "600 tokens at once (about 2 micro-batches a step), weights dequantized once, "
        "75.8 GiB free on the GPU"
    )


def test_the_peak_is_weights_adapter_activations_and_buffers():
    named = COUNTS | {"device": "cuda", "weights": int(LOADED_BYTES), "longest": 512, "step_tokens": 1040}
    found = memory_plan.peak_bytes(plan(80), MISTRAL, **named)
    # An H100 that dequantized the weights held 22.9 GiB at most in steps of 1,040 tokens.
    assert 22.9 * 0.9 < found / 2**30 < 22.9 * 1.1
    adapter_bytes = COUNTS["trainable"] * 18
    activations = 1040 * MISTRAL.token_bytes(recompute=False)
    expected = int(LOADED_BYTES) + int(COUNTS["four_bit"] * 1.484) + adapter_bytes + activations + 2**28
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_peak_of_small_steps_is_that_of_the_longest_row():
    named = COUNTS | {"device": "cuda", "weights": 0}
    small = memory_plan.peak_bytes(plan(80), MISTRAL, longest=512, step_tokens=130, **named)
    assert small == memory_plan.peak_bytes(plan(80), MISTRAL, longest=130, step_tokens=512, **named)


def test_a_process_counts_where_weights_lie_in_its_own_memory():
    named = COUNTS | {"weights": 0, "longest": 512, "step_tokens": 1040}
    on = {
        device: memory_plan.peak_bytes(plan(16), MISTRAL, device=device, **named)
        for device in ("cpu", "cuda")
    }
    assert on["cpu"] - on["cuda"] == int(0.7 * 2**30)


def test_weights_that_would_be_slow_to_come_by_stay_in_4_bits():
    assert plan(80).dequantize
    assert not plan(80, may_dequantize=False).dequantize


def test_4_bit_weights_are_counted_as_what_they_stand_for(tiny_base):
    model = sql_model.load_base(str(tiny_base), "nf4")
    # Two layers with four of 64 x 64 for attention and three of 64 x 128.
    assert memory_plan.four_bit_parameters(model) == 2 * (4 * 64 * 64 + 3 * 64 * 128)


@pytest.mark.parametrize(
    ("config", "intermediate", "keys"),
    [
        (LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2), 11008, 32),
        (OPTConfig(hidden_size=64, num_attention_heads=4, ffn_dim=96), 96, 64),
        (GPT2Config(n_embd=64, n_head=4), 256, 64),
        (GPTNeoXConfig(hidden_size=64, num_attention_heads=4, intermediate_size=80), 80, 64),
    ],
)
def test_sizes_of_a_decoder_are_read_by_whatever_names_it_has(config, intermediate, keys):
    shape = memory_plan.Shape.of(config, torch.float32)
    assert (shape.hidden, shape.queries) == (64, 64)
    assert (shape.intermediate, shape.keys) == (intermediate, keys)
