"""Which matrices of a divided base each process keeps."""

import pytest
import torch

from steps.text2sql import pulled_layers

# Of a layer of Mistral-7B, in thousands: q, k, v, o, gate, up, down.
SIZES = (16, 4, 4, 16, 56, 56, 56)


def shares(monkeypatch, processes, layers=8):
    """Names of what each process keeps, by layer, and how much of all it is."""
    monkeypatch.setattr(pulled_layers.dist, "get_world_size", lambda: processes)
    held = [[torch.nn.Parameter(torch.zeros(size, 1)) for size in SIZES] for _ in range(layers)]
    names = {id(one): name for group in held for one, name in zip(group, "qkvogud", strict=True)}
    found = pulled_layers.divided(held)
    kept = [sum(one.nbytes for share in found for one in share[rank]) for rank in range(processes)]
    return [["".join(names[id(one)] for one in part) for part in share] for share in found], kept


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_each_matrix_is_kept_once_and_all_keep_about_as_much(monkeypatch, processes):
    found, kept = shares(monkeypatch, processes)
    assert all(sorted("".join(share)) == sorted("qkvogud") for share in found)
    assert max(kept) - min(kept) <= 4 * max(SIZES)


def test_keys_and_values_mostly_stay_together_and_in_order(monkeypatch):
    found, _ = shares(monkeypatch, 2)
    assert sum(any("kv" in part for part in share) for share in found) >= 6
