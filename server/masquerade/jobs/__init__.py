"""Slow things, durable: uploaded files, jobs, and the one runner that works them off.

Knows states, queues and quotas, in sqlite. Refuses to know what a job builds: the work is given to it.
"""

from masquerade.jobs.desk import Desk
from masquerade.jobs.records import TRANSITIONS, Event, File, Job, State
from masquerade.jobs.runner import Cancelled, Outcome, Runner, Step
from masquerade.jobs.table import Asked, Quotas, Table
from masquerade.jobs.uploads import Uploads

__all__ = [
    "TRANSITIONS",
    "Asked",
    "Cancelled",
    "Desk",
    "Event",
    "File",
    "Job",
    "Outcome",
    "Quotas",
    "Runner",
    "State",
    "Step",
    "Table",
    "Uploads",
]
