"""The scripts of benchmarks/ follow the library; what they measure is small here."""

import argparse
import itertools
import json
import re
import statistics
import sys

import mlflow
import pandas
import pytest
import torch

from benchmarks import evaluate_throughput, loss_curve, package, recipe, several_gpus, train_throughput
from steps.text2sql import adapter, sample_data, splits, tokenization
from steps.text2sql.sql_model import load_base, load_base_tokenizer
from tests.conftest import tracking_at


@pytest.fixture
def tiny_data(tiny_base):
    return loss_curve.prepared_rows(load_base_tokenizer(str(tiny_base)), None)


def test_the_packed_training_has_the_losses_of_a_plain_trainer(tiny_base, tiny_data, monkeypatch):
    monkeypatch.setattr(loss_curve, "EMBEDDED_BASE", str(tiny_base))
    how = {"steps": 4, "learning_rate": 1e-3}
    plain = loss_curve.plain(load_base_tokenizer(str(tiny_base)), tiny_data, **how)
    assert plain == pytest.approx(loss_curve.project(tiny_data, **how, compiled=False), rel=1e-4)
    assert plain == pytest.approx(
        loss_curve.plain(load_base_tokenizer(str(tiny_base)), tiny_data, **how, parts=2), rel=1e-4
    )
    assert len(set(plain)) == 4


def test_a_training_throughput_is_of_the_projects_own_training(tiny_base, tiny_data):
    clock = train_throughput.Clock(steps=1, warm_up=2)
    plan = train_throughput.fit_project(
        load_base(str(tiny_base), "nf4"), tiny_data, batch_size=2, steps=3, compiled=False, callbacks=[clock]
    )
    assert "micro-batch a step" in plan
    assert clock.seconds > 0


def test_trls_trainer_runs_where_it_is_installed(tmp_path):
    pytest.importorskip("trl", reason="trl is not installed; pip install trl")
    folder = train_throughput.make_weights("tiny", tmp_path)
    clock = train_throughput.Clock(steps=1, warm_up=1)
    train_throughput.train_trl(folder, 2, 2, clock)
    assert clock.seconds > 0


def test_an_evaluation_throughput_compares_batches_with_single_rows(tiny_base, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_throughput, "EMBEDDED_BASE", str(tiny_base))
    monkeypatch.setattr(sys, "argv", ["evaluate_throughput", "16"])
    evaluate_throughput.main()
    row = r"^\| (\d+) \| [\d.]+ \| \d+ \| ([\d.]+) x \(([\d.]+) to ([\d.]+)\) \|"
    found = re.findall(row, capsys.readouterr().out, re.MULTILINE)
    assert found[0] == ("1", "1.0", "1.0", "1.0")
    assert found[1][0] == "32"
    assert all(float(low) <= float(middle) <= float(high) for _, middle, low, high in found)


@pytest.fixture
def recipe_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    pandas.DataFrame(sample_data.generate(7)[::10]).to_json(file, orient="records", lines=True)
    return file


def test_recipes_are_chosen_on_rows_whose_tables_none_is_trained_on(recipe_rows, monkeypatch):
    monkeypatch.setattr(recipe, "CHOICE_ROWS", 40)
    rows = pandas.read_json(recipe_rows, lines=True)
    train, choice = recipe.table_apart(rows)
    assert len(train) + len(choice) == len(rows)
    assert 20 < len(choice) <= 40
    groups = pandas.Series(splits.groups(rows["context"]), index=rows.index)
    assert set(groups[train.index]).isdisjoint(groups[choice.index])


def test_recipes_are_trained_and_scored_over_seeds(tiny_base, recipe_rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "EMBEDDED_BASE", str(tiny_base))
    monkeypatch.setattr(recipe, "CHOICE_ROWS", 40)
    monkeypatch.setattr(recipe, "MAX_NEW_TOKENS", 2)
    out = tmp_path / "found.jsonl"
    given = ["recipe", "--rows", str(recipe_rows), "--steps", "2", "--seeds", "0", "1", "--out", str(out)]
    names = [
        "defaults",
        "EVA",
        "gradient",
        "LoftQ",
        "not corrected & plain scale & cosine & clip 1.0",
        "LoRA+ 4 & learning rate 0.002",
        "balanced lengths",
        "mean of last 20 %",
    ]
    monkeypatch.setattr(sys, "argv", [*given, "--recipes", *names])
    recipe.main()
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["recipe"] for line in lines] == names * 2
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["recipe", "--rows", str(recipe_rows), "--table", str(out)])
    recipe.main()
    head, _, *found = capsys.readouterr().out.splitlines()
    assert "choice, exact match" in head
    assert [row.split(" | ")[0] for row in found] == [f"| {name}" for name in names]


