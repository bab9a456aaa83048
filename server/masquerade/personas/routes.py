"""`/v1/personas` and `/v1/aliases`: reading and changing the registry.

The entity tag of a persona is the digest of its current revision, so `If-Match` is compare-and-swap. Requests in flight
keep their mask, whatever changes here.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import JSONResponse, Response

from maskstore import (
    ANY,
    Anything,
    Mask,
    MaskCorrupt,
    MaskMismatch,
    Measurement,
    Persona,
    Revision,
    SignatureError,
    UnknownVersion,
    compose,
    diff,
    export_mask,
    import_mask,
    open_served,
    read_info,
)
from maskstore.signing import examine
from masquerade.errors import InvalidMask, InvalidValue
from masquerade.http import downloads
from masquerade.http.access import Building, Caller, Chatting, Managing, ScopedRoute
from masquerade.http.dependencies import Served
from masquerade.http.downloads import Download, TemporaryDownload
from masquerade.http.throttle import Throttle
from masquerade.http.wire import Deleted
from masquerade.personas.objects import PersonaDetails, PersonaDiff, PersonaList, PersonaObject
from masquerade.personas.schemas import AliasTarget, Change, Composition, Renaming, Rollback
from masquerade.service.serving import Serving

router = APIRouter(prefix="/v1/personas", tags=["personas"], route_class=ScopedRoute)
aliases = APIRouter(prefix="/v1/aliases", tags=["personas"], route_class=ScopedRoute)
HEADER_BYTES = 2**24  # limit of a mask file beside its tensors

_MASK = {"schema": {"type": "string", "format": "binary"}}
_BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": _MASK}}}


def read_precondition(
    if_match: Annotated[str | None, Header()] = None, if_none_match: Annotated[str | None, Header()] = None
) -> str | Anything | None:
    """The digest that must be current: any, none (`If-None-Match: *`), or the one of `If-Match`."""
    if if_none_match is not None and if_none_match.strip() != "*":
        raise InvalidValue("If-None-Match must be `*`: the persona must not exist yet", param="If-None-Match")
    if if_none_match is not None:
        return None
    if if_match in (None, "*"):
        return ANY
    return str(if_match).strip().strip('"').partition("-")[0]  # what follows the digest tells a mask's files apart


Precondition = Annotated[str | Anything | None, Depends(read_precondition)]
_TO_PREVIOUS = Rollback()


@router.get("")
def list_personas(serving: Served, caller: Chatting, tag: Annotated[str | None, Query()] = None) -> PersonaList:
    """The personas of the served base that the key may use; with `tag`, those that have it. Those that are not served
    have a `warning` that says why.
    """
    visible = {revision.name for revision in serving.own_personas() if caller.sees(revision.name)}
    personas = [persona for persona in serving.registry.personas(tag) if persona.name in visible]
    return PersonaList(data=[PersonaObject(**_describe_persona(serving, caller, persona)) for persona in personas])


@router.post("/compose", response_model=PersonaDetails, status_code=201)
def compose_masks(request: Composition, serving: Served, expected: Precondition, caller: Managing) -> Response:
    """Make a persona from others, by the algebra of what they prune. Only personas on the key's list are known."""
    registry, aliases = serving.registry, serving.registry.aliases()
    caller.check_managed(request.name, aliases, "name")
    known = [*(revision.name for revision in registry.names()), *aliases]

    def load(reference: str) -> Mask:
        return open_served(registry, caller.check_managed(reference, aliases, "expression"))

    mask = compose(request.expression, list(filter(caller.sees, known)), load, request.name, request.force)
    revision = registry.publish(request.name, serving.store.add(mask), expected, mask.info)
    return _show(serving, caller, revision.name, status=201)


@router.get("/{name}", response_model=PersonaDetails)
def show_persona(name: str, serving: Served, caller: Chatting) -> Response:
    """Everything about a persona: revision, history, how it was built, certificate, size, residency."""
    caller.check_persona(name, "name")
    return _show(serving, caller, name)


@router.patch("/{name}", response_model=PersonaDetails)
def change_persona(name: str, request: Change, serving: Served, caller: Managing) -> Response:
    """Set the default gamma, the notes, the tags."""
    registry = serving.registry
    name = caller.check_managed(name, registry.aliases(), "name")
    gamma = request.gamma if "gamma" in request.model_fields_set else ANY
    tags = request.tags
    registry.change(name, gamma=gamma, notes=request.notes, tags=None if tags is None else lambda _: tags)
    return _show(serving, caller, name)


