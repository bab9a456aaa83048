"""Server-sent events out of bytes.

Knows the wire format. Refuses to know what an event means. `httpx` can split a body into lines too, but takes Unicode's
line separators for line ends, which may well stand inside an event.
"""

from __future__ import annotations

from collections.abc import Iterator


class EventDecoder:
    """Takes bytes as they arrive, gives back the data of every event that they complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[str]:
        """Take some bytes; comments and fields other than `data` are dropped, as is an event without an end."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            text = line.removesuffix(b"\r").decode()
            if text.startswith("data:"):
                self._data.append(text[5:].removeprefix(" "))
            elif not text and self._data:
                yield "\n".join(self._data)
                self._data.clear()
