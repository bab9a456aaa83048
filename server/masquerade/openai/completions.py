"""`POST /v1/completions`: continues texts, without a chat template."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from masquerade.errors import BadRequest
from masquerade.http.access import Chatting, ScopedRoute
from masquerade.http.dependencies import PERSONA_HEADER, Served
from masquerade.openai.answers import CompletionAnswer
from masquerade.openai.generation import resolve_persona, respond
from masquerade.openai.objects import TEXT_CHUNK, TextCompletion, either
from masquerade.openai.prompts import context_room, tokenise_texts
from masquerade.openai.schemas import CompletionRequest

router = APIRouter(route_class=ScopedRoute)


@router.post("/v1/completions", responses=either(TextCompletion, TEXT_CHUNK), openapi_extra=PERSONA_HEADER)
async def complete_text(request: CompletionRequest, serving: Served, caller: Chatting, http: HTTPRequest) -> Response:
    """Continue each prompt, as a persona."""
    resolved = await resolve_persona(serving, request, caller, http)
    size, room = len(await http.body()), context_room(serving)
    prompts = await tokenise_texts(serving, caller, size, request.prompts(), room)
    answer = CompletionAnswer(serving.base, resolved, wants_usage=request.wants_usage)
    try:
        return await respond(serving, resolved, request, caller, prompts, answer, http.receive)
    except BadRequest as error:
        error.param = "prompt" if error.param == "messages" else error.param
        raise
