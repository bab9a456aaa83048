"""Runs independent works, such as those of a pair's sides: one after another, or each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

import torch

from masquerade.model import trim_heap

Y = TypeVar("Y")
T = TypeVar("T")


class Executor(Protocol):
    """Runs works to their ends. They must not need what another one changes, nor the caller what they change."""

    def run(self, works: Mapping[int, Generator[Y, None, T]]) -> Generator[Y, None, dict[int, T]]:
        """The results of all works, by their keys; yields what the works yield. Raises what a work raises."""


class SequentialExecutor:
    """Runs one work after another, in their order."""

    def run(self, works: Mapping[int, Generator[Y, None, T]]) -> Generator[Y, None, dict[int, T]]:
        """The results of all works. Items are those of the works."""
        results = {}
        for key, work in works.items():
            results[key] = yield from work
        return results


class ProcessExecutor:
    """Runs each work in a process of its own, which is forked when `run` begins; for works on a CPU under Linux.

    A forked process shares the memory of the caller until one of them changes it, so the base's weights exist once. The
    threads that torch uses here are divided among the works. Results and what the works yield are pickled.

    All processes end with `run`, also if it is closed or interrupted. If this process is killed, they end at their next
    item. Raises `ChildProcessError` if a process ends without a result, as one that is killed.
    """

    @staticmethod
    def serves(device: torch.device) -> bool:
        """Whether a base on a device allows it, and torch has threads to divide here."""
        return sys.platform == "linux" and device.type == "cpu" and torch.get_num_threads() > 1

    def run(self, works: Mapping[int, Generator[Y, None, T]]) -> Generator[Y, None, dict[int, T]]:
        """The results of all works. An item is the wait for what any process yields."""
        results: dict[int, T] = {}
        with _start(works) as processes:
            running = dict(processes)
            while running:
                for connection in wait(list(running)):
                    assert isinstance(connection, Connection)
                    key, process = running[connection]
                    try:
                        kind, value = connection.recv()
                    except (EOFError, OSError):  # OSError is the end within a message
                        raise ChildProcessError(_explain(process)) from None
                    if kind == "error":
                        raise value
                    if kind == "result":
                        results[key] = value
                        del running[connection]
                    else:
                        yield value
        return {key: results[key] for key in works}


@contextmanager
def _start(works: Mapping[int, Generator[Any, None, Any]]) -> Iterator[dict[Connection, tuple[int, BaseProcess]]]:
    """Start a process for each work; what they send can be read from the connections. Kills them at the end."""
    context = multiprocessing.get_context("fork")
    threads = max(1, torch.get_num_threads() // len(works))
    started: dict[Connection, tuple[int, BaseProcess]] = {}
    trim_heap()  # what is free now would be free in each process, and used again in each
    try:
        for key, work in works.items():
            reader, writer = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(
                target=_work, args=(work, threads, writer, [*started, reader]), daemon=True
            )
            started[reader] = key, process
            _fork(process)
            writer.close()
        yield started
    finally:
        for reader, (_, process) in started.items():
            if process.pid is not None:
                process.kill()
                process.join()
            reader.close()


def _fork(process: BaseProcess) -> None:
    """Start a process from a new thread.

    OpenMP's threads belong to the thread that has used them, and do not exist in a forked process, where that thread
    would wait for them forever. A new thread has none yet, and starts its own.
    """
    with warnings.catch_warnings(), ThreadPoolExecutor(1, "fork") as thread:
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside other threads, since Python 3.12
        thread.submit(process.start).result()


def _work(work: Generator[Any, None, Any], threads: int, writer: Connection, readers: list[Connection]) -> None:
    """Run a work in a process of its own. It ends by the broken connection if its parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the terminal is for the parent, which kills this
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # they would warn of the fork
    for reader in readers:
        reader.close()  # otherwise nobody sees that the parent has ended
    torch.set_num_threads(threads)
    with suppress(BrokenPipeError):
        try:
            while True:
                writer.send(("item", next(work)))
        except StopIteration as end:
            writer.send(("result", end.value))
        except BrokenPipeError:
            raise
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))  # a traceback is not pickled
            writer.send(("error", error))


def _explain(process: BaseProcess) -> str:
    process.join()
    code = process.exitcode or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    memory = "; there may be too little memory" if code == -signal.SIGKILL else ""
    return f"a process of this build {how}{memory}; the same command goes on from what was found so far"