@router.delete("/{name}")
def delete_persona(name: str, serving: Served, expected: Precondition, caller: Managing) -> Deleted:
    """Delete a persona with its history and aliases, or only an alias."""
    caller.check_persona(name, "name")  # an alias is not resolved: the persona behind it stays
    serving.registry.remove(name, expected)
    return Deleted(id=name, object="persona")


@router.get("/{name}/diff/{other}")
def compare(name: str, other: str, serving: Served, caller: Building) -> PersonaDiff:
    """Jaccard and differing share of two personas: in total, in attention and MLP, and for each layer and Linear."""
    aliases = serving.registry.aliases()
    references = caller.check_managed(name, aliases, "name"), caller.check_managed(other, aliases, "other")
    a, b = (serving.store.open(serving.registry.resolve(reference).digest) for reference in references)
    return PersonaDiff.model_validate(diff(a, b).to_json())


@router.post("/{name}/rename", response_model=PersonaDetails)
def rename(name: str, request: Renaming, serving: Served, expected: Precondition, caller: Managing) -> Response:
    """Rename a persona, with its history, aliases and tags."""
    aliases = serving.registry.aliases()
    name = caller.check_managed(name, aliases, "name")
    caller.check_managed(request.name, aliases, "name")
    return _show(serving, caller, serving.registry.rename(name, request.name, expected).name)


@router.post("/{name}/rollback", response_model=PersonaDetails)
def roll_back(
    name: str, serving: Served, expected: Precondition, caller: Managing, request: Rollback = _TO_PREVIOUS
) -> Response:
    """Make an older revision current again; without a body, the one before the current."""
    name = caller.check_managed(name, serving.registry.aliases(), "name")
    return _show(serving, caller, serving.registry.rollback(name, request.to, expected).name)


@router.put("/{name}/pin", response_model=PersonaDetails)
def pin(name: str, serving: Served, caller: Managing) -> Response:
    """Keep the mask of a revision (`name` or `name@digest`), even if its name is deleted."""
    revision = serving.registry.resolve(caller.check_managed(name, serving.registry.aliases(), "name"))
    serving.registry.pin(revision.digest)
    return _show(serving, caller, revision.name)


@router.delete("/{name}/pin", response_model=PersonaDetails)
def unpin(name: str, serving: Served, caller: Managing) -> Response:
    """Unpin a mask."""
    revision = serving.registry.resolve(caller.check_managed(name, serving.registry.aliases(), "name"))
    serving.registry.unpin(revision.digest)
    return _show(serving, caller, revision.name)


@router.get(
    "/{name}/content",
    response_class=Download,
    responses=downloads.describe("(a .safetensors file)", "The mask; the `ETag` begins with its digest."),
)
def export(name: str, serving: Served, caller: Managing) -> Response:
    """The mask as a file: `name`, or `name@digest` for an older revision. Unless it is signed, the file has the name,
    the gamma and the phase at which the persona is served.
    """
    revision = serving.registry.resolve(caller.check_managed(name, serving.registry.aliases(), "name"))
    kept = serving.store.summary(revision.digest)
    served = serving.registry.served_info(revision, kept.info)
    path, download, tag = serving.store.locate(revision.digest), Download, revision.digest
    if kept.signature is None and served != kept.info:  # personas with equal masks share the file
        path, download = serving.store.draft_path(), TemporaryDownload
        export_mask(serving.store, revision.digest, path, info=served)
        tag += f"-{hashlib.sha256(repr(served).encode()).hexdigest()[:16]}"  # other bytes, so another part of none
    return download(
        path,
        media_type="application/octet-stream",
        filename=f"{revision.name}.safetensors",
        headers={"ETag": f'"{tag}"'},
    )


@router.put("/{name}/content", response_model=PersonaDetails, status_code=201, openapi_extra=_BODY)
async def import_content(
    name: str, http: Request, serving: Served, expected: Precondition, caller: Managing
) -> Response:
    """Publish the mask file in the body under a name. It is verified in full before anything changes."""
    caller.check_managed(name, await asyncio.to_thread(serving.registry.aliases), "name")
    upload = serving.store.quarantine() / f"upload-{secrets.token_hex(8)}"
    try:
        await _receive(http.stream(), upload, serving.largest_mask + HEADER_BYTES)
        throttle: Throttle = http.app.state.imports
        async with throttle.turn():
            return await asyncio.to_thread(_publish, serving, caller, name, upload, expected)
    finally:
        upload.unlink(missing_ok=True)


