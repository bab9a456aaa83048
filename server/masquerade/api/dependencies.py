"""What a route asks for: the parts of the application that a request belongs to.

Knows where the application keeps them. Refuses to know what they do. They are coroutines because the framework would
send plain functions to a thread for each request.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request

from masquerade.api.serving import Serving
from masquerade.errors import PersonaConflict, WorkedElsewhere
from masquerade.jobs import Desk


async def find_serving(http: Request) -> Serving:
    """What the server of a request serves."""
    serving: Serving = http.app.state.serving
    return serving


async def read_persona(http: Request) -> str | None:
    """The persona that the header `X-Persona` names; `PersonaConflict` if it is there twice and not the same."""
    named = set(http.headers.getlist("X-Persona"))
    if len(named) > 1:
        raise PersonaConflict("the header X-Persona names several personas; give one", param="X-Persona")
    return next(iter(named), None)


async def find_desk(http: Request) -> Desk:
    """The store's jobs; `WorkedElsewhere` if another server has them."""
    desk: Desk | None = http.app.state.desk
    if desk is None:
        raise WorkedElsewhere("another server works the jobs of this store; send builds there")
    return desk


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
Worked = Annotated[Desk, Depends(find_desk)]
