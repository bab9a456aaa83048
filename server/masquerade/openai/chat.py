"""`POST /v1/chat/completions`.

Knows how a chat becomes a prompt and what its answer may be. Refuses to know how the answer is made and sent.
"""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from masquerade.engine import AnswerFormat
from masquerade.http.access import Chatting, ScopedRoute
from masquerade.http.dependencies import PERSONA_HEADER, Served, read_persona
from masquerade.model import find_dialect
from masquerade.openai.answers import ChatAnswer
from masquerade.openai.generation import departure, plan, respond
from masquerade.openai.objects import CHAT_CHUNK, ChatCompletion, either
from masquerade.openai.prompts import context_room, tokenise_chat
from masquerade.openai.schemas import ChatRequest
from masquerade.openai.tools import open_toolbox

router = APIRouter(route_class=ScopedRoute)


@router.post("/v1/chat/completions", responses=either(ChatCompletion, CHAT_CHUNK), openapi_extra=PERSONA_HEADER)
async def complete_chat(asked: ChatRequest, serving: Served, caller: Chatting, http: HTTPRequest) -> Response:
    """Answer a chat as a persona. See the README for the fields beyond OpenAI's."""
    reference = serving.find_reference(asked.model, asked.persona, await read_persona(http))
    caller.check_reference(reference)
    tokenizer, size = serving.base.tokenizer, len(await http.body())
    resolved = await serving.resolve_persona(
        reference, asked.gamma, asked.persona_phase, partial(departure, http.receive)
    )
    toolbox = open_toolbox(asked, find_dialect(tokenizer), tokenizer) if asked.tools else None
    tools = asked.tools if toolbox else None
    prompt = await tokenise_chat(serving, caller, size, asked.messages, tools, context_room(serving))
    form = toolbox.form(asked.wanted) if toolbox else AnswerFormat([asked.wanted]) if asked.wanted else None
    grammars = None
    if form:
        compile_form = partial(serving.engine.grammars.compile, form, asked.n or 1)
        grammars = await serving.workers.run(caller.owner, size, compile_form)
    generation = plan(serving, resolved, asked, caller, [prompt], grammars)
    return await respond(generation, ChatAnswer(serving.base, resolved, toolbox), asked, http.receive)
