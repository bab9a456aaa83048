"""What a start of the server takes, from the command to the first answer, beside the imports that it cannot avoid.

`python -m benchmarks.start --json [--model M ...] [--runs N] [--quick]`. Each run starts `masquerade serve` with a new
store and one thread, and asks for one token until there is an answer. CPU time is that of the process, user and system;
it counts where other work shares the cores. The runs of all models alternate, and the least of each counts. The first
round, which fills the page cache and compiles Python, is not counted.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks._report import Figure, arguments, report
from masquerade.sources import find_model
from tests.serving import ServerDied, free_port

FLOORS = {
    "import torch, transformers": "import torch, transformers",
    "import torch and transformers' Llama": "import torch; from transformers.models.llama import modeling_llama",
}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
WALL_SECONDS = "<= 5"  # of a model in the page cache, on cores without other work


class Cost(NamedTuple):
    """CPU seconds and wall seconds of a start."""

    cpu: float
    wall: float


def main() -> None:
    parser = arguments(__doc__, "one run of each")
    parser.add_argument("--model", action="append")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    models = options.model or ["demo", "smollm2"]
    report("start", list(measure(models, 1 if options.quick else options.runs)), options.json)


def measure(models: Sequence[str], runs: int) -> Iterator[Figure]:
    starts: dict[str, Callable[[], Cost]] = {name: lambda code=code: run(code) for name, code in FLOORS.items()}
    starts |= {f"serve --model {name}": lambda name=name: serve(name) for name in models}
    rounds = [{name: start() for name, start in starts.items()} for _ in range(1 + runs)][1:]
    for name in starts:
        yield Figure(f"{name}, CPU time", min(costs[name].cpu for costs in rounds), "s")
        bound = None if name in FLOORS else WALL_SECONDS
        yield Figure(f"{name}, wall time", min(costs[name].wall for costs in rounds), "s", bound)


def run(code: str) -> Cost:
    """The cost of Python code, with the end of its process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=ONE_THREAD, check=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall)


def serve(model: str) -> Cost:
    """The cost of a server until its first answer."""
    name, port = find_model(model).name, free_port()
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w+b") as log:
        command = [sys.executable, "-m", "masquerade", "serve", "--model", model, "--port", str(port)]
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--store", str(Path(folder, "store"))], env=ONE_THREAD, stdout=log, stderr=log
        )
        try:
            while not answers(port, name):
                if process.poll() is not None:
                    raise ServerDied(Path(folder, "log").read_text())
                time.sleep(0.05)
            return Cost(read_cpu_seconds(process.pid), time.perf_counter() - started)
        finally:
            process.kill()
            process.wait()


def answers(port: int, model: str) -> bool:
    """Whether a chat of one token is answered."""
    body = {"model": model, "messages": [{"role": "user", "content": "How are you?"}], "max_tokens": 1}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as response:
            return bool(response.read())
    except urllib.error.HTTPError as refusal:
        refusal.close()
        return False
    except OSError:
        return False


def read_cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, as Linux reports it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
