"""A parent of commands that start at once: everything slow to import is imported before it forks.

`python -m tests.zygote` reads orders, a JSON object a line. It answers `start` with the id of the process that runs
`masquerade ARGUMENTS`, and `reap` with the exit status of one that has ended. It has one thread, so what it forks is as
good as new.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from masquerade.cli import heap

REAP_SECONDS = 30.0


class Zygote:
    """The parent, as those see it who give the orders."""

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self._env = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **(env or {})}
        self._asking = threading.Lock()
        self._parent: subprocess.Popen[str] | None = None

    def start(self, arguments: list[str], log: Path) -> Process:
        """Run `masquerade ARGUMENTS` here and with the present environment; what it writes goes to the end of `log`."""
        order = {"arguments": arguments, "log": str(log), "env": {**os.environ, **self._env}, "folder": os.getcwd()}
        return Process(self, self.ask({"start": order}))

    def ask(self, order: Mapping[str, Any]) -> int:
        """The answer to an order; the first one starts the parent."""
        with self._asking:
            if self._parent is None:
                self._parent = subprocess.Popen(
                    [sys.executable, "-m", "tests.zygote"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, **self._env},
                    text=True,
                )
            assert self._parent.stdin
            assert self._parent.stdout
            self._parent.stdin.write(json.dumps(order) + "\n")
            self._parent.stdin.flush()
            if answer := self._parent.stdout.readline():
                return int(answer)
        raise RuntimeError("the parent of all servers has ended")

    def close(self) -> None:
        """End the parent; its children must have ended."""
        if self._parent:
            self._parent.communicate()


class Process:
    """What a zygote has started, with the part of `subprocess.Popen` that waits for a process and ends it."""

    def __init__(self, parent: Zygote, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._parent = parent
        self._closing = threading.Lock()  # one waits for it, and another kills it
        self._handle = os.pidfd_open(pid)  # a child that has ended keeps its id until it is reaped

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""
        with self._closing:
            if self.returncode is None and select.select([self._handle], [], [], 0)[0]:
                os.close(self._handle)
                self.returncode = self._parent.ask({"reap": self.pid})
            return self.returncode

    def wait(self, timeout: float | None = REAP_SECONDS) -> int:
        """Its exit status, once it has ended; raises `subprocess.TimeoutExpired`."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(0.005)
        return status

    def send_signal(self, number: int) -> None:
        with self._closing, suppress(ProcessLookupError):
            if self.returncode is None:
                signal.pidfd_send_signal(self._handle, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def main() -> None:
    """Import, then fork for every order."""
    with heap.importing():
        from masquerade.cli import loading, server  # noqa: F401 - what `masquerade serve` imports
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
    for line in sys.stdin:
        order = json.loads(line)
        if "reap" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["reap"], 0)[1])
        elif not (answer := os.fork()):
            become(**order["start"])
        print(answer, flush=True)
    os._exit(0)  # what was imported has nothing to tidy up


def become(arguments: list[str], log: str, env: Mapping[str, str], folder: str) -> None:
    """In the child: be the command."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = ["masquerade", *arguments]
    status = 0
    try:
        from masquerade.cli import main as command

        command()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
