"""Calls of MLflow that fail where several processes make them at once, and succeed when tried again."""

import random
import re
import time
from collections.abc import Callable
from typing import Any

from mlflow.exceptions import MlflowException

TRIES = 10
# What databases say of a row that is there by now; MLflow of a name, and after three tries of its own;
# SQLite of a lock.
COLLISION = re.compile(
    r"unique constraint|duplicate|already exists|giving up after|database is locked", re.IGNORECASE
)


def tried_again(call: Callable[[], Any]) -> Any:
    """Result of a call, made up to `TRIES` times while it collides with others; any other error is raised."""
    for _ in range(TRIES - 1):
        try:
            return call()
        except MlflowException as error:
            if not COLLISION.search(str(error)):
                raise
        time.sleep(random.uniform(0, 1))
    return call()
