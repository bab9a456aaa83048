"""What a route asks for: the parts of the application that a request belongs to.

Knows where the application keeps them. Refuses to know what they do. They are coroutines because the framework would
send plain functions to a thread for each request.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from masquerade.api.serving import Serving
from masquerade.errors import WorkedElsewhere
from masquerade.jobs import Desk


async def find_serving(http: Request) -> Serving:
    """What the server of a request serves."""
    serving: Serving = http.app.state.serving
    return serving


async def find_desk(http: Request) -> Desk:
    """The store's jobs; `WorkedElsewhere` if another server has them."""
    desk: Desk | None = http.app.state.desk
    if desk is None:
        raise WorkedElsewhere("another server works the jobs of this store; send builds there")
    return desk


Served = Annotated[Serving, Depends(find_serving)]
Worked = Annotated[Desk, Depends(find_desk)]
