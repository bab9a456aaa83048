"""HTTP calls as values, their retries and errors; shared by `Client` and `AsyncClient`."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, Generic, Protocol, TypeVar

import httpx

from ._errors import ApiError, ConnectionFailed, MasqueradeError, TimedOut, UnexpectedAnswer, from_response
from ._types import decoding

T = TypeVar("T")
H = TypeVar("H", httpx.Client, httpx.AsyncClient)

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(300.0, connect=5.0)
DEFAULT_RETRIES = 2
LONGEST_WAIT = 60.0  # seconds; a longer Retry-After raises the error
LONGEST_ABSENCE = 300.0  # seconds without the server in which a build is waited for
_OF_GATEWAYS = (502, 504)  # the server may have done its work all the same
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds, without Retry-After

Timeout = float | httpx.Timeout | None


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, with httpx's names, and `read`, which decodes a successful response.

    `again` marks an idempotent call, which is sent again if its response was lost.
    """

    method: str
    url: str
    read: Callable[[httpx.Response], T]
    json: Any = None
    params: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    data: Mapping[str, Any] | None = None  # of a form
    files: Mapping[str, Callable[[], tuple[str, IO[bytes]]]] | None = None  # reopened for each attempt
    again: bool = False
    changes: bool = False  # a persona, so that to do it twice is something else

    @contextmanager
    def request(self) -> Iterator[dict[str, Any]]:
        """The arguments of `httpx.Client.build_request`; files are open within the block."""
        with ExitStack() as opened:
            parts = {key: open_() for key, open_ in (self.files or {}).items()}
            for _, file in parts.values():
                opened.enter_context(file)
            given = {name: value for name, value in vars(self).items() if name not in ("read", "again", "changes")}
            yield given | {"files": parts or None}


class Runs(Protocol):
    """What `Client` offers to its parts."""

    def run(self, call: Call[T], /) -> T:
        """Send a call and return its decoded response."""

    def open(self, call: Call[Any], /) -> AbstractContextManager[httpx.Response]:
        """Send a call and yield its streaming response."""


class AsyncRuns(Protocol):
    """What `AsyncClient` offers to its parts."""

    async def run(self, call: Call[T], /) -> T:
        """Send a call and return its decoded response."""

    def open(self, call: Call[Any], /) -> AbstractAsyncContextManager[httpx.Response]:
        """Send a call and yield its streaming response."""


class Attempts:
    """The remaining attempts of one call."""

    def __init__(self, retries: int, again: bool, changes: bool = False) -> None:
        self._left = retries
        self._again, self._changes = again, changes
        self._pause = FIRST_PAUSE

    def pause(self, error: MasqueradeError) -> float:
        """Seconds until the next attempt; raises `error` if there is none."""
        if not self._left or not self._is_retryable(error):
            raise error
        self._left -= 1
        delay = error.retry_after if isinstance(error, ApiError) else None
        if delay is not None:
            if delay > LONGEST_WAIT:
                raise error
            return delay
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        return pause * random.uniform(0.75, 1.25)

    def _is_retryable(self, error: MasqueradeError) -> bool:
        if isinstance(error, ApiError):
            return error.passing and not (self._changes and error.status in _OF_GATEWAYS)
        return isinstance(error, ConnectionFailed) and (self._again or not error.reached)


class Patience:
    """For how long somebody who waits puts up with a server that is away, such as during a restart."""

    def __init__(self) -> None:
        self._pause, self._since = FIRST_PAUSE, math.inf

    def reset(self) -> None:
        """The server is there."""
        self._pause, self._since = FIRST_PAUSE, time.monotonic()

    def pause(self, error: MasqueradeError) -> float:
        """Seconds until the next look; raises `error` if it does not pass, lasts too long, or was there at once."""
        passing = error.passing if isinstance(error, ApiError) else isinstance(error, ConnectionFailed)
        known = self._since < math.inf or (isinstance(error, ConnectionFailed) and error.reached)
        if not (passing and known):
            raise error
        self._since = min(self._since, time.monotonic())
        if time.monotonic() - self._since > LONGEST_ABSENCE:
            raise error
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        return pause


def read_key(text: str | None) -> str | None:
    """A key without the space around it, such as the newline at the end of a file; None if nothing is left.

    Raises `MasqueradeError`, which does not repeat it, for one that no header can have.
    """
    key = (text or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise MasqueradeError("the API key has characters that no key has; was it copied in full?")
    return key or None


def connect(kind: type[H], base_url: str, api_key: str | None, timeout: Timeout) -> H:
    """A client of httpx; the base URL may end in `/v1`, as in other clients.

    Raises `MasqueradeError` for a proxy of the environment that cannot be used, and `ConnectionFailed` for an address
    that cannot be one.
    """
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        with http_errors():
            return kind(base_url=base_url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=timeout)
    except (ImportError, ValueError) as error:  # of a proxy
        raise MasqueradeError(f"the proxy that the environment names cannot be used: {error}") from error


@contextmanager
def http_errors() -> Iterator[None]:
    """Translate errors of httpx to errors of this package."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
        kind = TimedOut if isinstance(error, httpx.TimeoutException) else ConnectionFailed
        raise kind(str(error) or repr(error), reached=False) from error
    except httpx.TimeoutException as error:
        raise TimedOut(f"no answer in time: {error!r}") from error
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ConnectionFailed(str(error) or repr(error)) from error
    except httpx.DecodingError as error:
        raise UnexpectedAnswer(str(error)) from error


def check(response: httpx.Response) -> None:
    """Raise the error of a response without success; its body must have been read."""
    if not response.is_success:
        raise from_response(response.status_code, response.headers, response.content)


def check_options(given: Mapping[str, Any], known: type[Any]) -> None:
    """Raise TypeError for an option that is not a key of `known`, a TypedDict."""
    if unknown := given.keys() - known.__annotations__.keys():
        raise TypeError(f"unknown option {min(unknown)!r}; there are {', '.join(known.__annotations__)}")


def decoder(what: str, make: Callable[[Any], T]) -> Callable[[httpx.Response], T]:
    """A function that makes a value of a JSON response; raises `UnexpectedAnswer` if the response is not `what`."""

    def read(response: httpx.Response) -> T:
        with decoding(what):
            return make(response.json())

    return read


def list_decoder(what: str, make: Callable[[Any], T]) -> Callable[[httpx.Response], list[T]]:
    """The same for an object whose `data` is a list."""
    return decoder(f"a list of {what}", lambda body: [make(one) for one in body["data"]])
