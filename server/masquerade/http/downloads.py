"""Files as responses, whole or in ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi.responses import FileResponse
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from masquerade.errors import InvalidValue, RangeNotSatisfiable
from masquerade.http import errors


class Download(FileResponse):
    """A file, or the part that the header `Range` names. A bad range gets an error like all others."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file or the error."""
        failed_start: Message | None = None

        async def send_unless_failed(message: Message) -> None:
            nonlocal failed_start
            if message["type"] == "http.response.start" and message["status"] >= 400:
                failed_start = message
            if failed_start is None:
                await send(message)

        await super().__call__(scope, receive, send_unless_failed)
        if failed_start is None:
            return
        size = Headers(raw=failed_start["headers"]).get("content-range")
        if size is None:
            response = errors.respond(InvalidValue("the header Range is not a range of bytes", param="Range"))
        else:
            error = RangeNotSatisfiable(f"the file has {size.rpartition('/')[2]} bytes", param="Range")
            response = errors.respond(error, {"Content-Range": size})
        await response(scope, receive, send)


class TemporaryDownload(Download):
    """A file that is deleted afterwards."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `Download`."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            Path(self.path).unlink(missing_ok=True)


def describe(example: str, text: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that returns a file."""
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}, "example": example}}
    return {
        200: {"description": text, "content": content},
        206: {"description": "The part that `Range` asked for.", "content": content},
    }
