"""The process that SQL runs in, as the process that asks it sees it: its start, its deadline, its end."""

import atexit
import math
import os
import select
import subprocess
import sys
import threading
import time
from typing import Any

from steps.text2sql import sql_worker

# How long after a deadline the process is killed: SQLite stops by itself within milliseconds, if it can.
GRACE_SECONDS = 0.05
# It takes 0.03 s; a machine may be busy.
START_SECONDS = 60

# ["rows", rows], ["error", reason], ["late"] or ["died"]
Reply = list[Any]


class SqlProcess:
    """A long-lived sql_worker: started when it is first needed, replaced when it was late or died.

    Whoever asks holds `lock`.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def ask(self, request: dict[str, Any], seconds: float) -> list[Reply]:
        """The replies of sql_worker to a request: to opening the database, then to each query.

        A `["late"]` or `["died"]` may be the last before its time: that query ended the process.
        """
        request = request | {"seconds": seconds}
        try:
            is_new = self._start()
            replies = self._replies(request, seconds + GRACE_SECONDS)
            if replies == [["died"]] and not is_new:  # killed while it waited, which could not be seen yet
                self._start()
                replies = self._replies(request, seconds + GRACE_SECONDS)
        except BaseException:  # Ctrl-C among them: the next reply would be one to this request
            self.stop()
            raise
        return replies

    def _start(self) -> bool:
        """Start a process unless one runs; whether it did."""
        if self._process and self._process.poll() is None:
            return False
        self.stop()
        # A session of its own: Ctrl-C is for us, and we end it. Isolated: nothing but the standard library.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", sql_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env=os.environ | {"LC_ALL": "C"},  # the archive of all locales counts as memory
        )
        os.set_blocking(self._process.stdin.fileno(), False)
        if self._receive(time.monotonic() + START_SECONDS) != ["rows", []]:
            raise RuntimeError(f"{sys.executable} {sql_worker.__file__} did not start")
        return True

    def _replies(self, request: dict[str, Any], seconds: float) -> list[Reply]:
        replies, deadline = [], time.monotonic() + seconds
        try:
            self._send(request, deadline)
            replies.append(self._receive(deadline))
            while replies[0][0] == "rows" and len(replies) <= len(request["queries"]):
                replies.append(self._receive(deadline))
                deadline = time.monotonic() + seconds
        except TimeoutError:
            self.stop()
            replies.append(["late"])
        except ConnectionError:
            self.stop()
            replies.append(["died"])
        return replies

    def _send(self, request: dict[str, Any], deadline: float) -> None:
        file = self._process.stdin.fileno()
        message = f"{sql_worker.ENCODER.encode(request)}\n".encode(errors="surrogatepass")
        while message:
            _wait(file, select.POLLOUT, deadline)
            message = message[os.write(file, message) :]

    def _receive(self, deadline: float) -> Reply:
        parts = [self._unread]
        while b"\n" not in parts[-1]:
            _wait(self._process.stdout.fileno(), select.POLLIN, deadline)
            parts.append(os.read(self._process.stdout.fileno(), 1 << 16))
            if not parts[-1]:
                raise ConnectionResetError
        line, _, self._unread = b"".join(parts).partition(b"\n")
        kind, *rest = sql_worker.decoded(line)
        return [kind, [tuple(row) for row in rest[0]]] if kind == "rows" else [kind, *rest]

    def stop(self) -> None:
        """Kill the process if there is one."""
        process, self._process, self._unread = self._process, None, b""
        if process:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def forget(self) -> None:
        """After a fork, in the child: the process is the parent's."""
        if self._process:
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.returncode = 0  # it is not ours to wait for
        self.__init__()


def _wait(file: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(file, event)
    if not poll.poll(max(math.ceil((deadline - time.monotonic()) * 1000), 0)):
        raise TimeoutError


PROCESS = SqlProcess()
os.register_at_fork(after_in_child=PROCESS.forget)
atexit.register(PROCESS.stop)
