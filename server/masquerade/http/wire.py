"""Building blocks of wire objects: strict models, typed errors, lists, server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from fastapi.responses import StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from masquerade.errors import MasqueradeError, UnsupportedParameter


def check_unicode(text: str) -> str:
    """The text. Raises `ValueError` if it has half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair, which is not text") from None
    return text


Text = Annotated[str, AfterValidator(check_unicode)]


class Refusal(ValueError):
    """Carries a typed error through pydantic, which wraps the exceptions of validators."""

    def __init__(self, error: MasqueradeError) -> None:
        super().__init__(str(error))
        self.error = error


class Schema(BaseModel):
    """A strict and immutable model."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class WireObject(Schema, extra="forbid"):
    """An object of a response without other fields than these."""


class RequestBody(Schema):
    """A body that may have fields that the server does not implement.

    `refused` has the values of such fields that change nothing. Other values raise `UnsupportedParameter`.
    """

    refused: ClassVar[Mapping[str, tuple[Any, ...]]]

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: Any) -> Any:
        for name, value in fields.items() if isinstance(fields, dict) else ():
            if name in cls.refused and value is not None and value not in cls.refused[name]:
                raise Refusal(UnsupportedParameter(f"`{name}` is not supported", param=name))
        return fields


T = TypeVar("T", bound=BaseModel)


def show(example: dict[str, Any]) -> ConfigDict:
    """The configuration of a model that has an example, beside what it inherits."""
    return ConfigDict(json_schema_extra={"example": example})


class Page(Schema, Generic[T]):
    """Some of a list; `has_more` says whether more follow `after` the last one."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class Deleted(Schema):
    """A deleted object."""

    model_config = show({"id": "file-6ab1f0c2d3e4f5061728394a", "object": "file", "deleted": True})

    id: str
    object: str
    deleted: Literal[True] = True


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_LINE_ENDS = {end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


def encode(value: Any) -> str:
    """A value as JSON in one line, also for clients that split lines as Unicode does."""
    return escape_line_ends(_encode(value))


def escape_line_ends(text: str) -> str:
    """JSON text whose strings have no line end of Unicode; those of ASCII are always escaped in JSON."""
    if not text.isascii():
        for end, escaped in _LINE_ENDS.items():
            text = text.replace(end, escaped)
    return text


def sse(data: dict[str, Any] | str) -> str:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else encode(data)}\n\n"


def respond_events(events: AsyncIterator[str], headers: Mapping[str, str] | None = None) -> StreamingResponse:
    """A response of server-sent events that proxies do not buffer."""
    unbuffered = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers={**unbuffered, **(headers or {})})
