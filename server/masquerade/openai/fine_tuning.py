"""`/v1/fine_tuning/jobs`: building personas with OpenAI's fine-tuning interface."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from masquerade.errors import InvalidValue, UnsupportedParameter
from masquerade.http import errors
from masquerade.http.access import Building, Caller, ScopedRoute
from masquerade.http.builds import JobObject, RepeatHeaders, describe_job
from masquerade.http.dependencies import Served, ServedJobs
from masquerade.http.wire import Page, respond_events, sse
from masquerade.jobs import Event, Job, JobService
from masquerade.jobs.records import OPEN
from masquerade.openai.objects import EVENT, CheckpointObject, EventObject, stream_of
from masquerade.openai.schemas import JobRequest
from masquerade.service.build_requests import submit
from masquerade.service.serving import Serving

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["building"], route_class=ScopedRoute)
POLL_SECONDS = 0.3  # between two reads of the events of a streamed job
PING_SECONDS = 15.0  # longest silence of a stream

_EVENT_PREFIX = "ftevent-"

Limit = Annotated[int, Query(ge=1, le=100)]


@router.post("")
async def create_job(
    request: JobRequest, serving: Served, job_service: ServedJobs, caller: Building, repeat: RepeatHeaders
) -> JobObject:
    """Queue a build. The files are read in full first, so that the answer reports every error in them.

    A request that repeats one for an unfinished job is answered with that job: the `Idempotency-Key` is known, or the
    request is a retry of OpenAI's SDK.
    """

    def create() -> JobObject:
        job = submit(serving, job_service, caller, caller.owner, request.build_request(), repeat)
        caller.record.targets.append(job.id)
        return describe_job(job_service, job)

    return await asyncio.to_thread(create)


@router.get("")
def list_jobs(
    http: Request, job_service: ServedJobs, caller: Building, after: str | None = None, limit: Limit = 20
) -> Page[JobObject]:
    """The key's jobs, the newest first."""
    if any(name.startswith("metadata") for name in http.query_params):
        raise UnsupportedParameter("jobs cannot be filtered by metadata", param="metadata")
    jobs, more = job_service.table.list_jobs(caller.owner, after, limit)
    return Page(data=[describe_job(job_service, job) for job in jobs], has_more=more)


@router.get("/{job_id}")
def show_job(job_id: str, job_service: ServedJobs, caller: Building) -> JobObject:
    """A job as it is now."""
    return describe_job(job_service, job_service.table.get_job(job_id, caller.owner))


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, job_service: ServedJobs, caller: Building) -> JobObject:
    """Cancel a job: at once if it is queued, within one work item if it is running."""
    job_service.table.get_job(job_id, caller.owner)
    return describe_job(job_service, job_service.runner.cancel(job_id))


@router.get(
    "/{job_id}/events", response_model=Page[EventObject], responses={200: {"content": stream_of("An event", EVENT)}}
)
async def list_events(
    job_id: str,
    serving: Served,
    job_service: ServedJobs,
    caller: Building,
    after: str | None = None,
    limit: Limit = 20,
    stream: bool = False,
) -> Any:
    """A job's events, the newest first; with `stream=true` as server-sent events from the first on."""
    await asyncio.to_thread(job_service.table.get_job, job_id, caller.owner)
    if stream and after is not None:
        raise InvalidValue("a stream begins with the first event; it takes no `after`", param="after")
    if stream:
        return respond_events(_stream(serving, job_service, caller, job_id))
    before = None if after is None else _read_event_id(after)
    events, more = await asyncio.to_thread(job_service.table.last_events, job_id, before, limit)
    return Page(data=[_describe_event(event) for event in events], has_more=more)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(job_id: str, job_service: ServedJobs, caller: Building) -> Page[CheckpointObject]:
    """The personas of a finished job, each as a checkpoint."""
    job = job_service.table.get_job(job_id, caller.owner)
    personas = (job.result or {}).get("personas", [])
    checkpoints = [_describe_checkpoint(job, number, persona) for number, persona in enumerate(personas, 1)]
    first, last = (checkpoints[0].id, checkpoints[-1].id) if checkpoints else (None, None)
    return Page(data=checkpoints, has_more=False, first_id=first, last_id=last)


async def _stream(serving: Serving, job_service: JobService, caller: Caller, job_id: str) -> AsyncIterator[str]:
    """Every event from the first on, until the job ends or the key becomes invalid. A server that stops ends it without
    `[DONE]`: the client comes back for the rest.
    """
    try:
        async for event in _follow(serving, job_service, caller, job_id):
            yield event
    except Exception as failure:  # the status has been sent
        error = errors.translate(failure)
        caller.record.fail(error)
        yield sse(errors.body(error))


async def _follow(serving: Serving, job_service: JobService, caller: Caller, job_id: str) -> AsyncIterator[str]:
    last_number, last_sent = 0, time.monotonic()
    while not serving.engine.is_draining:
        if problem := caller.key_error():
            raise problem
        job = await asyncio.to_thread(job_service.table.get_job, job_id)
        events = await asyncio.to_thread(job_service.table.list_events, job_id, last_number)
        for event in events:
            last_number = event.number
            yield sse(_describe_event(event).model_dump())
        if events:
            last_sent = time.monotonic()
            continue
        if job.state not in OPEN:
            yield sse("[DONE]")
            return
        if time.monotonic() - last_sent >= PING_SECONDS:
            last_sent = time.monotonic()
            yield ": ping\n\n"
        await asyncio.sleep(POLL_SECONDS)


def _describe_event(event: Event) -> EventObject:
    return EventObject.model_validate(
        {
            "id": f"{_EVENT_PREFIX}{event.number}",
            "created_at": int(event.created_at),
            "level": event.level,
            "message": event.message,
            "type": "metrics" if event.data else "message",
            "data": dict(event.data) or None,
        }
    )


def _read_event_id(event_id: str) -> int:
    digits = event_id.removeprefix(_EVENT_PREFIX)
    if digits == event_id or not (digits.isascii() and digits.isdigit() and len(digits) < 19):
        raise InvalidValue(f"{event_id!r:.60} is not the id of an event", param="after")
    return int(digits)


def _describe_checkpoint(job: Job, number: int, persona: dict[str, Any]) -> CheckpointObject:
    certificate = persona["certificate"]
    return CheckpointObject(
        id=f"ftckpt-{persona['digest'][:24]}",
        created_at=int(job.finished_at or 0),
        fine_tuned_model_checkpoint=f"{job.spec['base']['name']}:{persona['persona']}@{persona['digest'][:8]}",
        fine_tuning_job_id=job.id,
        step_number=number,
        metrics={key: float(value) for key, value in certificate.items() if isinstance(value, int | float)},
    )
