"""What is sent and how its answer is read, as values; `Client` and `AsyncClient` add only the waiting.

Knows requests, responses and when one may be tried again. Refuses to know what is asked: that is `_chat`, `_personas`
and `_builds`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, Generic, TypeVar

import httpx

from ._errors import ApiError, ConnectionFailed, MasqueradeError, TimedOut, UnexpectedAnswer, from_response

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(300.0, connect=5.0)
DEFAULT_RETRIES = 2
LONGEST_WAIT = 60.0  # seconds that a server may ask to be left alone; for longer the caller decides
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds, where the server does not say

Timeout = float | httpx.Timeout | None


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and `read`, which makes a value of a response that is no refusal.

    `again` says that it may be sent again when its answer was lost: doing it twice is doing it once.
    """

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    json: Any = None
    params: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    form: Mapping[str, Any] | None = None
    files: Mapping[str, Callable[[], tuple[str, IO[bytes]]]] | None = None  # opened anew for each attempt
    again: bool = False

    @contextmanager
    def request(self) -> Iterator[dict[str, Any]]:
        """The arguments of `httpx.Client.build_request`; files are open within."""
        with ExitStack() as opened:
            parts = {key: open_() for key, open_ in (self.files or {}).items()}
            for _, file in parts.values():
                opened.enter_context(file)
            yield {
                "method": self.method,
                "url": self.path,
                "json": self.json,
                "params": self.params,
                "headers": self.headers,
                "content": self.content,
                "data": self.form,
                "files": parts or None,
            }


class Attempts:
    """How often one call may still be tried."""

    def __init__(self, retries: int, again: bool) -> None:
        self._left = retries
        self._again = again
        self._pause = FIRST_PAUSE

    def pause(self, error: MasqueradeError) -> float:
        """Seconds until the next attempt; raises the error if there is none."""
        if not self._left or not self._helps(error):
            raise error
        self._left -= 1
        asked = error.retry_after if isinstance(error, ApiError) else None
        if asked is not None:
            if asked > LONGEST_WAIT:
                raise error
            return asked
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        return pause * random.uniform(0.75, 1.25)

    def _helps(self, error: MasqueradeError) -> bool:
        if isinstance(error, ApiError):
            return error.passing
        return isinstance(error, ConnectionFailed) and (self._again or not error.reached)


def settings(base_url: str, api_key: str | None, timeout: Timeout) -> dict[str, Any]:
    """The arguments of the httpx client; a base URL may end in `/v1`, as other clients want it."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return {"base_url": base_url.rstrip("/").removesuffix("/v1"), "headers": headers, "timeout": timeout}


@contextmanager
def connecting() -> Iterator[None]:
    """The transport's failures become this package's."""
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
    """Raise what a response, if it is a refusal, stands for; its body has been read."""
    if not response.is_success:
        raise from_response(response.status_code, response.headers, response.content)
