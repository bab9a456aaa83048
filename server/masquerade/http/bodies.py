"""JSON bodies, parsed within limits, so that none blocks the event loop for more than 0.2 s."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from email.message import Message
from typing import Any, NamedTuple

from fastapi import Request

from masquerade.errors import InvalidValue
from masquerade.http.throttle import Throttle

MOST_VALUES = 2**18  # in one JSON text
MOST_NAMES = 2**15  # of fields in objects
MOST_CONTAINERS = 2**15  # arrays and objects
MOST_DEPTH = 128  # levels of nested arrays and objects
LARGE = 2**18  # bytes; larger bodies are parsed one at a time

_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[\]{},:]', re.DOTALL)
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_PATH_PARTS = 4  # of the path in an error


class NotJson(InvalidValue):
    """A text is not JSON of Unicode text and finite numbers (I-JSON, RFC 7493 sections 2.1 and 2.2)."""


class ParsedRequest(Request):
    """A request whose body was read as JSON."""

    def __init__(self, http: Request, content: bytes, value: Any) -> None:
        super().__init__(http.scope, http.receive)
        self._content, self._value = content, value

    async def body(self) -> bytes:
        """The bytes."""
        return self._content

    async def json(self) -> Any:
        """The value of the JSON."""
        return self._value


async def read_body(http: Request) -> Request:
    """The request, with its body parsed if it is JSON. Raises `InvalidValue` as `parse` does.

    Large bodies are throttled: Python parses JSON without releasing the interpreter lock, so several at once would
    stall every stream.
    """
    if not is_json(http.headers.get("content-type", "")):
        return http
    content = await http.body()
    if not content:
        return http
    if len(content) < LARGE:
        return ParsedRequest(http, content, parse(content))
    throttle: Throttle = http.app.state.large_bodies
    async with throttle.turn():
        return ParsedRequest(http, content, parse(content))


def parse(content: bytes | str, what: str = "the body", param: str | None = None) -> Any:
    """The value of a JSON text.

    Raises `InvalidValue` with the position of an error in the syntax, with the number that is not finite or the field
    that is not Unicode, or with the limit on values, names, containers or depth that the text exceeds. `what` and
    `param` say where the text came from. For a body with an error in a field, `param` is the field.
    """
    text = content if isinstance(content, str) else _decode(content, what)
    check_size(count(text), what, param)
    try:
        value, is_finite = _load(text)
    except json.JSONDecodeError as error:
        raise NotJson(f"{what} is not JSON: {error.msg} at byte {_byte(text, error.pos)}", param=param) from None
    except RecursionError:
        raise _too_deep(text, what, param) from None
    except ValueError:
        limit = sys.get_int_max_str_digits()
        raise InvalidValue(f"{what} has a number of more than {limit} digits", param=param) from None
    if _is_deep(value):
        raise _too_deep(text, what, param)
    if not is_finite or ("\\u" in text and not _is_sound(value)):  # else there are no halves of surrogate pairs
        raise _unsound(value, what, param)
    return value


class Size(NamedTuple):
    """What determines the time to parse a JSON text."""

    values: int
    names: int
    containers: int

    def plus(self, other: Size) -> Size:
        """The size of two texts."""
        return Size(*map(sum, zip(self, other, strict=True)))

    def faults(self) -> Iterator[str]:
        """The numbers over their limits, with the limits."""
        names = "values", "names", "arrays and objects"
        for found, most, name in zip(self, (MOST_VALUES, MOST_NAMES, MOST_CONTAINERS), names, strict=True):
            if found > most:
                yield f"{found} {name}; the limit is {most}"


def count(text: str) -> Size:
    """The size of a JSON text, or an upper bound that is within the limits."""
    size = _count(text)
    if not any(size.faults()):
        return size
    unescaped = text.replace("\\\\", "").replace('\\"', "")  # then every quote delimits a string
    if (strings := unescaped.count('"') // 2) > MOST_VALUES + MOST_NAMES:
        return Size(strings, 0, 0)
    return _count("".join(unescaped.split('"')[::2]))


def check_size(size: Size, what: str, param: str | None) -> None:
    """Raises `InvalidValue` for a size over a limit."""
    for fault in size.faults():
        raise InvalidValue(f"{what} has {fault}", param=param)


def _count(text: str) -> Size:
    containers = text.count("[") + text.count("{")
    return Size(text.count(",") + containers, text.count(":"), containers)


def is_json(content_type: str) -> bool:
    """Whether a body is parsed as JSON, by the framework's own rule."""
    header = Message()
    header["content-type"] = content_type
    subtype = header.get_content_subtype()
    return header.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


