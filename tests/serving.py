"""Starts a real server in a separate process for tests that use HTTP, waits for it and ends it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.zygote import Process, Zygote

START_SECONDS = 120.0
STOP_SECONDS = 60.0
_zygotes: list[Zygote] = []


class ServerDied(Exception):
    """The process ended, or never became ready; holds what it said on stderr."""


@dataclass(frozen=True)
class Server:
    """A server that answers at `base_url` and writes its log to `log`."""

    base_url: str
    process: subprocess.Popen[bytes] | Process
    log: Path

    def said(self) -> str:
        """Everything that it wrote so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def forking() -> Iterator[None]:
    """Within the block, `serve` forks servers from a process that has imported everything, which takes three seconds of
    CPU time: once, and not for each server.
    """
    _zygotes.append(Zygote())
    yield
    _zygotes.pop().close()


@contextmanager
def serve(
    *arguments: str, env: Mapping[str, str] | None = None, port: int = 0, start_seconds: float = START_SECONDS
) -> Iterator[Server]:
    """Run `masquerade serve` with the arguments, on a (free) port of loopback, until the block ends.

    Without `--store` among the arguments it gets an empty store that goes with it. One thread computes, so that servers
    of several tests do not fight for cores; `env` adds to the environment.
    """
    port = port or free_port()
    with tempfile.TemporaryDirectory(prefix="masquerade-") as folder:
        store = () if "--store" in arguments else ("--store", str(Path(folder, "store")))
        command = ["serve", "--host", "127.0.0.1", "--port", str(port), *store, *arguments]
        log = Path(folder, "log")
        # `env` may be for the start of Python itself
        process = _zygotes[-1].start(command, log) if _zygotes and env is None else _start(command, log, env or {})
        server = Server(f"http://127.0.0.1:{port}", process, log)
        try:
            wait_until_ready(server, start_seconds)
            yield server
        finally:
            stop(process)


def _start(command: list[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "masquerade", *command],
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_ready(server: Server, seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not _is_ready(server.base_url):
        if server.process.poll() is not None:
            raise ServerDied(f"exit status {server.process.returncode} before it was ready:\n{server.said()}")
        if time.monotonic() > deadline:
            raise ServerDied(f"not ready after {seconds:.0f} s:\n{server.said()}")
        time.sleep(0.05)


def _is_ready(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as refusal:
        refusal.close()
        return False
    except OSError:
        return False


def stop(process: subprocess.Popen[bytes] | Process) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
