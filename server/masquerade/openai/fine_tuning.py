"""`/v1/fine_tuning/jobs`: building personas, as OpenAI's SDK fine-tunes.

Knows job objects, events and checkpoints. Refuses to build: jobs are queued, and worked off elsewhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import ConfigDict, Field, ValidationError, model_validator
from starlette.datastructures import UploadFile

from maskstore import InvalidName, MaskNotFound, check_name
from masquerade.errors import (
    InvalidValue,
    MasqueradeError,
    PersonaExists,
    PersonaForbidden,
    UnsupportedParameter,
    UploadNotFound,
)
from masquerade.http import errors
from masquerade.http.access import Building, Caller, ScopedRoute
from masquerade.http.dependencies import Served, ServedJobs
from masquerade.http.wire import Page, Refusal, Schema, Text, refuse, sse
from masquerade.jobs import Event, File, Job, JobService, Repeat, draw_job_id
from masquerade.jobs.records import OPEN
from masquerade.openai.files import EXAMPLE, PURPOSE, keep, read_form, take_apart
from masquerade.openai.objects import EVENT, CheckpointObject, EventObject, JobObject, stream_of
from masquerade.openai.schemas import at_most
from masquerade.pruning import Recipe
from masquerade.service import building
from masquerade.service.serving import Serving

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["building"], route_class=ScopedRoute)
one_shot = APIRouter(tags=["building"], route_class=ScopedRoute)
POLL_SECONDS = 0.3  # how often a stream of events looks for more
PING_SECONDS = 15.0  # how long it is silent at most

Limit = Annotated[int, Query(ge=1, le=100)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Label = Annotated[Text, Field(max_length=64)]
Remark = Annotated[Text, Field(max_length=512)]
Metadata = Annotated[dict[Label, Remark], Field(max_length=16), at_most(16)]


class MaskRecipe(Schema):
    """How a mask is made; what is absent is the builder's default.

    With a `system_prompt` the base writes the examples itself: it answers the questions of the training file under the
    prompt, and for contrast under `contrast_prompt`, or none.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    score: Text | None = None
    rho: float | Literal["auto"] | None = None
    group: Text | None = None
    scope: Text | None = None
    phi: Text | None = None
    tokens: Text | None = None
    gamma: float | None = None
    phase: Text | None = None
    neutral_budget: float | None = None
    own_budget: float | None = None
    effect: float | None = None
    samples: Annotated[int, Field(lt=2**31)] | None = None
    force: bool | None = None
    system_prompt: Text | None = None
    contrast_prompt: Text | None = None
    contrast_name: Text | None = None  # publish the opposite too, under this name
    replace: bool = False  # make a new generation of a persona that exists


class MaskMethod(MaskRecipe):
    """A recipe, and ids of `/v1/files`."""

    contrast_file: Text | None = None  # how the opposite talks; by default the training file, if it has both sides
    contrast_validation_file: Text | None = None
    neutral_file: Text | None = None
    card_file: Text | None = None  # a character card, JSON or PNG, in place of a system prompt


class Method(Schema, extra="forbid"):
    """`{"type": "mask", "mask": {...}}`."""

    type: Literal["mask"]
    mask: MaskMethod = MaskMethod()


