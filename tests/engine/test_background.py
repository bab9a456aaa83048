"""Work between steps: when it is due, and that its faults are its asker's."""

from __future__ import annotations

import pytest

from masquerade.engine.background import BackgroundTasks
from masquerade.errors import InvalidValue


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def take(self, seconds: float) -> None:
        self.now += seconds


def test_everything_is_due_while_nobody_is_served() -> None:
    tasks = BackgroundTasks(clock=Clock())
    outcomes = [tasks.submit(lambda n=n: n * n) for n in range(5)]  # type: ignore[misc]
    while tasks.run_due(serving=False):
        pass
    assert [outcome.result(0) for outcome in outcomes] == [0, 1, 4, 9, 16]
    assert not tasks


def test_of_the_tokens_of_those_who_are_served_less_than_five_in_a_hundred_are_delayed() -> None:
    clock = Clock()
    tasks = BackgroundTasks(share=0.0, clock=clock)
    tasks.submit(lambda: None)
    tasks.run_due(serving=False)
    delayed = 0
    for _ in range(2000):
        clock.take(0.01)
        tasks.count_step()
        tasks.submit(lambda: clock.take(0.5))
        delayed += tasks.run_due(serving=True)
    assert 0.03 < delayed / 2000 < 0.05


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
def test_a_least_share_of_the_time_is_theirs(share: float) -> None:
    """Even where a piece is far shorter than a step, and steps alone would give it next to nothing."""
    clock = Clock()
    tasks, started, spent = BackgroundTasks(share=share, clock=clock), clock.now, 0.0
    for _ in range(20_000):
        clock.take(0.001)
        tasks.count_step()
        tasks.submit(lambda: clock.take(0.0005))
        spent += 0.0005 * tasks.run_due(serving=True)
    assert spent / (clock.now - started) >= min(share, 0.0005 / 0.0015) * 0.9


def test_who_has_given_up_does_not_keep_the_others_from_hearing_that_nothing_will_be_done() -> None:
    tasks = BackgroundTasks(clock=Clock())
    impatient, patient = tasks.submit(lambda: 1), tasks.submit(lambda: 2)
    assert impatient.cancel()
    tasks.fail_all(KeyError("over"))
    assert isinstance(patient.exception(0), KeyError)


@pytest.mark.parametrize("error", [ValueError("no"), MemoryError()])
def test_a_fault_is_the_askers(error: Exception) -> None:
    def fail() -> None:
        raise error

    tasks = BackgroundTasks()
    bad, good = tasks.submit(fail), tasks.submit(lambda: "fine")
    while tasks.run_due(serving=False):
        pass
    with pytest.raises(type(error)):
        bad.result(0)
    assert good.result(0) == "fine"


def test_what_is_abandoned_ends_with_the_reason() -> None:
    tasks = BackgroundTasks()
    outcome = tasks.submit(lambda: 1)
    tasks.fail_all(RuntimeError("stopping"))
    with pytest.raises(RuntimeError, match="stopping"):
        outcome.result(0)
    assert not tasks.run_due(serving=False)


def test_what_was_cancelled_is_not_done() -> None:
    tasks, done = BackgroundTasks(), []
    tasks.submit(lambda: done.append(1)).cancel()
    assert tasks.run_due(serving=False)
    assert done == []


@pytest.mark.parametrize(("steps", "share"), [(-1, 0.1), (1, -0.1), (1, 1.1)])
def test_what_makes_no_sense_is_refused(steps: int, share: float) -> None:
    with pytest.raises(InvalidValue):
        BackgroundTasks(steps, share)
