"""The same seed, machine and rows give the same dataset and adapter, wherever and in whichever process."""

import os
import subprocess
import sys

import mlflow
import pytest

from steps.text2sql import manifest, tracking
from tests.conftest import PROJECT, QUICK, defaults, plain_rows, words, write_jsonl


def step(name, folder, hash_seed, **values):
    """Run a step in a process of its own, in this folder; its run comes back."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", f"steps.{name}", *words(defaults(name) | values)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return mlflow.search_runs(output_format="list", max_results=1)[0].info.run_id


@pytest.mark.slow
def test_two_processes_in_two_folders_make_the_same_dataset_and_the_same_adapter(store, tiny_base, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", plain_rows(60))
    datasets, adapters = set(), set()
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        prepared = step("prepare_data", folder, hash_seed, base_model=tiny_base, dataset=rows)
        uri = f"runs:/{prepared}/dataset"
        datasets.add(tracking.digest_of(uri))
        values = QUICK | {"lora_dropout": 0.1, "dataset_uri": uri}
        trained = step("train", folder, hash_seed, **values)
        adapters.add(
            manifest.sha256(tracking.download(f"runs:/{trained}/adapter/adapter_model.safetensors", folder))
        )
    assert (len(datasets), len(adapters)) == (1, 1)
