"""Work that is done in small items, with its progress, so that a server can run other work between them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """`done` of `total` parts of a stage are finished; `total` is None if it is unknown.

    `model_next` is whether the next work item uses the model. If not, it may run on any thread, beside other uses of
    the model.
    """

    stage: str
    done: int
    total: int | None
    model_next: bool = True


Work = Generator[Progress, None, T]


def track(
    stage: str,
    items: Generator[None, None, T],
    total: int | None = None,
    *,
    model: bool = True,
    model_after: bool = True,
) -> Work[T]:
    """Yield the progress of work items, with `model` whether they use the model; `total` is None if it is unknown.

    After the last item the total is known, and `model_after` is whether the work after it uses the model.
    """
    done = 0
    while True:
        try:
            next(items)
        except StopIteration as end:
            result: T = end.value
            break
        done += 1
        yield Progress(stage, done, total, model)
    if done and (total is None or model_after != model):
        yield Progress(stage, done, done, model_after)
    return result


def count(stage: str, items: Generator[int | None, None, T], total: int) -> Work[T]:
    """Yield the progress of work items, each of which yields how many of `total` parts it completes (None is 0).

    All items use the model.
    """
    done = 0
    while True:
        try:
            done += next(items) or 0
        except StopIteration as end:
            result: T = end.value
            return result
        yield Progress(stage, done, total)
