"""`/v1/files`: uploads, as OpenAI's SDK makes them, and what jobs have made.

Knows multipart bodies and file objects. Refuses to believe a name, a type or a length that a client states.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from starlette.datastructures import FormData, UploadFile
from starlette.types import Message

from masquerade.errors import InvalidValue, TooLarge, UnsupportedParameter, UploadNotFound
from masquerade.http import downloads
from masquerade.http.access import Building, Caller, ScopedRoute
from masquerade.http.dependencies import ServedJobs
from masquerade.http.downloads import Download
from masquerade.http.wire import Deleted, Page
from masquerade.jobs import File, JobService
from masquerade.openai.objects import FileObject

router = APIRouter(prefix="/v1/files", tags=["building"], route_class=ScopedRoute)
PURPOSE = "fine-tune"
ENVELOPE = 2**16  # bytes that a multipart body may have beside its files
LONGEST_NAME = 255

EXAMPLE = '{"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Oh. Hello."}]}'
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": [PURPOSE]},
                    },
                    "example": {"file": EXAMPLE, "purpose": PURPOSE},
                }
            }
        },
    }
}


@router.post("", openapi_extra=_FORM)
async def upload(http: Request, job_service: ServedJobs, caller: Building) -> FileObject:
    """Keep a file; `purpose` must be `fine-tune`. Sent again, the same content is the same file."""
    async with read_form(http, job_service.uploads.limit) as form:
        texts, parts = take_apart(form)
        purpose = texts.get("purpose")
        if purpose != PURPOSE:
            raise UnsupportedParameter(f"the purpose {purpose!r:.40} is not supported; {PURPOSE!r} is", param="purpose")
        if any(name.startswith("expires_after") for name in texts):
            raise UnsupportedParameter("files do not expire; delete them", param="expires_after")
        return describe(await keep(job_service, caller, parts.get("file"), "file"))


@router.get("")
def list_files(
    job_service: ServedJobs,
    caller: Building,
    purpose: Annotated[str | None, Query()] = None,
    after: Annotated[str | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Page[FileObject]:
    """The key's files, the newest first, or the oldest with `order=asc`; from behind the file `after`."""
    files = job_service.table.list_files(caller.owner, purpose)
    files = files if order == "desc" else files[::-1]
    if after is not None:
        ids = [file.id for file in files]
        if after not in ids:
            raise UploadNotFound(f"there is no file {after!r:.80} to go on from", param="after")
        files = files[ids.index(after) + 1 :]
    shown = [describe(file) for file in files[:limit]]
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    return Page(data=shown, has_more=len(files) > limit, first_id=first, last_id=last)


@router.get("/{file_id}")
def show_file(file_id: str, job_service: ServedJobs, caller: Building) -> FileObject:
    """What is known about a file."""
    return describe(job_service.table.get_file(file_id, caller.owner))


@router.get(
    "/{file_id}/content", response_class=Download, responses=downloads.describe(EXAMPLE, "The file, byte for byte.")
)
def read_content(file_id: str, job_service: ServedJobs, caller: Building) -> Response:
    """The file itself."""
    file = job_service.table.get_file(file_id, caller.owner)
    return Download(job_service.uploads.path(file.id), media_type="application/octet-stream")


@router.delete("/{file_id}")
def delete_file(file_id: str, job_service: ServedJobs, caller: Building) -> Deleted:
    """Delete a file that no unfinished job needs."""
    job_service.uploads.remove(file_id, caller.owner)
    return Deleted(id=file_id, object="file")


async def keep(job_service: JobService, caller: Caller, part: Any, param: str, *, tentative: bool = False) -> File:
    """Keep a part of a form, tentatively if the rest of the form may fail.

    Raises `InvalidValue` if it is no file or an empty one.
    """
    if not isinstance(part, UploadFile):
        raise InvalidValue(f"`{param}` must be a file, in a multipart/form-data body", param=param)
    if not part.size:
        raise InvalidValue(f"`{param}` is empty", param=param)
    name = (part.filename or "").encode(errors="replace").decode()[:LONGEST_NAME]
    file = await asyncio.to_thread(
        job_service.uploads.receive, caller.owner, PURPOSE, name, part.file, tentative=tentative
    )
    caller.record.targets.append(file.id)
    return file


def describe(file: File) -> FileObject:
    """OpenAI's file object."""
    return FileObject.model_validate(
        {
            "id": file.id,
            "bytes": file.bytes,
            "created_at": int(file.created_at),
            "filename": file.name,
            "purpose": file.purpose,
        }
    )


def read_form(http: Request, limit: int) -> Any:
    """The form of a request, to be entered with `async with`; a body beyond the limit is refused while it arrives."""
    coding = http.headers.get("content-encoding", "identity")
    if coding != "identity":
        raise UnsupportedParameter(f"the body is {coding!r:.40}; send it uncompressed", param="Content-Encoding")
    kind = http.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise InvalidValue(
            f"the body must be multipart/form-data; the header Content-Type says {kind!r:.80}", param="file"
        )
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await http.receive()
        received += len(message.get("body", b""))
        if received > limit + ENVELOPE:
            raise TooLarge(f"the body is larger than {limit} bytes, which is the limit", param="file")
        return message

    return Request(http.scope, receive).form(max_files=8, max_fields=40)


def take_apart(form: FormData) -> tuple[dict[str, str], dict[str, UploadFile]]:
    """The texts and the files of a form. Raises `InvalidValue` for a field that is there twice."""
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
