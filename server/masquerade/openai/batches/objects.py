"""Objects of `/v1/batches`, and an example."""

from __future__ import annotations

from typing import Literal

from masquerade.http.wire import Schema, show
from masquerade.jobs import BatchState


class BatchFault(Schema):
    """What is wrong with a line of the input file, or why the batch could not go on (`line` is null)."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchFaults(Schema):
    """Why a batch failed; at most 100 faults."""

    object: Literal["list"] = "list"
    data: list[BatchFault]


class RequestCountsObject(Schema):
    """Requests of a batch: all, those in the output file, those in the error file."""

    total: int
    completed: int
    failed: int


class BatchObject(Schema):
    """A batch. Times are unix seconds, and null before the state is reached."""

    model_config = show(
        {
            "id": "batch_0f1e2d3c4b5a69788796a5b4",
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "errors": None,
            "input_file_id": "file-6ab1f0c2d3e4f5061728394a",
            "completion_window": "24h",
            "status": "in_progress",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": 1795341600,
            "in_progress_at": 1795341601,
            "expires_at": 1795428000,
            "finalizing_at": None,
            "completed_at": None,
            "failed_at": None,
            "expired_at": None,
            "cancelling_at": None,
            "cancelled_at": None,
            "request_counts": {"total": 100, "completed": 12, "failed": 1},
            "metadata": None,
        }
    )

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchFaults | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: BatchState
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCountsObject
    metadata: dict[str, str] | None
