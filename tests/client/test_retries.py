"""What is tried again, what is not, and for how long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from masquerade_client import (
    ApiError,
    AsyncClient,
    Build,
    BuildEvent,
    Client,
    ConnectionFailed,
    Overloaded,
    ServerError,
    _calls,
)
from masquerade_client._calls import Attempts, Patience
from tests.client.conftest import Async, Driver, Sync
from tests.client.scripted import COMPLETION, DONE, Answer, Handler, Script, answer_in, event, say, stream

Kind = type[Sync] | type[Async]


def turns(*answers: Answer) -> tuple[Answer, list[str]]:
    """One answer after the other; the paths that were asked for."""
    asked: list[str] = []
    left: Iterator[Answer] = iter(answers)

    def answer(handler: Handler) -> None:
        asked.append(handler.path)
        next(left)(handler)

    return answer, asked


def busy(status: int = 429, **headers: str) -> Answer:
    return say({"error": {"message": "busy", "code": "queue_full"}}, status, Retry_After="0", **headers)


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_the_server_cannot_take_just_now_is_asked_again(kind: Kind, script: Script, status: int) -> None:
    script.answer, asked = turns(busy(status), busy(status), say(COMPLETION))
    assert kind(base_url=script.base_url, retries=2).chat("Hello").text == "No crowds for me."
    assert len(asked) == 3


def test_a_stream_that_is_refused_is_asked_for_again(kind: Kind, script: Script) -> None:
    script.answer, asked = turns(busy(), stream(*answer_in("No.")))
    assert kind(base_url=script.base_url, retries=1).stream("Hello").text == "No."
    assert len(asked) == 2


def test_patience_ends(kind: Kind, script: Script) -> None:
    script.answer, asked = turns(busy(), busy(), busy())
    with pytest.raises(Overloaded):
        kind(base_url=script.base_url, retries=2).chat("Hello")
    assert len(asked) == 3


@pytest.mark.parametrize("status", [400, 404, 500])
def test_what_stays_wrong_is_asked_once(kind: Kind, script: Script, status: int) -> None:
    script.answer, asked = turns(busy(status), say(COMPLETION))
    with pytest.raises(ApiError):
        kind(base_url=script.base_url, retries=2).chat("Hello")
    assert len(asked) == 1


def test_the_server_may_say_that_it_is_of_no_use(kind: Kind, script: Script) -> None:
    script.answer, asked = turns(busy(503, X_Should_Retry="false"), say(COMPLETION))
    with pytest.raises(ServerError):
        kind(base_url=script.base_url, retries=2).chat("Hello")
    assert len(asked) == 1


def test_a_lost_answer_is_not_asked_for_twice_where_that_would_do_it_twice(kind: Kind, script: Script) -> None:
    script.answer, asked = turns(hang_up, say(COMPLETION))
    with pytest.raises(ConnectionFailed):
        kind(base_url=script.base_url, retries=2).chat("Hello")
    assert len(asked) == 1


@pytest.mark.parametrize(("status", "times"), [(502, 1), (503, 2), (504, 1)])
def test_a_gateway_does_not_know_whether_a_rollback_was_done(script: Script, status: int, times: int) -> None:
    script.answer, asked = turns(busy(status), busy(404))
    with pytest.raises(ApiError), Client(script.base_url, retries=2) as client:
        client.personas.rollback("formal")
    assert len(asked) == times


def test_who_waits_for_a_build_waits_for_a_server_that_is_away() -> None:
    patience = Patience()
    away = ConnectionFailed("nobody", reached=False)
    with pytest.raises(ConnectionFailed):
        patience.pause(away)  # from the beginning: the address is wrong
    patience.reset()
    assert [patience.pause(away) for _ in range(6)] == [0.5, 1, 2, 4, 8, 8]
    patience.reset()
    assert patience.pause(Overloaded("busy", passing=True)) == 0.5
    with pytest.raises(ApiError):
        patience.pause(ApiError("no such build", status=404))


def wait_for(kind: Kind, url: str, progress: Callable[[BuildEvent], object]) -> Build:
    async def wait() -> Build:
        async with AsyncClient(url, retries=0) as client:
            return await client.builds.wait("job", progress)

    if kind is Async:
        return asyncio.run(wait())
    with Client(url, retries=0) as client:
        return client.builds.wait("job", progress)


def test_a_long_step_of_a_build_costs_no_patience(kind: Kind, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is heard until it restarts, though nothing happens to the build for longer than patience lasts."""
    now, silent = [0.0], threading.Event()
    monkeypatch.setattr(_calls, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def wait_long(_: BuildEvent) -> None:
        now[0] += 2 * _calls.LONGEST_ABSENCE
        silent.set()

    def restart(handler: Handler) -> None:
        handler.start(200, Content_Type="text/event-stream", Connection="close")
        handler.write(event({"id": "1", "created_at": 1, "level": "info", "message": "a step"}))
        silent.wait(60)
        handler.write(b": ping\n\n")

    ended = {"status": "succeeded", "created_at": 1, "finished_at": 2, "personas": [], "error": None}
    build = {"id": "job", "persona": "formal", **ended}
    script.answer, asked = turns(restart, stream(DONE), say(build))
    assert wait_for(kind, script.base_url, wait_long).persona == "formal"
    assert len(asked) == 3


def test_a_lost_list_is_asked_for_again(client: Driver, kind: Kind, script: Script) -> None:
    listed, script.models = script.models, None
    script.answer, asked = turns(hang_up, say(listed))
    assert [model.id for model in kind(base_url=script.base_url, retries=1).models()] == ["demo"]
    assert len(asked) == 2


def test_pauses_grow_and_end() -> None:
    attempts = Attempts(6, again=False)
    pauses = [attempts.pause(ConnectionFailed("nobody", reached=False)) for _ in range(6)]
    for pause, expected in zip(pauses, [0.5, 1, 2, 4, 8, 8], strict=True):
        assert 0.75 * expected <= pause <= 1.25 * expected
    with pytest.raises(ConnectionFailed):
        attempts.pause(ConnectionFailed("nobody", reached=False))


def test_the_servers_word_counts_up_to_a_minute() -> None:
    attempts = Attempts(5, again=False)
    assert attempts.pause(Overloaded("busy", retry_after=3.0, passing=True)) == 3
    with pytest.raises(Overloaded):
        attempts.pause(Overloaded("busy", retry_after=61.0, passing=True))
