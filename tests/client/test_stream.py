"""Answers that grow, break, or are not heard to the end."""

from __future__ import annotations

import asyncio
import gc

import pytest

from masquerade_client import (
    ApiError,
    AsyncClient,
    BadRequest,
    Client,
    ConnectionFailed,
    NotFound,
    Overloaded,
    ServerError,
    UnexpectedAnswer,
    Usage,
)
from tests.client.conftest import Driver
from tests.client.scripted import (
    COMPLETION,
    DONE,
    USAGE,
    Handler,
    Script,
    answer_in,
    chunk,
    event,
    say,
    stream,
    stream_forever,
)


def test_the_pieces_arrive_in_order(client: Driver, script: Script) -> None:
    pieces: list[str] = []
    script.answer = stream(*answer_in("No ", "crowds", "."))
    client.stream("Hello", into=pieces)
    assert pieces == ["No ", "crowds", "."]


def test_a_stream_is_asked_for_with_usage(client: Driver, script: Script) -> None:
    script.answer = stream(*answer_in("No."))
    client.stream("Hello")
    assert script.body == {
        "model": "demo",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_complete_stream_is_a_reply_like_any_other(client: Driver, script: Script) -> None:
    script.answer = say(COMPLETION)
    at_once = client.chat("Hello")
    script.answer = stream(*answer_in("No crowds ", "for me."))
    assert client.stream("Hello").reply == at_once
    assert at_once.usage == Usage(3, 5, 8)


def test_the_persona_is_known_after_the_first_piece(client: Driver, script: Script) -> None:
    script.answer = stream(*answer_in("No", " way"))
    stopped = client.stream("Hello", stop_after=1)
    assert (stopped.persona, stopped.generation, stopped.text) == ("introvert", "c0ffee", "No")


def test_an_unheard_rest_means_no_reply(client: Driver, script: Script) -> None:
    script.answer = stream_forever(chunk("no "))
    with pytest.raises(ValueError, match="not complete"):
        _ = client.stream("Hello", stop_after=2).reply


def test_leaving_early_hangs_up(client: Driver, script: Script) -> None:
    script.answer = stream_forever(chunk("no "))
    client.stream("Hello", stop_after=2)
    assert script.hung_up.wait(5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("server_error", ServerError),
        ("invalid_request_error", BadRequest),
        ("rate_limit_error", Overloaded),
        ("something_new", ServerError),
        (None, ServerError),
    ],
)
def test_an_error_in_the_middle_is_raised(
    client: Driver, script: Script, name: str | None, expected: type[ApiError]
) -> None:
    pieces: list[str] = []
    error = {"message": "the step failed", "type": name, "param": None, "code": "step_failed"}
    script.answer = stream(chunk("No "), chunk("crowds"), event({"error": error}))
    with pytest.raises(expected, match="the step failed") as caught:
        client.stream("Hello", into=pieces)
    assert (caught.value.code, caught.value.status) == ("step_failed", None)
    assert pieces == ["No ", "crowds"]


def test_what_came_before_an_error_in_the_same_packet_is_not_lost(client: Driver, script: Script) -> None:
    pieces: list[str] = []
    script.answer = stream(chunk("No ") + chunk("crowds") + event({"error": {"message": "the step failed"}}))
    with pytest.raises(ServerError):
        client.stream("Hello", into=pieces)
    assert pieces == ["No ", "crowds"]


def test_an_error_in_the_middle_hangs_up(client: Driver, script: Script) -> None:
    script.answer = stream_forever(event({"error": {"message": "the step failed"}}))
    with pytest.raises(ServerError):
        client.stream("Hello")
    assert script.hung_up.wait(5)


def test_a_stream_that_stops_without_an_end_has_failed(client: Driver, script: Script) -> None:
    script.answer = stream(*answer_in("No", " way")[:-1])
    with pytest.raises(ConnectionFailed, match="middle"):
        client.stream("Hello")


def test_a_refused_stream_raises_like_a_refused_chat(client: Driver, script: Script) -> None:
    script.answer = say({"error": {"message": "who?", "code": "persona_not_found"}}, 404)
    with pytest.raises(NotFound) as caught:
        client.stream("Hello")
    assert caught.value.code == "persona_not_found"


