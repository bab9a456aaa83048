"""A decoder of server-sent events.

`httpx` can also split a body into lines, but it splits at Unicode's line separators, which an event may contain.
"""

from __future__ import annotations

from collections.abc import Iterator


class EventDecoder:
    """Decodes bytes incrementally into the data of events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[str]:
        """Yield the data of every event that `chunk` completes; comments and fields other than `data` are ignored."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            text = line.removesuffix(b"\r").decode()
            if text.startswith("data:"):
                self._data.append(text[5:].removeprefix(" "))
            elif not text and self._data:
                yield "\n".join(self._data)
                self._data.clear()
