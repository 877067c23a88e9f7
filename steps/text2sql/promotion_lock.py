"""One promotion of a model at a time, whichever machines they run on.

MLflow's registry cannot move an alias on condition, but it makes a registered model of a given name only
once: its stores have the name as primary key, SQLite, PostgreSQL, MySQL and those behind a server alike.
So the lock is an empty registered model `<name>.lock`, which says in its description what it is, and lives
for the second that an alias is moved in. A killed holder's lock is taken over: at once if its run has ended
or is gone, and after `LEASE_SECONDS` if the run says that it still runs.

Not covered: a holder that stands still for over `LEASE_SECONDS` between its last check and moving the alias.
"""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import mlflow
from mlflow.entities import RunStatus
from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException

from steps.text2sql.errors import UserError

# Moving the alias is about ten calls to the registry: under a second to a local store, some to a far one.
LEASE_SECONDS = 60.0
# Room for several promotions in a row, each killed at the worst moment.
WAIT_SECONDS = 300.0
POLL_SECONDS = 0.2
RUN, TOKEN = "promotion_lock_run", "promotion_lock_token"


@dataclass(frozen=True)
class Lock:
    """A claim to the lock of a model, by a run; every claim has a token of its own."""

    model: str
    run_id: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def name(self) -> str:
        """Name of the registered model that is the lock."""
        return f"{self.model}.lock"

    def check(self) -> None:
        """Make sure, before the alias is moved, that nobody took the lock over.

        Raises:
            UserError: somebody did.
        """
        if holder(self) != self:
            raise UserError(
                f"{self.name}: another promotion took the lock over, since this one held it for over "
                f"{LEASE_SECONDS:.0f} s; nothing was moved. Run it again."
            )


@contextmanager
def held(model: str, *, run_id: str) -> Iterator[Lock]:
    """Hold the lock of a model during the block.

    Raises:
        UserError: it was held by others for `WAIT_SECONDS`, or something else has its name.
    """
    lock = Lock(model, run_id)
    try:
        _acquire(lock)
        yield lock
    finally:
        if holder(lock) == lock:
            _delete(lock.name)


def _acquire(lock: Lock) -> None:
    start = time.monotonic()
    seen, since = None, start
    while not _create(lock):
        now, other = time.monotonic(), holder(lock)
        if other != seen:
            seen, since = other, now
        if other and (_has_ended(other.run_id) or now - since > LEASE_SECONDS):
            _take_away(other)
        elif now - start > WAIT_SECONDS:
            raise UserError(
                f"{lock.name}: another promotion has held this lock, or one after the other has, for "
                f"{WAIT_SECONDS:.0f} s, now run {other.run_id if other else 'none'}; nothing was moved. "
                "Wait for it to end, or end it, and promote again."
            )
        else:
            time.sleep(POLL_SECONDS)


def _create(lock: Lock) -> bool:
    """Make the registered model that is the lock; False if there is one."""
    says = (
        f"Lock of the promote step of {lock.model}, held by run {lock.run_id} while it moves the alias "
        "champion, and removed then. It holds no versions. If no promotion is at work, delete it."
    )
    tags = {RUN: lock.run_id, TOKEN: lock.token}
    try:
        mlflow.MlflowClient().create_registered_model(lock.name, tags=tags, description=says)
    except MlflowException as error:
        # The second code: it was there, and was removed before the store could look at it.
        if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
            raise
        return holder(lock) == lock  # it is this one if the answer to a first request was lost
    return True


def holder(lock: Lock, *, name: str | None = None) -> Lock | None:
    """Who holds the lock now, if anybody; `name` if the lock has been renamed.

    Raises:
        UserError: a registered model has the name of the lock and is none.
    """
    name = name or lock.name
    while (found := _read(name)) and TOKEN not in found.tags:
        # MLflow reads a model first and its tags then: a lock that is removed in between seems to have none.
        again = _read(name)
        if again and again.creation_timestamp == found.creation_timestamp:
            raise UserError(
                f"registered_model_name={lock.model}: its lock would be the registered model {name}, which "
                "is another one; nothing was moved. Rename that one."
            )
    return Lock(lock.model, found.tags[RUN], found.tags[TOKEN]) if found else None


def _read(name: str) -> RegisteredModel | None:
    try:
        return mlflow.MlflowClient().get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    return None


def _has_ended(run_id: str) -> bool:
    """Whether a run is over, deleted or unknown."""
    try:
        info = mlflow.get_run(run_id).info
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return True
    return info.lifecycle_stage == "deleted" or RunStatus.is_terminated(RunStatus.from_string(info.status))


def _take_away(dead: Lock) -> None:
    """Remove a dead holder's lock, which only one of those who try succeeds in.

    Renaming, which the store does as a whole, shows whose lock it was: one that was renewed meanwhile is
    given back. Its holder checks before it moves the alias.
    """
    client, aside = mlflow.MlflowClient(), f"{dead.token}.lock"
    with suppress(MlflowException):  # another one was first
        client.rename_registered_model(dead.name, aside)
        if holder(dead, name=aside) == dead:
            _delete(aside)
        else:
            client.rename_registered_model(aside, dead.name)


def _delete(name: str) -> None:
    with suppress(MlflowException):  # somebody took it for dead and removed it
        mlflow.MlflowClient().delete_registered_model(name)
