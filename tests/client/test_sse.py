"""The event decoder, byte by byte."""

from __future__ import annotations

import pytest

from masquerade_client._sse import EventDecoder


def decode(raw: bytes, size: int) -> list[str]:
    decoder = EventDecoder()
    return [event for start in range(0, len(raw), size) for event in decoder.feed(raw[start : start + size])]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("raw", "events"),
    [
        (b"data: a\n\ndata: b\n\n", ["a", "b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
        (b"data:a\n\n", ["a"]),
        (b"data:  a\n\n", [" a"]),
        (b"data: a\ndata: b\n\n", ["a\nb"]),
        (b": ping\n\n\n\ndata: a\n\n", ["a"]),
        (b"event: x\nid: 1\nretry: 5\ndata: a\n\n", ["a"]),
        ("data: é\u2028🎭\n\n".encode(), ["é\u2028🎭"]),
        (b"data: a\n\ndata: no end", ["a"]),
        (b"data: a\n\ndata: no end\n", ["a"]),
        (b"", []),
    ],
)
def test_events_do_not_depend_on_how_the_bytes_are_cut(raw: bytes, events: list[str], size: int) -> None:
    assert decode(raw, size) == events
