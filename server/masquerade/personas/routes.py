"""`/v1/personas`: what the registry knows, and what may be changed about it.

Knows representations, entity tags and preconditions: the tag of a persona is the digest of its current generation, so
`If-Match` is compare-and-swap. Refuses to know how masks are made and worn. Requests in flight hold their mask; nothing
here disturbs them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, Field

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
    import_mask,
)
from maskstore.signing import examine
from masquerade.errors import InvalidMask, InvalidValue
from masquerade.http import downloads
from masquerade.http.access import Building, Caller, Chatting, Managing, ScopedRoute
from masquerade.http.dependencies import Served
from masquerade.http.downloads import Download
from masquerade.http.throttle import Throttle
from masquerade.http.wire import Deleted, Schema, Text, show
from masquerade.personas.objects import PersonaDetails, PersonaDiff, PersonaList, PersonaObject
from masquerade.service.serving import Serving

router = APIRouter(prefix="/v1/personas", tags=["personas"], route_class=ScopedRoute)
aliases = APIRouter(prefix="/v1/aliases", tags=["personas"], route_class=ScopedRoute)
HEADER_BYTES = 2**24  # allowance for what a mask file says beside its tensors


_MASK = {"schema": {"type": "string", "format": "binary"}}
_BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": _MASK}}}


class Command(Schema):
    """What is to be done; a field that is not known would be left undone, so it is refused."""

    model_config = ConfigDict(extra="forbid")


class Change(Command):
    """What a PATCH may set; fields that are absent stay. A gamma of null leaves the default to the mask."""

    model_config = show({"gamma": 0.2, "notes": "for rainy days", "tags": ["npc"]})

    gamma: Annotated[float, Field(ge=0, le=1)] | None = None
    notes: Text | None = None
    tags: list[Text] | None = None


class Composition(Command):
    """A new generation of `name` from an expression over personas, such as `a | b - c`."""

    model_config = show({"name": "moody", "expression": "gloomy | cheerful"})

    name: Text
    expression: Text
    force: bool = False  # publish even a mask that prunes nothing


class Renaming(Command):
    """The new name."""

    model_config = show({"name": "sombre"})

    name: Text


class Rollback(Command):
    """Number or digest prefix of a generation; by default the one before the current."""

    model_config = show({"to": 1})

    to: int | Text | None = None


class AliasTarget(Command):
    """The persona an alias stands for."""

    model_config = show({"persona": "gloomy"})

    persona: Text


def read_precondition(
    if_match: Annotated[str | None, Header()] = None, if_none_match: Annotated[str | None, Header()] = None
) -> str | Anything | None:
    """What must be current for a change: any digest, none at all (`If-None-Match: *`), or the one of `If-Match`."""
    if if_none_match is not None and if_none_match.strip() != "*":
        raise InvalidValue("If-None-Match must be `*`: the persona must not exist yet", param="If-None-Match")
    if if_none_match is not None:
        return None
    return ANY if if_match in (None, "*") else str(if_match).strip().strip('"')


Expected = Annotated[str | Anything | None, Depends(read_precondition)]


@router.get("")
def list_personas(serving: Served, caller: Chatting, tag: Annotated[str | None, Query()] = None) -> PersonaList:
    """The personas of the served base that the key may use, or those of them that bear a tag."""
    ours = {generation.name for generation in serving.personas() if caller.sees(generation.name)}
    known = [persona for persona in serving.registry.personas(tag) if persona.name in ours]
    return PersonaList(data=[PersonaObject(**_describe(serving, caller, persona)) for persona in known])


@router.post("/compose", response_model=PersonaDetails, status_code=201)
def compose_masks(asked: Composition, serving: Served, expected: Expected, caller: Managing) -> Response:
    """Make a persona of others, by the algebra of what they prune. Others than the key's own are as good as unknown."""
    registry, store, aliases = serving.registry, serving.store, serving.registry.aliases()
    caller.check_managed(asked.name, aliases, "name")
    known = [*(generation.name for generation in registry.names()), *aliases]

    def load(reference: str) -> Mask:
        return store.open(registry.resolve(caller.check_managed(reference, aliases, "expression")).digest)

    mask = compose(asked.expression, list(filter(caller.sees, known)), load, asked.name, asked.force)
    generation = registry.publish(asked.name, store.add(mask), expected)
    return _show(serving, caller, generation.name, status=201)


