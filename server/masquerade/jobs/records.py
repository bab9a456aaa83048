"""What is remembered: files, jobs, events; and which way a job may go."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]
ID = "ftjob-"  # what the id of every job begins with
RESULTS = "fine-tune-results"  # OpenAI's purpose of files that jobs make; no quota counts them

# A running job goes back to the queue when its server died. Nothing leaves an end.
TRANSITIONS: Mapping[State, frozenset[State]] = {
    "validating_files": frozenset({"queued", "failed", "cancelled"}),
    "queued": frozenset({"running", "cancelled"}),
    "running": frozenset({"succeeded", "failed", "cancelled", "queued"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
OPEN: frozenset[State] = frozenset(state for state, following in TRANSITIONS.items() if following)


def draw_job_id() -> str:
    """An id for a new job."""
    return f"{ID}{secrets.token_hex(12)}"


@dataclass(frozen=True)
class File:
    """An uploaded file; its content lies under its id."""

    id: str
    owner: str
    purpose: str
    name: str  # what the client called it: shown, never used as a path
    bytes: int
    digest: str  # by which its content is known: sha256 of what was uploaded, a mask's own
    created_at: float  # unix seconds


@dataclass(frozen=True)
class Job:
    """Something to build. `spec['files']` are the files it needs, by role; the rest of it is its work's own."""

    id: str
    owner: str
    state: State
    spec: Mapping[str, Any]
    created_at: float
    started_at: float | None
    finished_at: float | None
    error: Mapping[str, Any] | None
    result: Mapping[str, Any] | None
    key: str | None = None  # by which its client knows it again
    cancelling: bool = False  # it was asked to end while it ran


@dataclass(frozen=True)
class Event:
    """Something that happened to a job; `number` counts over all jobs of the table and only grows."""

    number: int
    job: str
    created_at: float
    level: Level
    message: str
    data: Mapping[str, Any]