@aliases.put("/{alias}", response_model=PersonaDetails)
def set_alias(alias: str, request: AliasTarget, serving: Served, caller: Managing) -> Response:
    """Make a name an alias of a persona: it refers to the current revision."""
    caller.check_persona(alias, "alias")
    name = caller.check_managed(request.persona, serving.registry.aliases(), "persona")
    serving.registry.alias(alias, name)
    return _show(serving, caller, name)


async def _receive(body: AsyncIterator[bytes], path: Path, limit: int) -> None:
    """Stream a body to a file. Raises `InvalidMask` for a body larger than any mask of the base."""
    received = 0
    with path.open("xb") as file:
        async for chunk in body:
            received += len(chunk)
            if received > limit:
                raise InvalidMask(f"the body is larger than {limit} bytes, which is more than any mask of this base")
            await asyncio.to_thread(file.write, chunk)


def _publish(serving: Serving, caller: Caller, name: str, upload: Path, expected: str | Anything | None) -> Response:
    try:
        mask = import_mask(serving.store, upload, serving.base.fingerprint)
        serving.residency.prefetch(mask.digest)
    except (MaskCorrupt, MaskMismatch, SignatureError, UnknownVersion) as error:
        raise InvalidMask(f"the body is not a mask for this base: {error.message}") from error
    info = None if mask.signature else read_info(upload)  # a signed copy in the store says more than an upload
    revision = serving.registry.publish(name, mask.digest, expected, info)
    return _show(serving, caller, revision.name, status=201)


def _show(serving: Serving, caller: Caller, name: str, status: int = 200) -> Response:
    persona = serving.registry.describe(name.partition("@")[0])
    history = serving.registry.history(persona.name)
    summary = serving.store.summary(persona.current.digest)
    quantization = serving.base.quantization
    certificate = serving.registry.certificate(persona.current, summary.info, quantization)
    signature = examine(summary, serving.store.keys.trusted())
    info = asdict(summary.info)
    _hide(caller, info)
    details = _describe_persona(serving, caller, persona) | {
        "notes": persona.notes,
        "history": [_describe_revision(revision) for revision in history],
        "built": {
            key: info[key] for key in ("score", "parameters", "calibration", "created_at", "opposite", "ancestry")
        },
        "certificate": dict(certificate.figures),
        "certificate_source": certificate.source,
        "measurement": certificate.measurement and _describe_measurement(certificate.measurement),
        "signature": signature and asdict(signature),
    }
    content = PersonaDetails(**details).model_dump()
    return JSONResponse(content, status_code=status, headers={"ETag": f'"{persona.current.digest}"'})


def _describe_measurement(measurement: Measurement) -> dict[str, Any]:
    return {key: getattr(measurement, key) for key in ("measured_at", "gamma", "phase", "data", "quantization")}


def _hide(caller: Caller, info: dict[str, Any]) -> None:
    """Remove the names of personas that are not on the key's list."""
    if not caller.sees(info["opposite"] or ""):
        info["opposite"] = None
    if not all(map(caller.sees, info["ancestry"].get("parents", {}).values())):
        info["ancestry"] = {}


def _describe_persona(serving: Serving, caller: Caller, persona: Persona) -> dict[str, Any]:
    summary = serving.store.summary(persona.current.digest)
    gamma, phase = persona.current.defaults(summary.info)
    warning = serving.find_warning(persona.current)
    return {
        "id": persona.name,
        "object": "persona",
        "model": f"{serving.base.name}:{persona.name}",
        **_describe_revision(persona.current),
        "gamma": gamma if persona.gamma is None else persona.gamma,
        "phase": phase,
        "aliases": list(filter(caller.sees, persona.aliases)),
        "tags": list(persona.tags),
        "pinned": persona.pinned,
        "bytes": summary.nbytes,
        "resident": persona.current.digest in serving.residency,
        "requests": serving.request_counts.of(persona.current.digest),
        "served": warning is None or serving.accept_uncertified,
        "warning": warning,
    }


def _describe_revision(revision: Revision) -> dict[str, Any]:
    return {"generation": revision.digest, "number": revision.number, "created_at": revision.created_at}
