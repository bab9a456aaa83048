"""What the commands for masks share: opening the registry and printing a result."""

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

Persona = Annotated[str, typer.Argument(help="A persona, an alias, or name@digest for an older revision.")]
Expected = Annotated[
    str | None, typer.Option("--expect", help="Fail unless this digest is current; `none`: unless the name is new.")
]


def open_registry(
    model: str, store: Path | None, *, require_signed: bool = False, accept_tensors: bool = False
) -> Registry:
    """The registry of a store, by default the model's."""
    files = find_model(model)
    return open_store(
        store, files.name, files.fingerprint(), require_signed=require_signed, accept_tensors=accept_tensors
    )[1]


def say(as_json: bool, result: Mapping[str, Any], text: str | Table) -> None:
    """Print one JSON object, or a text or table."""
    if as_json:
        print(json.dumps(result))
    elif isinstance(text, str):
        print(text)
    else:
        Console().print(text)


def summarise(mask: Mask | MaskReader) -> dict[str, Any]:
    """The main fields of a mask, as JSON."""
    return {
        "persona": mask.info.persona,
        "digest": mask.digest,
        "base": {"name": mask.base.name, "fingerprint": mask.base.fingerprint},
        "score": mask.info.score,
    }


def identify(revision: Revision) -> dict[str, Any]:
    """A revision as JSON."""
    return {
        "persona": revision.name,
        "digest": revision.digest,
        "generation": revision.number,
        "created_at": revision.created_at,
    }