class JobRequest(Schema):
    """`POST /v1/fine_tuning/jobs`. `suffix` is the persona's name; without it one is made, such as `persona-0f1e2d`."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        json_schema_extra={
            "example": {
                "model": "demo",
                "training_file": "file-6ab1f0c2d3e4f5061728394a",
                "suffix": "gloomy",
                "method": {"type": "mask", "mask": {"contrast_file": "file-94a82715f6e0d3c4b5a60718"}},
            }
        },
    )

    model: Text
    training_file: Text
    suffix: Text | None = None
    method: Method | None = None  # without it, with the builder's defaults
    validation_file: Text | None = None
    seed: Seed | None = None
    metadata: Metadata | None = None
    # OpenAI's; a mask has its own, in `method`
    hyperparameters: Annotated[dict[str, Literal["auto"]], at_most(16)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: Any) -> Any:
        names = fields if isinstance(fields, dict) else ()
        astray = next((name for name in names if name in MaskMethod.model_fields), None)
        if astray is not None:
            raise Refusal(UnsupportedParameter(f"`{astray}` belongs in `method.mask`", param=astray))
        return refuse(fields, {"integrations": ([],), "name": ()})

    @property
    def mask(self) -> MaskMethod:
        """How the mask is to be made."""
        return self.method.mask if self.method else MaskMethod()


class PersonaForm(MaskRecipe):
    """The fields of `POST /v1/personas` that are no files."""

    name: Text
    model: Text | None = None
    seed: Seed | None = None


# Files of the form, and the roles they have. `file` and `prompts` are both the training file.
_PARTS = ("file", "prompts", "card", "contrast", "validation", "contrast_validation", "neutral")
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {part: {"type": "string", "format": "binary"} for part in _PARTS}
                    | PersonaForm.model_json_schema()["properties"],
                    "additionalProperties": False,
                    "example": {
                        "name": "gloomy",
                        "file": EXAMPLE,
                        "contrast": EXAMPLE.replace("Oh. Hello.", "Hello!!"),
                    },
                }
            }
        },
    }
}


def read_asked(
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
    x_stainless_retry_count: Annotated[str | None, Header()] = None,
) -> Repeat:
    """Whether a request may be the repeat of one whose answer was lost: a key says so, or the SDK that counts."""
    return Repeat(idempotency_key or None, x_stainless_retry_count not in (None, "0"))


AskedBy = Annotated[Repeat, Depends(read_asked)]


@router.post("")
async def create_job(
    asked: JobRequest, serving: Served, job_service: ServedJobs, caller: Building, repeat: AskedBy
) -> JobObject:
    """Queue a build. The files are read in full first, so that what is wrong with them is said at once.

    Asked again for what an unfinished job does, with an `Idempotency-Key` that is known, or as a retry of OpenAI's SDK,
    it answers with the job that there is.
    """
    return await asyncio.to_thread(_create, serving, job_service, caller, asked, repeat)


@one_shot.post("/v1/personas", openapi_extra=_FORM)
async def build_persona(
    http: Request, serving: Served, job_service: ServedJobs, caller: Building, repeat: AskedBy
) -> JobObject:
    """Upload and build in one form: `name`, and `file` with perhaps `contrast`, or `prompts` with `system_prompt` or
    `card`; beside them everything that `method.mask` may say.
    """
    async with read_form(http, 2 * job_service.uploads.limit) as form:
        texts, parts = take_apart(form)
        asked = _read_texts(texts)
        _check_parts(parts)
        kept: dict[str, File] = {}
        try:
            for name, part in parts.items():
                kept[name] = await keep(job_service, caller, part, name, tentative=True)
            job = await asyncio.to_thread(
                _create, serving, job_service, caller, _translate(serving, asked, kept), repeat
            )
        except Exception as error:
            if isinstance(error, MasqueradeError):
                error.param = _name_part(error.param, "prompts" in parts)
            await asyncio.to_thread(job_service.uploads.discard, kept.values())
            raise
        await asyncio.to_thread(job_service.uploads.confirm, kept.values())
        return job


@router.get("")
def list_jobs(
    http: Request,
    job_service: ServedJobs,
    caller: Building,
    after: Annotated[str | None, Query()] = None,
    limit: Limit = 20,
) -> Page[JobObject]:
    """The key's jobs, the newest first."""
    if any(name.startswith("metadata") for name in http.query_params):
        raise UnsupportedParameter("jobs cannot be picked by their metadata", param="metadata")
    jobs, more = job_service.table.list_jobs(caller.owner, after, limit)
    return Page(data=[_describe(job_service, job) for job in jobs], has_more=more)


@router.get("/{job_id}")
def show_job(job_id: str, job_service: ServedJobs, caller: Building) -> JobObject:
    """A job as it is now."""
    return _describe(job_service, job_service.table.get_job(job_id, caller.owner))


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, job_service: ServedJobs, caller: Building) -> JobObject:
    """End a job: at once if it waits, within one work item if it runs."""
    job_service.table.get_job(job_id, caller.owner)
    return _describe(job_service, job_service.runner.cancel(job_id))


