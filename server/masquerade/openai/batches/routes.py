"""`/v1/batches`: files of requests that the server answers in the background."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from masquerade.errors import InvalidValue, UploadNotFound, WorkedElsewhere
from masquerade.http.access import Building, ScopedRoute
from masquerade.http.builds import RepeatHeaders
from masquerade.http.dependencies import ServedJobs
from masquerade.http.wire import Page
from masquerade.jobs import BATCH_INPUT, BatchRecord, JobService
from masquerade.openai.batches.objects import BatchObject
from masquerade.openai.batches.runner import BatchRunner
from masquerade.openai.batches.schemas import BatchRequest

router = APIRouter(prefix="/v1/batches", tags=["batches"], route_class=ScopedRoute)


async def find_batch_runner(http: Request) -> BatchRunner:
    """The runner of the store's batches. Raises `WorkedElsewhere` if another server has it."""
    runner: BatchRunner | None = http.app.state.batch_runner
    if runner is None:
        raise WorkedElsewhere("another server runs the batches of this store; send them there")
    return runner


Runner = Annotated[BatchRunner, Depends(find_batch_runner)]


@router.post("")
async def create_batch(
    request: BatchRequest, job_service: ServedJobs, runner: Runner, caller: Building, repeat: RepeatHeaders
) -> BatchObject:
    """Queue a file of requests: each line has a `custom_id`, `method` POST, `url` and `body`, as with OpenAI.

    Requests run in the background, with the rights of the key, and count towards its limits. A request that repeats
    one for an unfinished batch is answered with that batch.
    """

    def create() -> BatchRecord:
        fields = caller.owner, request.endpoint, request.input_file_id, request.metadata, repeat
        if known := job_service.batches.find_repeated(*fields):
            return known
        _check_file(job_service, caller.owner, request.input_file_id)
        return job_service.batches.add(*fields)

    batch = await asyncio.to_thread(create)
    caller.record.targets.append(batch.id)
    runner.add(batch.id)
    return describe(batch)


@router.get("")
def list_batches(
    job_service: ServedJobs,
    caller: Building,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page[BatchObject]:
    """The key's batches, the newest first."""
    batches, more = job_service.batches.list(caller.owner, after, limit)
    shown = [describe(batch) for batch in batches]
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    return Page(data=shown, has_more=more, first_id=first, last_id=last)


@router.get("/{batch_id}")
def show_batch(batch_id: str, job_service: ServedJobs, caller: Building) -> BatchObject:
    """A batch as it is now."""
    return describe(job_service.batches.get(batch_id, caller.owner))


@router.post("/{batch_id}/cancel")
async def cancel_batch(batch_id: str, job_service: ServedJobs, runner: Runner, caller: Building) -> BatchObject:
    """Cancel a batch. Results of requests that have been answered become files."""
    await asyncio.to_thread(job_service.batches.get, batch_id, caller.owner)
    return describe(await runner.cancel(batch_id))


def describe(batch: BatchRecord) -> BatchObject:
    """The batch object of a batch."""
    times = {f"{state}_at": int(began) for state, began in batch.times.items()}
    return BatchObject.model_validate(
        {
            "id": batch.id,
            "endpoint": batch.endpoint,
            "errors": {"data": list(batch.errors)} if batch.errors else None,
            "input_file_id": batch.input_file,
            "status": batch.state,
            "output_file_id": batch.output_file,
            "error_file_id": batch.error_file,
            "created_at": int(batch.created_at),
            "expires_at": int(batch.expires_at),
            "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
            "metadata": batch.metadata,
            **times,
        }
    )


def _check_file(job_service: JobService, owner: str, file_id: str) -> None:
    """The file must belong to the owner and have the purpose of batches, and there must be room for the results."""
    try:
        file = job_service.table.get_file(file_id, owner)
    except UploadNotFound as error:
        error.param = "input_file_id"
        raise
    if file.purpose != BATCH_INPUT:
        raise InvalidValue(
            f"{file_id} has the purpose {file.purpose!r}; it must be {BATCH_INPUT!r}", param="input_file_id"
        )
    job_service.table.check_room(owner)
