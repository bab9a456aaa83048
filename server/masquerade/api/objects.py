"""What the routes of files, jobs and personas answer with.

Knows OpenAI's objects and the project's own, and an example of each. Refuses to know where the facts come from.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from masquerade.api.schemas import Schema
from masquerade.jobs import State

T = TypeVar("T", bound=BaseModel)


def show(example: dict[str, Any]) -> ConfigDict:
    """The configuration of a model that has an example."""
    return ConfigDict(strict=True, frozen=True, json_schema_extra={"example": example})


class Page(Schema, Generic[T]):
    """Some of a list; `has_more` says whether `after` its last one there are others."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class Deleted(Schema):
    """What is no more."""

    model_config = show({"id": "file-6ab1f0c2d3e4f5061728394a", "object": "file", "deleted": True})

    id: str
    object: str
    deleted: Literal[True] = True


class FileObject(Schema):
    """A file: uploaded (`fine-tune`), or made by a job (`fine-tune-results`)."""

    model_config = show(
        {
            "id": "file-6ab1f0c2d3e4f5061728394a",
            "object": "file",
            "bytes": 48213,
            "created_at": 1795341600,
            "filename": "gloomy.jsonl",
            "purpose": "fine-tune",
            "status": "processed",
        }
    )

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune", "fine-tune-results"]
    status: Literal["processed"] = "processed"


class JobFault(Schema):
    """Why a job failed; `param` is the field of its request that is at fault, where there is one."""

    code: str
    message: str
    param: str | None


class Progress(Schema):
    """How far the current stage of a job is; `total_steps` is 0 where it cannot be known beforehand."""

    stage: str
    step: int
    total_steps: int


class Made(Schema):
    """A persona that a job has made."""

    persona: str
    digest: str
    certificate: dict[str, Any]
    file: str | None = None


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
    "method": {"type": "mask", "mask": {"score": "attribution", "contrast_file": "file-94a82715f6e0d3c4b5a60718"}},
    "seed": 0,
    "error": None,
    "trained_tokens": None,
    "metadata": {},
    "progress": {"stage": "backward", "step": 12, "total_steps": 96},
    "personas": [],
}


class JobObject(Schema):
    """OpenAI's job, with its `progress` and the `personas` it has made."""

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
    progress: Progress | None  # of a job that runs
    personas: list[Made]


EVENT: dict[str, Any] = {
    "id": "ftevent-42",
    "object": "fine_tuning.job.event",
    "created_at": 1795341604,
    "level": "info",
    "message": "backward 12/96",
    "type": "metrics",
    "data": {"stage": "backward", "step": 12, "total_steps": 96},
}


class EventObject(Schema):
    """Something that happened to a job."""

    model_config = show(EVENT)

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: Progress | None


class CheckpointObject(Schema):
    """A persona that a finished job has made, by its generation."""

    model_config = show(
        {
            "id": "ftckpt-7d1f2a3b4c5d6e7f80912a3b",
            "object": "fine_tuning.job.checkpoint",
            "created_at": 1795341640,
            "fine_tuned_model_checkpoint": "demo:gloomy@7d1f2a3b",
            "fine_tuning_job_id": "ftjob-0f1e2d3c4b5a69788796a5b4",
            "step_number": 1,
            "metrics": {"flip": 0.98, "neutral_ratio": 1.003},
        }
    )

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]


class GenerationObject(Schema):
    """A generation of a persona: the digest of its mask, and its number."""

    generation: str
    number: int
    created_at: str


_PERSONA_EXAMPLE: dict[str, Any] = {
    "id": "gloomy",
    "object": "persona",
    "model": "demo:gloomy",
    "generation": "7d1f2a3b" * 8,
    "number": 2,
    "created_at": "2026-11-22T10:00:00+00:00",
    "gamma": 0.0,
    "phase": "decode",
    "aliases": [],
    "tags": ["npc"],
    "pinned": False,
    "bytes": 9216,
    "resident": True,
    "requests": 17,
}


class PersonaObject(GenerationObject):
    """A persona: its current generation, defaults, size, residency and how many requests wore it."""

    model_config = show(_PERSONA_EXAMPLE)

    id: str
    object: Literal["persona"] = "persona"
    model: str
    gamma: float
    phase: Literal["all", "decode"]
    aliases: list[str]
    tags: list[str]
    pinned: bool
    bytes: int
    resident: bool
    requests: int


class PersonaDetails(PersonaObject):
    """... with its notes, its history (the newest first), how it was built, and its certificate."""

    model_config = show(
        _PERSONA_EXAMPLE
        | {
            "notes": "soft-spoken",
            "history": [{key: _PERSONA_EXAMPLE[key] for key in ("generation", "number", "created_at")}],
            "built": {"score": "attribution", "parameters": {"rho": 0.003}, "opposite": "cheerful"},
            "certificate": {"flip": 0.98, "passed": True},
        }
    )

    notes: str
    history: list[GenerationObject]
    built: dict[str, Any]
    certificate: dict[str, Any]


class PersonaList(Schema):
    """Personas by name."""

    object: Literal["list"] = "list"
    data: list[PersonaObject]


class OverlapObject(Schema):
    """Two masks over some weights: how many there are, pruned by a, by b, by both; `jaccard` is both / either, and
    `differing` the share of the weights on which they disagree.
    """

    size: int
    a: int
    b: int
    both: int
    jaccard: float
    differing: float


_OVERLAP = {"size": 3145728, "a": 9437, "b": 9437, "both": 120, "jaccard": 0.0064, "differing": 0.0059}


class PersonaDiff(Schema):
    """Two generations compared, by their digests: in all, by layer, by part (attention, mlp, other), by Linear."""

    model_config = show(
        {
            "object": "persona.diff",
            "a": "9f2c1a7b" * 8,
            "b": "04d3e8f1" * 8,
            "total": _OVERLAP,
            "layers": {"0": _OVERLAP},
            "parts": {"attention": _OVERLAP},
            "modules": {"model.layers.0.self_attn.o_proj": _OVERLAP},
        }
    )

    object: Literal["persona.diff"] = "persona.diff"
    a: str
    b: str
    total: OverlapObject
    layers: dict[str, OverlapObject]
    parts: dict[str, OverlapObject]
    modules: dict[str, OverlapObject]
