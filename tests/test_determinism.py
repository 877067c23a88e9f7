"""The same seed, machine and rows give the same dataset and adapter, wherever and in whichever process."""

import json
import os
import subprocess
import sys

import pytest

from steps.text2sql import artifacts, manifest
from tests.conftest import PROJECT, QUICK, call_step, plain_rows, prepared_uri, write_jsonl

# In a process of its own, in another folder, with another seed of Python's hashes.
MAKE = """\
import json, sys
from pathlib import Path
from tests.test_determinism import make
print("MADE " + json.dumps(make(Path(sys.argv[1]), Path(sys.argv[2]), Path.cwd())))
"""


def make(base, rows, scratch):
    """Digests of a dataset and of an adapter that was trained on it."""
    uri = prepared_uri(base, rows)
    trained = call_step("train", **QUICK | {"lora_dropout": 0.1, "dataset_uri": uri})
    weights = artifacts.download(f"runs:/{trained.info.run_id}/adapter/adapter_model.safetensors", scratch)
    return [artifacts.digest_of(uri), manifest.sha256(weights)]


@pytest.mark.slow
def test_two_processes_in_two_folders_make_the_same_dataset_and_the_same_adapter(store, tiny_base, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", plain_rows(60))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MAKE, str(tiny_base), str(rows)],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    [line] = [one for one in done.stdout.splitlines() if one.startswith("MADE ")] or [done.stderr]
    assert make(tiny_base, rows, tmp_path) == json.loads(line.removeprefix("MADE "))
