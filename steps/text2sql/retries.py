"""Calls of MLflow that fail where several processes make them at once, and succeed when tried again."""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mlflow.exceptions import MlflowException

TRIES = 10


def tried_again(call: Callable[[], Any]) -> Any:
    """Result of a call, made up to `TRIES` times; what the last one raises is raised."""
    for _ in range(TRIES - 1):
        with suppress(MlflowException):
            return call()
        time.sleep(random.uniform(0, 1))
    return call()
