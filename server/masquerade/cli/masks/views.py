"""Views of masks: `ls`, `show`, `verify`, `diff`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from maskstore import Mask, MaskError, Registry, SignatureError, diff, plot, read_mask, signing
from maskstore import Persona as PersonaRecord
from masquerade.cli.masks.common import CommandResult, Persona, identify, open_registry, summarise, tabulate
from masquerade.cli.options import AsJson, Model, StoreFolder, say
from masquerade.sources import find_model


def list_masks(
    registry: Registry, tag: Annotated[str | None, typer.Option(help="Only personas with this tag.")] = None
) -> CommandResult:
    """List the personas of a store; a mask whose file cannot be read is listed with the reason, `damaged`."""
    rows = [_list_row(registry, persona) for persona in registry.personas(tag)]
    table = Table(Column("persona", no_wrap=True), "gen.", "digest", "base", "score", "bytes", "aliases", "tags")
    for row in rows:
        if row["damaged"]:
            print(f"{row['persona']} is damaged: {row['damaged']}; `masquerade masks fsck` checks it", file=sys.stderr)
            described = "damaged", "", ""
        else:
            described = row["base"]["name"], row["score"], str(row["bytes"])
        table.add_row(
            row["persona"],
            str(row["generation"]),
            row["digest"][:8],
            *described,
            " ".join(row["aliases"]),
            " ".join(row["tags"]),
        )
    return {"personas": rows}, table


def _list_row(registry: Registry, persona: PersonaRecord) -> dict[str, Any]:
    """A persona as JSON; `damaged` is null, or why its mask cannot be read."""
    named = identify(persona.current) | {"aliases": persona.aliases, "tags": persona.tags, "pinned": persona.pinned}
    digest = persona.current.digest
    try:
        with registry.store.reader(digest) as mask:
            nbytes = registry.store.locate(digest).stat().st_size
            return summarise(mask) | named | {"bytes": nbytes, "damaged": None}
    except (MaskError, OSError) as error:
        return named | {"damaged": str(error)}


def show_mask(persona: Persona, model: Model = "demo", store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Show the metadata of a persona's mask, its history, and the curve of its certificate as a table.

    `measurements` has all that was measured here, for each quantisation of the base, gamma and phase.
    """
    registry = open_registry(model, store)
    revision = registry.resolve(persona)
    mask = registry.store.open(revision.digest)
    known = registry.describe(revision.name)
    certificate = registry.certificate(revision, mask.info, mask.info.quantization)
    info = asdict(registry.served_info(revision, mask.info)) | {
        "certificate": dict(certificate.figures),
        "certificate_source": certificate.source,
        "measurement": certificate.measurement and asdict(certificate.measurement),
        "measurements": [asdict(one) for one in registry.measurements(mask.digest)],
    }
    details = (
        _measure(mask, registry.store.keys.trusted()) | info | identify(revision) | {"made_at": info["created_at"]}
    )
    details |= {"aliases": known.aliases, "tags": known.tags, "notes": known.notes, "default_gamma": known.gamma}
    details["history"] = [identify(past) for past in registry.history(revision.name)]
    if as_json:
        print(json.dumps(details))
    else:
        Console().print_json(json.dumps(details))
        if curve := certificate.figures.get("curve"):
            Console().print(tabulate(curve))


def verify_mask(
    file: Annotated[Path, typer.Argument(help="A .safetensors mask file.")],
    model: Annotated[str | None, typer.Option(help="Also check that the mask belongs to this base.")] = None,
    as_json: AsJson = False,
) -> None:
    """Verify a mask file and its signature; exit status 1 if it is damaged."""
    mask = read_mask(file, base=find_model(model).fingerprint() if model else None)
    signature = signing.examine(mask, {})
    if signature and signature.valid is False:
        raise SignatureError(f"the signature by {signature.key} does not fit", path=file)
    text = f"{file}: good; {mask.info.persona}, {mask.pruned} pruned in {len(mask.targets)} Linears, {mask.digest}"
    say(as_json, _measure(mask), f"{text}; {_describe_signature(signature)}")


def compare_masks(
    registry: Registry,
    a: Annotated[str, typer.Argument(help="A persona, or a .safetensors file.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    picture: Annotated[Path | None, typer.Option("--plot", help="Also write a heat map as PNG.")] = None,
) -> CommandResult:
    """Compare two masks: Jaccard index and differing share, in total, per part and per layer."""
    difference = diff(*(_find(registry, one) for one in (a, b)))
    if picture:
        plot(difference, picture)
    return difference.to_json(), difference.text()


def _find(registry: Registry, name: str) -> Mask:
    path = Path(name)
    return read_mask(path) if path.suffix == ".safetensors" else registry.store.open(registry.resolve(name).digest)


def _measure(mask: Mask, trusted: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    sizes = {"targets": len(mask.targets), "pruned": mask.pruned, "density": mask.density, "bytes": mask.nbytes}
    signature = signing.examine(mask, trusted)
    return summarise(mask) | sizes | {"signature": signature and asdict(signature)}


def _describe_signature(signature: signing.Signature | None) -> str:
    if signature is None:
        return "not signed"
    covers = {"everything": "tensors and metadata", "tensors": "tensors only"}[signature.covers]
    return f"signed by {signature.key[:16]}: {covers}" + ("" if signature.valid else ", not checked")
