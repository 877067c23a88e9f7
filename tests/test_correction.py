"""The correction of 4-bit weights: what it takes back, and that it is part of what is saved."""

from unittest import mock

import pytest
import torch
from mlflow.artifacts import download_artifacts
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from steps.text2sql import adapter, base_model, correction, fused_layers, sql_model
from steps.text2sql.errors import UserError
from steps.text2sql.manifest import AdapterManifest, DatasetManifest
from tests.conftest import QUICK, call_step, plain_rows, prepared_uri, write_jsonl
from tests.two_processes import rows

RANK = 8


@pytest.fixture(scope="module")
def published(tiny_base):
    return sql_model.load_base(str(tiny_base), "none")


@pytest.fixture
def tokenizer(tiny_base):
    return sql_model.load_base_tokenizer(str(tiny_base))


@pytest.fixture
def dataset_uri(store, tiny_base, tmp_path):
    """A prepared dataset of plain rows in a fresh store."""
    return prepared_uri(tiny_base, write_jsonl(tmp_path / "rows.jsonl", plain_rows(28)))


@pytest.fixture(params=[False, True], ids=["lora", "rslora"])
def adapted(tiny_base, request):
    """The base in 4 bits with a new adapter."""
    torch.manual_seed(0)
    lora = adapter.lora_config(
        r=RANK, alpha=16, dropout=0.0, target_modules="all-linear", rank_stabilized=request.param
    )
    return adapter.attach(sql_model.load_base(str(tiny_base), "nf4"), lora)


@pytest.fixture
def corrected(adapted, published):
    """That with its correction, and the share of the error that is left."""
    left = correction.add(adapted, published, rows(30))
    return adapted.eval(), left


@pytest.fixture
def trained(corrected):
    """That with an adapter that is not zero."""
    for one in adapter.own(corrected[0]):
        if one.requires_grad:
            one.data.normal_(0, 0.1)
    return corrected[0]


@pytest.fixture
def saved(trained, tokenizer, tmp_path):
    """Folder that it is saved in."""
    described = DatasetManifest(*[""] * len(DatasetManifest.__dataclass_fields__))
    adapter.save(trained, tokenizer, AdapterManifest("nf4", 1, 1, vars(described)), tmp_path)
    return tmp_path


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


def test_a_layer_that_is_not_quantized_has_nothing_to_correct(tiny_base, published):
    lora = adapter.lora_config(r=RANK, alpha=16, dropout=0.0, target_modules="q_proj,lm_head")
    model = adapter.attach(sql_model.load_base(str(tiny_base), "nf4"), lora)
    left = correction.add(model, published, rows(30))
    heads = [module for name, module in model.named_modules() if name.endswith("lm_head")]
    assert [type(module.base_layer) for module in heads] == [torch.nn.Linear]
    assert not heads[0].lora_B[correction.NAME].weight.any()
    assert 0 < left < 1


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


def test_what_is_saved_is_one_adapter_that_computes_the_same(trained, saved, tiny_base):
    alone = PeftModel.from_pretrained(sql_model.load_base(str(tiny_base), "nf4"), saved).eval()
    assert list(alone.peft_config) == ["default"]
    assert alone.peft_config["default"].r == 2 * RANK
    torch.testing.assert_close(outputs(alone), outputs(trained))


def test_every_bit_of_both_comes_back_from_a_checkpoint(trained, saved):
    before = {name: one.clone() for name, one in trained.named_parameters() if ".lora_" in name}
    for one in adapter.own(trained):
        one.data.zero_()
    correction.load_weights(trained, load_file(saved / adapter.WEIGHTS))
    after = dict(trained.named_parameters())
    assert before
    assert all(torch.equal(after[name], one) for name, one in before.items())


def test_weights_of_another_shape_do_not_come_back(trained, saved):
    weights = {name: one[..., 1:] for name, one in load_file(saved / adapter.WEIGHTS).items()}
    with pytest.raises(RuntimeError):
        correction.load_weights(trained, weights)


def test_without_a_correction_an_adapter_is_saved_and_loaded_as_it_is(adapted, tokenizer, tmp_path):
    described = DatasetManifest(*[""] * len(DatasetManifest.__dataclass_fields__))
    adapter.save(adapted, tokenizer, AdapterManifest("nf4", 1, 1, vars(described)), tmp_path)
    weights = load_file(tmp_path / adapter.WEIGHTS)
    assert adapter.settings(tmp_path)["r"] == RANK
    assert {len(one) for name, one in weights.items() if "lora_A" in name} == {RANK}
    before = [one.clone() for one in adapter.own(adapted)]
    correction.load_weights(adapted, weights)
    assert all(map(torch.equal, before, adapter.own(adapted)))


def test_fused_layers_train_beside_it(trained):
    ids = torch.tensor([[5, 6, 7, 8]])

    def gradients():
        trained.zero_grad()
        loss = trained.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item(), torch.cat(
            [one.grad.flatten() for one in adapter.own(trained) if one.requires_grad]
        )

    usual = gradients()
    fused_layers.fuse(trained)
    assert sum("forward" in vars(module) for module in trained.modules()) == 14 + 5
    found = gradients()
    assert found[0] == pytest.approx(usual[0], rel=1e-6)
    assert ((found[1] - usual[1]).norm() / usual[1].norm()).item() < 2e-6
    assert all(one.grad is None for one in adapter.own(trained) if not one.requires_grad)


@pytest.mark.parametrize("given", ["auto", "yes"])
def test_a_base_that_does_not_fit_once_more_is_refused(tiny_base, given):
    numbers = sum(one.numel() for one in sql_model.load_base(str(tiny_base), "none").parameters())
    base_model.check_room(str(tiny_base), given, numbers * 4)
    with pytest.raises(UserError, match=rf"correction={given}: .* are free; give quantization_correction=no"):
        base_model.check_room(str(tiny_base), given, numbers * 4 - 1)


@pytest.mark.parametrize(
    ("given", "quantization", "parameters", "expected"),
    [
        ("auto", "nf4", 10**9, True),
        ("auto", "nf4", 10**9 + 1, False),
        ("auto", "none", 10**8, False),
        ("yes", "nf4", 7 * 10**9, True),
        ("no", "nf4", 10**8, False),
    ],
)
def test_small_bases_in_4_bits_are_corrected_unless_told_otherwise(given, quantization, parameters, expected):
    assert correction.is_due(given, quantization=quantization, parameters=parameters) == expected


def test_a_step_trains_with_it_and_says_what_is_left(dataset_uri, tiny_base):
    recipe = {"lora_r": RANK, "use_rslora": "yes", "quantization": "nf4", "quantization_correction": "yes"}
    run = call_step("train", **QUICK | recipe | {"dataset_uri": dataset_uri, "max_steps": 2})
    assert 0 < run.data.metrics["quantization_error_left"] < 0.8
    folder = download_artifacts(f"runs:/{run.info.run_id}/adapter")
    alone = PeftModel.from_pretrained(sql_model.load_base(str(tiny_base), "nf4"), folder)
    lora = alone.peft_config["default"]
    assert (lora.r, lora.use_rslora) == (2 * RANK, True)
    layer = next(module for module in alone.modules() if isinstance(module, LoraLayer))
    assert layer.scaling["default"] == pytest.approx(lora.lora_alpha / (2 * RANK) ** 0.5)
    assert layer.scaling["default"] == pytest.approx(QUICK["lora_alpha"] / RANK**0.5)
    assert layer.lora_B["default"].weight[:, RANK:].any()
