"""Checkpoints: whole or not there, and a training that goes on from one ends with the very same bits."""

import errno
import os
import random
import signal
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import load_file

from steps.text2sql import adapter, checkpoints, manifest, memory_plan, run_folder, sql_model, training
from steps.text2sql.checkpoints import Checkpoints
from steps.text2sql.manifest import AdapterManifest
from tests.test_training import Probe, splits

ROWS, BATCH, STEPS = 14, 4, 9  # 4 steps an epoch, the last with 2 rows


@pytest.fixture
def tokenizer(tiny_base):
    return sql_model.load_base_tokenizer(str(tiny_base))


@pytest.fixture
def trains(tiny_base, tokenizer, tmp_path):
    """Makes a training with dropout in a model of its own; adapter, losses and mean loss come back."""

    def train(folder, *, optim="adamw_torch", r=4, resume_from=None, save_steps=1, probe=None, tokens=4096):
        torch.manual_seed(0)
        lora = adapter.lora_config(r=r, alpha=8, dropout=0.3, target_modules="all-linear")
        model = adapter.attach(sql_model.load_base(str(tiny_base), "nf4"), lora)
        settings = training.arguments(
            tmp_path,
            steps=STEPS,
            batch_size=BATCH,
            recompute=False,
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            optim=optim,
            logging_steps=2,
            seed=7,
            disable_tqdm=True,
        )
        if resume_from is None:
            torch.manual_seed(7)
        else:
            torch.manual_seed(1234)  # as little as possible is as it was

        def save(step, write_state):
            def fill(work):
                write_state(work)
                model.save_pretrained(work)
                (work / "README.md").unlink()
                manifest.write(AdapterManifest("nf4", step, STEPS, {}), work)

            run_folder.write_folder(folder / f"checkpoint-{step}", fill)

        callback = Checkpoints(save, save_steps=save_steps, resume_from=resume_from)
        probe = probe or Probe()
        with callback.listening():
            mean = training.train(
                model,
                splits(tokenizer, ROWS, 4),
                settings=settings,
                plan=memory_plan.Plan(tokens=tokens, recompute=False, dequantize=False, reason=""),
                replay=False,
                callbacks=[probe],
                checkpoints=callback,
            )
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        return SimpleNamespace(
            weights=weights,
            losses=probe.losses,
            mean=mean,
            evaluations=probe.evaluations,
            by=callback.stopped_by,
        )

    return train


def interrupt(at):
    """Send this process SIGTERM at one step."""
    return lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == at else None


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("step", [1, 4, 5, 8])
def test_a_training_goes_on_with_the_very_bits(trains, tmp_path, step):
    whole = trains(tmp_path / "whole")
    rest = trains(tmp_path / "rest", resume_from=tmp_path / "whole" / f"checkpoint-{step}")
    assert same(rest.weights, whole.weights)
    assert rest.mean == whole.mean
    assert rest.losses == whole.losses[len(whole.losses) - len(rest.losses) :]
    assert rest.evaluations == [at for at in whole.evaluations if at > step]


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "adamw_torch_fused"])
def test_every_optimizer_goes_on_with_the_very_bits(trains, tmp_path, optim):
    # 64 x 64 numbers: bitsandbytes keeps the states of smaller matrices in 32 bits.
    whole = trains(tmp_path / "whole", optim=optim, r=64)
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    states = {
        tensor.dtype
        for tensor in load_file(checkpoint / checkpoints.TENSORS).values()
        if tensor.numel() == 4096
    }
    assert (torch.uint8 in states) == ("8bit" in optim)
    assert same(trains(tmp_path / "rest", optim=optim, r=64, resume_from=checkpoint).weights, whole.weights)


def test_steps_of_several_micro_batches_are_skipped_whole(trains, tmp_path):
    whole = trains(tmp_path / "whole", tokens=40)
    rest = trains(tmp_path / "rest", tokens=40, resume_from=tmp_path / "whole" / "checkpoint-7")
    assert same(rest.weights, whole.weights)


def test_a_checkpoint_holds_safetensors_and_json_alone(trains, tmp_path):
    trains(tmp_path / "whole", save_steps=4)
    found = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.*"))
    assert {path.suffix for path in found} == {".safetensors", ".json"}
    assert {path.parts[0] for path in found} == {"checkpoint-4", "checkpoint-8"}


# When