@router.get(
    "/{job_id}/events", response_model=Page[EventObject], responses={200: {"content": stream_of("An event", EVENT)}}
)
async def list_events(
    job_id: str,
    job_service: ServedJobs,
    caller: Building,
    after: Annotated[str | None, Query()] = None,
    limit: Limit = 20,
    stream: bool = False,
) -> Any:
    """What happened, the newest first, as OpenAI lists it; with `stream=true` as server-sent events, as it happens."""
    await asyncio.to_thread(job_service.table.get_job, job_id, caller.owner)
    if stream and after is not None:
        raise InvalidValue("a stream begins with the first event; it takes no `after`", param="after")
    if stream:
        return StreamingResponse(
            _follow(job_service, caller, job_id), media_type="text/event-stream", headers=_NO_CACHE
        )
    before = None if after is None else _read_event_id(after)
    events, more = await asyncio.to_thread(job_service.table.last_events, job_id, before, limit)
    return Page(data=[_tell(event) for event in events], has_more=more)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(job_id: str, job_service: ServedJobs, caller: Building) -> Page[CheckpointObject]:
    """What a finished job has made: a checkpoint for each persona."""
    job = job_service.table.get_job(job_id, caller.owner)
    made = (job.result or {}).get("personas", [])
    points = [_checkpoint(job, number, one) for number, one in enumerate(made, 1)]
    first, last = (points[0].id, points[-1].id) if points else (None, None)
    return Page(data=points, has_more=False, first_id=first, last_id=last)


_NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_SETTINGS = tuple(field.name for field in fields(Recipe) if field.name in MaskRecipe.model_fields)


def _create(serving: Serving, job_service: JobService, caller: Caller, asked: JobRequest, repeat: Repeat) -> JobObject:
    serving.find_reference(asked.model, None, None)
    if asked.model != serving.base.name:
        raise UnsupportedParameter("a persona is built from the base, not from another persona", param="model")
    spec, job_id = _specify(serving, asked), draw_job_id()
    names = building.JobNames.of(job_id, spec)
    _check_rights(serving, caller, asked, names)
    job = job_service.table.find_repeated(caller.owner, spec, repeat)
    if job is None:
        for role, file_id in spec["files"].items():
            _check_file(job_service, caller.owner, file_id, building.field_of(role))
        _check_names(serving, job_service, caller.owner, names, replace=asked.mask.replace)
        building.check(job_service, spec, names)
        job = job_service.table.add_job(caller.owner, spec, repeat, job_id)
        job_service.runner.wake()
    caller.record.targets.append(job.id)
    return _describe(job_service, job)


def _specify(serving: Serving, asked: JobRequest) -> dict[str, Any]:
    """A request as a job's spec. Raises `InvalidValue` for what contradicts itself."""
    mask = asked.mask
    told = mask.system_prompt is not None or mask.card_file is not None
    if mask.contrast_prompt is not None and not told:
        raise InvalidValue("contrast_prompt needs a system_prompt or a card_file", param="method.mask.contrast_prompt")
    if mask.system_prompt is not None and mask.card_file is not None:
        raise InvalidValue("give a system_prompt or a card_file, not both", param="method.mask.card_file")
    if told and mask.contrast_file is not None:
        raise InvalidValue(
            "with a system prompt or a card the base writes the contrast itself; say how in contrast_prompt",
            param="method.mask.contrast_file",
        )
    if mask.replace and asked.suffix is None:
        raise InvalidValue("to replace a persona, give its name in `suffix`", param="suffix")
    if mask.system_prompt is not None and not mask.system_prompt.strip():
        raise InvalidValue("the system prompt is empty", param="method.mask.system_prompt")
    files = {
        "training": asked.training_file,
        "validation": asked.validation_file,
        "contrast": mask.contrast_file,
        "contrast_validation": mask.contrast_validation_file,
        "neutral": mask.neutral_file,
        "card": mask.card_file,
    }
    chosen = {name: getattr(mask, name) for name in _SETTINGS}
    return {
        "base": {"name": serving.base.name, "fingerprint": serving.base.fingerprint},
        "persona": asked.suffix,
        "opposite": mask.contrast_name,
        "replace": mask.replace,
        "prompt": {"system": mask.system_prompt or "", "contrast": mask.contrast_prompt or ""} if told else None,
        "files": {role: file for role, file in files.items() if file is not None},
        "recipe": {name: value for name, value in chosen.items() if value is not None} | {"seed": asked.seed or 0},
        "method": asked.method.model_dump(exclude_none=True) if asked.method else None,
        "metadata": asked.metadata or {},
        "seed": asked.seed or 0,
    }


