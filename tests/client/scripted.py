"""A tiny real HTTP server that says what a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler"], None]


@dataclass
class Script:
    """What to answer next, and what has been asked last; questions for the models are answered on the side."""

    base_url: str = ""
    answer: Answer | None = None
    models: Any = field(default_factory=lambda: {"object": "list", "data": [{"id": "demo", "parent": None}]})
    path: str = ""
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    hung_up: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Script

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.script.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        pass

    def start(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def _answer(self) -> None:
        if self.path == "/v1/models" and self.script.models is not None:
            say(self.script.models)(self)
            return
        self.script.path = self.path
        self.script.headers = {name.lower(): value for name, value in self.headers.items()}
        assert self.script.answer is not None, "the test scripted no answer"
        self.script.answer(self)


@contextmanager
def scripted() -> Iterator[Script]:
    """Serve a script on a free port until the block ends."""
    script = Script()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Scripted", (Handler,), {"script": script}))
    script.base_url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def say(data: object, status: int = 200, **headers: str) -> Answer:
    """Answer with JSON."""
    return say_bytes(json.dumps(data).encode(), status, Content_Type="application/json", **headers)


def say_bytes(content: bytes, status: int = 200, **headers: str) -> Answer:
    """Answer with anything."""

    def answer(handler: Handler) -> None:
        handler.start(status, Content_Length=str(len(content)), **headers)
        handler.write(content)

    return answer


def stream(*pieces: bytes) -> Answer:
    """Answer with an event stream, one write a piece; it ends by closing the connection."""

    def answer(handler: Handler) -> None:
        handler.start(200, Content_Type="text/event-stream", Connection="close")
        for piece in pieces:
            handler.write(piece)

    return answer


def stream_forever(event: bytes) -> Answer:
    """Repeat an event until the client hangs up, and note that it did."""

    def answer(handler: Handler) -> None:
        handler.start(200, Content_Type="text/event-stream", Connection="close")
        try:
            while not handler.script.hung_up.wait(0.01):
                handler.write(event)
        except OSError:
            handler.script.hung_up.set()

    return answer


def wait_until_hung_up(handler: Handler) -> None:
    """Never answer; note when the client gives up."""
    handler.rfile.read(1)
    handler.script.hung_up.set()
    handler.close_connection = True


COMPLETION: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "demo:introvert",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "No crowds for me."}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
    "persona": "introvert",
    "generation": "c0ffee",
}


def event(data: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def chunk(content: str | None = None, finish_reason: str | None = None, **fields: object) -> bytes:
    """One `chat.completion.chunk` as an event."""
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    head = {key: COMPLETION[key] for key in ("id", "created", "model", "persona", "generation")}
    return event({**head, "object": "chat.completion.chunk", "choices": [choice], "usage": None, **fields})


USAGE = chunk(choices=[], usage=COMPLETION["usage"])
DONE = b"data: [DONE]\n\n"


def answer_in(*pieces: str) -> list[bytes]:
    """A whole stream that says the pieces."""
    return [chunk(""), *map(chunk, pieces), chunk(finish_reason="stop"), USAGE, DONE]
