"""How long threads of OpenMP wait for each other, as that library says itself."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is Linux's")


def settings_after(statement, **variables):
    """What OpenMP prints of its settings in a process that runs a statement."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", statement],
        env=kept | {"OMP_DISPLAY_ENV": "verbose"} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr


@pytest.mark.parametrize("package", ["steps", "benchmarks"])
def test_threads_wait_in_a_short_loop(package):
    assert "GOMP_SPINCOUNT = '4000'" in settings_after(f"import {package}; import torch")


def test_a_policy_of_the_users_stays():
    load = "import steps; import torch"
    assert "GOMP_SPINCOUNT = '0'" in settings_after(load, OMP_WAIT_POLICY="passive")
    assert "GOMP_SPINCOUNT = '7'" in settings_after(load, GOMP_SPINCOUNT="7")
