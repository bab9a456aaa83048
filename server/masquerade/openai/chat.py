"""`POST /v1/chat/completions`."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from masquerade.engine import AnswerFormat
from masquerade.http.access import Chatting, ScopedRoute
from masquerade.http.dependencies import PERSONA_HEADER, Served
from masquerade.model import find_dialect
from masquerade.openai.answers import ChatAnswer
from masquerade.openai.generation import resolve_persona, respond
from masquerade.openai.objects import CHAT_CHUNK, ChatCompletion, either
from masquerade.openai.prompts import context_room, tokenise_chat
from masquerade.openai.schemas import ChatRequest
from masquerade.openai.tools import select_tools

router = APIRouter(route_class=ScopedRoute)


@router.post("/v1/chat/completions", responses=either(ChatCompletion, CHAT_CHUNK), openapi_extra=PERSONA_HEADER)
async def complete_chat(request: ChatRequest, serving: Served, caller: Chatting, http: HTTPRequest) -> Response:
    """Answer a chat as a persona. See the README for the fields beyond OpenAI's."""
    tokenizer, size = serving.base.tokenizer, len(await http.body())
    resolved = await resolve_persona(serving, request, caller, http)
    tool_set = select_tools(request, find_dialect(tokenizer), tokenizer) if request.tools else None
    tools = request.tools if tool_set else None
    prompt = await tokenise_chat(serving, caller, size, request.messages, tools, context_room(serving))
    json_format = request.json_format
    if tool_set:
        answer_format = tool_set.answer_format(json_format)
    else:
        answer_format = AnswerFormat([json_format]) if json_format else None
    grammars = None
    if answer_format:
        compile_format = partial(serving.engine.grammars.compile, answer_format, request.n or 1)
        grammars = await serving.workers.run(caller.owner, size, compile_format)
    answer = ChatAnswer(serving.base, resolved, tool_set)
    return await respond(serving, resolved, request, caller, [prompt], answer, http.receive, grammars)
