"""Rows into packs, and attention and loss within them."""

import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
)

from steps.text2sql import gradients, packed_attention, packing

SHAPE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def row(length, answer, *, first=3):
    """Tokens `first`, `first` + 1, … of which the last `answer` are to be learned."""
    ids = list(range(first, first + length))
    return {"input_ids": ids, "labels": [-100] * (length - answer) + ids[length - answer :]}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS)).eval()


def losses_alone(model, rows):
    """Summed loss of each row by itself, with the model's own attention."""
    with torch.no_grad():
        return [
            torch.nn.functional.cross_entropy(
                model(torch.tensor([one["input_ids"]])).logits[0, :-1],
                torch.tensor(one["labels"][1:]),
                reduction="sum",
            ).item()
            for one in rows
        ]


def test_first_fit_takes_the_longest_first_and_the_first_pack_with_room():
    # 6 | 5 | 4 with 6 | 3 with 5 | 2 with 5 and 3
    assert packing.first_fit([5, 4, 6, 2, 3], capacity=10) == [[2, 1], [0, 4, 3]]


def test_a_row_longer_than_the_capacity_is_alone_and_whole():
    packs = packing.pack([row(12, 2), row(3, 1)], capacity=8)
    assert [pack.input_ids.shape[1] for pack in packs] == [12, 3]


def test_a_pack_has_its_rows_with_positions_and_offsets_of_their_own():
    [pack] = packing.pack([row(4, 2), row(3, 1, first=50)], capacity=10)
    assert pack.input_ids.tolist() == [[3, 4, 5, 6, 50, 51, 52]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert pack.offsets.tolist() == [0, 4, 7]


def test_an_answer_is_foretold_at_the_token_before_it():
    [pack] = packing.pack([row(4, 2), row(3, 1, first=50)], capacity=10)
    assert pack.answer_positions.tolist() == [1, 2, 5]
    assert pack.answers.tolist() == [5, 6, 52]


def test_nothing_foretells_the_first_token_of_a_row():
    rows = [row(3, 3), row(3, 3, first=50)]
    [pack] = packing.pack(rows, capacity=10)
    assert pack.answers.tolist() == [4, 5, 51, 52]
    assert packing.answer_tokens(rows) == 4


def test_with_a_multiple_all_packs_of_as_many_rows_have_few_shapes():
    few, many = (packing.pack([row(n, 2)] * 3, capacity=64, multiple=16)[0] for n in (6, 10))
    assert [part.shape for part in few._replace(offsets=few.offsets)] == [
        (1, 32),
        (1, 32),
        (5,),
        (16,),
        (16,),
    ]
    assert few.offsets.tolist() == [0, 6, 12, 18, 32]
    assert [part.shape for part in many] == [part.shape for part in few]


@pytest.mark.parametrize(("capacity", "multiple"), [(16, 1), (40, 1), (500, 1), (64, 16)])
def test_rows_of_a_pack_do_not_see_each_other(model, capacity, multiple):
    rows = [row(5 + 3 * i, 2 + i, first=3 + 20 * i) for i in range(6)]
    expected = losses_alone(model, rows)
    model.set_attn_implementation(packed_attention.NAME)
    with torch.no_grad():
        packs = packing.pack(rows, capacity=capacity, multiple=multiple)
        found = sum(packed_attention.summed_loss(model, pack, longest=128).item() for pack in packs)
    assert found == pytest.approx(sum(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "are_apart"),
    [
        (LlamaConfig, True),
        (Qwen3Config, True),
        (Gemma3TextConfig, True),
        (FalconConfig, False),
        (BloomConfig, False),
        (MambaConfig, False),
    ],
)
def test_a_model_whose_layers_ask_for_their_rows_reads_them_apart_and_no_other_does(kind, are_apart):
    torch.manual_seed(0)
    config = kind(**SHAPE, **HEADS, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # large enough for rows to differ
            torch.nn.init.normal_(parameter, std=0.2)
    rows = [row(9, 4), row(12, 5, first=60)]
    expected = sum(losses_alone(model, rows))
    assert (packed_attention.not_apart(model) == "") is are_apart
    model.config.use_cache = False
    model.set_attn_implementation(packed_attention.NAME)
    with torch.no_grad():
        found = packed_attention.summed_loss(model, packing.pack(rows, capacity=40)[0], longest=20).item()
    assert (found == pytest.approx(expected, rel=1e-5)) is are_apart


def test_the_order_within_a_pack_does_not_change_a_rows_loss(model):
    rows = [row(9, 4), row(9, 4, first=60)]
    model.set_attn_implementation(packed_attention.NAME)
    with torch.no_grad():
        found = [
            packed_attention.summed_loss(model, packing.pack(order, capacity=20)[0], longest=20).item()
            for order in (rows, rows[::-1])
        ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_sliding_window_is_that_of_the_model():
    torch.manual_seed(0)
    mistral = MistralForCausalLM(MistralConfig(**SHAPE, **HEADS, sliding_window=4)).eval()
    rows = [row(20, 10), row(12, 4, first=60)]
    expected = losses_alone(mistral, rows)
    mistral.set_attn_implementation(packed_attention.NAME)
    with torch.no_grad():
        [pack] = packing.pack(rows, capacity=40)
        found = packed_attention.summed_loss(mistral, pack, longest=20).item()
    assert found == pytest.approx(sum(expected), rel=1e-6)


@pytest.mark.parametrize("asked", [{"softcap": 50.0}, {"s_aux": torch.zeros(4)}])
def test_attention_that_is_more_than_this_is_refused(asked):
    parts = (torch.zeros(1, 4, 3, 8) for _ in range(3))
    offsets = torch.tensor([0, 3])
    with pytest.raises(NotImplementedError, match=next(iter(asked))):
        packed_attention.packed_attention(
            None, *parts, None, scaling=1.0, cu_seq_lens_q=offsets, max_length_q=3, **asked
        )


@pytest.mark.parametrize(("count", "processes"), [(8, 2), (7, 2), (1, 2), (8, 3), (5, 8)])
def test_every_process_gets_as_many_packs_and_no_row_is_lost(count, processes):
    rows = [row(5 + i, 2) for i in range(count)]
    packs = packing.pack_evenly(rows, capacity=40, multiple=1, processes=processes)
    assert len(packs) % processes == 0
    answers = [token for pack in packs for token in pack.answers.tolist() if token != -100]
    assert sorted(answers) == sorted(token for one in rows for token in one["labels"] if token != -100)


def test_processes_share_the_tokens_evenly():
    rows = [row(20 + i, 2) for i in range(16)]
    first, second = packing.pack_evenly(rows, capacity=4096, multiple=1, processes=2)
    sizes = [pack.input_ids.shape[1] for pack in (first, second)]
    assert max(sizes) < 1.2 * min(sizes)


@pytest.mark.parametrize(
    ("lengths", "processes"), [([60, 9, 8, 7], 2), ([30] * 7, 3), ([12], 2), ([9] * 5, 4)]
)
def test_packs_of_several_processes_have_one_shape_where_steps_are_recorded(lengths, processes):
    rows = [row(length, length - 1 if length < 10 else 1) for length in lengths]
    packs = packing.pack_evenly(rows, capacity=48, multiple=16, processes=processes)
    assert len({tuple(part.shape for part in pack) for pack in packs}) == 1
    answers = sum((pack.answers != -100).sum().item() for pack in packs)
    assert answers == packing.answer_tokens(rows)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[60, 9, 8, 7], [30] * 7, [12], [20] * 4, [24] * 5])
def test_the_largest_pack_is_told_from_lengths_alone(lengths, processes):
    packs = packing.pack_evenly(
        [row(length, 1) for length in lengths], capacity=48, multiple=1, processes=processes
    )
    largest = max(pack.input_ids.shape[1] for pack in packs)
    assert packing.largest(lengths, capacity=48, processes=processes) == largest


def test_the_longest_rows_are_spread_first_each_to_the_emptiest_pack():
    # 60 | 9 | 8 with 9 | 7 with 9 and 8: nothing that changes places makes them more alike
    assert packing.spread([9, 60, 7, 8], 2) == [[0, 3, 2], [1]]


def test_a_row_changes_places_with_another_where_that_makes_packs_more_alike():
    # first 9, 4 | 7, 5, 3
    assert sorted(map(sorted, packing.spread([7, 3, 9, 4, 5], 2))) == [[0, 1, 3], [2, 4]]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("count", "apart"), [(1, 0), (2, 1), (4, 6)])
