"""`GET /v1/models`: the base, and each of its personas as a model."""

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
    """The base first, then its personas that the key may use."""
    return {"object": "list", "data": await asyncio.to_thread(_models, serving, caller)}


@router.get("/v1/models/{model:path}", response_model=None, responses={200: {"model": ModelObject}})
async def show_model(model: str, serving: Served, caller: Chatting) -> dict[str, Any]:
    """A model of the list, or another id that a request may have: `base:alias`, `base:persona@digest8`."""
    return await asyncio.to_thread(_find, serving, caller, model)


def _models(serving: Serving, caller: Caller) -> list[dict[str, Any]]:
    visible = (revision for revision in serving.personas() if caller.sees(revision.name))
    return [_describe_base(serving), *(_describe_persona(serving, revision.name, revision) for revision in visible)]


def _find(serving: Serving, caller: Caller, model: str) -> dict[str, Any]:
    """Raises `ModelNotFound`, also for a persona that is not on the key's list."""
    try:
        named = serving.find_reference(model, None, None)
        if named is None:
            return _describe_base(serving)
        reference = named.name
        if caller.sees(reference.partition("@")[0]):
            revision = serving.registry.resolve(reference)
            if serving.fits_base(revision):
                return _describe_persona(serving, reference, revision)
    except (ModelNotFound, MaskNotFound, InvalidName):
        pass
    raise ModelNotFound(f"the model {model!r:.200} is not served here; GET /v1/models lists what is", param="model")


def _describe_base(serving: Serving) -> dict[str, Any]:
    created = int(serving.base.path.stat().st_mtime)
    model = {"object": "model", "owned_by": "masquerade", "root": serving.base.name}
    length = {"max_model_len": serving.engine.max_length}
    return {"id": serving.base.name, "created": created, "parent": None} | model | length


def _describe_persona(serving: Serving, reference: str, revision: Revision) -> dict[str, Any]:
    return {
        **_describe_base(serving),
        "id": f"{serving.base.name}:{reference}",
        "created": int(datetime.fromisoformat(revision.created_at).timestamp()),
        "parent": serving.base.name,
        "generation": revision.digest,
    }