def _decode(content: bytes, what: str) -> str:
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.upper().removesuffix("-SIG")
        raise InvalidValue(
            f"{what} is not {name}: byte {error.start} is 0x{content[error.start]:02x}; send JSON in UTF-8"
        ) from None


class _NotFinite(ValueError):
    """A number is not finite."""


def _read_finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise _NotFinite
    return value


def _load(text: str) -> tuple[Any, bool]:
    """The value, and whether its numbers are finite."""
    try:
        return json.loads(text, parse_float=_read_finite, parse_constant=_read_finite), True
    except _NotFinite:
        return json.loads(text), False


def _unsound(value: Any, what: str, param: str | None) -> NotJson:
    """The error for a text with half of a surrogate pair, or with a number that is not finite; with its path."""
    path, inner = list[str | int](), value
    for name in _find_unsound(value):
        path.append(name)
        inner = inner[name]
    fault = f"{inner}, which is not a finite number" if isinstance(inner, float) else "half of a surrogate pair"
    where = _join(path)
    return NotJson(f"{what} has {fault}" + (f", in {where!r}" if where else ""), param=param or where or None)


def _find_unsound(value: Any) -> Sequence[str | int]:
    """The path to the first name or value in a value that is not sound; empty if there is none."""
    if not isinstance(value, dict | list):
        return []
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(name, str) and not name.isascii() and not _is_sound(name):
            return [name]
        if isinstance(inner, dict | list):
            if path := _find_unsound(inner):
                return [name, *path]
        elif not (isinstance(inner, str) and inner.isascii()) and not _is_sound(inner):
            return [name]
    return []


def _is_sound(value: Any) -> bool:
    """Whether a value can be written as JSON in UTF-8."""
    try:
        _encode(value).encode()
    except ValueError:
        return False
    return True


def _is_deep(value: Any) -> bool:
    """Whether a value is nested deeper than `MOST_DEPTH`."""
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [inner for outer in level for inner in _containers(outer)]
        if not level:
            return False
    return True


def _containers(value: Any) -> Iterator[Any]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (inner for inner in inside if isinstance(inner, dict | list))


def _too_deep(text: str, what: str, param: str | None) -> InvalidValue:
    """The error, with the position and the path of the first container beyond the limit."""
    path: list[str | int] = []  # the name or index in each open container
    name = ""
    for token in _TOKEN.finditer(text):
        match token.group():
            case "[" | "{" as opening:
                path.append(0 if opening == "[" else "")
                if len(path) > MOST_DEPTH:
                    return InvalidValue(
                        f"{what} is nested deeper than {MOST_DEPTH} levels, which is the limit, at byte "
                        f"{_byte(text, token.start())}",
                        param=param or _join(path),
                    )
            case "]" | "}" if path:
                path.pop()
            case "," if path and isinstance(path[-1], int):
                path[-1] += 1
            case ":" if path:
                path[-1] = name[1:-1]
            case name:
                pass
    return InvalidValue(f"{what} is nested too deeply; the limit is {MOST_DEPTH} levels", param=param)


def _join(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path[:_PATH_PARTS])).encode(errors="replace").decode()


def _byte(text: str, position: int) -> int:
    """The position of a character, in bytes."""
    return len(text[:position].encode(errors="replace"))
