"""Records of files, jobs and events, and the state transitions of a job."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]
ID = "ftjob-"  # prefix of every job id
RESULTS = "fine-tune-results"  # OpenAI's purpose of files that jobs make; no quota counts them
BATCH_INPUT, BATCH_OUTPUT = "batch", "batch_output"  # OpenAI's purposes of files of batches
LEASE_SECONDS = 15.0  # after which another server takes up what a dead one ran
REPEAT_SECONDS = 900.0  # after a request in which its repeat is recognized

# A running job goes back to the queue if its server dies. The last three states are final.
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
    name: str  # as the client called it: shown, never used as a path
    bytes: int
    digest: str  # sha256 of an uploaded file; of a mask, its digest
    created_at: float  # unix seconds


@dataclass(frozen=True)
class Job:
    """A build. `spec['files']` are the files it needs, by role; only the work reads the rest of `spec`."""

    id: str
    owner: str
    state: State
    spec: Mapping[str, Any]
    created_at: float
    started_at: float | None
    finished_at: float | None
    error: Mapping[str, Any] | None
    result: Mapping[str, Any] | None
    key: str | None = None  # the client's idempotency key
    cancelling: bool = False  # cancellation was requested while it ran


@dataclass(frozen=True)
class Event:
    """An event of a job; `number` increases over all jobs of the table."""

    number: int
    job: str
    created_at: float
    level: Level
    message: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Quotas:
    """Limits of one owner."""

    files: int = 200
    file_bytes: int = 2**30  # of all files together
    open_jobs: int = 16
    rows: int = 100_000  # examples of one file
    days: float = 30.0  # after which ended jobs, and files, are deleted
    responses: int = 10_000  # stored ones; beyond that, and beyond the bytes, the oldest are deleted
    response_bytes: int = 2**28  # of all stored responses together
    response_days: float = 30.0  # after which responses are deleted; 0 stores none


@dataclass(frozen=True)
class Repeat:
    """How a client marks a request, so that its repeat is recognized."""

    key: str | None = None  # idempotency key of the request and its repeats
    again: bool = False  # it retries a request that got no answer

    def since(self, now: float) -> float:
        """From when on an equal request that has been served is the same one."""
        return now - REPEAT_SECONDS if self.again else math.inf
