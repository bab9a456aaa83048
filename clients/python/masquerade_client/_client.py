"""The synchronous client: sends calls with `httpx.Client`."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import httpx

from . import _chat
from ._builds import Builds
from ._calls import (
    DEFAULT_RETRIES,
    DEFAULT_TIMEOUT,
    DEFAULT_URL,
    Attempts,
    Call,
    Timeout,
    check,
    connect,
    http_errors,
    read_key,
)
from ._errors import MasqueradeError
from ._personas import Personas
from ._types import ChatOptions, Delta, Model, Prompt, Reply

if TYPE_CHECKING:
    import openai

T = TypeVar("T")


class Client:
    """A connection pool to one server. It is thread-safe; close it, or use it in a `with` statement.

    `timeout` is in seconds, for each read. `retries` is the number of further attempts if a call did not reach the
    server, if the server is temporarily unavailable, or if the response to an idempotent call was lost.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        timeout: Timeout = DEFAULT_TIMEOUT,
        retries: int = DEFAULT_RETRIES,
    ) -> None:
        self._api_key = read_key(api_key)
        self._http = connect(httpx.Client, base_url, self._api_key, timeout)
        self._retries = retries
        self._model: str | None = None
        self.personas = Personas(self)
        self.builds = Builds(self)

    def chat(self, prompt: Prompt, **options: Unpack[ChatOptions]) -> Reply:
        """Answer a prompt or a list of messages; see `ChatOptions`."""
        return self.run(_chat.chat(self._name_model(_chat.chat_body(prompt, **options))))

    def stream(self, prompt: Prompt, **options: Unpack[ChatOptions]) -> Stream:
        """Stream the answer. The request is sent when the stream is entered or first iterated."""
        body = _chat.stream_body(prompt, **options)
        return Stream(lambda: self._send(_chat.stream(self._name_model(body)), stream=True))

    def models(self) -> list[Model]:
        """The base model and its personas, as model ids."""
        return self.run(_chat.list_models())

    def ready(self) -> bool:
        """Whether the server is reachable and ready to answer."""
        try:
            with http_errors():
                return self._http.get("/readyz").is_success
        except MasqueradeError:
            return False

    def metrics(self) -> str:
        """The server's metrics, in the text format of Prometheus."""
        return self.run(_chat.metrics())

    def openai(self) -> openai.OpenAI:
        """A stock OpenAI client for this server and key; needs the package `openai`."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self._http.base_url}".rstrip("/") + "/v1", api_key=self._api_key or "none")

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def run(self, call: Call[T]) -> T:
        """Send a call, with retries, and return its decoded response."""
        return call.read(self._send(call))

    @contextmanager
    def open(self, call: Call[Any]) -> Iterator[httpx.Response]:
        """Send a call and yield its streaming response; an error response is raised."""
        with closing(self._send(call, stream=True)) as response:
            yield response

    def _send(self, call: Call[Any], *, stream: bool = False) -> httpx.Response:
        """The response to a call, after as many attempts as it takes; with `stream`, its body is still to be read."""
        attempts = Attempts(self._retries, call.again, call.changes)
        while True:
            try:
                with call.request() as request, http_errors():
                    response = self._http.send(self._http.build_request(**request), stream=stream)
                    if response.is_success:
                        return response
                    with closing(response):
                        response.read()
                check(response)
            except MasqueradeError as error:
                time.sleep(attempts.pause(error))

    def _name_model(self, body: dict[str, Any]) -> dict[str, Any]:
        if "model" not in body:
            self._model = self._model or _chat.only_base(self.models())
            body["model"] = self._model
        return body

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream(_chat.StreamBase):
    """An iterator of the answer's pieces. Leaving the `with` block closes the connection."""

    def __init__(self, send: Callable[[], httpx.Response]) -> None:
        super().__init__()
        self._send = send
        self._response: httpx.Response | None = None
        self._pieces = self._receive()

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        return next(self._pieces)

    def close(self) -> None:
        """Close the connection."""
        self._pieces.close()
        if self._response is not None:
            self._response.close()

    def _receive(self) -> Generator[Delta]:
        response = self._open()
        try:
            with http_errors():
                for chunk in response.iter_bytes():
                    yield from self._deltas(chunk)
            self._finish()
        finally:
            response.close()

    def _open(self) -> httpx.Response:
        if self._response is None:
            self._response = self._send()
        return self._response
