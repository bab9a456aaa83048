"""Maintenance of a store and signatures: `gc`, `fsck`, `keygen`, `sign`, `trust`, `distrust`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from maskstore import fsck, gc, signing
from maskstore.upkeep import GRACE
from masquerade.cli.masks.common import Persona, identify, open_registry, say
from masquerade.cli.options import AsJson, Model, StoreFolder

KeyFile = Annotated[Path, typer.Option("--key", help="File of the private key.")]


def collect(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed.")] = False,
    grace: Annotated[float, typer.Option(help="Minimum age of a removed mask, in seconds.")] = GRACE,
    model: Model = "demo",
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Remove masks that no name, alias, pin or history refers to."""
    done = gc(open_registry(model, store).store.root, dry=dry_run, grace=grace)
    verb = "would be removed" if done.dry else "are removed"
    text = f"{len(done.digests)} masks and {len(done.leftovers)} leftovers {verb}, {done.nbytes} bytes"
    say(as_json, asdict(done), text)


def check(
    repair: Annotated[bool, typer.Option("--repair", help="Move damaged files aside, rebuild the rest.")] = False,
    model: Model = "demo",
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Verify every mask and every reference of a store; exit status 1 if damage remains unrepaired."""
    found = fsck(open_registry(model, store).store.root if store is None else store, repair=repair)
    table = Table("damage", "what", "message", "done about it")
    for finding in found.findings:
        table.add_row(finding.kind, finding.subject, finding.message, finding.action or "-")
    say(as_json, asdict(found) | {"clean": found.clean}, f"{found.masks} masks, clean" if found.clean else table)
    if not all(finding.action for finding in found.findings):
        raise typer.Exit(1)


def make_key(
    file: Annotated[Path, typer.Argument(help="Path of the private key, created readable for its owner only.")],
    as_json: AsJson = False,
) -> None:
    """Create an ed25519 key for signing masks, and print the public key."""
    private, public = signing.generate()
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as out:
        out.write(f"{private}\n")
    say(as_json, {"public": public, "file": str(file)}, public)


def sign_mask(
    persona: Persona, key: KeyFile, model: Model = "demo", store: StoreFolder = None, as_json: AsJson = False
) -> None:
    """Sign a persona's mask: base, tensors and metadata."""
    registry = open_registry(model, store)
    revision = registry.resolve(persona)
    registry.store.replace(signing.sign(registry.store.open(revision.digest), key.read_text().strip()))
    say(as_json, identify(revision), f"{revision.digest[:8]} is signed")


def trust(
    label: Annotated[str, typer.Argument(help="Label of the key.")],
    public: Annotated[str, typer.Argument(help="The public key, 64 hex digits.")],
    model: Model = "demo",
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Trust a key: with --require-signed, only masks signed by a trusted key are served and imported."""
    keys = open_registry(model, store).store.keys
    keys.trust(public, label)
    say(as_json, {"trusted": keys.trusted()}, f"{label} is trusted")


def distrust(label: str, model: Model = "demo", store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Remove a trusted key."""
    keys = open_registry(model, store).store.keys
    keys.distrust(label)
    say(as_json, {"trusted": keys.trusted()}, f"{label} is not trusted any more")
