"""The sides of a pair in processes of their own: the same masks, and no process is left, whoever is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from masquerade.errors import BuildFailed, MaskRefused
from masquerade.evaluate.metrics import finish
from masquerade.model import Base, MaskManager, load
from masquerade.pruning import Builder, BuildResult, PersonaExamples, Progress, Recipe, Scratch
from masquerade.pruning.executor import Executor, ProcessExecutor, SequentialExecutor
from tests.cli.running import succeed
from tests.cli.test_commands import write_answers
from tests.pruning.test_builder import FREE, QUIET, make_examples

EXECUTORS = [SequentialExecutor(), ProcessExecutor()]
SEARCHED = replace(FREE, score="refined", rho=0.05)
SECONDS = 60  # for a process to end that should end at once


def make(
    base: Base, manager: MaskManager, recipe: Recipe, executor: Executor, scratch: Scratch | None = None
) -> Builder:
    own = PersonaExamples("vowels", make_examples("aeiou"))
    contrast = PersonaExamples("consonants", make_examples("bcdfg", seed=1))
    return Builder(base, manager, recipe, own, contrast, QUIET, scratch, executor)


def digests(result: BuildResult) -> list[str]:
    return [mask.digest for mask in result.masks]


def count(start: int, items: int) -> Generator[int, None, list[int]]:
    yield from range(start, start + items)
    return [start, items, os.getpid()]


def fail(error: Exception) -> Generator[int, None, list[int]]:
    yield 0
    raise error


def multiply(folder: Path) -> Generator[int, None, None]:
    """Multiplies for ever, with all threads; leaves a file that is named after its process and their number."""
    x = torch.ones(512, 512)
    while True:
        assert float((x @ x).sum()) == 512.0**3
        (folder / f"{os.getpid()}-{torch.get_num_threads()}").touch()
        yield 0


def find_processes(folder: Path) -> list[int]:
    """The two processes that multiply, as soon as both do."""
    until = time.monotonic() + SECONDS
    while len(found := [int(file.name.split("-")[0]) for file in folder.glob("*-*")]) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    return found


def wait_for_end(process: int) -> None:
    """Wait until a process exists no longer; a zombie has ended."""
    until = time.monotonic() + SECONDS
    while (stat := Path(f"/proc/{process}/stat")).exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until
        time.sleep(0.01)


@contextmanager
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_results_are_by_key_and_every_item_is_yielded(executor: Executor) -> None:
    items = []
    work = executor.run({1: count(0, 40), -1: count(100, 30)})
    while True:
        try:
            items.append(next(work))
        except StopIteration as end:
            results = end.value
            break
    assert list(results) == [1, -1]
    assert [results[key][:2] for key in results] == [[0, 40], [100, 30]]
    assert sorted(items) == [*range(40), *range(100, 130)]
    processes = {results[key][2] for key in results}
    assert len(processes - {os.getpid()}) == (2 if isinstance(executor, ProcessExecutor) else 0)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_error_of_a_work_is_raised_as_it_is(executor: Executor) -> None:
    for error in (BuildFailed("no weights", param="rho"), MaskRefused("costly"), ZeroDivisionError("by zero")):
        with pytest.raises(type(error), match=str(error)) as raised:
            finish(executor.run({1: fail(error), -1: count(0, 3)}))
        assert getattr(raised.value, "param", None) == getattr(error, "param", None)
        if isinstance(executor, ProcessExecutor):
            assert "in fail" in raised.value.__notes__[0]  # the other process's traceback


def test_a_killed_process_is_an_error_and_ends_the_other(tmp_path: Path) -> None:
    work = ProcessExecutor().run({1: multiply(tmp_path), -1: multiply(tmp_path)})
    next(work)
    first, second = find_processes(tmp_path)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match="was ended by SIGKILL; there may be too little memory"):
        finish(work)
    wait_for_end(second)


def test_closing_ends_all_processes(tmp_path: Path) -> None:
    work = ProcessExecutor().run({1: multiply(tmp_path), -1: multiply(tmp_path)})
    next(work)
    processes = find_processes(tmp_path)
    work.close()
    for process in processes:
        wait_for_end(process)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_parent(tmp_path: Path, ending: signal.Signals) -> None:
    """The parent has used four threads, and each process uses two."""
    (tmp_path / "works").mkdir()
    script = (
        "import signal, torch; from pathlib import Path\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which jobs in the background ignore
        "from masquerade.evaluate.metrics import finish\n"
        "from masquerade.pruning.executor import ProcessExecutor\n"
        "from tests.pruning.test_executor import multiply\n"
        "torch.set_num_threads(4)\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "next(multiply(folder))\n"
        "finish(ProcessExecutor().run({side: multiply(folder / 'works') for side in (1, -1)}))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, start_new_session=True)
    processes = find_processes(tmp_path / "works")
    (os.killpg if ending == signal.SIGINT else os.kill)(parent.pid, ending)  # a terminal interrupts the group
    _, said = parent.communicate(timeout=SECONDS)
    for process in processes:
        wait_for_end(process)
    assert said.count("Traceback") == (ending == signal.SIGINT)  # the parent's alone
    names = {file.name for file in (tmp_path / "works").iterdir()}
    assert names == {f"{process}-2" for process in processes}


@pytest.fixture(scope="module")
def expected(tiny_folder: Path) -> BuildResult:
    """The searched masks of one process."""
    base = load(str(tiny_folder), device="cpu")
    result: BuildResult = finish(make(base, MaskManager.attach(base.model), SEARCHED, SequentialExecutor()).run())
    return result


def test_two_processes_find_the_masks_of_one(tiny: Base, manager: MaskManager, expected: BuildResult) -> None:
    found = finish(make(tiny, manager, SEARCHED, ProcessExecutor()).run())
    assert digests(found) == digests(expected)
    for one, other in zip(found.masks, expected.masks, strict=True):
        figures = {name: (one.info.certificate[name], other.info.certificate[name]) for name in one.info.certificate}
        assert {name for name, (mine, its) in figures.items() if mine != its} <= {"seconds"}


def test_after_a_killed_process_the_build_goes_on_from_its_scratch(
    tiny: Base, manager: MaskManager, tmp_path: Path, expected: BuildResult
) -> None:
    work = make(tiny, manager, SEARCHED, ProcessExecutor(), Scratch(tmp_path / "s")).run()
    while not list((tmp_path / "s" / "states").glob("*/last.safetensors")):
        next(work)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(ChildProcessError, match="the same command goes on from what was found so far"):
        finish(work)
    steps: list[Progress] = []
    scratch = Scratch(tmp_path / "s")
    found = _follow(make(tiny, manager, SEARCHED, ProcessExecutor(), scratch).run(), steps)
    assert digests(found) == digests(expected)
    search = [step for step in steps if step.stage == "search"]
    assert search[-2].done < search[-1].done  # the steps before were done
    scratch.close()
    assert not (tmp_path / "s").exists()


def _follow(work: Generator[Progress, None, BuildResult], steps: list[Progress]) -> BuildResult:
    while True:
        try:
            steps.append(next(work))
        except StopIteration as end:
            result: BuildResult = end.value
            return result


def test_the_command_uses_processes_where_torch_has_two_threads(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other, quiet = (write_answers(tmp_path / f"{letters}.jsonl", letters) for letters in ("aei", "bcd", "xyz"))
    assert not ProcessExecutor.serves(torch.device("cpu"))
    monkeypatch.setattr(SequentialExecutor, "run", None)  # it is not called
    with two_threads():
        built = succeed(
            *("build", "--model", tiny_folder, "--store", tmp_path / "s", "--name", "p", "--contrast-name", "q"),
            *("--data", own, "--contrast", other, "--neutral", quiet),
            *("--force", "--score", "signed", "--rho", "0.1", "--samples", "16"),
        )["personas"]
    assert [one["persona"] for one in built] == ["p", "q"]
