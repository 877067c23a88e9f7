"""The correction of 4-bit weights that recipes are measured with: what it takes back."""

from unittest import mock

import pytest
import torch
from peft import get_peft_model_state_dict

from benchmarks import correction
from steps.text2sql import adapter, sql_model
from tests.two_processes import rows

RANK = 8


@pytest.fixture(scope="module")
def published(tiny_base):
    return sql_model.load_base(str(tiny_base), "none")


@pytest.fixture
def corrected(tiny_base, published):
    """The base in 4 bits with a new adapter and its correction, and the share of the error that is left."""
    torch.manual_seed(0)
    lora = adapter.lora_config(r=RANK, alpha=16, dropout=0.0, target_modules="all-linear")
    model = adapter.attach(sql_model.load_base(str(tiny_base), "nf4"), lora)
    left = correction.add(model, published, rows(30))
    return model.eval(), left


def outputs(model):
    """What the layers make of rows that the correction was not made with."""
    ids = torch.tensor([row["input_ids"][:8] for row in rows(30).to_list()[20:]])
    with torch.no_grad():
        return model(input_ids=ids).logits


def squares(tensor):
    return tensor.square().sum().item()


def test_no_term_of_its_rank_leaves_less_of_the_outputs_error():
    torch.manual_seed(0)
    error = torch.randn(24, 16)
    inputs = torch.randn(500, 16) @ torch.randn(16, 16)
    with mock.patch.object(correction, "DAMPING", 0):
        down, up, left = correction.least(error, inputs, rank=4)
    assert (down.shape, up.shape) == ((4, 16), (24, 4))
    best = torch.linalg.svdvals(error @ inputs.T)  # Eckart and Young, of the outputs themselves
    assert squares((error - up @ down) @ inputs.T) == pytest.approx(squares(best[4:]), rel=1e-3)
    assert left.item() == pytest.approx(squares(best[4:]) / squares(best), rel=1e-3)


def test_fewer_tokens_than_inputs_are_enough():
    torch.manual_seed(0)
    error, inputs = torch.randn(24, 64), torch.randn(10, 64)
    down, up, left = correction.least(error, inputs, rank=10)
    assert squares((error - up @ down) @ inputs.T) < 0.01 * squares(error @ inputs.T)
    assert 0 < left.item() < 1


def test_a_corrected_base_is_nearer_to_the_published_one(tiny_base, published, corrected):
    model, left = corrected
    wanted, plain = outputs(published.eval()), outputs(sql_model.load_base(str(tiny_base), "nf4").eval())
    error, error_before = squares(outputs(model) - wanted), squares(plain - wanted)
    assert error < 0.7 * error_before
    assert 0.3 < left < 0.7  # random weights and inputs have no directions that count for more


def test_the_adapter_alone_is_trained(corrected):
    model, _ = corrected
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {correction.TRAINED}
    before = get_peft_model_state_dict(model, adapter_name=correction.NAME)
    assert all(tensor.any() for tensor in before.values())
    model.train()(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_a_rank_beyond_the_layers_size_corrects_all_of_it(tiny_base, published):
    lora = adapter.lora_config(r=96, alpha=96, dropout=0.0, target_modules="all-linear")
    model = adapter.attach(sql_model.load_base(str(tiny_base), "nf4"), lora)
    assert correction.add(model, published, rows(30)) == pytest.approx(0, abs=1e-5)
    assert torch.allclose(outputs(model.eval()), outputs(published.eval()), atol=1e-4)
