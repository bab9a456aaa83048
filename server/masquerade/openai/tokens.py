"""`POST /tokenize` and `POST /detokenize`, in the form of vLLM's.

Knows what a text or a chat is in tokens. Refuses to generate.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest
from pydantic import ConfigDict, model_validator

from masquerade.errors import InvalidValue
from masquerade.http.access import Chatting, ScopedRoute
from masquerade.http.dependencies import Served
from masquerade.http.wire import Schema, Text, refuse
from masquerade.model import too_long
from masquerade.openai import unsupported
from masquerade.openai.prompts import counting_room, tokenise_chat, tokenise_texts, work
from masquerade.openai.schemas import Ids, Messages, Tools

router = APIRouter(route_class=ScopedRoute)


class TokenizeRequest(Schema):
    """`POST /tokenize`: a `prompt`, or the `messages` of a chat."""

    model_config = ConfigDict(json_schema_extra={"example": {"prompt": "Hello!", "return_token_strs": True}})

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    tools: Tools | None = None
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
    tokens: Ids

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: Any) -> Any:
        return refuse(fields, unsupported.DETOKENIZE)


class Detokenized(Schema):
    """The text of token ids."""

    model_config = ConfigDict(json_schema_extra={"example": {"prompt": "Hello!"}})

    prompt: str


@router.post("/tokenize", response_model=Tokenized)
async def tokenize(asked: TokenizeRequest, serving: Served, caller: Chatting, http: HTTPRequest) -> Response:
    """The tokens of a text, or of a chat as the model gets it.

    At most as many as the context has, or 65 536 where that is more. They count as the key's tokens.
    """
    if asked.model is not None:
        caller.check_reference(serving.find_reference(asked.model, None, None))
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidValue("give `prompt` or `messages`, one of them", param="prompt")
    if asked.tools and asked.messages is None:
        raise InvalidValue("`tools` are offered in a chat: they need `messages`", param="tools")
    tokenizer, room, size = serving.base.tokenizer, counting_room(serving), len(await http.body())
    if asked.messages is not None:
        ids = await tokenise_chat(serving, caller, size, asked.messages, asked.tools, room)
    else:
        prompts, special = [asked.prompt or ""], asked.add_special_tokens
        (ids,) = await tokenise_texts(serving, caller, size, prompts, room, special=special)
    if len(ids) > room.tokens:
        raise too_long(room, f"this one has {len(ids)}", "prompt" if asked.messages is None else "messages", len(ids))
    caller.record.extra_tokens += len(ids)

    def answer() -> str:
        names = tokenizer.convert_ids_to_tokens(ids) if asked.return_token_strs else None
        told = Tokenized(count=len(ids), max_model_len=serving.base.context, tokens=ids, token_strs=names)
        return told.model_dump_json()

    return Response(await work(serving, caller, size, answer), media_type="application/json")


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(asked: DetokenizeRequest, serving: Served, caller: Chatting, http: HTTPRequest) -> Response:
    """The text of tokens, special ones included. At most as many as the context has, or 65 536 where that is more."""
    if asked.model is not None:
        caller.check_reference(serving.find_reference(asked.model, None, None))
    most, count = counting_room(serving).tokens, len(asked.tokens)
    if count > most:
        raise InvalidValue(f"tokens has {count} token ids; the limit is {most}", param="tokens")
    strange = next((token for token in asked.tokens if token >= serving.base.vocabulary), None)
    if strange is not None:
        raise InvalidValue(
            f"token id {strange} is outside of the vocabulary of {serving.base.vocabulary}", param="tokens"
        )

    def answer() -> str:
        return Detokenized(prompt=serving.base.tokenizer.decode(asked.tokens)).model_dump_json()

    return Response(
        await work(serving, caller, len(await http.body()), answer),
        media_type="application/json",
    )
