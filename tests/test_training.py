"""Training: rules behind `auto`, the Trainer's loss and gradients, reports, checkpoints."""

import math
from functools import partial
from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import TrainerCallback

from steps.text2sql import (
    adapter,
    device,
    memory_plan,
    sql_model,
    trainer,
    training,
    training_speed,
    validations,
)
from steps.text2sql.checkpoints import Checkpoints
from steps.text2sql.training_estimate import Work
from steps.text2sql.training_speed import Speed
from tests.recorded import Recorded


@pytest.fixture
def tokenizer(tiny_base):
    return sql_model.load_base_tokenizer(str(tiny_base))


@pytest.fixture
def model(tiny_base):
    """Tiny base in fp32 with a new adapter."""
    torch.manual_seed(0)
    lora = adapter.lora_config(r=4, alpha=8, dropout=0.0, target_modules="all-linear")
    return adapter.attach(sql_model.load_base(str(tiny_base), "none"), lora)


@pytest.fixture
def settings(tmp_path):
    """Makes settings for short trainings."""

    def make(steps, batch_size, **named):
        defaults = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "optim": "adamw_torch"}
        named = defaults | {"logging_steps": 1, "seed": 1, "disable_tqdm": True} | named
        return training.arguments(tmp_path, steps=steps, batch_size=batch_size, recompute=False, **named)

    return make


def rows(tokenizer, count, *, longest=24):
    """Tokenized rows whose prompts and answers have many lengths."""
    found = []
    for i in range(count):
        prompt = tokenizer("How many farms? " * (i % 4 + 1))["input_ids"]
        answer = [100 + i, *range(200, 200 + i * 5 % longest), tokenizer.eos_token_id]
        found.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return datasets.Dataset.from_list(found)


def splits(tokenizer, train_rows, validation_rows=1):
    return datasets.DatasetDict(
        {"train": rows(tokenizer, train_rows), "validation": rows(tokenizer, validation_rows)}
    )


NO_CHECKPOINTS = Checkpoints(lambda step, write_state: None, save_steps=1_000_000)


class Probe(TrainerCallback):
    """Notes losses, gradients and evaluations, and does something at a step or an evaluation."""

    def __init__(self, *, at_step=lambda step: None, at_evaluation=lambda step: None):
        self.at_step, self.at_evaluation = at_step, at_evaluation
        self.losses, self.evaluations, self.evaluated_rows, self.gradients = [], [], set(), {}

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    def on_step_end(self, args, state, control, **kwargs):
        self.seen = int(state.num_input_tokens_seen)
        self.at_step(state.global_step)

    def on_log(self, args, state, control, *, logs, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []

    def on_prediction_step(self, args, state, control, *, eval_dataloader, **kwargs):
        self.evaluated_rows.add(len(eval_dataloader.dataset))

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations.append(state.global_step)
        self.at_evaluation(state.global_step)


def train(model, data, *, settings, callbacks, tokens=64, replay=False, **named):
    """Train with packs of so many tokens."""
    plan = memory_plan.Plan(tokens=tokens, recompute=False, dequantize=False, reason="")
    return training.train(
        model,
        data,
        settings=settings,
        plan=plan,
        replay=replay,
        callbacks=callbacks,
        checkpoints=NO_CHECKPOINTS,
        **named,
    )


def run(model, tokenizer, data, settings, *callbacks, tokens=64):
    """Train with packs of so many tokens; a probe of it comes back."""
    probe = Probe()
    train(model, data, settings=settings, callbacks=[probe, *callbacks], tokens=tokens)
    return probe


def test_no_number_is_an_input_of_a_compiled_layer(model, tokenizer, monkeypatch):
    taken = []

    def compiled(graph, inputs, **named):
        taken.extend(inputs)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compiled)
    training.compile_layers(model)
    model(**tokenizer("How many farms?", return_tensors="pt"))
    torch._dynamo.reset()
    assert any(isinstance(one, torch.Tensor) for one in taken)
    assert not [one for one in taken if isinstance(one, torch.Tensor) and not one.dim()]


# Rules


