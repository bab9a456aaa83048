"""Faults: what goes wrong with one request, or at one place of a step, and must not go wrong with the others."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import masquerade.engine
from masquerade.engine import AnswerText, Engine, EngineConfig, Event, Finished, Request, SamplingParams
from masquerade.errors import BadRequest, NotReady, StepFailed
from masquerade.model import AppliedMask, Base, MaskManager
from tests import world
from tests.engine.asking import Listener, ask, finish, is_whole

Make = Callable[..., Engine]
ROOM = str(Path(masquerade.engine.__file__).parent)


class Broken:
    """Stands for a tokenizer, a grammar or an owner that fails."""

    complete = False
    stopped = False

    def fail(self, *_: object, **__: object) -> Any:
        raise RuntimeError("broken")

    push = flush = allow = accept = __call__ = fail


class Forbidding(Broken):
    """A grammar that allows nothing."""

    def allow(self, row: torch.Tensor) -> None:
        row.fill_(float("-inf"))


HOT: dict[str, float] = {"temperature": 1.0}
DEADLY: dict[str, dict[str, Any]] = {
    # The four that kill transformers' continuous batching together with their neighbours
    "temperature zero": {"sampling": SamplingParams(temperature=0.0)},
    "top_k above the vocabulary": {"sampling": SamplingParams(top_k=10**6)},
    "a token outside of the vocabulary": {"prompt": [5, 10**6]},
    "a prompt larger than the cache": {"prompt": [5] * 200},
    # and more like them
    "a negative token": {"prompt": [5, -1]},
    "no room for an answer": {"count": 0},
    "an integer for temperature": {"sampling": SamplingParams(temperature=1)},
    "a temperature next to zero": {"sampling": SamplingParams(temperature=1e-40, top_p=0.5)},
    "a temperature next to infinity": {"sampling": SamplingParams(temperature=1e38)},
    "a nucleus of nothing": {"sampling": SamplingParams(top_p=5e-324)},
    "min_p of everything": {"sampling": SamplingParams(min_p=1.0)},
    "a top_k beyond all numbers": {"sampling": SamplingParams(temperature=1, top_k=2**63 - 1)},
    "a bias outside of the vocabulary": {"sampling": SamplingParams(bias={10**6: 1.0})},
    "everything forbidden by bias": {"sampling": SamplingParams(bias=dict.fromkeys(range(262), -100.0))},
    "penalties at their limits": {
        "sampling": SamplingParams(presence_penalty=2, frequency_penalty=-2, repetition_penalty=5e-324)
    },
    "a negative seed of a thousand digits": {"sampling": SamplingParams(seed=-(10**1000))},
    "more least than most tokens": {"min_tokens": 9},
    "nothing but ends": {"ends": frozenset(range(262)), "min_tokens": 4},
    "ends outside of the vocabulary": {"ends": frozenset({10**6}), "min_tokens": 2},
    "a tokenizer that fails": {"text": Broken()},
    "a grammar that fails": {"grammar": Broken()},
    "a grammar that allows nothing": {"grammar": Forbidding()},
    "an owner that has gone": {"emit": Broken()},
    "cancelled before it came": {"cancelled": True},
}


@pytest.mark.parametrize("what", DEADLY)
def test_what_is_deadly_for_one_leaves_its_neighbours_alone(make_engine: Make, what: str) -> None:
    engine = make_engine(cache_bytes=10 * 16 * 512)
    neighbours = [ask([1, 20, 30]), ask([6, 7], sampling=SamplingParams(seed=4)), ask([9] * 30)]
    alone = [engine.generate([ask(n.prompt, sampling=n.sampling)[0]])[0] for n, _ in neighbours]
    changes = dict(DEADLY[what])
    later = {name: changes.pop(name) for name in ("emit", "cancelled") if name in changes}
    deadly, _ = ask(changes.pop("prompt", [5, 6, 7]), changes.pop("count", 8), **changes)
    for name, value in later.items():
        setattr(deadly, name, value)
    for place, (neighbour, _) in enumerate(neighbours):
        if place == 1:
            try:
                engine.submit(deadly)
            except BadRequest:
                deadly.finished = True
        engine.submit(neighbour)
    finish(engine)
    assert [neighbour.ids[len(neighbour.prompt) :] for neighbour, _ in neighbours] == alone
    assert [heard.end for _, heard in neighbours] == [Finished("length")] * 3
    assert deadly.finished
    assert is_whole(engine)


class TestForwardPass:
    """The model itself fails."""

    @pytest.fixture
    def fail(self, tiny: Base, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[int]], bool]], None]:
        forward = tiny.model.model.forward

        def install(when: Callable[[list[int]], bool]) -> None:
            def failing(input_ids: torch.Tensor, **kw: object) -> object:
                if when(input_ids[0].tolist()):
                    raise RuntimeError("the device is on fire")
                return forward(input_ids=input_ids, **kw)

            monkeypatch.setattr(tiny.model.model, "forward", failing)

        return install

    @pytest.mark.parametrize("place", range(5))
    def test_the_guilty_one_is_found(self, make_engine: Make, fail: Callable[..., None], place: int) -> None:
        engine = make_engine()
        alone = engine.generate([ask()[0]])[0]
        asked = [ask([99, 98] if number == place else None) for number in range(5)]
        fail(lambda ids: "99, 98" in str(ids))
        engine.generate([request for request, _ in asked])
        for number, (request, heard) in enumerate(asked):
            if number == place:
                assert heard.end.reason == "error"
                assert isinstance(heard.end.error, StepFailed)
                assert "on fire" in str(heard.end.error)
            else:
                assert request.ids[3:] == alone
        assert is_whole(engine)

    def test_one_failure_by_chance_costs_nobody_anything(self, make_engine: Make, fail: Callable[..., None]) -> None:
        engine, failures = make_engine(), iter([False, True, False, True])
        asked = [ask([number + 6] * 3, sampling=SamplingParams(seed=number)) for number in range(4)]
        alone = engine.generate([ask(request.prompt, sampling=request.sampling)[0] for request, _ in asked])
        fail(lambda _: next(failures, False))
        assert engine.generate([request for request, _ in asked]) == alone
        assert engine.counts.failures == 2

    def test_an_engine_whose_every_step_fails_is_not_ready_until_one_succeeds(
        self, make_engine: Make, fail: Callable[..., None]
    ) -> None:
        engine = make_engine()
        engine.start()
        fail(lambda _: True)
        (victim, heard), (later, other) = ask(), ask()
        engine.submit(victim)
        assert heard.ended.wait(30)
        assert "failed" in (engine.unready_reason or "")
        fail(lambda _: False)
        engine.submit(later)
        assert other.ended.wait(30)
        assert engine.ready

    @pytest.mark.parametrize("order", [1, -1])
    def test_an_engine_that_serves_some_is_ready(
        self, make_engine: Make, fail: Callable[..., None], order: int
    ) -> None:
        engine = make_engine()
        engine.start()
        fail(lambda ids: 99 in ids)
        asked = [ask(prompt, 1) for prompt in ([5, 6, 7], [99, 98, 97])[::order]]
        engine.submit(*(request for request, _ in asked))
        assert all(heard.ended.wait(30) for _, heard in asked)
        assert engine.ready

    def test_blocks_that_nothing_looked_at_are_not_shared(
        self, make_engine: Make, tiny: Base, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a prompt without an answer nobody sees that it is not finite."""
        engine, prompt = make_engine(), list(range(5, 45))
        embed = tiny.model.model.embed_tokens.forward
        monkeypatch.setattr(tiny.model.model.embed_tokens, "forward", lambda ids: embed(ids) * torch.nan)
        engine.generate([ask(prompt, 0)[0]])
        monkeypatch.undo()
        request, heard = ask(prompt)
        engine.generate([request])
        assert heard.end.reason == "length"


