"""Uploaded files, stored responses and a durable queue of jobs in SQLite, and the runner that executes them."""

from masquerade.jobs.records import ID, TRANSITIONS, Event, File, Job, State, draw_job_id
from masquerade.jobs.responses import ResponseTable, StoredResponse
from masquerade.jobs.runner import Cancelled
from masquerade.jobs.service import JobService
from masquerade.jobs.table import JobTable, Quotas, Repeat
from masquerade.jobs.uploads import Uploads

__all__ = [
    "ID",
    "TRANSITIONS",
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
]
