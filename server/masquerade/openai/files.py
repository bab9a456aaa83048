"""`/v1/files`: uploads of clients, and what jobs and batches have made."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from masquerade.errors import InvalidValue, UnsupportedParameter, UploadNotFound
from masquerade.http import downloads
from masquerade.http.access import Building, ScopedRoute
from masquerade.http.dependencies import ServedJobs
from masquerade.http.downloads import Download
from masquerade.http.forms import EXAMPLE, describe_form, read_form, split_form, store_file
from masquerade.http.wire import Deleted, Page
from masquerade.jobs import BATCH_INPUT, File
from masquerade.openai.objects import FileObject
from masquerade.service.build_requests import PURPOSE

router = APIRouter(prefix="/v1/files", tags=["building"], route_class=ScopedRoute)
PURPOSES = (PURPOSE, BATCH_INPUT)
_FORM = describe_form(
    required=["file", "purpose"],
    properties={"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": [*PURPOSES]}},
    example={"file": EXAMPLE, "purpose": PURPOSE},
)


@router.post("", openapi_extra=_FORM)
async def upload(http: Request, job_service: ServedJobs, caller: Building) -> FileObject:
    """Store a file; `purpose` must be `fine-tune` or `batch`. The same content sent again is the same file."""
    async with read_form(http, job_service.uploads.limit) as form:
        texts, parts = split_form(form)
        purpose = texts.get("purpose")
        if purpose is None:
            raise InvalidValue(f"the form has no `purpose`; give {' or '.join(PURPOSES)}", param="purpose")
        if purpose not in PURPOSES:
            raise UnsupportedParameter(
                f"the purpose {purpose!r:.40} is not supported; {' and '.join(PURPOSES)} are", param="purpose"
            )
        if any(name.startswith("expires_after") for name in texts):
            raise UnsupportedParameter("files do not expire; delete them", param="expires_after")
        return describe(await store_file(job_service, caller, parts.get("file"), "file", purpose))


@router.get("")
def list_files(
    job_service: ServedJobs,
    caller: Building,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Page[FileObject]:
    """The key's files, the newest first, or the oldest with `order=asc`; those that follow the file `after`."""
    files = job_service.table.list_files(caller.owner, purpose)
    files = files if order == "desc" else files[::-1]
    if after is not None:
        ids = [file.id for file in files]
        if after not in ids:
            raise UploadNotFound(f"there is no file {after!r:.80} to continue after", param="after")
        files = files[ids.index(after) + 1 :]
    shown = [describe(file) for file in files[:limit]]
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    return Page(data=shown, has_more=len(files) > limit, first_id=first, last_id=last)


@router.get("/{file_id}")
def show_file(file_id: str, job_service: ServedJobs, caller: Building) -> FileObject:
    """The file object."""
    return describe(job_service.table.get_file(file_id, caller.owner))


@router.get(
    "/{file_id}/content", response_class=Download, responses=downloads.describe(EXAMPLE, "The file, byte for byte.")
)
def read_content(file_id: str, job_service: ServedJobs, caller: Building) -> Response:
    """The bytes of a file."""
    file = job_service.table.get_file(file_id, caller.owner)
    return Download(job_service.uploads.path(file.id), media_type="application/octet-stream")


@router.delete("/{file_id}")
def delete_file(file_id: str, job_service: ServedJobs, caller: Building) -> Deleted:
    """Delete a file that no unfinished job needs."""
    job_service.uploads.remove(file_id, caller.owner)
    return Deleted(id=file_id, object="file")


def describe(file: File) -> FileObject:
    """The file object of a file."""
    return FileObject.model_validate(
        {
            "id": file.id,
            "bytes": file.bytes,
            "created_at": int(file.created_at),
            "filename": file.name,
            "purpose": file.purpose,
        }
    )
