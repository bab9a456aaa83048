"""`POST /v1/chat/completions`.

Knows how a chat becomes a prompt and what its answer may be. Refuses to know how the answer is made and sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from masquerade.engine import AnswerFormat
from masquerade.http.access import Chatting
from masquerade.http.dependencies import PERSONA_HEADER, Served, read_persona
from masquerade.model import find_dialect, render_chat
from masquerade.openai.answers import ChatAnswer
from masquerade.openai.generation import LONG, departure, plan, respond
from masquerade.openai.objects import CHAT_CHUNK, ChatCompletion, either
from masquerade.openai.schemas import ChatRequest, Message, Tool
from masquerade.openai.tools import open_toolbox

router = APIRouter()


@router.post("/v1/chat/completions", responses=either(ChatCompletion, CHAT_CHUNK), openapi_extra=PERSONA_HEADER)
async def complete_chat(asked: ChatRequest, serving: Served, caller: Chatting, http: HTTPRequest) -> Response:
    """Answer a chat as a persona. See the README for the fields beyond OpenAI's."""
    choice = serving.choose(asked.model, asked.persona, await read_persona(http))
    caller.check_choice(choice)
    gone = partial(departure, http.receive)
    resolved = await serving.resolve_persona(choice, asked.gamma, asked.persona_phase, gone)
    tokenizer = serving.base.tokenizer
    toolbox = open_toolbox(asked, find_dialect(tokenizer), tokenizer) if asked.tools else None
    prompt = await tokenise(tokenizer, asked.messages, asked.tools if toolbox else None)
    form = toolbox.form(asked.wanted) if toolbox else AnswerFormat([asked.wanted]) if asked.wanted else None
    grammars = await asyncio.to_thread(serving.engine.grammars.compile, form, asked.n or 1) if form else None
    generation = plan(serving, resolved, asked, caller, [prompt], grammars)
    return await respond(generation, ChatAnswer(serving.base, resolved, toolbox), asked, http.receive)


async def tokenise(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] | None) -> list[int]:
    """Token ids of a chat; of a long one, while the event loop goes on."""
    plain = [message.plain() for message in messages]
    offered = [tool.model_dump(exclude_none=True) for tool in tools or ()]
    if sum(len(message["content"]) for message in plain) > LONG or offered:
        return await asyncio.to_thread(render_chat, tokenizer, plain, offered)
    return render_chat(tokenizer, plain, offered)
