"""`POST /v1/embeddings`: texts as vectors, from the base or through a persona's mask."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from masquerade.engine import Embedding, Request, Vector
from masquerade.errors import BadRequest, UnsupportedParameter
from masquerade.generation.handler import resolve_persona
from masquerade.generation.outputs import OutputCollector, Receive, collect_deltas
from masquerade.generation.prompts import context_room, tokenise_texts
from masquerade.http.access import Caller, Chatting, ScopedRoute
from masquerade.http.dependencies import PERSONA_HEADER, Served
from masquerade.http.request_log import Usage
from masquerade.http.wire import encode
from masquerade.openai.objects import EmbeddingList
from masquerade.openai.schemas import EmbeddingRequest
from masquerade.service.serving import ResolvedPersona, Serving

PORTION = 32  # inputs of a request that are in the engine at a time, so that the queue has room for other requests

router = APIRouter(route_class=ScopedRoute)


@router.post(
    "/v1/embeddings", response_model=None, responses={200: {"model": EmbeddingList}}, openapi_extra=PERSONA_HEADER
)
async def embed_texts(request: EmbeddingRequest, serving: Served, caller: Chatting, http: HTTPRequest) -> Response:
    """Embed each input: a vector of length 1, pooled from the last hidden states of its tokens.

    `pooling` is `mean` (the default) or `last`. A persona's mask applies to every token, whatever its phase: an input
    has no answer to which phase `decode` could apply.
    """
    size = int(serving.base.model.config.hidden_size)
    if request.dimensions not in (None, size):
        raise UnsupportedParameter(
            f"`dimensions` is {request.dimensions}; the embeddings of this model have {size}", param="dimensions"
        )
    resolved = await resolve_persona(serving, request, caller, http)
    try:
        prompts = await tokenise_texts(serving, caller, len(await http.body()), request.inputs(), context_room(serving))
        vectors = await embed(serving, resolved, request, caller, prompts, http.receive)
    except BadRequest as error:
        error.param = "input" if error.param in ("messages", "prompt") else error.param
        raise
    if vectors is None:
        return Response(status_code=499)  # nobody reads it
    tokens = sum(map(len, prompts))
    fields = {
        "object": "list",
        "model": resolved.model,
        "persona": resolved.persona,
        "generation": resolved.digest,
        "gamma": resolved.gamma,
        "pooling": request.pooling,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    in_base64 = request.encoding_format == "base64"
    content = await asyncio.to_thread(write_body, fields, vectors, in_base64=in_base64)
    headers = {"X-Persona-Generation": resolved.digest} if resolved.digest else None
    return Response(content, media_type="application/json", headers=headers)


async def embed(
    serving: Serving,
    resolved: ResolvedPersona,
    request: EmbeddingRequest,
    caller: Caller,
    prompts: Sequence[list[int]],
    receive: Receive,
) -> list[Vector] | None:
    """The vectors of prompts; None if the client disconnected. Raises as `Engine.submit` and the engine's requests."""
    tokens, began = 0, asyncio.get_running_loop().time()
    caller.record.begin(resolved, lambda: Usage(tokens, 0))
    caller.record.embeds = True
    vectors = []
    for first in range(0, len(prompts), PORTION):
        portion = prompts[first : first + PORTION]
        embeddings = [Embedding(request.pooling) for _ in portion]
        requests = [
            partial(
                Request,
                prompt=prompt,
                max_tokens=0,
                applied=resolved.applied,
                embedding=embedding,
                owner=caller.share,
                priority=caller.priority,
            )
            for prompt, embedding in zip(portion, embeddings, strict=True)
        ]
        outputs = OutputCollector(serving, requests, caller, streams=False)
        outputs.start(began)
        tokens += sum(map(len, portion))
        await collect_deltas(outputs, receive)
        if outputs.disconnected:
            return None
        vectors += [embedding.vector for embedding in embeddings if embedding.vector is not None]
    return vectors


def write_body(fields: dict[str, Any], vectors: Sequence[Vector], *, in_base64: bool) -> str:
    """The JSON of an `EmbeddingList`, vector by vector, so that other threads are not kept waiting."""
    items = (
        f'{{"object":"embedding","index":{index},"embedding":{encode(_write(vector, in_base64))}}}'
        for index, vector in enumerate(vectors)
    )
    return f'{encode(fields)[:-1]},"data":[{",".join(items)}]}}'


def _write(vector: Vector, in_base64: bool) -> str | list[float]:
    if in_base64:
        return base64.b64encode(vector.astype(np.dtype("<f4")).tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
