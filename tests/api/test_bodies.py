"""JSON is read within bounds, and what is wrong with it is told with its place."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from typing import Any

import pytest
from fastapi.routing import APIRoute, iter_route_contexts
from hypothesis import given
from hypothesis import strategies as st

from masquerade.app import describe
from masquerade.errors import InvalidValue
from masquerade.http.access import ScopedRoute
from masquerade.http.bodies import MOST_CONTAINERS, MOST_DEPTH, MOST_NAMES, MOST_VALUES, parse
from masquerade.http.throttle import Throttle

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def nest(depth: int, last: Any = 1) -> Any:
    for _ in range(depth):
        last = {"a": last}
    return last


@given(value=JSON)
def test_what_is_sound_is_read_as_it_is(value: Any) -> None:
    assert parse(json.dumps(value)) == value
    assert parse(json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")) == value


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_other_unicode_is_read(encoding: str) -> None:
    assert parse('{"a": "ü漢"}'.encode(encoding)) == {"a": "ü漢"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": "ü"}'.encode("latin-1"), "the body is not UTF-8: byte 7 is 0xfc"),
        ('{"ü": 1,}'.encode(), "the body is not JSON: .* at byte 9"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number of more than 4300 digits"),
        (b"[" + b"1," * MOST_VALUES + b"1]", f"{MOST_VALUES + 1} values; the limit is {MOST_VALUES}"),
        (b"[" + b"[]," * MOST_CONTAINERS + b"1]", f"arrays and objects; the limit is {MOST_CONTAINERS}"),
        (b"{" + b'"":1,' * MOST_NAMES + b'"":1}', f"names; the limit is {MOST_NAMES}"),
        (b'["' + b'","' * MOST_VALUES + b'"]', f"values; the limit is {MOST_VALUES}"),
        (b'{"a": "\xed\xa0\xbd"}', "the body is not UTF-8: byte 7 is 0xed"),
        (b'{"a": ["x", {"b": "\\ud83d!"}]}', "half of a surrogate pair, in 'a.1.b'"),
        (b'{"a": {"\\uDE00": 1}}', r"half of a surrogate pair, in 'a.\?'"),
        (b'{"a": -1e999}', "-inf, which is not a finite number, in 'a'"),
        (b"NaN", "the body has nan, which is not a finite number$"),
        (b'"\\ud800"', "the body has half of a surrogate pair$"),
        (b'{"a": [NaN]}', "nan, which is not a finite number, in 'a.0'"),
        (b"[" * 20_000, f"nested deeper than {MOST_DEPTH} levels, which is the limit, at byte {MOST_DEPTH}"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_told(content: bytes, words: str) -> None:
    with pytest.raises(InvalidValue, match=words) as refusal:
        parse(content)
    assert len(str(refusal.value)) < 300


def test_pairs_of_surrogates_and_backslashes_are_text() -> None:
    assert parse(b'{"a": "\\ud83d\\ude00", "b": "\\\\ud83d"}') == {"a": "\U0001f600", "b": "\\ud83d"}


@pytest.mark.parametrize("text", [",[{:" * 400_000, '\\",{:[' * 200_000, "\\\\" * 300_000 + ",", '"'])
def test_what_a_string_says_is_no_structure(text: str) -> None:
    document = {"a": [text, text], "b": {text: "x"}}
    assert parse(json.dumps(document)) == document


@pytest.mark.parametrize("depth", [MOST_DEPTH - 1, MOST_DEPTH, MOST_DEPTH + 1, 400, 5_000])
def test_the_depth_is_bounded_and_its_field_named(depth: int) -> None:
    text = '{"x": [7, {"y,[": ' + '{"a":' * (depth - 3) + "1" + "}" * (depth - 3) + "}]}"
    if depth <= MOST_DEPTH:
        assert parse(text) == {"x": [7, {"y,[": nest(depth - 3)}]}
        return
    with pytest.raises(InvalidValue, match=f"{MOST_DEPTH} levels") as refusal:
        parse(text)
    assert refusal.value.param == "x.1.y,[.a"


@pytest.mark.parametrize(
    "content",
    [
        b"[" + b"[]," * 2_600_000 + b"[]]",
        b"{" + b'"a":1,' * 1_300_000 + b'"a":1}',
        b'{"a":"' + b'\\"' * 3_900_000 + b'"}',
        b'{"a":"' + b"," * 8_000_000 + b'"}',
        b"[" * 8_000_000,
        b'"' * 8_000_000,
    ],
    ids=lambda content: content[:12].decode(),
)
def test_no_body_keeps_the_event_loop_for_long(content: bytes) -> None:
    """A stall: json.loads alone takes 2 s for the first. Processor time, since the machine may be busy."""
    started = time.process_time()
    with suppress(InvalidValue):
        parse(content)
    assert time.process_time() - started < 0.5


def test_no_route_reads_json_in_another_way() -> None:
    routes = [route.original_route for route in iter_route_contexts(describe().routes)]
    bodies = [route for route in routes if isinstance(route, APIRoute) and route.body_field is not None]
    assert len(bodies) > 8
    assert [route.path for route in bodies if not isinstance(route, ScopedRoute)] == []


def test_large_bodies_take_turns_and_leave_pauses() -> None:
    """Two pieces of work at once are done after each other, and something else is done between them."""
    done: list[str] = []

    async def work(throttle: Throttle, name: str) -> None:
        async with throttle.turn():
            done.append(f"{name} begins")
            time.sleep(0.05)  # holds the event loop, as a parser does
            done.append(f"{name} ends")

    async def tick() -> None:
        while True:
            done.append("tick")
            await asyncio.sleep(0.001)

    async def run() -> None:
        pace, ticking = Throttle(), asyncio.create_task(tick())
        await asyncio.gather(work(pace, "a"), work(pace, "b"))
        ticking.cancel()

    asyncio.run(run())
    begins, ends = done.index("b begins"), done.index("a ends")
    assert done.index("a begins") < ends < begins
    assert done[ends:begins].count("tick") > 5
