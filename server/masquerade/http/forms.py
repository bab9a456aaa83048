"""Multipart forms with files: read within a limit, and stored as uploads."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.types import Message

from masquerade.errors import InvalidValue, TooLarge, UnsupportedParameter
from masquerade.http.access import Caller
from masquerade.jobs import File, JobService
from masquerade.service.build_requests import PURPOSE

OVERHEAD_BYTES = 2**16  # of a multipart body, beside its files
MAX_FILENAME = 255

# A training file of one line, for the description of the interface.
EXAMPLE = '{"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Oh. Hello."}]}'


def describe_form(**schema: Any) -> dict[str, Any]:
    """The OpenAPI description of a route whose body is a multipart form, by the keywords of the form's schema."""
    described = {"multipart/form-data": {"schema": {"type": "object", **schema}}}
    return {"requestBody": {"required": True, "content": described}}


def read_form(http: Request, limit: int) -> AbstractAsyncContextManager[FormData]:
    """The form of a request, as a context manager that closes its files.

    Raises `UnsupportedParameter` for a compressed body and `InvalidValue` for another content type. Entering it raises
    `TooLarge` as soon as more than `limit` bytes have arrived.
    """
    encoding = http.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise UnsupportedParameter(f"the body is {encoding!r:.40}; send it uncompressed", param="Content-Encoding")
    content_type = http.headers.get("content-type", "")
    if not content_type.lower().startswith("multipart/form-data"):
        raise InvalidValue(
            f"the body must be multipart/form-data; the header Content-Type says {content_type!r:.80}", param="file"
        )
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await http.receive()
        received += len(message.get("body", b""))
        if received > limit + OVERHEAD_BYTES:
            raise TooLarge(f"the body is larger than {limit} bytes, which is the limit", param="file")
        return message

    return Request(http.scope, receive).form(max_files=8, max_fields=40)


def split_form(form: FormData) -> tuple[dict[str, str], dict[str, UploadFile]]:
    """The text fields and the files of a form. Raises `InvalidValue` for a field that occurs twice."""
    texts: dict[str, str] = {}
    files: dict[str, UploadFile] = {}
    for name, value in form.multi_items():
        if name in texts or name in files:
            raise InvalidValue(f"`{name:.80}` is there twice", param=name)
        if isinstance(value, str):
            texts[name] = value
        else:
            files[name] = value
    return texts, files


async def store_file(
    job_service: JobService, caller: Caller, part: Any, param: str, purpose: str = PURPOSE, *, tentative: bool = False
) -> File:
    """Store a file of a form; a tentative one can be given up if the rest of the form fails.

    Raises `InvalidValue` if the part is not a file, or is empty.
    """
    if not isinstance(part, UploadFile):
        raise InvalidValue(f"`{param}` must be a file, in a multipart/form-data body", param=param)
    if not part.size:
        raise InvalidValue(f"`{param}` is empty", param=param)
    name = (part.filename or "").encode(errors="replace").decode()[:MAX_FILENAME]
    file = await asyncio.to_thread(
        job_service.uploads.receive, caller.owner, purpose, name, part.file, tentative=tentative
    )
    caller.record.targets.append(file.id)
    return file
