"""Uploaded files, stored responses and a durable queue of jobs, and the runner that executes them."""

from masquerade.jobs.batches import BATCH_TRANSITIONS, BatchRecord, BatchState, BatchTable
from masquerade.jobs.records import (
    BATCH_INPUT,
    BATCH_OUTPUT,
    ID,
    TRANSITIONS,
    Event,
    File,
    Job,
    Quotas,
    Repeat,
    State,
    draw_job_id,
)
from masquerade.jobs.responses import ResponseTable, StoredResponse, open_responses
from masquerade.jobs.results import BatchResults
from masquerade.jobs.runner import Cancelled
from masquerade.jobs.service import JobService
from masquerade.jobs.table import JobTable, open_group
from masquerade.jobs.uploads import Uploads

__all__ = [
    "BATCH_INPUT",
    "BATCH_OUTPUT",
    "BATCH_TRANSITIONS",
    "ID",
    "TRANSITIONS",
    "BatchRecord",
    "BatchResults",
    "BatchState",
    "BatchTable",
    "Cancelled",
    "Event",
    "File",
    "Job",
    "JobService",
    "JobTable",
    "Quotas",
    "Repeat",
    "ResponseTable",
    "State",
    "StoredResponse",
    "Uploads",
    "draw_job_id",
    "open_group",
    "open_responses",
]
