"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest

from masquerade.errors import InvalidValue
from masquerade.generation.handler import check_persona
from masquerade.generation.messages import Messages, Tools
from masquerade.generation.prompts import counting_room, run_off_loop, tokenise_chat, tokenise_texts
from masquerade.generation.requests import TemplateFields
from masquerade.http.access import Chatting, ScopedRoute
from masquerade.http.dependencies import Served
from masquerade.http.wire import RequestBody, Schema, Text, show
from masquerade.model import too_long
from masquerade.openai import unsupported
from masquerade.openai.schemas import Ids

router = APIRouter(route_class=ScopedRoute)


class TokenizeRequest(TemplateFields):
    """`POST /tokenize`: a `prompt`, or the `messages` of a chat."""

    model_config = show({"prompt": "Hello!", "return_token_strs": True})
    refused = unsupported.TOKENIZE

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True  # for a prompt; the template adds those of a chat
    return_token_strs: bool | None = None


class Tokenized(Schema):
    """Token ids; `token_strs` only with `return_token_strs`."""

    model_config = show({"count": 2, "max_model_len": 512, "tokens": [1567, 6], "token_strs": ["Hello", "!"]})

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestBody):
    """`POST /detokenize`."""

    model_config = show({"tokens": [1567, 6]})
    refused = unsupported.DETOKENIZE

    model: Text | None = None
    tokens: Ids


class Detokenized(Schema):
    """The text of token ids."""

    model_config = show({"prompt": "Hello!"})

    prompt: str


@router.post("/tokenize", response_model=Tokenized)
async def tokenize(request: TokenizeRequest, serving: Served, caller: Chatting, http: HTTPRequest) -> Response:
    """The tokens of a text, or of a chat as the model gets it.

    The limit is the context, or 65 536 tokens if that is more. They count as the key's tokens.
    """
    if request.model is not None:
        await check_persona(serving, request.model, caller)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidValue("give `prompt` or `messages`, one of them", param="prompt")
    if request.tools and request.messages is None:
        raise InvalidValue("`tools` belong to a chat: they need `messages`", param="tools")
    tokenizer, room, size = serving.base.tokenizer, counting_room(serving), len(await http.body())
    if request.messages is not None:
        options = request.template_options
        ids = await tokenise_chat(serving, caller, size, request.messages, request.tools, room, options)
    else:
        prompts, special = [request.prompt or ""], request.add_special_tokens
        (ids,) = await tokenise_texts(serving, caller, size, prompts, room, special=special)
    if len(ids) > room.tokens:
        raise too_long(room, f"this one has {len(ids)}", "prompt" if request.messages is None else "messages", len(ids))
    caller.record.extra_tokens += len(ids)

    def render() -> str:
        texts = tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else None
        return Tokenized(
            count=len(ids), max_model_len=serving.engine.max_length, tokens=ids, token_strs=texts
        ).model_dump_json()

    return Response(await run_off_loop(serving, caller, size, render), media_type="application/json")


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(request: DetokenizeRequest, serving: Served, caller: Chatting, http: HTTPRequest) -> Response:
    """The text of tokens, with special ones. The limit is the context, or 65 536 tokens if that is more."""
    if request.model is not None:
        await check_persona(serving, request.model, caller)
    limit, count = counting_room(serving).tokens, len(request.tokens)
    if count > limit:
        raise InvalidValue(f"tokens has {count} token ids; the limit is {limit}", param="tokens")
    vocabulary = serving.base.vocabulary
    unknown = next((token for token in request.tokens if token >= vocabulary), None)
    if unknown is not None:
        raise InvalidValue(f"token id {unknown} is outside of the vocabulary of {vocabulary}", param="tokens")

    def render() -> str:
        return Detokenized(prompt=serving.base.tokenizer.decode(request.tokens)).model_dump_json()

    content = await run_off_loop(serving, caller, len(await http.body()), render)
    return Response(content, media_type="application/json")