@pytest.mark.parametrize(
    ("parameters", "steps", "rate"),
    [(7_000_000_000, 500, 2e-4), (135_000_000, 500, 1.5e-3), (135_000_000, 60, 2e-3)],
)
def test_learning_rate_goes_through_its_points(parameters, steps, rate):
    assert training.learning_rate(parameters, steps) == pytest.approx(rate)


@pytest.mark.parametrize("steps", [60, 500])
def test_rank_stabilized_adapters_have_a_rate_of_their_own(steps):
    rate = partial(training.learning_rate, steps=steps, rank_stabilized=True)
    assert rate(135_000_000) == pytest.approx(5e-4)
    plain = training.learning_rate(7_000_000_000, 500) / training.learning_rate(135_000_000, 500)
    assert rate(7_000_000_000) == pytest.approx(5e-4 * plain)


def test_learning_rate_is_a_power_law_between_them():
    # Halfway in log size or steps is halfway in log rate: the geometric means.
    assert training.learning_rate(round(math.sqrt(7e9 * 1.35e8)), 500) == pytest.approx(
        math.sqrt(2e-4 * 1.5e-3)
    )
    assert training.learning_rate(135_000_000, round(math.sqrt(500 * 60))) == pytest.approx(
        math.sqrt(1.5e-3 * 2e-3), rel=1e-3
    )


@pytest.mark.parametrize("steps", [1, 60, 500, 100_000])
def test_learning_rate_never_grows_with_the_base_or_the_steps_nor_exceeds_2e_3(steps):
    rates = [training.learning_rate(10**n, steps) for n in range(3, 13)]
    assert rates == sorted(rates, reverse=True)
    assert training.learning_rate(10**9, steps) >= training.learning_rate(10**9, steps + 100)
    assert max(rates) == 2e-3
    assert min(rates) > 0


@pytest.mark.parametrize(
    ("rows", "max_steps", "epochs", "steps"),
    [
        (100, 7, 3.0, 7),
        (100, -1, 1.0, 13),
        (100, -1, 2.5, 33),
        (1, -1, 0.1, 1),
        (800, -1, 1.1, 110),
        (800, -1, 1e-9, 1),
    ],
)
def test_max_steps_counts_and_epochs_where_it_is_minus_1(rows, max_steps, epochs, steps):
    assert (
        training.total_steps(rows=rows, batch_size=8, max_steps=max_steps, num_train_epochs=epochs) == steps
    )


@pytest.mark.parametrize(
    ("steps", "rows", "batch_size", "seen"),
    [(0, 39, 8, 0), (4, 39, 8, 32), (5, 39, 8, 39), (6, 39, 8, 47), (3, 39, 512, 117), (30, 45, 8, 225)],
)
def test_the_last_step_of_an_epoch_has_the_rows_that_are_left(steps, rows, batch_size, seen):
    assert training_speed.rows_seen(steps, rows=rows, batch_size=batch_size) == seen
    of_work = Work(rows, 10.0, 1.0, 20, batch_size, steps)
    assert (of_work.rows_in_all, of_work.tokens) == (seen, 10 * seen)
    assert of_work.step_tokens == 10 * min(rows, batch_size)


def test_the_optimizer_is_fused_on_cuda_only():
    assert training.optimizer("cuda") == "adamw_torch_fused"
    assert training.optimizer("cpu") == "adamw_torch"


@pytest.mark.parametrize(("steps", "pays"), [(2500, False), (2650, True)])
def test_compiling_pays_where_what_it_saves_is_longer_than_it_takes(steps, pays):
    # 4 x 7e9 operations a token at 0.45 x 800e12 a second: 7.8e-5 s; 0.08 of 200 s are the 16 s.
    assert (
        Speed(frozen_parameters=7_000_000_000, operations_per_second=8e14).compiling_pays(tokens=steps * 1000)
        is pays
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 100, 500])
def test_validation_happens_one_to_three_times(settings, steps):
    # The Trainer validates every eval_steps, and after the last step.
    assert 1 <= math.ceil(steps / settings(steps, 8).eval_steps) <= 3


# Loss and gradients


