"""`POST /tokenize` and `POST /detokenize`, in the form of vLLM's.

Knows what a text or a chat is in tokens. Refuses to generate.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import ConfigDict, Field, model_validator

from masquerade.errors import InvalidValue
from masquerade.http.access import Chatting
from masquerade.http.dependencies import Served
from masquerade.http.wire import Schema, Text, refuse
from masquerade.openai import chat, completions, unsupported
from masquerade.openai.schemas import MOST_MESSAGES, Id, Message, Tool

router = APIRouter()


class TokenizeRequest(Schema):
    """`POST /tokenize`: a `prompt`, or the `messages` of a chat."""

    model_config = ConfigDict(json_schema_extra={"example": {"prompt": "Hello!", "return_token_strs": True}})

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True  # of a prompt; a chat has those of its template
    return_token_strs: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: Any) -> Any:
        return refuse(fields, unsupported.TOKENIZE)


class Tokenized(Schema):
    """Token ids; `token_strs` only if they were asked for."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"count": 2, "max_model_len": 512, "tokens": [1567, 4], "token_strs": ["Hello", "!"]}
        }
    )

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Schema):
    """`POST /detokenize`."""

    model_config = ConfigDict(json_schema_extra={"example": {"tokens": [1567, 4]}})

    model: Text | None = None
    tokens: list[Id]

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: Any) -> Any:
        return refuse(fields, unsupported.DETOKENIZE)


class Detokenized(Schema):
    """The text of token ids."""

    model_config = ConfigDict(json_schema_extra={"example": {"prompt": "Hello!"}})

    prompt: str


@router.post("/tokenize", response_model=Tokenized)
async def tokenize(asked: TokenizeRequest, serving: Served, caller: Chatting) -> Any:
    """The tokens of a text, or of a chat as the model gets it."""
    if asked.model is not None:
        caller.check_choice(serving.choose(asked.model, None, None))
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidValue("give `prompt` or `messages`, one of them", param="prompt")
    if asked.tools and asked.messages is None:
        raise InvalidValue("`tools` are offered in a chat: they need `messages`", param="tools")
    tokenizer = serving.base.tokenizer
    if asked.messages is not None:
        ids = await chat.tokenise(tokenizer, asked.messages, asked.tools)
    else:
        (ids,) = await completions.tokenise(tokenizer, [asked.prompt or ""], special=asked.add_special_tokens)
    names = tokenizer.convert_ids_to_tokens(ids) if asked.return_token_strs else None
    return {"count": len(ids), "max_model_len": serving.base.context, "tokens": ids, "token_strs": names}


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(asked: DetokenizeRequest, serving: Served, caller: Chatting) -> Any:
    """The text of tokens, special ones included."""
    if asked.model is not None:
        caller.check_choice(serving.choose(asked.model, None, None))
    strange = next((token for token in asked.tokens if token >= serving.base.vocabulary), None)
    if strange is not None:
        raise InvalidValue(
            f"token id {strange} is outside of the vocabulary of {serving.base.vocabulary}", param="tokens"
        )
    return {"prompt": await asyncio.to_thread(serving.base.tokenizer.decode, asked.tokens)}
