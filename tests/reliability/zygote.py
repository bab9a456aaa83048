"""A parent of commands that start at once: everything slow to import is imported before it forks.

`python -m tests.reliability.zygote` reads orders, a JSON object a line, and answers each with the id of the process
that runs `masquerade ARGUMENTS`. It has one thread, so what it forks is as good as new; SIGKILL ends that for good.
"""

from __future__ import annotations

import gc
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

from tests import serving

FIRST = ("masquerade.cli.serve", "masquerade.cli.loading", "masquerade.cli.server")
REAP_SECONDS = 30.0


class Process:
    """A process that is nobody's child here; enough of `subprocess.Popen` for those who wait for it and kill it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._closing = threading.Lock()  # one waits for it, and another kills it
        try:
            self._handle: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._handle = None

    def poll(self) -> int | None:
        """0 once it has ended, however it did."""
        with self._closing:
            if self._handle is not None and select.select([self._handle], [], [], 0)[0]:
                os.close(self._handle)
                self._handle = None
            self.returncode = 0 if self._handle is None else None
            return self.returncode

    def wait(self, timeout: float | None = REAP_SECONDS) -> int:
        """Until it has ended; raises `subprocess.TimeoutExpired`."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(0.005)
        return 0

    def send_signal(self, number: int) -> None:
        with self._closing, suppress(ProcessLookupError):
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Zygote:
    """The parent, as those see it who give the orders."""

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads, **(env or {})},
            text=True,
        )

    def start(self, arguments: list[str], log: Path) -> Process:
        """Run `masquerade ARGUMENTS`; what it writes goes to the end of `log`."""
        assert self._parent.stdin
        assert self._parent.stdout
        self._parent.stdin.write(json.dumps({"arguments": arguments, "log": str(log)}) + "\n")
        self._parent.stdin.flush()
        answer = self._parent.stdout.readline()
        if not answer:
            raise serving.ServerDied("the parent of all servers has ended")
        return Process(int(answer))

    def close(self) -> None:
        """End the parent; its children must have ended."""
        assert self._parent.stdin
        self._parent.stdin.close()
        self._parent.wait()


def main() -> None:
    """Import, then fork for every order."""
    for module in FIRST:
        __import__(module)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            become(order["arguments"], order["log"])
        print(child, flush=True)
    os._exit(0)  # what was imported has nothing to tidy up


def become(arguments: list[str], log: str) -> None:
    """In the child: be the command."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
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
