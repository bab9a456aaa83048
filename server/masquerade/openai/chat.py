"""`POST /v1/chat/completions`."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from masquerade.generation.handler import respond_chat
from masquerade.generation.requests import ChatRequest
from masquerade.http.access import Chatting, ScopedRoute
from masquerade.http.dependencies import PERSONA_HEADER, Served
from masquerade.openai.answers import ChatAnswer
from masquerade.openai.objects import CHAT_RESPONSES

router = APIRouter(route_class=ScopedRoute)


@router.post("/v1/chat/completions", responses=CHAT_RESPONSES, openapi_extra=PERSONA_HEADER)
async def complete_chat(request: ChatRequest, serving: Served, caller: Chatting, http: HTTPRequest) -> Response:
    """Answer a chat as a persona. See the README for the fields beyond OpenAI's."""
    make_answer = partial(ChatAnswer, wants_usage=request.wants_usage)
    return await respond_chat(serving, request, caller, http, make_answer)