def _check_file(job_service: JobService, owner: str, file_id: str, param: str) -> None:
    """A file must be the owner's, and for building."""
    try:
        file = job_service.table.get_file(file_id, owner)
    except UploadNotFound as error:
        error.param = param
        raise
    if file.purpose != PURPOSE:
        raise InvalidValue(f"{file_id} has the purpose {file.purpose!r}; it must be {PURPOSE!r}", param=param)


def _check_rights(serving: Serving, caller: Caller, asked: JobRequest, names: building.JobNames) -> None:
    """As `building.check_rights`; of a name that the client did not give, the refusal says where it comes from."""
    try:
        building.check_rights(caller, serving.registry, names, replace=asked.mask.replace)
    except PersonaForbidden as error:
        if asked.suffix is not None or error.param != "suffix":
            raise
        raise PersonaForbidden(
            f"no `suffix` was given, and this key may not use the name that was made, {names.persona!r}; give a "
            "`suffix` that is on the key's list",
            param="suffix",
        ) from error


def _check_names(
    serving: Serving, job_service: JobService, owner: str, names: building.JobNames, *, replace: bool
) -> None:
    """Names must be names, and free unless they may be replaced."""
    if names.opposite == names.persona:
        raise InvalidValue("the opposite needs a name of its own", param="method.mask.contrast_name")
    building_now = {
        taken: job
        for job in job_service.table.open_jobs()
        for taken, _ in building.JobNames.of(job.id, job.spec).fields()
    }
    for persona, param in names.fields():
        try:
            check_name(persona)
        except InvalidName as error:
            raise InvalidValue(error.message, param=param) from error
        if persona in serving.registry.aliases():
            raise PersonaExists(f"{persona!r} is an alias; a persona needs a name of its own", param=param)
        if replace:
            continue
        if persona in building_now:
            job = building_now[persona]
            which = f"the job {job.id}" if job.owner == owner else "a job of another key"
            raise PersonaExists(f"{which} is building {persona!r} already", param=param)
        try:
            serving.registry.resolve(persona)
        except MaskNotFound:
            continue
        raise PersonaExists(
            f"there is a persona {persona!r}; set method.mask.replace to make a new generation of it", param=param
        )


def _read_texts(texts: Mapping[str, str]) -> PersonaForm:
    """The fields of the form, whose values are all text. Raises what FastAPI raises for a body."""
    try:
        return PersonaForm.model_validate(texts, strict=False)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _check_parts(parts: Mapping[str, UploadFile]) -> None:
    """Raises `UnsupportedParameter` for a file that has no role, and `InvalidValue` without the one that is needed."""
    for name in parts:
        if name not in _PARTS:
            raise UnsupportedParameter(f"`{name:.80}` is no file of this form; {', '.join(_PARTS)} are", param=name)
    if ("file" in parts) == ("prompts" in parts):
        raise InvalidValue(
            "give `file`, a JSONL of how the persona talks, or `prompts`, a JSONL of questions for a system prompt or "
            "a card; both as files in a multipart/form-data body",
            param="file",
        )


def _translate(serving: Serving, asked: PersonaForm, kept: Mapping[str, File]) -> JobRequest:
    """The request for a job that a form amounts to."""
    ids = {name: file.id for name, file in kept.items()}
    told = asked.system_prompt is not None or "card" in ids
    if told != ("prompts" in ids):
        raise InvalidValue(
            "a system prompt or a card needs `prompts`, a JSONL of questions"
            if told
            else "`prompts` needs a system_prompt or a card",
            param="prompts",
        )
    recipe = asked.model_dump(exclude={"name", "model", "seed"}, exclude_unset=True)
    named = {f"{name}_file": file_id for name, file_id in ids.items() if name not in ("file", "prompts", "validation")}
    return JobRequest(
        model=serving.base.name if asked.model is None else asked.model,
        training_file=ids.get("file") or ids["prompts"],
        validation_file=ids.get("validation"),
        suffix=asked.name,
        seed=asked.seed,
        method=Method(type="mask", mask=MaskMethod.model_validate(recipe | named)),
    )


