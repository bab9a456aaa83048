"""Wire objects of builds, for both routes that queue one: the mask method of a request, and the job object."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from fastapi import Depends, Header
from pydantic import Field, field_validator

from masquerade.http.certificates import CertificateObject
from masquerade.http.wire import Schema, Text, show
from masquerade.jobs import Job, JobService, Repeat, State
from masquerade.pruning import Recipe
from masquerade.service.build_requests import BuildRequest
from masquerade.service.building import JobNames

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class MaskRecipe(Schema, extra="forbid"):
    """How a mask is made; what is absent is the builder's default.

    With a `system_prompt` the base writes the examples itself: it answers the questions of the training file under the
    prompt, and for contrast under `contrast_prompt`, or none.
    """

    score: Text | None = None
    rho: float | Literal["auto"] | None = None
    group: Text | None = None
    scope: Text | None = None
    structure: Text | None = None  # weights, or channels: whole input channels of a Linear
    phi: Text | None = None
    tokens: Text | None = None
    gamma: float | None = None
    phase: Text | None = None
    strength: Text | None = None  # gentle, normal or strong: what the mask may cost
    neutral_budget: float | None = None  # in place of the strength's
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


_SETTINGS = {field.name for field in fields(Recipe)}


def make_build_request(
    model: str,
    method: Method | None,
    *,
    persona: str | None,
    training_file: str,
    validation_file: str | None,
    seed: int | None,
    metadata: Mapping[str, str] | None = None,
) -> BuildRequest:
    """The request for a build; without a method, with the builder's defaults."""
    mask = method.mask if method else MaskMethod()
    given = mask.model_dump(exclude_none=True)
    files = {"training": training_file} | ({"validation": validation_file} if validation_file is not None else {})
    files |= {name.removesuffix("_file"): value for name, value in given.items() if name.endswith("_file")}
    return BuildRequest(
        model=model,
        files=files,
        persona=persona,
        opposite=mask.contrast_name,
        replace=mask.replace,
        system_prompt=mask.system_prompt,
        contrast_prompt=mask.contrast_prompt,
        recipe={name: value for name, value in given.items() if name in _SETTINGS},
        seed=seed or 0,
        metadata=metadata or {},
        method=method.model_dump(exclude_none=True) if method else None,
    )


def read_repeat(
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
    x_stainless_retry_count: Annotated[str | None, Header()] = None,
) -> Repeat:
    """Whether the request may repeat an earlier one: by its key, or by the retry count of OpenAI's SDK."""
    return Repeat(idempotency_key or None, x_stainless_retry_count not in (None, "0"))


RepeatHeaders = Annotated[Repeat, Depends(read_repeat)]


class JobFault(Schema):
    """Why a job failed; `param` is the field of its request that is at fault, where there is one."""

    code: str
    message: str
    param: str | None


class JobProgress(Schema):
    """How far the current stage of a job is; `total_steps` is null where it cannot be known beforehand."""

    stage: str
    step: int
    total_steps: int | None

    @field_validator("total_steps", mode="before")
    @classmethod
    def _unknown(cls, total: int | None) -> int | None:
        """Jobs of earlier versions have 0 where the total is not known."""
        return total or None


class BuiltPersona(Schema):
    """A persona that a job has made."""

    persona: str
    digest: str
    certificate: CertificateObject
    file: str | None = None


class RefusedPersona(Schema):
    """A persona of a job whose mask is refused; `reason` has the figures."""

    persona: str
    score: str
    rho: float
    reason: str


_JOB_EXAMPLE: dict[str, Any] = {
    "id": "ftjob-0f1e2d3c4b5a69788796a5b4",
    "object": "fine_tuning.job",
    "created_at": 1795341600,
    "started_at": 1795341601,
    "finished_at": None,
    "estimated_finish": 1795341640,
    "model": "demo",
    "fine_tuned_model": None,
    "organization_id": "masquerade",
    "result_files": [],
    "status": "running",
    "training_file": "file-6ab1f0c2d3e4f5061728394a",
    "validation_file": None,
    "hyperparameters": {},
    "method": {"type": "mask", "mask": {"strength": "normal", "contrast_file": "file-94a82715f6e0d3c4b5a60718"}},
    "seed": 0,
    "error": None,
    "trained_tokens": None,
    "metadata": {},
    "persona": "sombre",
    "progress": {"stage": "backward", "step": 12, "total_steps": 96},
    "personas": [],
    "refused": [],
}


class JobObject(Schema):
    """OpenAI's job, with the name of its `persona`, its `progress`, and the `personas` it has made or `refused`.

    A job with a refused persona has failed, although it may have published the opposite.
    """

    model_config = show(_JOB_EXAMPLE)

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None  # by the duration of the last jobs
    model: str
    fine_tuned_model: str | None
    organization_id: Literal["masquerade"] = "masquerade"
    result_files: list[str]  # the masks
    status: State
    training_file: str
    validation_file: str | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any] | None  # as it was asked for; litellm reads no other than OpenAI's
    seed: int
    error: JobFault | None
    trained_tokens: int | None  # of the examples that the masks were found in
    metadata: dict[str, str]
    persona: str  # the name that was asked for, or made; whether or not the job has come to that
    progress: JobProgress | None  # of a job that runs
    personas: list[BuiltPersona]
    refused: list[RefusedPersona]  # their masks have no effect, or harm the model


def describe_job(job_service: JobService, job: Job) -> JobObject:
    """The job object of a job as it is now."""
    spec, result = job.spec, job.result or {}
    personas = result.get("personas", [])
    finetuned = f"{spec['base']['name']}:{personas[0]['persona']}" if job.state == "succeeded" else None
    return JobObject.model_validate(
        {
            "id": job.id,
            "created_at": int(job.created_at),
            "started_at": int(job.started_at) if job.started_at else None,
            "finished_at": int(job.finished_at) if job.finished_at else None,
            "estimated_finish": _estimate_finish(job_service, job),
            "model": spec["base"]["name"],
            "fine_tuned_model": finetuned,
            "result_files": [persona["file"] for persona in personas if persona["file"]],
            "status": job.state,
            "training_file": spec["files"]["training"],
            "validation_file": spec["files"].get("validation"),
            "hyperparameters": {},
            "method": spec["method"],
            "seed": spec["seed"],
            "error": job.error,
            "trained_tokens": result.get("trained_tokens"),
            "metadata": spec["metadata"],
            "persona": JobNames.of(job.id, spec).persona,
            "progress": job_service.table.progress(job.id) if job.state == "running" else None,
            "personas": personas,
            "refused": result.get("refused", []),
        }
    )


def _estimate_finish(job_service: JobService, job: Job) -> int | None:
    """When a running job will end, by the duration of the last jobs; None if unknown, or if that time has passed."""
    if job.state != "running" or job.started_at is None or (typical := job_service.table.typical_seconds()) is None:
        return None
    end = job.started_at + typical
    return int(end) + 1 if end > time.time() else None
