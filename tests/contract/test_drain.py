"""A server that is told to stop: answers that have begun may end, newcomers are told to come back."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.contract.asking import CHAT
from tests.serving import Server, serve

TIMEOUT = 120.0
ENOUGH = 1000  # tokens: more than can be said while a newcomer is refused


def ask(http: httpx.Client, tokens: int) -> Any:
    messages = [{"role": "user", "content": "Hi."}]
    asked = {"model": "rambler", "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True}
    return http.stream("POST", CHAT, json=asked)


def events(response: httpx.Response) -> Iterator[Any]:
    """What a stream says; its end is None."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield None if line == "data: [DONE]" else json.loads(line[6:])


def stop_after_first_text(server: Server, said: Iterator[Any]) -> None:
    next(event for event in said if event["choices"] and event["choices"][0]["delta"].get("content"))
    server.process.send_signal(signal.SIGTERM)


def refused(http: httpx.Client) -> httpx.Response:
    """The refusal of a newcomer, who may come before the signal does."""
    while True:
        with ask(http, 1) as response:
            response.read()
        if response.status_code != 200:
            return response


def test_what_has_begun_ends_and_newcomers_are_refused(rambler: Path) -> None:
    with (
        serve("--model", str(rambler), "--drain-seconds", str(TIMEOUT)) as server,
        httpx.Client(base_url=server.base_url, timeout=TIMEOUT) as http,
    ):
        with ask(http, ENOUGH) as stream:
            said = events(stream)
            stop_after_first_text(server, said)
            refusal = refused(http)
            assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "not_ready")
            assert int(refusal.headers["Retry-After"]) >= 1
            for path in ("/readyz", "/health", "/ping"):
                assert http.get(path).status_code == 503
            assert http.get("/healthz").status_code == 200
            *_, closing, end = said
        assert closing["choices"][0]["finish_reason"] == "length"
        assert end is None
        server.process.wait(TIMEOUT)


def test_after_the_grace_the_rest_is_told(rambler: Path) -> None:
    with (
        serve("--model", str(rambler), "--drain-seconds", "0") as server,
        httpx.Client(base_url=server.base_url, timeout=TIMEOUT) as http,
    ):
        with ask(http, 4 * ENOUGH) as stream:
            said = events(stream)
            stop_after_first_text(server, said)
            *_, last = said
        assert last["error"]["code"] == "not_ready"
        server.process.wait(TIMEOUT)
