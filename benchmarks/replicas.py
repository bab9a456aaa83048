"""What Ray costs around an engine: `serve --replicas 1` beside `serve`, both with the demo.

`python -m benchmarks.replicas --json [--quick]`. Turns alternate. CPU time is that of all processes of a server, less
what they take while nobody asks; memory is their proportional set size (PSS). A request is a chat with one token in one
piece; a streamed token is what a long stream costs more than a short one.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks._report import Figure, arguments, report
from tests import serving
from tests.serving import Server

CLIENTS = 8  # at once
SHORT, LONG = 2, 202  # tokens of streams
IDLE_SECONDS = 5.0
TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Side:
    """A server, and what was measured of it."""

    server: Server
    client: httpx.Client
    start_seconds: float
    costs: dict[str, float]  # least CPU-seconds of a request, by its kind

    def ask(self, tokens: int, *, stream: bool) -> float:
        """Seconds to the first byte of an answer that is read to its end."""
        body = {"model": "demo:casual", "prompt": "Once", "max_tokens": tokens, "min_tokens": tokens, "stream": stream}
        started = time.perf_counter()
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            parts = response.iter_bytes()
            next(parts)
            first = time.perf_counter() - started
            for _ in parts:
                pass
        return first

    def measure(self, kind: str, requests: int) -> None:
        """Update the least CPU time of a request of a kind."""
        tokens, stream = {"request": (1, False), "short": (SHORT, True), "long": (LONG, True)}[kind]
        idle = self._measure_idle()
        used, started = count_cpu(self.server.process.pid), time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            [*pool.map(lambda _: self.ask(tokens, stream=stream), range(requests))]
        used = count_cpu(self.server.process.pid) - used - idle * (time.perf_counter() - started)
        self.costs[kind] = min(used / requests, self.costs.get(kind, used))

    def _measure_idle(self) -> float:
        used = count_cpu(self.server.process.pid)
        time.sleep(IDLE_SECONDS)
        return (count_cpu(self.server.process.pid) - used) / IDLE_SECONDS


def main() -> None:
    options = arguments(__doc__, "fewer requests").parse_args()
    report("replicas", list(measure(*((40, 2) if options.quick else (200, 5)))), options.json)


def measure(requests: int, turns: int) -> Iterator[Figure]:
    with ExitStack() as running:
        alone, behind = (_start(running, *more) for more in ((), ("--replicas", "1")))
        sides = {"alone": alone, "behind an ingress": behind}
        first: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(turns):
            for kind in ("request", "short", "long"):
                for side in sides.values():
                    side.measure(kind, requests)
            for _ in range(requests):
                for name, side in sides.items():
                    first[name].append(side.ask(SHORT, stream=True))
        for name, side in sides.items():
            token = (side.costs["long"] - side.costs["short"]) / (LONG - SHORT)
            yield Figure(f"{name}: start", side.start_seconds, "s")
            yield Figure(f"{name}: memory", measure_memory(side.server.process.pid) / 2**20, "MiB")
            yield Figure(f"{name}: CPU time without requests", 100 * side._measure_idle(), "% of a core")
            yield Figure(f"{name}: a request", 1e3 * side.costs["request"], "CPU-ms")
            yield Figure(f"{name}: a streamed token", 1e3 * token, "CPU-ms")
            yield Figure(f"{name}: first token, median", 1e3 * statistics.median(first[name]), "ms")


def _start(running: ExitStack, *more: str) -> Side:
    started = time.perf_counter()
    server = running.enter_context(serving.serve(*more, env={}, start_seconds=600))
    seconds = time.perf_counter() - started
    client = running.enter_context(httpx.Client(base_url=server.base_url, timeout=120))
    side = Side(server, client, seconds, {})
    side.ask(SHORT, stream=True)
    return side


def list_processes(root: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(_read_stat(int(folder.name))[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def count_cpu(root: int) -> float:
    """CPU-seconds of a process and all below it so far, those that have ended included."""
    total = 0
    for process in list_processes(root):
        try:
            total += sum(map(int, _read_stat(process)[11:15]))
        except OSError:
            continue
    return total / TICK


def measure_memory(root: int) -> int:
    """Bytes of a process and all below it, shared pages divided among those that share them."""
    total = 0
    for process in list_processes(root):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def _read_stat(process: int) -> list[str]:
    """The fields of `/proc/PID/stat` after the name: the state, the parent, ..."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


if __name__ == "__main__":
    main()
