"""The scripts of benchmarks/ follow the library; what they measure is small here."""

import re
import sys

import pytest

from benchmarks import evaluate_throughput, loss_curve, train_throughput
from steps.text2sql.sql_model import load_base, load_base_tokenizer


@pytest.fixture
def tiny_data(tiny_base):
    return loss_curve.prepared_rows(load_base_tokenizer(str(tiny_base)))


def test_the_packed_training_has_the_losses_of_a_plain_trainer(tiny_base, tiny_data, monkeypatch):
    monkeypatch.setattr(loss_curve, "EMBEDDED_BASE", str(tiny_base))
    plain = loss_curve.plain(load_base_tokenizer(str(tiny_base)), tiny_data, 4)
    assert plain == pytest.approx(loss_curve.project(tiny_data, 4, compiled=False), rel=1e-4)
    assert len(set(plain)) == 4


def test_a_training_throughput_is_of_the_projects_own_training(tiny_base, tiny_data):
    clock = train_throughput.Clock(steps=1, warm_up=2)
    plan = train_throughput.fit_project(
        load_base(str(tiny_base), "nf4"), tiny_data, batch_size=2, steps=3, compiled=False, callbacks=[clock]
    )
    assert "micro-batch a step" in plan
    assert clock.seconds > 0


def test_an_evaluation_throughput_compares_batches_with_single_rows(tiny_base, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_throughput, "EMBEDDED_BASE", str(tiny_base))
    monkeypatch.setattr(sys, "argv", ["evaluate_throughput", "8"])
    evaluate_throughput.main()
    sizes = re.findall(r"^\| (\d+) \| [\d.]+ \| \d+ \| [\d.]+ x \|", capsys.readouterr().out, re.MULTILINE)
    assert sizes[:2] == ["1", "32"]