def test_an_adapter_can_begin_on_the_directions_of_the_frozen_weights_gradient(
    tiny_base, recipe_rows, monkeypatch
):
    monkeypatch.setattr(recipe, "EMBEDDED_BASE", str(tiny_base))
    rows = recipe.prepared(pandas.read_json(recipe_rows, lines=True), recipe.Recipe())["train"]
    model = adapter.attach(load_base(str(tiny_base), "none"), train_throughput.project_lora())
    found = recipe.weight_gradients(model, rows)
    recipe.start_on_gradients(model, rows)
    for layer in found:
        layer.base_layer.weight.requires_grad_()
    for batch in itertools.islice(recipe.batches_of(rows), recipe.GRADIENT_BATCHES):
        model(**batch).loss.backward()  # B is zero: the adapter changes nothing
    assert len(found) == 2 * 7
    for layer, gradient in found.items():
        torch.testing.assert_close(gradient, layer.base_layer.weight.grad, rtol=1e-3, atol=1e-6)
        directions = torch.linalg.svd(gradient).Vh[:4]
        held = layer.lora_A["default"].weight * 3**0.5
        torch.testing.assert_close((directions @ held.T).norm(dim=1), torch.ones(4), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("defaults", type(None)), ("Muon", torch.optim.Muon), ("Riemannian", torch.optim.AdamW)],
)
def test_a_recipe_has_its_own_optimizer_with_its_own_rate(tiny_base, name, kind):
    model = adapter.attach(load_base(str(tiny_base), "none"), train_throughput.project_lora())
    one = recipe.recipe_of(f"{name} & learning rate 0.003")
    found = recipe.optimizer(model, one)
    assert isinstance(found, kind)
    if found:
        assert {group["lr"] for group in found.param_groups} == {0.003}
        before = [weight.clone() for weight in model.parameters() if weight.requires_grad]
        model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
        found.step()
        after = [weight for weight in model.parameters() if weight.requires_grad]
        assert not all(map(torch.equal, before, after))


def test_a_quick_measurement_reads_right_answers_instead_of_generating(
    tiny_base, recipe_rows, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(recipe, "EMBEDDED_BASE", str(tiny_base))
    monkeypatch.setattr(recipe, "CHOICE_ROWS", 40)
    monkeypatch.setattr(recipe, "generate", None)
    monkeypatch.setattr(recipe, "is_likeliest", lambda logits, labels: labels[:, 0] == tokenization.IGNORED)
    out = tmp_path / "found.jsonl"
    given = ["recipe", "--rows", str(recipe_rows), "--steps", "2", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", [*given, "--recipes", "defaults", "--quick", "--out", str(out)])
    recipe.main()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*given, "--table", str(out)])
    recipe.main()
    head, _, row = capsys.readouterr().out.splitlines()
    assert head == "| recipe | steps | seeds | choice, likeliest | to defaults | training, s |"
    assert re.fullmatch(r"\| defaults \| 2 \| 1 \| 100.0% \| \+0.0% \| \d+ \|", row)


def test_recipes_are_ordered_and_compared_with_the_defaults_seed_by_seed(recipe_rows, tmp_path):
    found = {
        "defaults": {0: 0.4, 1: 0.5, 2: 0.6},
        "worse": {2: 0.5},
        "better": {1: 0.51, 0: 0.43},
    }
    lines = [
        {"recipe": name, "steps": 60, "seed": seed, "train_seconds": 2 + seed, "sets": {}}
        | {"likeliest": {"choice": share, "spider": 0.1}}
        for name, shares in found.items()
        for seed, share in shares.items()
    ]
    out = tmp_path / "found.jsonl"
    out.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    given = argparse.Namespace(
        table=out, rows=recipe_rows, all_rows=False, validation=None, spider=None, databases=None
    )
    _, *rows = recipe.table(given)
    defaults, worse, better = (
        ["defaults", 60, 3, "50.0% ± 24.8", "10.0% ± 0.0", "+0.0% ± 0.0", "3"],
        ["worse", 60, 1, "50.0%", "10.0%", "-10.0%", "4"],
        ["better", 60, 2, "47.0% ± 50.8", "10.0% ± 0.0", "+2.0% ± 12.7", "2"],
    )
    assert [[*row] for row in rows] == [defaults, worse, better]


def test_an_answer_is_likeliest_where_each_of_its_tokens_is():
    ignored = tokenization.IGNORED
    labels = torch.tensor([[ignored, ignored, 2, 1], [ignored, 2, 1, ignored], [ignored, 1, 2, ignored]])
    ahead = torch.tensor([[0, 2, 1, 0], [2, 0, 0, 0], [1, 2, 0, 0]])
    logits = torch.nn.functional.one_hot(ahead, 3).float()
    assert recipe.is_likeliest(logits, labels).tolist() == [True, False, True]


