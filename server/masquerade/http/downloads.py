"""Files as answers.

Knows which ranges of a file can be asked for. Refuses to know what is in it.
"""

from __future__ import annotations

from typing import Any

from fastapi.responses import FileResponse
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from masquerade.errors import BadRequest, InvalidValue
from masquerade.http import errors


class RangeNotSatisfiable(BadRequest):
    """The file ends before the range begins."""

    status = 416
    code = "range_not_satisfiable"


class Download(FileResponse):
    """A file, or the part of it that the header `Range` asks for; a range that is none is refused as all else is."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        refusal: Message | None = None

        async def send_unless_refused(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refusal = message
            if refusal is None:
                await send(message)

        await super().__call__(scope, receive, send_unless_refused)
        if refusal is None:
            return
        size = Headers(raw=refusal["headers"]).get("content-range")
        if size is None:
            await errors.respond(InvalidValue("this is no range of bytes", param="Range"))(scope, receive, send)
            return
        error = RangeNotSatisfiable(f"the file has {size.rpartition('/')[2]} bytes", param="Range")
        await errors.respond(error, {"Content-Range": size})(scope, receive, send)


def describe(example: str, text: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers with a file."""
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}, "example": example}}
    return {
        200: {"description": text, "content": content},
        206: {"description": "The part that `Range` asked for.", "content": content},
    }
