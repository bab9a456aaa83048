"""`POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from masquerade.anthropic.answers import MessageAnswer
from masquerade.anthropic.objects import TokenCount, describe_message
from masquerade.anthropic.schemas import CountTokensRequest, MessagesRequest
from masquerade.errors import MasqueradeError
from masquerade.generation.handler import check_persona, respond_chat
from masquerade.generation.prompts import counting_room, tokenise_chat
from masquerade.http.access import Chatting, ScopedRoute
from masquerade.http.dependencies import PERSONA_HEADER, Served, read_persona
from masquerade.http.errors import ANTHROPIC, ANTHROPIC_RESPONSES
from masquerade.model import too_long

router = APIRouter(route_class=ScopedRoute, responses=ANTHROPIC_RESPONSES)
_FIELDS = (".function.parameters", ".input_schema")  # the schema of a tool, in chats and in messages


@router.post(ANTHROPIC, responses=describe_message(), openapi_extra=PERSONA_HEADER)
async def create_message(request: MessagesRequest, serving: Served, caller: Chatting, http: HTTPRequest) -> Response:
    """Answer messages as a persona, in Anthropic's form. Fields beyond Anthropic's are as in chats."""
    request_id = http.state.request_id
    make_answer = partial(MessageAnswer, max_tokens=request.max_tokens, request_id=request_id)
    try:
        return await respond_chat(serving, request.chat(), caller, http, make_answer)
    except MasqueradeError as error:
        if error.param:
            error.param = error.param.replace(*_FIELDS)
            error.args = (str(error).replace(*_FIELDS),)
        raise


@router.post(f"{ANTHROPIC}/count_tokens", openapi_extra=PERSONA_HEADER)
async def count_tokens(request: CountTokensRequest, serving: Served, caller: Chatting, http: HTTPRequest) -> TokenCount:
    """The tokens of a prompt, as the model gets it. They count as the key's tokens, as those of `/tokenize` do."""
    await check_persona(serving, request.model, caller, request.persona, await read_persona(http))
    room, size = counting_room(serving), len(await http.body())
    ids = await tokenise_chat(serving, caller, size, request.chat_messages(), request.chat_tools(), room)
    if len(ids) > room.tokens:
        raise too_long(room, f"this one has {len(ids)}", "messages", len(ids))
    caller.record.extra_tokens += len(ids)
    return TokenCount(input_tokens=len(ids))
