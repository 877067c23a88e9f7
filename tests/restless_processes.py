"""A step of two processes of which one does not end well: `python -m tests.restless_processes --how …`."""

import os
import signal
import sys

from steps.text2sql import collectives, ranks, step_run
from steps.text2sql.errors import UserError


def body() -> None:
    """End as the word says in the second process, while the first waits for it."""
    how = sys.argv[sys.argv.index("--how") + 1]
    print("from", ranks.index(), flush=True)
    with collectives.joined():
        collectives.smallest(0)
        if ranks.index() == 1:
            {"fails": fail, "breaks": lambda: 1 / 0, "is_killed": kill, "is_stopped": stop, "is_left": leave}[
                how
            ]()
        collectives.smallest(0)


def fail() -> None:
    """As a step does with a message for the user."""
    raise UserError("rows: there are none")


def kill() -> None:
    """As the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    """As NCCL does when it cannot reach the others."""
    raise ranks.LeftAlone("another process is gone: no route to host")


def stop() -> None:
    """As the system does when it is shut down."""
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    step_run.run_in_run(body)