def test_loss_is_the_mean_over_answer_tokens_and_eos(model, tokenizer, settings):
    data = splits(tokenizer, 8)
    losses, count = 0.0, 0
    with torch.no_grad():
        for row in data["train"]:
            ids = torch.tensor([row["input_ids"]])
            start = row["labels"].count(-100)
            # The logits at a position foretell the next token.
            logits = model(input_ids=ids).logits[0, start - 1 : -1]
            losses += torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum").item()
            count += len(row["input_ids"]) - start
    probe = run(model, tokenizer, data, settings(1, 8))
    assert probe.losses[0] == pytest.approx(losses / count, rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_gradients_of_packs_are_those_of_the_rows_one_by_one(model, tokenizer, settings, tokens):
    data = splits(tokenizer, 8)
    loss = sum(
        torch.nn.functional.cross_entropy(
            model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1],
            torch.tensor(row["labels"][1:]),
            reduction="sum",
        )
        for row in data["train"]
    )
    loss /= sum(label != -100 for row in data["train"] for label in row["labels"])
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    probe = run(model, tokenizer, data, settings(1, 8), tokens=tokens)
    found = torch.cat([gradient.flatten() for gradient in probe.gradients.values()])
    assert expected.norm() > 0
    # lora_B is zero at first, so lora_A has no gradient: the probe's step is the first.
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.fixture
def recorded(monkeypatch):
    """Trains with recordings that are made up."""
    monkeypatch.setattr(trainer, "Gradients", Recorded)
    monkeypatch.setattr(trainer, "SHAPE_TOKENS", 2)
    monkeypatch.setattr(Recorded, "room", math.inf)
    return Recorded


@pytest.mark.parametrize(("steps", "batch_size"), [(4, 3), (10, 3), (25, 3), (3, 40)])
def test_what_is_recorded_first_is_as_large_as_all_that_follows(
    model, tokenizer, settings, recorded, steps, batch_size
):
    settled = settings(steps, batch_size)
    train(model, splits(tokenizer, 30), settings=settled, callbacks=[], tokens=10_000, replay=True)
    began, first, *others, ended = recorded.computed
    assert began is ended is None
    assert len(others) == steps
    assert first == max(others)


def test_what_is_recorded_first_leaves_no_trace(tiny_base, tokenizer, settings, recorded):
    found = {}
    for replay in (False, True):
        torch.manual_seed(0)
        lora = adapter.lora_config(r=4, alpha=8, dropout=0.0, target_modules="all-linear")
        model, probe = adapter.attach(sql_model.load_base(str(tiny_base), "none"), lora), Probe()
        train(model, splits(tokenizer, 12), settings=settings(3, 4), callbacks=[probe], replay=replay)
        found[replay] = [*probe.losses, probe.seen]
    assert found[True] == pytest.approx(found[False], rel=1e-5)


@pytest.mark.parametrize(("logging_steps", "has_new_shapes"), [(1, False), (2, False), (1, True)])
def test_where_steps_are_recorded_the_next_one_is_computed_before_a_point_is_logged(
    model, tokenizer, settings, recorded, monkeypatch, logging_steps, has_new_shapes
):
    monkeypatch.setattr(trainer, "SHAPE_TOKENS", 2 if has_new_shapes else 1000)
    settled, computed = settings(6, 4, logging_steps=logging_steps), {}

    class Logged(TrainerCallback):
        def on_log(self, args, state, control, *, logs, **kwargs):
            steps = len([tokens for tokens in recorded.computed if tokens]) - 1  # one is the largest of all
            if "loss" in logs:
                computed[state.global_step] = (steps, round(logs["epoch"] * 3))

    train(model, splits(tokenizer, 12), settings=settled, callbacks=[Logged()], tokens=10_000, replay=True)
    alone = {1, 3, 5} if logging_steps == 1 else {1}  # not with a validation, nor at the end
    alone = set() if has_new_shapes else alone  # nor before a recording, whose time is none of the point's
    assert computed == {
        step: (step + (step in alone), step) for step in range(1, 7) if step == 1 or not step % logging_steps
    }


