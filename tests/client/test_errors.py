"""Every way to fail has its type."""

from __future__ import annotations

import pytest

from masquerade_client import (
    ApiError,
    BadRequest,
    Conflict,
    ConnectionFailed,
    MasqueradeError,
    NotAllowed,
    NotFound,
    Overloaded,
    ServerError,
    TimedOut,
    UnexpectedAnswer,
)
from tests.client.conftest import Async, Driver, Sync
from tests.client.scripted import COMPLETION, Script, say, say_bytes, wait_until_hung_up

REFUSAL = {
    "error": {
        "message": "there is no persona 'pirate'",
        "type": "not_found_error",
        "param": "persona",
        "code": "persona_not_found",
    }
}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, BadRequest),
        (401, NotAllowed),
        (403, NotAllowed),
        (404, NotFound),
        (409, Conflict),
        (413, BadRequest),
        (418, BadRequest),
        (429, Overloaded),
        (500, ServerError),
        (503, ServerError),
    ],
)
def test_the_status_decides_the_type(client: Driver, script: Script, status: int, expected: type[ApiError]) -> None:
    script.answer = say(REFUSAL, status)
    with pytest.raises(ApiError) as caught:
        client.chat("Hello")
    assert type(caught.value) is expected
    assert caught.value.status == status


def test_an_error_holds_what_the_body_says(client: Driver, script: Script) -> None:
    script.answer = say(REFUSAL, 404, X_Request_Id="r-1")
    with pytest.raises(NotFound) as caught:
        client.chat("Hello")
    error = caught.value
    assert (error.message, error.type, error.code, error.param, error.request_id) == (
        "there is no persona 'pirate'",
        "not_found_error",
        "persona_not_found",
        "persona",
        "r-1",
    )


def test_an_error_prints_its_message_and_its_facts(client: Driver, script: Script) -> None:
    script.answer = say(REFUSAL, 404)
    with pytest.raises(NotFound) as caught:
        client.chat("Hello")
    assert str(caught.value) == "there is no persona 'pirate' (status=404, code=persona_not_found, param=persona)"


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("Wed, 21 Oct 2026 07:28:00 GMT", None)])
def test_an_overloaded_server_says_when_to_return(
    client: Driver, script: Script, header: str, seconds: float | None
) -> None:
    script.answer = say(REFUSAL, 429, Retry_After=header)
    with pytest.raises(Overloaded) as caught:
        client.chat("Hello")
    assert caught.value.retry_after == seconds


@pytest.mark.parametrize("content", [b"<h1>Bad Gateway</h1>", b'{"error": "no"}', b'["error"]', b'{"detail": []}'])
def test_an_error_page_of_something_else_still_says_what_it_said(
    client: Driver, script: Script, content: bytes
) -> None:
    script.answer = say_bytes(content, 502)
    with pytest.raises(ServerError) as caught:
        client.chat("Hello")
    assert caught.value.message == f"HTTP 502: {content.decode()}"


@pytest.mark.parametrize(
    "content",
    [b"hello", b"[]", b"{}", b'{"choices": []}', b"\xff", b'{"choices": [{"message": null}]}'],
)
def test_an_answer_that_is_no_completion_is_unexpected(client: Driver, script: Script, content: bytes) -> None:
    script.answer = say_bytes(content)
    with pytest.raises(UnexpectedAnswer):
        client.chat("Hello")


def test_a_redirect_is_unexpected(client: Driver, script: Script) -> None:
    script.answer = say({}, 302, Location="/elsewhere")
    with pytest.raises(UnexpectedAnswer, match="302"):
        client.chat("Hello")


def test_a_body_in_a_broken_encoding_is_unexpected(client: Driver, script: Script) -> None:
    script.answer = say_bytes(b"not gzip", Content_Encoding="gzip")
    with pytest.raises(UnexpectedAnswer):
        client.chat("Hello")


def test_nobody_there_is_a_failed_connection(kind: type[Sync] | type[Async], nowhere: str) -> None:
    with pytest.raises(ConnectionFailed) as caught:
        kind(base_url=nowhere).chat("Hello")
    assert not isinstance(caught.value, TimedOut)


def test_a_connection_that_breaks_off_is_a_failed_connection(client: Driver, script: Script) -> None:
    script.answer = lambda handler: handler.start(200, Content_Length="99", Connection="close")
    with pytest.raises(ConnectionFailed):
        client.chat("Hello")


def test_an_answer_that_takes_too_long_is_timed_out(kind: type[Sync] | type[Async], script: Script) -> None:
    script.answer = wait_until_hung_up
    with pytest.raises(TimedOut):
        kind(base_url=script.base_url, timeout=0.1).chat("Hello")
    assert script.hung_up.wait(5), "the client has given up but holds the connection"


@pytest.mark.parametrize("url", ["not a url", "ftp://127.0.0.1", "http://["])
def test_an_impossible_address_is_a_failed_connection(kind: type[Sync] | type[Async], url: str) -> None:
    with pytest.raises(ConnectionFailed):
        kind(base_url=url).chat("Hello")


def test_after_an_error_the_client_is_as_good_as_before(client: Driver, script: Script) -> None:
    script.answer = say(REFUSAL, 404)
    with pytest.raises(NotFound):
        client.chat("Hello")
    script.answer = say(COMPLETION)
    assert client.chat("Hello").text == "No crowds for me."


def test_one_except_clause_catches_everything() -> None:
    for kind in (ConnectionFailed, UnexpectedAnswer, ApiError):
        assert issubclass(kind, MasqueradeError)
