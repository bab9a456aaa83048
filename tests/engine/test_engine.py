"""Admission, cancelling, faults: what may happen to one request and must not happen to its neighbours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from masquerade.engine import Engine, EngineConfig, Finished, Token
from masquerade.errors import ContextTooLong, InvalidValue, NotReady, Overloaded
from masquerade.model import Base
from tests.engine.asking import ask, finish, is_whole

Make = Callable[..., Engine]


def test_events_are_the_tokens_and_one_end(make_engine: Make) -> None:
    engine, (request, listener) = make_engine(), ask()
    answer = engine.generate([request])[0]
    assert listener.events == [*map(Token, answer), Finished("length")]
    assert is_whole(engine)


def test_the_end_token_stops_and_is_not_part_of_the_answer(make_engine: Make) -> None:
    engine = make_engine()
    answer = engine.generate([ask(count=20)[0]])[0]
    request, listener = ask(count=20, ends=frozenset({answer[5]}))
    assert engine.generate([request])[0] == answer[: answer.index(answer[5])]
    assert listener.end.reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "count", "error", "words"),
    [
        (
            [1] * 250,
            7,
            ContextTooLong,
            "maximum context length is 256 tokens.* 257 were requested .250 in the messages, 7",
        ),
        ([1, 10**6], 4, InvalidValue, "1000000 is outside of the vocabulary of 262"),
        ([1, -1], 4, InvalidValue, "-1 is outside"),
        ([1], -1, InvalidValue, "max_tokens is -1"),
    ],
)
def test_what_can_never_run_is_refused_with_the_numbers(
    make_engine: Make, prompt: list[int], count: int, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make_engine().submit(ask(prompt, count)[0])


def test_what_never_fits_the_cache_is_refused_with_the_numbers(make_engine: Make) -> None:
    engine = make_engine(cache_bytes=64 * 512)
    with pytest.raises(ContextTooLong, match=r"64 tokens with the cache it was given.*70 were requested"):
        engine.submit(ask([1] * 50, 20)[0])


def test_a_full_queue_refuses_and_the_queued_are_served(make_engine: Make) -> None:
    engine = make_engine(max_waiting=3)
    asked = [ask() for _ in range(3)]
    for request, _ in asked:
        engine.submit(request)
    with pytest.raises(Overloaded, match="3 requests are waiting") as refusal:
        engine.submit(ask()[0])
    assert refusal.value.retry_after >= 1
    finish(engine)
    assert all(listener.end.reason == "length" for _, listener in asked)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancelling_at_any_step_ends_the_request_and_frees_its_blocks(make_engine: Make, steps: int) -> None:
    engine = make_engine(max_batch_tokens=40)
    (gone, heard), (stays, other) = ask(list(range(6, 96)), 40), ask()
    alone = engine.generate([ask()[0]])[0]
    engine.submit(gone)
    engine.submit(stays)
    for _ in range(steps):
        engine.step()
    engine.cancel(gone)
    finish(engine)
    assert heard.end == Finished("cancelled")
    assert stays.ids[3:] == alone
    assert other.end.reason == "length"
    assert is_whole(engine)


def test_the_thread_serves_until_it_is_stopped(make_engine: Make) -> None:
    engine = make_engine()
    assert not engine.ready
    engine.start()
    assert engine.ready
    asked = [ask() for _ in range(5)]
    for request, _ in asked:
        engine.submit(request)
    assert all(listener.ended.wait(30) for _, listener in asked)
    request, listener = ask(count=200)
    engine.submit(request)
    engine.stop()
    assert listener.ended.wait(30)
    assert listener.end.reason in ("cancelled", "length")
    assert not engine.ready
    with pytest.raises(NotReady):
        engine.submit(ask()[0])


@pytest.mark.parametrize(
    "limits", [{"max_running": 0}, {"max_waiting": 0}, {"prefill_budget": 0}, {"max_running": 9, "max_batch_tokens": 8}]
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(InvalidValue):
        EngineConfig(**limits)


def test_steps_leave_no_gradients(tiny: Base, make_engine: Make) -> None:
    make_engine().generate([ask()[0]])
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    assert torch.is_grad_enabled()


def test_attention_that_would_be_served_wrongly_is_refused(tiny: Base, make_engine: Make) -> None:
    def reattend(_: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, object]:
        return args, {**kwargs, "position_bias": 1.0}

    engine = make_engine()
    for layer in tiny.model.model.layers:
        layer.self_attn.register_forward_pre_hook(reattend, with_kwargs=True)
    request, listener = ask()
    engine.generate([request])
    assert "position_bias" in str(listener.end.error)