def test_packs_of_a_step_differ_by_a_few_tokens_with_every_row_in_one(seed, count, apart):
    lengths = random.Random(seed).choices(range(70, 250), k=32)
    packs = packing.spread(lengths, count)
    sizes = [sum(lengths[i] for i in pack) for pack in packs]
    assert max(sizes) - min(sizes) <= apart
    assert sorted(i for pack in packs for i in pack) == list(range(32))


def test_a_pack_without_answers_has_no_loss(model):
    model.set_attn_implementation(packed_attention.NAME)
    empty = packing.empty_like(packing.pack([row(6, 2)], capacity=10)[0])
    assert packed_attention.summed_loss(model, empty, longest=10).item() == 0


@pytest.mark.parametrize(("capability", "flash"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_flash_attention_is_for_ampere_and_later(monkeypatch, capability, flash):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    packed_attention.has_flash.cache_clear()
    assert packed_attention.has_flash() is flash
    packed_attention.has_flash.cache_clear()


@pytest.mark.parametrize(
    ("rope", "recorded"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, True),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, False),
        ({"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}, False),
        (None, True),
    ],
)
def test_frequencies_that_change_with_the_length_are_not_recorded(monkeypatch, rope, recorded):
    config = LlamaConfig(**SHAPE)
    config.rope_parameters = rope
    assert not gradients.can_record(config)  # no GPU here
    monkeypatch.setattr(packed_attention, "has_flash", lambda: True)
    assert gradients.can_record(config) is recorded
