"""`POST /v1/completions`: a text goes on, without a chat template.

Knows how texts and token ids become prompts. Refuses to know how the answer is made and sent.
"""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from masquerade.errors import BadRequest
from masquerade.http.access import Chatting, ScopedRoute
from masquerade.http.dependencies import PERSONA_HEADER, Served, read_persona
from masquerade.openai.answers import CompletionAnswer
from masquerade.openai.generation import departure, plan, respond
from masquerade.openai.objects import TEXT_CHUNK, TextCompletion, either
from masquerade.openai.prompts import context_room, tokenise_texts
from masquerade.openai.schemas import CompletionRequest

router = APIRouter(route_class=ScopedRoute)


@router.post("/v1/completions", responses=either(TextCompletion, TEXT_CHUNK), openapi_extra=PERSONA_HEADER)
async def complete_text(asked: CompletionRequest, serving: Served, caller: Chatting, http: HTTPRequest) -> Response:
    """Go on with each prompt, as a persona."""
    reference = serving.find_reference(asked.model, asked.persona, await read_persona(http))
    caller.check_reference(reference)
    size = len(await http.body())
    resolved = await serving.resolve_persona(
        reference, asked.gamma, asked.persona_phase, partial(departure, http.receive)
    )
    prompts = await tokenise_texts(serving, caller, size, asked.prompts(), context_room(serving))
    try:
        generation = plan(serving, resolved, asked, caller, prompts)
        return await respond(generation, CompletionAnswer(serving.base, resolved), asked, http.receive)
    except BadRequest as error:
        error.param = "prompt" if error.param == "messages" else error.param
        raise
