"""`GET /v1/models`: the base, and every persona of it as a model of its own."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

from fastapi import APIRouter

from maskstore import InvalidName, MaskNotFound, Revision
from masquerade.errors import ModelNotFound
from masquerade.http.access import Caller, Chatting
from masquerade.http.dependencies import Served
from masquerade.openai.objects import ModelList, ModelObject
from masquerade.service.serving import Serving

router = APIRouter()


@router.get("/v1/models", response_model=None, responses={200: {"model": ModelList}})
async def list_models(serving: Served, caller: Chatting) -> dict[str, Any]:
    """The base first, then those of its personas that the key may use."""
    return {"object": "list", "data": await asyncio.to_thread(_models, serving, caller)}


@router.get("/v1/models/{model:path}", response_model=None, responses={200: {"model": ModelObject}})
async def show_model(model: str, serving: Served, caller: Chatting) -> dict[str, Any]:
    """One of them, or whatever else a request may name: `base:alias`, `base:persona@digest8`."""
    return await asyncio.to_thread(_find, serving, caller, model)


def _models(serving: Serving, caller: Caller) -> list[dict[str, Any]]:
    personas = [_entry(serving, one.name, one) for one in serving.personas() if caller.sees(one.name)]
    return [_base(serving), *personas]


def _find(serving: Serving, caller: Caller, model: str) -> dict[str, Any]:
    """Who is not on the key's list is as good as not there."""
    try:
        choice = serving.find_reference(model, None, None)
        if choice is None:
            return _base(serving)
        reference = choice.name
        if caller.sees(reference.partition("@")[0]):
            generation = serving.registry.resolve(reference)
            if serving.fits_base(generation):
                return _entry(serving, reference, generation)
    except (ModelNotFound, MaskNotFound, InvalidName):
        pass
    raise ModelNotFound(f"the model {model!r:.200} is not served here; GET /v1/models lists what is", param="model")


def _base(serving: Serving) -> dict[str, Any]:
    return {"id": serving.base.name, "created": int(serving.base.path.stat().st_mtime), "parent": None} | _common(
        serving
    )


def _entry(serving: Serving, reference: str, generation: Revision) -> dict[str, Any]:
    return {
        "id": f"{serving.base.name}:{reference}",
        "created": int(datetime.fromisoformat(generation.created_at).timestamp()),
        "parent": serving.base.name,
        "generation": generation.digest,
    } | _common(serving)


def _common(serving: Serving) -> dict[str, Any]:
    return {"object": "model", "owned_by": "masquerade", "root": serving.base.name}