@pytest.mark.parametrize("data", [b"data: {\n\n", b"data: []\n\n", b"data: {}\n\n", b"data: \xff\n\n"])
def test_an_event_that_is_no_chunk_is_unexpected(client: Driver, script: Script, data: bytes) -> None:
    script.answer = stream(data)
    with pytest.raises(UnexpectedAnswer):
        client.stream("Hello")


@pytest.mark.parametrize("missing", [USAGE, chunk(finish_reason="stop")])
def test_a_stream_without_usage_or_finish_reason_has_no_reply(client: Driver, script: Script, missing: bytes) -> None:
    script.answer = stream(*(piece for piece in answer_in("No.") if piece != missing))
    with pytest.raises(UnexpectedAnswer):
        _ = client.stream("Hello").reply


def test_text_arrives_whole_however_it_is_cut(client: Driver, script: Script) -> None:
    text = "naïve … 🎭\u2028\x85\x0b\r\n end"
    raw = b": ping\n\n" + b"".join(answer_in(text))
    script.answer = stream(*(raw[start : start + 1] for start in range(len(raw))))
    assert client.stream("Hello").text == text


def test_a_stream_can_be_read_in_two_goes(script: Script) -> None:
    script.answer = stream(*answer_in("No", " way", "."))
    with Client(script.base_url) as client, client.stream("Hello") as answer:
        first = next(answer)
        assert [str(piece) for piece in (first, *answer)] == ["No", " way", "."]


def test_a_stream_needs_no_with_statement(script: Script) -> None:
    script.answer = stream(*answer_in("No", "."))
    with Client(script.base_url) as client:
        assert [piece.text for piece in client.stream("Hello")] == ["No", "."]


def test_an_async_stream_needs_no_with_statement(script: Script) -> None:
    async def run() -> list[str]:
        async with AsyncClient(script.base_url) as client:
            return [piece.text async for piece in client.stream("Hello")]

    script.answer = stream(*answer_in("No", "."))
    assert asyncio.run(run()) == ["No", "."]


def test_nothing_is_sent_before_a_stream_is_entered(script: Script) -> None:
    with Client(script.base_url) as client:
        client.stream("Hello")
    assert script.path == ""


def test_a_stream_that_was_left_gives_nothing_more(script: Script) -> None:
    script.answer = stream_forever(chunk("no "))
    with Client(script.base_url) as client:
        with client.stream("Hello") as answer:
            next(answer)
        assert list(answer) == []


def test_a_cancelled_task_hangs_up(script: Script) -> None:
    async def run() -> None:
        async with AsyncClient(script.base_url) as client:

            async def listen() -> None:
                async with client.stream("Hello") as answer:
                    async for _ in answer:
                        heard.set()

            heard = asyncio.Event()
            task = asyncio.create_task(listen())
            await heard.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(script.hung_up.wait, 5)

    script.answer = stream_forever(chunk("no "))
    asyncio.run(run())


def test_one_connection_serves_stream_after_stream(script: Script) -> None:
    content = b"".join(answer_in("No", "."))

    ports = set()

    def answer(handler: Handler) -> None:
        ports.add(handler.client_address)
        handler.start(200, Content_Type="text/event-stream", Content_Length=str(len(content)))
        handler.write(content)

    script.answer = answer
    with Client(script.base_url) as client:
        for _ in range(3):
            with client.stream("Hello") as stream_:
                list(stream_)
    assert len(ports) == 1


def test_a_forgotten_stream_hangs_up_when_collected(script: Script) -> None:
    script.answer = stream_forever(chunk("no "))
    with Client(script.base_url) as client:
        answer = client.stream("Hello")
        next(answer)
        del answer
        gc.collect()
        assert script.hung_up.wait(5)


def test_done_is_not_text(client: Driver, script: Script) -> None:
    script.answer = stream(chunk("[DONE]"), chunk(finish_reason="stop"), USAGE, DONE)
    assert client.stream("Hello").text == "[DONE]"