def _name_part(param: str | None, told: bool) -> str | None:
    """The field of the form that is meant by one of a job's request."""
    if param is None:
        return None
    name = param.removeprefix("method.mask.").removesuffix("_file")
    return {"training": "prompts" if told else "file", "suffix": "name"}.get(name, name)


async def _follow(job_service: JobService, caller: Caller, job_id: str) -> AsyncIterator[str]:
    """Every event from the first on, until the job has ended, or the key."""
    try:
        async for event in _events(job_service, caller, job_id):
            yield event
    except Exception as error:  # the status has been sent
        told = errors.translate(error)
        caller.record.fail(told)
        yield sse(errors.body(told))


async def _events(job_service: JobService, caller: Caller, job_id: str) -> AsyncIterator[str]:
    seen, spoken = 0, time.monotonic()
    while True:
        if problem := caller.key_error():
            raise problem
        job = await asyncio.to_thread(job_service.table.get_job, job_id)
        events = await asyncio.to_thread(job_service.table.list_events, job_id, seen)
        for event in events:
            seen = event.number
            yield sse(_tell(event).model_dump())
        if events:
            spoken = time.monotonic()
            continue
        if job.state not in OPEN:
            yield sse("[DONE]")
            return
        if time.monotonic() - spoken >= PING_SECONDS:
            spoken = time.monotonic()
            yield ": ping\n\n"
        await asyncio.sleep(POLL_SECONDS)


def _describe(job_service: JobService, job: Job) -> JobObject:
    """OpenAI's job object."""
    spec, result = job.spec, job.result or {}
    made = result.get("personas", [])
    return JobObject.model_validate(
        {
            "id": job.id,
            "created_at": int(job.created_at),
            "started_at": int(job.started_at) if job.started_at else None,
            "finished_at": int(job.finished_at) if job.finished_at else None,
            "estimated_finish": _estimate(job_service, job),
            "model": spec["base"]["name"],
            "fine_tuned_model": f"{spec['base']['name']}:{made[0]['persona']}" if made else None,
            "result_files": [one["file"] for one in made],
            "status": job.state,
            "training_file": spec["files"]["training"],
            "validation_file": spec["files"].get("validation"),
            "hyperparameters": {},
            "method": spec["method"],
            "seed": spec["seed"],
            "error": job.error,
            "trained_tokens": result.get("trained_tokens"),
            "metadata": spec["metadata"],
            "persona": building.JobNames.of(job.id, spec).persona,
            "progress": job_service.table.progress(job.id) if job.state == "running" else None,
            "personas": made,
        }
    )


def _estimate(job_service: JobService, job: Job) -> int | None:
    """When a running job will end if it takes as long as the last ones; None if there were none, or it takes longer."""
    if job.state != "running" or job.started_at is None or (typical := job_service.table.typical_seconds()) is None:
        return None
    end = job.started_at + typical
    return int(end) + 1 if end > time.time() else None


def _tell(event: Event) -> EventObject:
    return EventObject.model_validate(
        {
            "id": f"{_EVENT}{event.number}",
            "created_at": int(event.created_at),
            "level": event.level,
            "message": event.message,
            "type": "metrics" if event.data else "message",
            "data": dict(event.data) or None,
        }
    )


_EVENT = "ftevent-"


def _read_event_id(event_id: str) -> int:
    digits = event_id.removeprefix(_EVENT)
    if digits == event_id or not (digits.isascii() and digits.isdigit() and len(digits) < 19):
        raise InvalidValue(f"{event_id!r:.60} is no event's id", param="after")
    return int(digits)


def _checkpoint(job: Job, number: int, made: dict[str, Any]) -> CheckpointObject:
    figures = {key: float(value) for key, value in made["certificate"].items() if isinstance(value, int | float)}
    return CheckpointObject(
        id=f"ftckpt-{made['digest'][:24]}",
        created_at=int(job.finished_at or 0),
        fine_tuned_model_checkpoint=f"{job.spec['base']['name']}:{made['persona']}@{made['digest'][:8]}",
        fine_tuning_job_id=job.id,
        step_number=number,
        metrics=figures,
    )
