"""A step of two processes of which one does not end well: `python -m tests.restless_processes --how …`."""

import atexit
import os
import signal
import sys
import time

from steps.text2sql import collectives, ranks, step_run
from steps.text2sql.errors import UserError


def body() -> None:
    """End as the word says in the second process, while the first waits for it or is busy."""
    how = sys.argv[sys.argv.index("--how") + 1]
    print("from", ranks.index(), flush=True)
    with collectives.joined():
        collectives.smallest(0)
        if ranks.index() == 1:
            SECOND[how]()
        FIRST.get(how, lambda: None)()
        collectives.smallest(0)


def fail() -> None:
    """As a step does with a message for the user."""
    raise UserError("rows: there are none")


def fail_and_block() -> None:
    """As a step whose memory on the GPU cannot be freed, since NCCL waits there for the others."""
    atexit.register(time.sleep, 3600)
    fail()


def kill() -> None:
    """As the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    """As NCCL does when it cannot reach the others."""
    raise ranks.LeftAlone("another process is gone: no route to host")


def stop() -> None:
    """As the system does when it is shut down."""
    os.kill(os.getpid(), signal.SIGTERM)


def be_busy() -> None:
    """As a process that computes, and notices nothing of the others."""
    time.sleep(3600)


def be_stopped_late() -> None:
    """Get the launcher's signal just when the end of another process is told."""
    tell = ranks.tell_ending

    def stopped_before(kind: ranks.Kind, *reason: str) -> bool:
        if kind == "left":
            stop()
        return tell(kind, *reason)

    ranks.tell_ending = stopped_before


SECOND = {
    "fails": fail,
    "fails_and_is_blocked": fail_and_block,
    "breaks": lambda: 1 / 0,
    "is_killed": kill,
    "is_killed_beside_a_busy_one": kill,
    "is_killed_beside_one_stopped_late": kill,
    "is_stopped": stop,
    "is_left": leave,
}
FIRST = {"is_killed_beside_a_busy_one": be_busy, "is_killed_beside_one_stopped_late": be_stopped_late}


if __name__ == "__main__":
    step_run.run_in_run(body)
