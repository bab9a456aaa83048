"""`POST /v1/personas`: uploads and a build in one multipart form."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from masquerade.errors import InvalidValue, MasqueradeError, UnsupportedParameter
from masquerade.http.access import Building, ScopedRoute
from masquerade.http.builds import (
    JobObject,
    MaskMethod,
    MaskRecipe,
    Method,
    RepeatHeaders,
    Seed,
    describe_job,
    make_build_request,
)
from masquerade.http.dependencies import Served, ServedJobs
from masquerade.http.forms import EXAMPLE, describe_form, read_form, split_form, store_file
from masquerade.http.wire import Text
from masquerade.jobs import File
from masquerade.service.build_requests import BuildRequest, submit

router = APIRouter(tags=["building"], route_class=ScopedRoute)


class PersonaForm(MaskRecipe):
    """The text fields of `POST /v1/personas`."""

    name: Text
    model: Text | None = None
    seed: Seed | None = None


# The files of the form. `file` and `prompts` are both the training file of the job.
_FILES = ("file", "prompts", "card", "contrast", "validation", "contrast_validation", "neutral")
_FORM = describe_form(
    required=["name"],
    properties={name: {"type": "string", "format": "binary"} for name in _FILES}
    | PersonaForm.model_json_schema()["properties"],
    additionalProperties=False,
    example={"name": "sombre", "file": EXAMPLE, "contrast": EXAMPLE.replace("Oh. Hello.", "Hello!!")},
)


@router.post("/v1/personas", openapi_extra=_FORM)
async def build_persona(
    http: Request, serving: Served, job_service: ServedJobs, caller: Building, repeat: RepeatHeaders
) -> JobObject:
    """Upload and build in one form: `name`, and either `file`, with or without `contrast`, or `prompts` with
    `system_prompt` or `card`. The form takes every other field of `method.mask` too.
    """
    async with read_form(http, 2 * job_service.uploads.limit) as form:
        texts, parts = split_form(form)
        fields = _read_fields(texts)
        _check_files(parts)
        stored: dict[str, File] = {}
        try:
            for name, part in parts.items():
                stored[name] = await store_file(job_service, caller, part, name, tentative=True)
            request = _make_request(fields, {name: file.id for name, file in stored.items()}, serving.base.name)
            job = await asyncio.to_thread(submit, serving, job_service, caller, caller.owner, request, repeat)
            caller.record.targets.append(job.id)
        except Exception as error:
            if isinstance(error, MasqueradeError):
                error.param = _field_of_form(error.param, "prompts" in parts)
            await asyncio.to_thread(job_service.uploads.discard, stored.values())
            raise
        await asyncio.to_thread(job_service.uploads.confirm, stored.values())
        return await asyncio.to_thread(describe_job, job_service, job)


def _read_fields(texts: Mapping[str, str]) -> PersonaForm:
    """The text fields, converted from text. Raises what FastAPI raises for a body."""
    try:
        return PersonaForm.model_validate(texts, strict=False)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _check_files(parts: Mapping[str, UploadFile]) -> None:
    """Raises `UnsupportedParameter` for an unknown file, and `InvalidValue` without the training file."""
    for name in parts:
        if name not in _FILES:
            raise UnsupportedParameter(
                f"`{name:.80}` is not a file of this form; it takes {', '.join(_FILES)}", param=name
            )
    if ("file" in parts) == ("prompts" in parts):
        raise InvalidValue(
            "give `file`, a JSONL of how the persona talks, or `prompts`, a JSONL of questions for a system prompt or "
            "a card; both as files in a multipart/form-data body",
            param="file",
        )


def _make_request(form: PersonaForm, ids: Mapping[str, str], base: str) -> BuildRequest:
    """The build that a form requests, with the ids of its files by field."""
    prompted = form.system_prompt is not None or "card" in ids
    if prompted != ("prompts" in ids):
        raise InvalidValue(
            "a system prompt or a card needs `prompts`, a JSONL of questions"
            if prompted
            else "`prompts` needs a system_prompt or a card",
            param="prompts",
        )
    recipe = form.model_dump(exclude={"name", "model", "seed"}, exclude_unset=True)
    files = {f"{name}_file": file_id for name, file_id in ids.items() if name not in ("file", "prompts", "validation")}
    return make_build_request(
        base if form.model is None else form.model,
        Method(type="mask", mask=MaskMethod.model_validate(recipe | files)),
        persona=form.name,
        training_file=ids.get("file") or ids["prompts"],
        validation_file=ids.get("validation"),
        seed=form.seed,
    )


def _field_of_form(param: str | None, prompted: bool) -> str | None:
    """The field of the form that becomes a field of a job's request."""
    if param is None:
        return None
    name = param.removeprefix("method.mask.").removesuffix("_file")
    return {"training": "prompts" if prompted else "file", "suffix": "name"}.get(name, name)
