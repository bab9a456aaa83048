"""The lines of a batch's input file: each is one request, with an id that its result has too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masquerade.errors import MasqueradeError, quote
from masquerade.http import bodies
from masquerade.http.wire import encode

MOST_FAULTS = 100  # of a file that are reported
MAX_ID = 512  # characters of a custom id

Fault = dict[str, Any]


@dataclass(frozen=True)
class BatchLine:
    """A request of a batch."""

    custom_id: str
    body: dict[str, Any]

    @property
    def content(self) -> bytes:
        """The body as JSON."""
        return encode(self.body).encode()


class LineFault(Exception):
    """What is wrong with a line; the arguments are OpenAI's code, the message and the field."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param

    def describe(self, number: int | None) -> Fault:
        """An item of `errors.data` of a batch."""
        return {"code": self.code, "line": number, "message": str(self), "param": self.param}


def read_lines(path: Path, endpoint: str, limit: int) -> Iterator[BatchLine]:
    """The requests of a file that `find_faults` has passed."""
    for _, content in _split(path, limit):
        yield parse_line(content, endpoint, limit)


def find_faults(path: Path, endpoint: str, limit: int, most: int) -> tuple[int, list[Fault]]:
    """The number of requests in a file, and what is wrong with its lines.

    `limit` is in bytes of a line, `most` in lines.
    """
    faults: list[Fault] = []
    first_lines: dict[str, int] = {}  # by custom id
    count = 0
    for number, content in _split(path, limit):
        count += 1
        try:
            if count > most:
                raise LineFault("too_many_requests", f"the file has more than {most} requests, which is the limit")
            line = parse_line(content, endpoint, limit)
            first = first_lines.setdefault(line.custom_id, number)
            if first != number:
                message = f"the custom_id {quote(line.custom_id)} is that of line {first} too"
                raise LineFault("duplicate_custom_id", message, "custom_id")
        except LineFault as fault:
            faults.append(fault.describe(number))
        if len(faults) == MOST_FAULTS or count > most:
            break
    if not count:
        faults.append(LineFault("empty_file", "the file has no requests").describe(None))
    return count, faults


def parse_line(content: bytes, endpoint: str, limit: int) -> BatchLine:
    """The request of a line. Raises `LineFault`."""
    if len(content) > limit:
        raise LineFault("line_too_long", f"the line is longer than {limit} bytes, which is the limit")
    try:
        fields = bodies.parse(content, "the line")
    except MasqueradeError as error:
        raise LineFault("invalid_json_line", str(error)) from None
    if not isinstance(fields, dict):
        raise LineFault("invalid_json_line", "the line is not a JSON object")
    for name in ("custom_id", "method", "url", "body"):
        if fields.get(name) is None:
            raise LineFault("missing_required_parameter", f"the line has no `{name}`", name)
    custom_id, body = fields["custom_id"], fields["body"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID:
        raise LineFault("invalid_custom_id", f"`custom_id` must be a text of 1 to {MAX_ID} characters", "custom_id")
    if fields["method"] != "POST":
        raise LineFault("invalid_method", f"`method` is {quote(fields['method'])}; it must be 'POST'", "method")
    if fields["url"] != endpoint:
        message = f"`url` is {quote(fields['url'])}; the batch is for {endpoint!r}"
        raise LineFault("invalid_url", message, "url")
    if not isinstance(body, dict):
        raise LineFault("invalid_body", "`body` must be a JSON object", "body")
    return BatchLine(custom_id, body)


def _split(path: Path, limit: int) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1 on; of a longer line, `limit` + 1 bytes."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(limit + 1):
            number += 1
            rest = line
            while len(rest) > limit and not rest.endswith(b"\n"):
                rest = file.readline(limit + 1)
            if content := line.strip():
                yield number, content if len(content) <= limit else line
