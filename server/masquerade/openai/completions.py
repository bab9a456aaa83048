"""`POST /v1/completions`: a text goes on, without a chat template.

Knows how texts and token ids become prompts. Refuses to know how the answer is made and sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from masquerade.errors import BadRequest
from masquerade.http.access import Chatting
from masquerade.http.dependencies import PERSONA_HEADER, Served, read_persona
from masquerade.openai.answers import CompletionAnswer
from masquerade.openai.generation import LONG, departure, plan, respond
from masquerade.openai.objects import TEXT_CHUNK, TextCompletion, either
from masquerade.openai.schemas import CompletionRequest

router = APIRouter()


@router.post("/v1/completions", responses=either(TextCompletion, TEXT_CHUNK), openapi_extra=PERSONA_HEADER)
async def complete_text(asked: CompletionRequest, serving: Served, caller: Chatting, http: HTTPRequest) -> Response:
    """Go on with each prompt, as a persona."""
    choice = serving.choose(asked.model, asked.persona, await read_persona(http))
    caller.check_choice(choice)
    gone = partial(departure, http.receive)
    resolved = await serving.resolve_persona(choice, asked.gamma, asked.persona_phase, gone)
    prompts = await tokenise(serving.base.tokenizer, asked.prompts())
    try:
        generation = plan(serving, resolved, asked, caller, prompts)
        return await respond(generation, CompletionAnswer(serving.base, resolved), asked, http.receive)
    except BadRequest as error:
        error.param = "prompt" if error.param == "messages" else error.param
        raise


async def tokenise(tokenizer: Any, prompts: Sequence[str | list[int]], *, special: bool = True) -> list[list[int]]:
    """Token ids of prompts; `special` with what the tokenizer puts before every text."""

    def encode() -> list[list[int]]:
        return [
            prompt if isinstance(prompt, list) else list(tokenizer.encode(prompt, add_special_tokens=special))
            for prompt in prompts
        ]

    long = sum(len(prompt) for prompt in prompts if isinstance(prompt, str)) > LONG
    return await asyncio.to_thread(encode) if long else encode()
