"""Builds as tasks of a Ray cluster: each runs `masquerade build` on a node that has room for it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from masquerade.errors import InvalidValue

LAST_LINES = 20  # of a build's log that are kept for its error
REPORT = "report.json"  # what a build prints on stdout


@dataclass(frozen=True)
class BuildTask:
    """A build: the options of `masquerade build`, and the content of the files that they name."""

    name: str  # of the persona
    options: Sequence[tuple[str, str]]  # each with its value, "" for a flag
    files: Mapping[tuple[str, str], bytes] = field(default_factory=dict)  # by the option and value that name it


@dataclass(frozen=True)
class BuildOutcome:
    """The end of a build: its exit status, the masks that it published, and the last line of its log."""

    name: str
    status: int
    personas: Sequence[Mapping[str, Any]]  # as `masquerade build --json` prints them
    last_line: str


def check_room(cpus: float, gpus: float) -> None:
    """Raise `InvalidValue` for a build that needs more than the cluster has in all."""
    found = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for option, wanted, total in (("--cpus", cpus, found.get("CPU", 0)), ("--gpus", gpus, found.get("GPU", 0))):
        if wanted > total:
            raise InvalidValue(f"{option} is {wanted:g}, and there are {total:g} here: no build could ever begin")


def run_builds(tasks: Sequence[BuildTask], cpus: float, gpus: float) -> Iterator[BuildOutcome]:
    """Run builds on the cluster that this process is connected to; yields each as it ends.

    A build whose node or process dies is run once more. What its tasks print on stderr is printed here.
    """
    threads = {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(cpus)))}}
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1, runtime_env=threads)(_run)
    running = {remote.remote(task): task for task in tasks}
    while running:
        ended, _ = ray.wait([*running])
        task = running.pop(ended[0])
        try:
            yield ray.get(ended[0])
        except ray.exceptions.RayError as error:
            yield BuildOutcome(task.name, 1, (), str(error).strip().splitlines()[-1])


def _run(task: BuildTask) -> BuildOutcome:
    with tempfile.TemporaryDirectory(prefix="masquerade-") as folder:
        command = [sys.executable, "-m", "masquerade", "build", "--json", *_list_arguments(task, Path(folder))]
        lines: deque[str] = deque(maxlen=LAST_LINES)
        report = Path(folder) / REPORT  # a pipe would fill up while the other one is read
        with (
            open(report, "wb") as stdout,
            subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True) as process,
        ):
            assert process.stderr
            for line in process.stderr:
                lines.append(line.rstrip())
                print(f"{task.name}: {lines[-1]}", file=sys.stderr, flush=True)
        printed = report.read_text(encoding="utf-8")
    personas = json.loads(printed)["personas"] if printed.strip() else ()
    return BuildOutcome(task.name, process.returncode, personas, next(filter(None, reversed(lines)), ""))


def _list_arguments(task: BuildTask, folder: Path) -> Iterator[str]:
    """The options as a command line; the content of each file is written to the folder."""
    for number, (option, value) in enumerate(task.options):
        yield option
        if (option, value) in task.files:
            path = folder / f"{number}-{Path(value).name}"
            path.write_bytes(task.files[option, value])
            yield str(path)
        elif value:
            yield value
