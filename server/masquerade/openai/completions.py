"""`POST /v1/completions`: continues texts, without a chat template."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from masquerade.errors import BadRequest
from masquerade.generation.handler import resolve_persona, respond
from masquerade.generation.prompts import context_room, run_off_loop, tokenise_texts
from masquerade.http.access import Caller, Chatting, ScopedRoute
from masquerade.http.dependencies import PERSONA_HEADER, Served
from masquerade.openai.answers import CompletionAnswer
from masquerade.openai.objects import TEXT_RESPONSES
from masquerade.openai.schemas import CompletionRequest
from masquerade.service.serving import Serving

router = APIRouter(route_class=ScopedRoute)


@router.post("/v1/completions", responses=TEXT_RESPONSES, openapi_extra=PERSONA_HEADER)
async def complete_text(request: CompletionRequest, serving: Served, caller: Chatting, http: HTTPRequest) -> Response:
    """Continue each prompt, as a persona."""
    resolved = await resolve_persona(serving, request, caller, http)
    size, room = len(await http.body()), context_room(serving)
    prompts = await tokenise_texts(serving, caller, size, request.prompts(), room)
    echoes = await decode_prompts(serving, caller, size, request, prompts) if request.echo else ()
    answer = CompletionAnswer(serving.base, resolved, request, echoes)
    try:
        return await respond(serving, resolved, request, caller, prompts, answer, http.receive)
    except BadRequest as error:
        error.param = "prompt" if error.param == "messages" else error.param
        raise


async def decode_prompts(
    serving: Serving, caller: Caller, size: int, request: CompletionRequest, ids: Sequence[list[int]]
) -> list[str]:
    """The texts of prompts, from a body of `size` bytes: as they were given, or those of their token ids."""

    def decode() -> list[str]:
        prompts = zip(request.prompts(), ids, strict=True)
        return [text if isinstance(text, str) else serving.base.tokenizer.decode(own) for text, own in prompts]

    return await run_off_loop(serving, caller, size, decode)
