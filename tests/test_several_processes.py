"""Two processes on the CPU (gloo) learn what one learns, whether rows alone or the base too is divided."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from steps.text2sql import run_folder, sql_model
from tests import two_processes
from tests.conftest import tiny_tokenizer, write_tiny_base

pytestmark = pytest.mark.slow

LIMIT_SECONDS = 1500


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    """A base of five layers: more than there are places for layers that are put together."""
    return write_tiny_base(
        tmp_path_factory.mktemp("deep"), tiny_tokenizer(), num_hidden_layers=two_processes.LAYERS
    )


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """Every scenario by two processes, and `single` by one; gives what came of it by name and process."""
    scratch = tmp_path_factory.mktemp("trained")
    (scratch / "single").mkdir()
    alone = two_processes.train(tiny_base, scratch / "single")
    (scratch / "single" / "0.json").write_text(json.dumps(alone))
    with two_processes.started("tests.two_processes", str(tiny_base), str(scratch)) as pair:
        printed = [process.communicate(timeout=LIMIT_SECONDS)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], "\n".join(printed)

    def get(name, process=0):
        found = SimpleNamespace(**json.loads((scratch / name / f"{process}.json").read_text()))
        found.weights = load_file(scratch / name / f"adapter-{process}.safetensors")
        found.folder = scratch / name
        return found

    return get


@pytest.fixture(autouse=True)
def alone_again(monkeypatch):
    """What a training here says in the environment, forgotten afterwards."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")


def same(one, other, tolerance=1e-4):
    """Whether two adapters are the same within rounding, of fp32 sums in another order."""
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], atol=tolerance) for name in one
    )


@pytest.mark.parametrize(
    "name",
    [
        "ddp",
        "fsdp",
        "fsdp_recompute",
        "fsdp_compiled",
        "pulled",
        "pulled_recompute",
        "pulled_compiled",
        "recorded",
    ],
)
def test_two_processes_learn_what_one_learns_from_the_same_rows(trained, name):
    one, two = trained("single"), trained(name)
    assert len(one.losses) == two_processes.STEPS
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    assert two.mean == pytest.approx(one.mean, rel=1e-5)
    assert same(two.weights, one.weights)
    assert one.losses[0] - one.losses[-1] > 0.05  # it did learn


@pytest.mark.parametrize("name", ["ddp", "fsdp", "pulled"])
def test_the_validation_loss_of_two_processes_is_that_of_one(trained, name):
    assert len(trained("single").evaluations) == 3
    assert trained(name).evaluations == pytest.approx(trained("single").evaluations, rel=1e-4)


@pytest.mark.parametrize("name", two_processes.SCENARIOS)
def test_both_processes_end_with_the_same_bits(trained, name):
    first, second = trained(name, 0), trained(name, 1)
    assert all(torch.equal(first.weights[n], second.weights[n]) for n in first.weights)
    assert first.mean == second.mean


def test_the_base_is_divided_in_two_with_fsdp_alone(trained):
    assert trained("ddp").divided == 1
    # Layers are divided evenly; a tiny model's biases and norms too.
    fsdp = ("fsdp", "fsdp_nf4", "fsdp_dequantized")
    assert [trained(name, i).divided for name in fsdp for i in (0, 1)] == [0.5] * 6


@pytest.mark.parametrize("name", ["pulled", "pulled_nf4", "pulled_dequantized"])
def test_matrices_of_others_take_two_places_in_turns(trained, name):
    kept = two_processes.LAYERS  # a block for each layer
    assert [trained(name, i).places for i in (0, 1)] == [kept + 2, kept + 2]
    assert trained("ddp").places > 2 * kept + 2


@pytest.mark.parametrize("name", ["fsdp_nf4", "fsdp_dequantized", "pulled_nf4", "pulled_dequantized"])
def test_a_divided_4_bit_base_computes_what_a_whole_one_does(trained, tiny_base, tmp_path, name):
    whole = two_processes.train(tiny_base, tmp_path, quantization="nf4")
    assert trained(name).losses == pytest.approx(whole["losses"], rel=1e-4)
    assert same(trained(name).weights, load_file(tmp_path / "adapter-0.safetensors"))
    assert trained(name).losses != pytest.approx(trained("fsdp").losses, rel=1e-4)


@pytest.mark.parametrize("name", ["corrected", "fsdp_corrected"])
def test_a_correction_is_the_same_in_two_processes(trained, tiny_base, tmp_path, name):
    alone = two_processes.train(tiny_base, tmp_path, quantization="nf4", corrected=True)
    assert trained(name).losses == pytest.approx(alone["losses"], rel=1e-4)
    assert same(trained(name).weights, load_file(tmp_path / "adapter-0.safetensors"))


@pytest.mark.parametrize("name", ["resumed", "fsdp_resumed", "pulled_resumed"])
def test_two_processes_go_on_from_a_checkpoint_of_one(trained, name):
    assert trained(name).losses == pytest.approx(trained("single").losses[3:], rel=1e-4)
    assert same(trained(name).weights, trained("single").weights)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "pulled"])
def test_one_process_goes_on_from_a_checkpoint_of_two(trained, tiny_base, name):
    folder = trained(name).folder.with_name(f"alone_after_{name}")
    folder.mkdir()
    alone = two_processes.train(tiny_base, folder, go_on=f"{name}/checkpoint-3")
    assert alone["losses"] == pytest.approx(trained("single").losses[3:], rel=1e-4)
    assert same(load_file(folder / "adapter-0.safetensors"), trained("single").weights)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp_nf4", "pulled", "pulled_nf4"])
def test_a_saved_adapter_is_whole_and_loads_alone(trained, tiny_base, name):
    checkpoint = trained(name).folder / f"checkpoint-{two_processes.STEPS - 1}"
    model = PeftModel.from_pretrained(sql_model.load_base(str(tiny_base), "none"), checkpoint)
    loaded = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    assert {n: p.shape for n, p in loaded.items()} == {n: p.shape for n, p in trained(name).weights.items()}
    files = sorted(os.listdir(checkpoint))
    assert files == sorted(os.listdir(trained("single").folder / checkpoint.name))


def test_a_step_of_fewer_rows_than_processes_is_computed(trained, tiny_base, tmp_path):
    alone = two_processes.train(tiny_base, tmp_path, batch_size=1)
    assert trained("one_row").losses == pytest.approx(alone["losses"], rel=1e-4)


def test_when_memory_runs_out_in_one_process_both_start_the_step_again_with_halves(trained):
    assert trained("short_of_memory").losses == pytest.approx(trained("single").losses, rel=1e-4)
    assert same(trained("short_of_memory").weights, trained("single").weights)


def test_the_largest_pack_of_all_is_recorded_first(trained):
    for i in (0, 1):
        _, *computed, _ = trained("recorded", i).computed
        assert computed[0] == max(computed) > min(computed)


def test_4_bit_weights_are_divided_as_bytes(trained):
    assert trained("fsdp_nf4").dtypes == ["torch.float32", "torch.uint8"]


def test_a_signal_to_one_process_stops_both_after_the_same_step(trained):
    ended = [trained("stopped", i) for i in (0, 1)]
    assert [one.stopped_by for one in ended] == ["SIGTERM", "SIGTERM"]
    assert [len(one.losses) for one in ended] == [2, 2]
    assert run_folder.saved_in(ended[0].folder)[0].name == "checkpoint-2"


def test_processes_draw_dropout_of_their_own(trained):
    assert trained("dropout", 0).drawn != trained("dropout", 1).drawn
