"""How the events of answers come to the event loop: at once for all of a step, and a word where nothing comes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from masquerade.engine import Engine
from masquerade.generation import outputs
from masquerade.service.notifier import StepNotifier
from masquerade.service.serving import Serving

CHAT = "/v1/chat/completions"


class Steps:
    """As much of an engine as a notifier needs."""

    told: Any


def notify_and_wait(counts: list[int]) -> tuple[int, list[bool]]:
    """Notify from a thread, so many events in each step; how often the loop was woken, and which events are set."""

    async def run() -> tuple[int, list[bool]]:
        notifier, engine, loop, woken = StepNotifier(), Steps(), asyncio.get_running_loop(), 0
        notifier.bind(engine)  # type: ignore[arg-type]
        events = [asyncio.Event() for _ in range(max(counts))]
        wake = loop.call_soon_threadsafe

        def count(*call: Any) -> Any:
            nonlocal woken
            woken += 1
            return wake(*call)

        loop.call_soon_threadsafe = count  # type: ignore[method-assign]

        def step() -> None:
            for number in counts:
                for event in events[:number]:
                    notifier.notify(event)
                    notifier.notify(event)
                engine.on_step()

        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
        await asyncio.sleep(0)
        return woken, [event.is_set() for event in events]

    return asyncio.run(run())


def test_the_loop_is_woken_once_a_step_and_not_for_nothing() -> None:
    assert notify_and_wait([3, 0, 2]) == (2, [True] * 3)


@pytest.fixture
def slow(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The engine's steps wait for this."""
    free, step = threading.Event(), Engine._step
    monkeypatch.setattr(Engine, "_step", lambda self: free.wait(30) and step(self))
    yield free
    free.set()


def ask(serving: Serving, **more: Any) -> dict[str, Any]:
    fields = {"model": serving.base.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    return fields | {"min_tokens": 2} | more


def test_a_silent_stream_says_that_it_is_alive(
    http: httpx.Client, serving: Serving, slow: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "PING_SECONDS", 0.05)
    with http.stream("POST", CHAT, json=ask(serving, stream=True)) as answer:
        lines = answer.iter_lines()
        assert [next(line for line in lines if line.startswith(":")) for _ in range(3)] == [": ping"] * 3
        slow.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_who_waits_for_a_whole_answer_hears_nothing_of_silence(
    http: httpx.Client, serving: Serving, slow: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "PING_SECONDS", 0.05)
    threading.Timer(0.3, slow.set).start()
    assert http.post(CHAT, json=ask(serving)).json()["usage"]["completion_tokens"] == 2


def test_who_goes_away_is_not_answered(http: httpx.Client, serving: Serving, slow: threading.Event) -> None:
    with pytest.raises(httpx.ReadTimeout):
        http.post(CHAT, json=ask(serving, max_tokens=30, min_tokens=30), timeout=0.3)
    slow.set()
    assert http.post(CHAT, json=ask(serving)).status_code == 200
    told = http.get("/metrics").text
    assert f'masquerade_requests_total{{method="POST",route="{CHAT}",status="499"}} 1.0' in told
    assert serving.engine.counts.sampled < 30
