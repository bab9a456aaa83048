"""The asynchronous client: sends calls with `httpx.AsyncClient`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import httpx

from . import _chat
from ._builds import AsyncBuilds
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
from ._personas import AsyncPersonas
from ._types import ChatOptions, Delta, Model, Prompt, Reply

if TYPE_CHECKING:
    import openai

T = TypeVar("T")


class AsyncClient:
    """A connection pool to one server, for one event loop; close it, or use it in an `async with` statement.

    For `timeout` and `retries`, see `Client`.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        timeout: Timeout = DEFAULT_TIMEOUT,
        retries: int = DEFAULT_RETRIES,
    ) -> None:
        self._api_key = read_key(api_key)
        self._http = connect(httpx.AsyncClient, base_url, self._api_key, timeout)
        self._retries = retries
        self._model: str | None = None
        self.personas = AsyncPersonas(self)
        self.builds = AsyncBuilds(self)

    async def chat(self, prompt: Prompt, **options: Unpack[ChatOptions]) -> Reply:
        """Answer a prompt or a list of messages; see `ChatOptions`."""
        return await self.run(_chat.chat(await self._name_model(_chat.chat_body(prompt, **options))))

    def stream(self, prompt: Prompt, **options: Unpack[ChatOptions]) -> AsyncStream:
        """Stream the answer. The request is sent when the stream is entered or first iterated."""
        body = _chat.stream_body(prompt, **options)

        async def send() -> httpx.Response:
            return await self._send(_chat.stream(await self._name_model(body)), stream=True)

        return AsyncStream(send)

    async def models(self) -> list[Model]:
        """The base model and its personas, as model ids."""
        return await self.run(_chat.list_models())

    async def ready(self) -> bool:
        """Whether the server is reachable and ready to answer."""
        try:
            with http_errors():
                return (await self._http.get("/readyz")).is_success
        except MasqueradeError:
            return False

    async def metrics(self) -> str:
        """The server's metrics, in the text format of Prometheus."""
        return await self.run(_chat.metrics())

    def openai(self) -> openai.AsyncOpenAI:
        """A stock asynchronous OpenAI client for this server and key; needs the package `openai`."""
        from openai import AsyncOpenAI

        return AsyncOpenAI(base_url=f"{self._http.base_url}".rstrip("/") + "/v1", api_key=self._api_key or "none")

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def run(self, call: Call[T]) -> T:
        """Send a call, with retries, and return its decoded response."""
        return call.read(await self._send(call))

    @asynccontextmanager
    async def open(self, call: Call[Any]) -> AsyncIterator[httpx.Response]:
        """Send a call and yield its streaming response; an error response is raised."""
        async with aclosing(await self._send(call, stream=True)) as response:
            yield response

    async def _send(self, call: Call[Any], *, stream: bool = False) -> httpx.Response:
        """The response to a call, after as many attempts as it takes; with `stream`, its body is still to be read."""
        attempts = Attempts(self._retries, call.again, call.changes)
        while True:
            try:
                with call.request() as request, http_errors():
                    response = await self._http.send(self._http.build_request(**request), stream=stream)
                    if response.is_success:
                        return response
                    async with aclosing(response):
                        await response.aread()
                check(response)
            except MasqueradeError as error:
                await asyncio.sleep(attempts.pause(error))

    async def _name_model(self, body: dict[str, Any]) -> dict[str, Any]:
        if "model" not in body:
            self._model = self._model or _chat.only_base(await self.models())
            body["model"] = self._model
        return body

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class AsyncStream(_chat.StreamBase):
    """An iterator of the answer's pieces. Leaving the `async with` block closes the connection."""

    def __init__(self, send: Callable[[], Awaitable[httpx.Response]]) -> None:
        super().__init__()
        self._send = send
        self._response: httpx.Response | None = None
        self._pieces = self._receive()

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        return await anext(self._pieces)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._pieces.aclose()
        if self._response is not None:
            await self._response.aclose()

    async def _receive(self) -> AsyncGenerator[Delta]:
        response = await self._open()
        try:
            with http_errors():
                async for chunk in response.aiter_bytes():
                    for delta in self._deltas(chunk):
                        yield delta
            self._finish()
        finally:
            await response.aclose()

    async def _open(self) -> httpx.Response:
        if self._response is None:
            self._response = await self._send()
        return self._response
