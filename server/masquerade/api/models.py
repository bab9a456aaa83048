"""`GET /v1/models`: the base, and every persona of it as a model of its own."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

from fastapi import APIRouter

from masquerade.api.access import Caller, Chatting
from masquerade.api.dependencies import Served
from masquerade.api.forms import ModelForm, ModelList
from masquerade.api.serving import Serving
from masquerade.errors import ModelNotFound

router = APIRouter()


@router.get("/v1/models", response_model=None, responses={200: {"model": ModelList}})
async def list_models(serving: Served, caller: Chatting) -> dict[str, Any]:
    """The base first, then those of its personas that the key may use."""
    return {"object": "list", "data": await asyncio.to_thread(_models, serving, caller)}


@router.get("/v1/models/{model:path}", response_model=None, responses={200: {"model": ModelForm}})
async def show_model(model: str, serving: Served, caller: Chatting) -> dict[str, Any]:
    """One of them."""
    for entry in await asyncio.to_thread(_models, serving, caller):
        if entry["id"] == model:
            return entry
    raise ModelNotFound(f"the model {model!r} is not served here; GET /v1/models lists what is", param="model")


def _models(serving: Serving, caller: Caller) -> list[dict[str, Any]]:
    name, common = serving.base.name, {"object": "model", "owned_by": "masquerade", "root": serving.base.name}
    base = {"id": name, "created": int(serving.base.folder.stat().st_mtime), "parent": None, **common}
    personas = [
        {
            "id": f"{name}:{generation.name}",
            "created": int(datetime.fromisoformat(generation.created_at).timestamp()),
            "parent": name,
            "generation": generation.digest,
            **common,
        }
        for generation in serving.personas()
        if caller.sees(generation.name)
    ]
    return [base, *personas]