def test_a_score_counts_answers_as_served_and_as_generated():
    rows = pandas.DataFrame(
        {"context": ["CREATE TABLE t (mascot TEXT)"] * 4, "answer": ["SELECT mascot FROM t"] * 4}
    )
    texts = ["SELECT mascot FROM t", "SELECT masc FROM t", "SELECT 1 FROM t", "SELEC"]
    found = recipe.score(rows, {"generated": texts, "stopped": [True, True, True, False]})
    assert found == {"exact match": 0.5, "unrepaired": 0.25, "valid": 0.75, "stopped": 0.75}


def test_an_interval_is_students():
    values = [0.5, 0.6, 0.7]
    half_width = 4.303 * statistics.stdev(values) / 3**0.5  # t of 2 degrees of freedom
    assert recipe.interval(values) == f"60.0% ± {100 * half_width:.1f}"
    assert recipe.interval([0.5]) == "50.0%"


def test_a_package_gives_the_answers_of_the_model_that_was_trained(
    tiny_base, recipe_rows, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(recipe, "EMBEDDED_BASE", str(tiny_base))
    monkeypatch.setattr(package, "EMBEDDED_BASE", str(tiny_base))
    monkeypatch.setattr(recipe, "MAX_NEW_TOKENS", 8)
    files = ["--rows", str(recipe_rows), "--validation", str(recipe_rows)]
    monkeypatch.setattr(sys, "argv", ["package", *files, "--steps", "20", "--answers", "6"])
    with tracking_at(f"sqlite:///{tmp_path}/unused.db"):
        package.main()
    assert capsys.readouterr().out.splitlines()[-1] == "| package | 0.0% | 6 of 6 |"


def test_answers_of_a_package_that_differ_are_counted():
    rows = pandas.DataFrame({"context": ["CREATE TABLE t (a TEXT)"] * 2, "answer": ["SELECT a FROM t"] * 2})
    *_, served = package.table(rows, ["SELECT a FROM t"] * 2, ["SELECT a FROM t", "SELECT 1"])
    assert served == ("package", "50.0%", "1 of 2")


@pytest.fixture
def two_runs(tmp_path):
    """Ids of two runs with the points of a training each; the second is twice as fast."""
    with tracking_at(f"sqlite:///{tmp_path}/mlflow.db"):
        found = []
        for losses, speeds, memory in [([4.0, 2.0, 1.0], [1, 10, 20], 8), ([4.4, 2.0, 1.01], [1, 20, 40], 4)]:
            with mlflow.start_run() as run:
                for step, (loss, rows) in enumerate(zip(losses, speeds, strict=True), start=1):
                    metrics = {"train_loss": loss, "samples_per_second": rows, "peak_memory_gib": memory}
                    metrics["grad_norm"] = 10 * loss
                    mlflow.log_metrics(metrics, step=step)
            found.append(run.info.run_id)
        yield dict(zip(("one GPU", "DDP"), found, strict=True))


def test_trainings_on_several_gpus_are_compared_with_that_on_one(two_runs):
    _, one, two = several_gpus.trained(two_runs, after=1)
    assert one == ("one GPU", "0.00%", "0.0%", "15.00", "1.00 x", "8.0", "100%")
    assert two == ("DDP", "10.00%", "10.0%", "30.00", "2.00 x", "4.0", "50%")


def test_a_training_that_fails_on_several_gpus_is_named_and_others_are_made_once(
    tmp_path, monkeypatch, capsys
):
    def run(folder, step, *, parameters, **named):
        if parameters["launch"] == "fsdp":
            raise mlflow.exceptions.ExecutionException("no")
        return argparse.Namespace(run_id=f"id of {step}")

    monkeypatch.setattr(mlflow.projects, "run", run)
    found = several_gpus.Runs(tmp_path)
    assert [found.get(name, "train", launch=name.lower()) for name in ("DDP", "FSDP")] == ["id of train", ""]
    assert "FAILED: FSDP: no" in capsys.readouterr().out
    monkeypatch.setattr(mlflow.projects, "run", None)
    again = several_gpus.Runs(tmp_path)
    assert again.get("DDP", "train", launch="ddp") == "id of train"
    with pytest.raises(TypeError):  # made again where a value is another
        again.get("DDP", "train", launch="ddp", max_steps=7)


def test_losses_after_a_checkpoint_are_compared_with_those_of_the_whole_training(two_runs):
    resumed = {("one GPU", "DDP"): two_runs["DDP"]}
    assert list(several_gpus.gone_on(resumed, two_runs, after=1))[1] == ("one GPU", "DDP", "1.00%")
