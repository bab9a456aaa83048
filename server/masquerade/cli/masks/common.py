"""What the commands about masks share: which store, and how a result is printed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from maskstore import Mask, MaskReader, Registry, Revision
from masquerade.cli.stores import open_store
from masquerade.sources import find_model

Persona = Annotated[str, typer.Argument(help="A persona, one of its aliases, or name@digest for an older generation.")]
Expected = Annotated[
    str | None, typer.Option("--expect", help="Fail unless this digest is current now; `none`: the name must be new.")
]


def open_registry(
    model: str, store: Path | None, *, require_signed: bool = False, accept_tensors: bool = False
) -> Registry:
    """The registry of a store, by default of the model's own one."""
    files = find_model(model)
    return open_store(
        store, files.name, files.fingerprint(), require_signed=require_signed, accept_tensors=accept_tensors
    )[1]


def say(as_json: bool, result: Mapping[str, Any], text: str | Table) -> None:
    """Print one JSON object, or what a person wants to read."""
    if as_json:
        print(json.dumps(result))
    elif isinstance(text, str):
        print(text)
    else:
        Console().print(text)


def summarise(mask: Mask | MaskReader) -> dict[str, Any]:
    """What a line about a mask says."""
    return {
        "persona": mask.info.persona,
        "digest": mask.digest,
        "base": {"name": mask.base.name, "fingerprint": mask.base.fingerprint},
        "score": mask.info.score,
    }


def identify(generation: Revision) -> dict[str, Any]:
    """A generation as JSON."""
    return {
        "persona": generation.name,
        "digest": generation.digest,
        "generation": generation.number,
        "created_at": generation.created_at,
    }