def test_a_signal_ends_the_training_after_its_step_with_a_checkpoint(trains, tmp_path):
    stopped = trains(tmp_path / "stopped", save_steps=100, probe=Probe(at_step=interrupt(2)))
    assert stopped.by == "SIGTERM"
    [checkpoint] = run_folder.saved_in(tmp_path / "stopped")
    assert checkpoint.name == "checkpoint-2"
    rest = trains(tmp_path / "rest", save_steps=100, resume_from=checkpoint)
    assert same(rest.weights, trains(tmp_path / "whole", save_steps=100).weights)


def test_a_signal_while_validating_ends_the_training_with_a_checkpoint(trains, tmp_path):
    stopped = trains(tmp_path / "stopped", save_steps=100, probe=Probe(at_evaluation=interrupt(3)))
    assert stopped.by == "SIGTERM"
    assert [path.name for path in run_folder.saved_in(tmp_path / "stopped")] == ["checkpoint-4"]


def test_a_signal_after_the_last_step_lets_the_training_end(trains, tmp_path):
    ended = trains(tmp_path / "ended", save_steps=100, probe=Probe(at_evaluation=interrupt(STEPS)))
    assert ended.by == ""
    assert same(ended.weights, trains(tmp_path / "whole", save_steps=100).weights)


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not():
    callback = Checkpoints(lambda step, write_state: None, save_steps=100)
    with callback.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        callback.on_step_end(None, SimpleNamespace(global_step=1, max_steps=9), SimpleNamespace())
        assert callback.stopped_by == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_signals_go_back_to_who_had_them():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Checkpoints(lambda step, write_state: None, save_steps=100).listening():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# Files


def fill_two(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "a.json").write_text("{}")
    (folder / "b.json").write_text("[1]")
    manifest.write(AdapterManifest("nf4", 1, 2, {}), folder)


def test_values_come_back_with_their_types(tmp_path):
    shared = torch.arange(6).reshape(2, 3).t()
    values = {
        "state": {0: {"step": torch.tensor(3.0), "shared": shared}, 1: {"shared": shared}},
        "betas": (0.9, 0.999),
        "list": [None, True, "text", 1, 0.1, float("inf")],
        "numpy": numpy.random.RandomState(1).get_state(),
        "python": random.Random(1).getstate(),
        "empty": torch.zeros(0, dtype=torch.uint8),
    }
    checkpoints.write_values(values, tmp_path)
    found = checkpoints.read_values(tmp_path)
    assert list(found["state"]) == [0, 1]
    assert found["state"][0]["shared"] is found["state"][1]["shared"]
    assert torch.equal(found["state"][0]["shared"], shared)
    assert (found["betas"], found["list"], found["python"]) == (
        values["betas"],
        values["list"],
        values["python"],
    )
    assert found["numpy"][1].dtype == values["numpy"][1].dtype
    assert (found["numpy"][1] == values["numpy"][1]).all()
    assert found["empty"].dtype == torch.uint8


def test_a_folder_that_could_not_be_filled_leaves_nothing_and_the_one_before(tmp_path):
    target = tmp_path / "checkpoint-1"
    run_folder.write_folder(target, fill_two)

    def fails(folder):
        (folder / "b.json").write_text("[")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run_folder.write_folder(target, fails)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert run_folder.is_whole(target)


def test_checkpoints_are_found_newest_first_by_number_and_unfinished_ones_not(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", ".checkpoint-11.part", "checkpoint-x", "adapter"):
        (tmp_path / name).mkdir()
    assert [path.name for path in run_folder.saved_in(tmp_path)] == ["checkpoint-10", "checkpoint-9"]


@pytest.mark.parametrize(
    "tear",
    [
        lambda folder: (folder / "b.json").write_text("[2]"),
        lambda folder: (folder / "b.json").write_text(""),
        lambda folder: (folder / "b.json").unlink(),
        lambda folder: (folder / "sub" / "a.json").unlink(),
        lambda folder: (folder / "more.pkl").write_bytes(b"x"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text('{"files": 3}'),
        lambda folder: (folder / "link.json").symlink_to(folder / "b.json"),
    ],
)
def test_a_torn_or_changed_checkpoint_is_recognised(tmp_path, tear):
    run_folder.write_folder(tmp_path / "checkpoint-1", fill_two)
    assert run_folder.is_whole(tmp_path / "checkpoint-1")
    tear(tmp_path / "checkpoint-1")
    assert not run_folder.is_whole(tmp_path / "checkpoint-1")