def test_points_are_the_same_where_they_are_logged_late(tiny_base, tokenizer, settings, recorded):
    found = {}
    for replay in (False, True):
        torch.manual_seed(0)
        lora = adapter.lora_config(r=4, alpha=8, dropout=0.0, target_modules="all-linear")
        model, points = adapter.attach(sql_model.load_base(str(tiny_base), "none"), lora), []
        report = training.Reporter(
            lambda metrics, step, points=points: points.append({"step": step} | metrics),
            rows=12,
            batch_size=4,
            speed=Speed(1, 1.0),
        )
        settled = settings(7, 4, logging_steps=2, lr_scheduler_type="linear")
        train(model, splits(tokenizer, 12), settings=settled, callbacks=[report], replay=replay)
        names = ("step", "train_loss", "grad_norm", "learning_rate", "eval_loss")
        found[replay] = [{name: one[name] for name in names if name in one} for one in points]
    assert [one["step"] for one in found[True] if "train_loss" in one] == [1, 2, 4, 6]
    assert len(found[True]) == len(found[False]) > 4
    for late, expected in zip(found[True], found[False], strict=True):
        assert late == pytest.approx(expected, rel=1e-4)


def test_what_did_not_fit_is_halved_and_recorded_first_again(
    model, tokenizer, settings, recorded, monkeypatch, caplog
):
    monkeypatch.setattr(recorded, "room", 100)
    train(model, splits(tokenizer, 30), settings=settings(10, 3), callbacks=[], tokens=10_000, replay=True)
    _, too_large, dropped, largest, *others, _ = recorded.computed
    assert dropped is None
    assert too_large > recorded.room
    assert largest == max(others)
    assert f"going on with {too_large // 2} tokens" in caplog.text


def test_the_adapter_moves_and_the_base_does_not(model, tokenizer, settings):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, tokenizer, splits(tokenizer, 8), settings(2, 4))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".lora_" in name}


def test_loss_falls_on_a_few_rows(model, tokenizer, settings):
    probe = run(model, tokenizer, splits(tokenizer, 4), settings(30, 4, learning_rate=2e-2))
    assert probe.losses[-1] < probe.losses[0] - 0.5


def test_the_mean_loss_comes_back(model, tokenizer, settings):
    probe = Probe()
    mean = train(model, splits(tokenizer, 8), settings=settings(3, 4), callbacks=[probe])
    assert mean == pytest.approx(sum(probe.losses) / 3, rel=1e-4)


def test_validation_takes_few_rows_at_most_3_times(model, tokenizer, settings):
    probe = run(model, tokenizer, splits(tokenizer, 8, 100), settings(7, 2))
    assert probe.evaluations == [3, 6, 7]
    assert probe.evaluated_rows == {8}


@pytest.mark.parametrize(("steps", "rows"), [(3, 8), (30, 30), (64, 64), (500, 64)])
def test_a_validation_has_an_eighth_of_the_rows_of_the_training_and_8_to_64(steps, rows):
    assert validations.rows(steps=steps, batch_size=8) == rows


def test_a_validation_has_the_rows_that_are_asked_for_as_far_as_there_are(model, tokenizer, settings):
    for evaluated, rows in ((20, 20), (200, 100)):
        probe = Probe()
        data = splits(tokenizer, 8, 100)
        train(model, data, settings=settings(1, 2), callbacks=[probe], evaluated=evaluated)
        assert probe.evaluated_rows == {rows}


def test_training_without_validation_rows_reports_no_validation_loss(model, tokenizer, settings):
    data = splits(tokenizer, 8)
    data["validation"] = data["validation"].select([])
    probe = run(model, tokenizer, data, settings(1, 8))
    assert (len(probe.losses), probe.evaluations) == (1, [])


# Reports


@pytest.fixture
def reporter(monkeypatch):
    """A reporter of a training with 4 rows a step, what it logged, its clock and the Trainer's state."""
    clock, state, logged = (
        SimpleNamespace(now=100.0),
        SimpleNamespace(global_step=0, num_input_tokens_seen=0, max_steps=11, log_history=[]),
        [],
    )
    monkeypatch.setattr(device, "time", SimpleNamespace(monotonic=lambda: clock.now))
    # 1,000 operations a token, of 10,000 that the device does in a second.
    speed = Speed(frozen_parameters=250, operations_per_second=1e4)
    found = training.Reporter(
        lambda metrics, step: logged.append((step, metrics)), rows=400, batch_size=4, speed=speed
    )
    found.on_train_begin(None, state, None)

    def log(*, at, step, tokens, later=0, **logs):
        clock.now, state.global_step, state.num_input_tokens_seen = at, step, tokens
        found.on_step_end(None, state, None)
        clock.now += later
        found.on_log(None, state, None, logs=logs)

    return SimpleNamespace(reporter=found, log=log, logged=logged, clock=clock, state=state)