@router.get("/{name}", response_model=PersonaDetails)
def show_persona(name: str, serving: Served, caller: Chatting) -> Response:
    """Everything that is said about a persona: generation, history, how it was built, certificate, size, residency."""
    caller.check_persona(name, "name")
    return _show(serving, caller, name)


@router.patch("/{name}", response_model=PersonaDetails)
def change_persona(name: str, asked: Change, serving: Served, caller: Managing) -> Response:
    """Set the default gamma, the notes, the tags."""
    registry = serving.registry
    name = caller.check_managed(name, registry.aliases(), "name")
    if "gamma" in asked.model_fields_set:
        registry.set_gamma(name, asked.gamma)
    if asked.notes is not None:
        registry.note(name, asked.notes)
    if asked.tags is not None:
        registry.untag(name, *set(registry.describe(name).tags) - set(asked.tags))
        registry.tag(name, *asked.tags)
    return _show(serving, caller, name)


@router.delete("/{name}")
def delete_persona(name: str, serving: Served, expected: Expected, caller: Managing) -> Deleted:
    """Forget a persona with its history and aliases, or an alias alone."""
    caller.check_persona(name, "name")  # nothing is resolved: of an alias, what it stands for stays
    serving.registry.remove(name, expected)
    return Deleted(id=name, object="persona")


@router.get("/{name}/diff/{other}")
def compare(name: str, other: str, serving: Served, caller: Building) -> PersonaDiff:
    """Jaccard and differing share of two personas, in all, in attention and MLP, and for each layer and Linear."""
    aliases = serving.registry.aliases()
    references = [caller.check_managed(one, aliases, param) for one, param in ((name, "name"), (other, "other"))]
    a, b = (serving.store.open(serving.registry.resolve(one).digest) for one in references)
    return PersonaDiff.model_validate(diff(a, b).to_json())


@router.post("/{name}/rename", response_model=PersonaDetails)
def rename(name: str, asked: Renaming, serving: Served, expected: Expected, caller: Managing) -> Response:
    """Give a persona, with its history, aliases and tags, another name."""
    aliases = serving.registry.aliases()
    name = caller.check_managed(name, aliases, "name")
    caller.check_managed(asked.name, aliases, "name")
    return _show(serving, caller, serving.registry.rename(name, asked.name, expected).name)


@router.post("/{name}/rollback", response_model=PersonaDetails)
def roll_back(name: str, asked: Rollback, serving: Served, expected: Expected, caller: Managing) -> Response:
    """Make an older generation current again."""
    name = caller.check_managed(name, serving.registry.aliases(), "name")
    return _show(serving, caller, serving.registry.rollback(name, asked.to, expected).name)


@router.put("/{name}/pin", response_model=PersonaDetails)
def pin(name: str, serving: Served, caller: Managing) -> Response:
    """Keep the mask of a generation (`name` or `name@digest`) whatever happens to its name."""
    generation = serving.registry.resolve(caller.check_managed(name, serving.registry.aliases(), "name"))
    serving.registry.pin(generation.digest)
    return _show(serving, caller, generation.name)


@router.delete("/{name}/pin", response_model=PersonaDetails)
def unpin(name: str, serving: Served, caller: Managing) -> Response:
    """Let go of a pinned mask."""
    generation = serving.registry.resolve(caller.check_managed(name, serving.registry.aliases(), "name"))
    serving.registry.unpin(generation.digest)
    return _show(serving, caller, generation.name)


@router.get(
    "/{name}/content",
    response_class=Download,
    responses=downloads.describe("(a .safetensors file)", "The mask; its digest is the `ETag`."),
)
def export(name: str, serving: Served, caller: Managing) -> Response:
    """The mask as a file: `name`, or `name@digest` for an older generation."""
    generation = serving.registry.resolve(caller.check_managed(name, serving.registry.aliases(), "name"))
    return Download(
        serving.store.path(generation.digest),
        media_type="application/octet-stream",
        filename=f"{generation.name}.safetensors",
        headers={"ETag": f'"{generation.digest}"'},
    )


