"""FastAPI dependencies of routes.

They are coroutines because the framework runs plain functions in a thread, for each request.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request

from masquerade.errors import PersonaConflict, WorkedElsewhere
from masquerade.jobs import JobService, ResponseTable
from masquerade.service.serving import Serving


async def find_serving(http: Request) -> Serving:
    """What the server serves."""
    serving: Serving = http.app.state.serving
    return serving


async def read_persona(http: Request) -> str | None:
    """The persona in the header `X-Persona`. Raises `PersonaConflict` if the header names two."""
    named = set(http.headers.getlist("X-Persona"))
    if len(named) > 1:
        raise PersonaConflict("the header X-Persona names several personas; give one", param="X-Persona")
    return next(iter(named), None)


async def find_job_service(http: Request) -> JobService:
    """The store's jobs. Raises `WorkedElsewhere` if another server runs them."""
    job_service: JobService | None = http.app.state.job_service
    if job_service is None:
        raise WorkedElsewhere("another server runs the jobs of this store; send builds there")
    return job_service


async def find_responses(http: Request) -> ResponseTable:
    """The store's responses."""
    responses: ResponseTable = http.app.state.responses
    return responses


PERSONA_HEADER: dict[str, Any] = {
    "parameters": [
        {
            "name": "X-Persona",
            "in": "header",
            "required": False,
            "schema": {"type": "string"},
            "description": "The persona, where neither `model` nor `persona` names one.",
        }
    ]
}
Served = Annotated[Serving, Depends(find_serving)]
ServedJobs = Annotated[JobService, Depends(find_job_service)]
ServedResponses = Annotated[ResponseTable, Depends(find_responses)]