def test_a_report_has_the_projects_names(reporter):
    reporter.log(at=101, step=1, tokens=9, loss=2.0, learning_rate=1e-3, grad_norm=0.5, epoch=0.1)
    [(step, metrics)] = reporter.logged
    assert step == 1
    assert metrics.pop("peak_memory_gib") > 0
    assert metrics == {
        "train_loss": 2.0,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "samples_per_second": 4.0,
        "tokens_per_second": 9.0,
        "mfu": 0.9,
        "seconds_left": 10.0,
    }


def test_speeds_are_those_since_the_last_report(reporter):
    reporter.log(at=110, step=2, tokens=500, loss=2.0)
    reporter.log(at=112, step=5, tokens=600, loss=1.0)
    speeds = [(m["samples_per_second"], m["tokens_per_second"]) for _, m in reporter.logged]
    assert speeds == [(2 * 4 / 10, 500 / 10), (3 * 4 / 2, 100 / 2)]


def test_what_comes_between_the_end_of_a_step_and_its_report_counts_for_the_steps_after(reporter):
    reporter.log(at=110, later=5, step=2, tokens=500, loss=2.0)
    reporter.log(at=120, step=4, tokens=600, loss=1.0)
    assert [m["samples_per_second"] for _, m in reporter.logged] == [2 * 4 / 10, 2 * 4 / 10]


def test_a_validation_is_not_counted(reporter):
    reporter.log(at=110, step=2, tokens=500, loss=2.0)
    reporter.clock.now = 130
    reporter.reporter.on_evaluate(None, reporter.state, None)
    reporter.log(at=131, step=4, tokens=600, loss=1.0)
    assert reporter.logged[-1][1]["samples_per_second"] == 2 * 4


def test_a_validation_loss_is_reported_alone(reporter):
    reporter.log(at=110, step=2, tokens=500, eval_loss=3.0, eval_runtime=1.0)
    assert reporter.logged == [(2, {"eval_loss": 3.0})]


def test_the_trainers_own_summary_is_no_point_of_the_curve(reporter):
    reporter.log(at=110, step=2, tokens=500, train_loss=3.0, train_runtime=1.0)
    assert reporter.logged == []


def test_points_of_both_curves_are_kept(reporter):
    reporter.log(at=110, step=2, tokens=500, loss=2.0)
    reporter.log(at=111, step=2, tokens=500, eval_loss=3.0)
    assert (reporter.reporter.train_loss, reporter.reporter.eval_loss) == ([(2, 2.0)], [(2, 3.0)])


def test_the_curves_of_a_training_that_goes_on_begin_with_what_it_had_reported(reporter):
    history = [{"loss": 2.0, "grad_norm": 0.5, "step": 5}, {"eval_loss": 3.0, "step": 5}]
    reporter.reporter.on_train_begin(
        None, SimpleNamespace(global_step=5, num_input_tokens_seen=9, log_history=history), None
    )
    assert reporter.logged == [(5, {"train_loss": 2.0, "grad_norm": 0.5}), (5, {"eval_loss": 3.0})]
    assert (reporter.reporter.train_loss, reporter.reporter.eval_loss) == ([(5, 2.0)], [(5, 3.0)])


def test_tokens_are_counted_without_padding(model, tokenizer, settings):
    logged = []
    speed = Speed(frozen_parameters=1, operations_per_second=1.0)
    data = splits(tokenizer, 8)
    for batch_size in (8, 32):  # that many, or all that there are
        reporter = training.Reporter(
            lambda metrics, step: logged.append(metrics), rows=8, batch_size=batch_size, speed=speed
        )
        run(model, tokenizer, data, settings(1, batch_size), reporter)
        tokens = sum(map(len, data["train"]["input_ids"]))
        found, *_ = logged
        logged.clear()
        assert found["tokens_per_second"] / found["samples_per_second"] == pytest.approx(tokens / 8)