@router.put("/{name}/content", response_model=PersonaDetails, status_code=201, openapi_extra=_BODY)
async def import_content(name: str, http: Request, serving: Served, expected: Expected, caller: Managing) -> Response:
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
def set_alias(alias: str, asked: AliasTarget, serving: Served, caller: Managing) -> Response:
    """Let another name mean a persona, whatever is current there."""
    caller.check_persona(alias, "alias")
    name = caller.check_managed(asked.persona, serving.registry.aliases(), "persona")
    serving.registry.alias(alias, name)
    return _show(serving, caller, name)


async def _receive(body: AsyncIterator[bytes], path: Path, limit: int) -> None:
    """Stream a body to a file; more than any mask of the base can take is refused."""
    received = 0
    with path.open("xb") as file:
        async for piece in body:
            received += len(piece)
            if received > limit:
                raise InvalidMask(f"the body is larger than {limit} bytes, which is more than any mask of this base")
            await asyncio.to_thread(file.write, piece)


def _publish(serving: Serving, caller: Caller, name: str, upload: Path, expected: str | Anything | None) -> Response:
    try:
        mask = import_mask(serving.store, upload, serving.base.fingerprint)
        serving.residency.prefetch(mask.digest)
    except (MaskCorrupt, MaskMismatch, SignatureError, UnknownVersion) as error:
        raise InvalidMask(f"the body is no mask that can be worn here: {error.message}") from error
    generation = serving.registry.publish(name, mask.digest, expected)
    return _show(serving, caller, generation.name, status=201)


def _show(serving: Serving, caller: Caller, name: str, status: int = 200) -> Response:
    persona = serving.registry.describe(name.partition("@")[0])
    history = serving.registry.history(persona.name)
    summary = serving.store.summary(persona.current.digest)
    certificate = serving.registry.certificate(persona.current.digest, summary.info)
    signature = examine(summary, serving.store.keys.trusted())
    info = asdict(summary.info)
    _hide(caller, info)
    details = _describe(serving, caller, persona) | {
        "notes": persona.notes,
        "history": [_identify(past) for past in history],
        "built": {
            key: info[key] for key in ("score", "parameters", "calibration", "created_at", "opposite", "ancestry")
        },
        "certificate": dict(certificate.figures),
        "certificate_source": certificate.source,
        "measurement": certificate.measurement and _tell(certificate.measurement),
        "signature": signature and asdict(signature),
    }
    shown = PersonaDetails(**details).model_dump()
    return JSONResponse(shown, status_code=status, headers={"ETag": f'"{persona.current.digest}"'})


def _tell(measurement: Measurement) -> dict[str, Any]:
    told = asdict(measurement)
    return {key: told[key] for key in ("measured_at", "gamma", "phase", "data")}


def _hide(caller: Caller, info: dict[str, Any]) -> None:
    """Leave out names of personas that are not on the key's list."""
    if not caller.sees(info["opposite"] or ""):
        info["opposite"] = None
    if not all(map(caller.sees, info["ancestry"].get("parents", {}).values())):
        info["ancestry"] = {}


def _describe(serving: Serving, caller: Caller, persona: Persona) -> dict[str, Any]:
    summary = serving.store.summary(persona.current.digest)
    usual, phase = persona.current.defaults(summary.info)
    return {
        "id": persona.name,
        "object": "persona",
        "model": f"{serving.base.name}:{persona.name}",
        **_identify(persona.current),
        "gamma": usual if persona.gamma is None else persona.gamma,
        "phase": phase,
        "aliases": list(filter(caller.sees, persona.aliases)),
        "tags": list(persona.tags),
        "pinned": persona.pinned,
        "bytes": summary.nbytes,
        "resident": persona.current.digest in serving.residency,
        "requests": serving.request_counts.of(persona.current.digest),
    }


def _identify(generation: Revision) -> dict[str, Any]:
    return {"generation": generation.digest, "number": generation.number, "created_at": generation.created_at}