class Injector:
    """Raises once, at a line of the engine's code, when it is reached for the n-th time; `step` itself excepted."""

    SPARED = ("step", "_recover", "_emit", "_emit_step", "finish", "_reset")  # the net, and what is called from it

    def __init__(self, target: tuple[str, int] | None = None, time: int = 1) -> None:
        self.target, self.left, self.reached = target, time, dict[tuple[str, int], int]()

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, _: str, __: object) -> Any:
        if not frame.f_code.co_filename.startswith(ROOM) or frame.f_code.co_name in self.SPARED:
            return None
        return self._line

    def _line(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            place = frame.f_code.co_filename, frame.f_lineno
            self.reached[place] = self.reached.get(place, 0) + 1
            if place == self.target:
                self.left -= 1
                if self.left == 0:
                    raise RuntimeError("injected")
        return self._line


@pytest.mark.parametrize("share", range(4))
def test_an_exception_at_any_line_of_a_step_never_stops_the_loop(
    tiny: Base, manager: MaskManager, make_engine: Make, share: int
) -> None:
    """Every request ends, those that end well are right, nothing leaks, and the next one is served."""
    engine = make_engine(cache_bytes=5 * 16 * 512)
    applied = AppliedMask(manager.fit(world.make_mask(tiny, 0.003, seed=1)), 0.0)

    def make() -> list[tuple[Request, Listener]]:
        penal = SamplingParams(seed=3, top_p=0.9, presence_penalty=1.0, bias={7: 1.0}, logprobs=1)
        written = AnswerText(tiny.tokenizer, ["never said"])
        return [
            ask([8] * 20, 4, applied=applied),
            ask([8] * 20, 14, phase="decode", text=written),
            ask([5, 6], 3, sampling=penal, priority=1),
            ask([8] * 40, 4),
        ]

    def serve(injector: Injector) -> tuple[list[list[int]], list[Finished]]:
        asked = make()
        for request, _ in asked:
            engine.submit(request)
        engine.cancel(asked[-1][0])
        with injector:
            finish(engine)
        return [request.ids[len(request.prompt) :] for request, _ in asked], [heard.end for _, heard in asked]

    watch = Injector()
    right, _ = serve(watch)
    lines = sorted(watch.reached.items())
    assert len(lines) > 200
    died = 0
    for place, times in lines[share::4]:
        answers, ends = serve(Injector(place, 1 if place[1] % 2 else times))
        for answer, end, good in zip(answers, ends, right, strict=True):
            if end.reason == "cancelled":
                assert not answer, place
                continue
            assert answer == good if end.reason == "length" else end.error is not None, place
            died += end.error is not None
        assert is_whole(engine), place
    assert died  # the exceptions did arrive
    assert serve(Injector())[0] == right


def test_who_fails_to_hear_of_a_step_stops_nothing(make_engine: Make) -> None:
    engine, told = make_engine(), list[int]()

    def fail() -> None:
        told.append(len(heard.tokens))
        raise RuntimeError("deaf")

    request, heard = ask()
    engine.on_step = fail
    engine.submit(request)
    finish(engine)
    assert heard.end.reason == "length"
    assert told[-1] == len(heard.tokens)
    assert len(told) >= len(heard.tokens)


def test_a_hung_step_is_reported(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    now, entered, released = [0.0], threading.Event(), threading.Event()
    forward = tiny.model.model.forward

    def hang(**kw: object) -> object:
        entered.set()
        assert released.wait(30)
        return forward(**kw)

    monkeypatch.setattr(tiny.model.model, "forward", hang)
    engine = Engine(tiny, EngineConfig(hung_seconds=60), clock=lambda: now[0])
    assert not engine.ready
    engine.start()
    assert engine.ready
    request, listener = ask(count=1)
    engine.submit(request)
    assert entered.wait(30)
    now[0] = 59.0
    assert engine.ready
    now[0] = 61.0
    assert not engine.ready
    assert "61 s" in (engine.unready_reason or "")
    released.set()
    assert listener.ended.wait(30)
    engine.stop()
    assert not engine.ready


def test_what_was_taken_is_finished_before_the_engine_stops(make_engine: Make) -> None:
    engine = make_engine(max_running=2)
    engine.start()
    asked = [ask([n + 6] * 5, 20) for n in range(6)]
    for request, _ in asked:
        engine.submit(request)
    engine.stop(grace=60)
    assert [heard.end.reason for _, heard in asked] == ["length"] * 6


def test_draining_refuses_newcomers_and_the_thread_goes_on(make_engine: Make) -> None:
    engine = make_engine(max_running=2)
    engine.start()
    asked = [ask([n + 6] * 5, 240) for n in range(3)]
    for request, _ in asked:
        engine.submit(request)
    engine.drain(grace=0)
    assert all(heard.ended.wait(30) for _, heard in asked)
    assert {heard.end.reason for _, heard in asked} <= {"cancelled", "length"}
    with pytest.raises(NotReady, match="stopping"):
        engine.submit(ask()[0])
    assert "stopping" in (engine.unready_reason or "")
    assert engine.run_background(lambda: 7).result(30) == 7


def test_without_grace_everybody_is_told(make_engine: Make) -> None:
    engine = make_engine(max_running=2)
    asked = [ask([n + 6] * 5, 200) for n in range(6)]
    for request, _ in asked:
        engine.submit(request)
    engine.step()
    engine.stop()
    assert [heard.end.reason for _, heard in asked] == ["cancelled"] * 6
    assert is_whole(engine)


def test_an_owner_that_goes_away_while_listening_leaves_the_batch(make_engine: Make) -> None:
    def explode(_: Event) -> None:
        raise RuntimeError("the event loop is closed")

    engine = make_engine()
    alone = engine.generate([ask()[0]])[0]
    deaf, (stays, _) = Request([1, 2], 8, explode), ask()
    engine.submit(deaf)
    engine.submit(stays)
    engine.step()
    engine.step()
    assert deaf.finished
    finish(engine)
    assert stays.ids[3:] == alone
    assert is_whole(engine)


def test_what_was_no_number_once_is_not_found_again(tiny: Base, make_engine: Make) -> None:
    """A chunk that goes wrong by chance has filled blocks by the time that the last chunk tells."""
    engine, sick = make_engine(max_running=1, max_batch_tokens=16), True

    def spoil(_: torch.nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if sick else output

    hook = tiny.model.get_input_embeddings().register_forward_hook(spoil)
    (first, heard), (second, _) = ask(list(range(6, 86))), ask(list(range(6, 86)))
    engine.generate([first])
    assert "not a number" in str(heard.end.error)
    sick = False
    (answer,) = engine.generate([second])
    hook.remove()
    assert second.num_cached == 0
    assert answer == make_engine().generate([ask(list(range(6, 86)))[0]])[0]
    assert is_whole(engine)
