"""Maintenance of a store and signatures: `gc`, `fsck`, `keygen`, `sign`, `trust`, `distrust`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from maskstore import InvalidName, Registry, fsck, gc, signing
from maskstore.mirror import find_url
from maskstore.upkeep import GRACE
from masquerade.cli.masks.common import CommandResult, Persona, identify, open_registry
from masquerade.cli.options import AsJson, Model, StoreFolder, say
from masquerade.errors import InvalidValue
from masquerade.plan.memory import format_bytes
from masquerade.service import kept_builds

DAY = 86_400.0


def collect(
    registry: Registry,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed.")] = False,
    grace: Annotated[float, typer.Option(help="Minimum age of a removed mask, in seconds.")] = GRACE,
    build_days: Annotated[
        float, typer.Option(help="Minimum age of what a removed build keeps, in days since its last change.")
    ] = kept_builds.DAYS,
) -> CommandResult:
    """Remove masks that no name, alias, pin or history refers to, and what old builds keep that did not succeed."""
    done = gc(registry.store.root, dry=dry_run, grace=grace)
    verb = "would be removed" if done.dry else "are removed"
    text = [f"{len(done.digests)} masks and {len(done.leftovers)} leftovers {verb}, {done.nbytes} bytes"]
    builds = []
    for kept in kept_builds.list_kept_builds(registry.store.root):
        old = kept.age >= build_days * DAY
        removed = old and (dry_run or kept_builds.delete(kept.folder))
        name = kept.folder.relative_to(registry.store.root).as_posix()
        fate = ("would be removed" if dry_run else "is removed") if removed else "is in use" if old else "is kept"
        text.append(f"{name}, {format_bytes(kept.nbytes)}, {kept.age / DAY:.1f} days old, {fate}")
        builds.append({"folder": name, "nbytes": kept.nbytes, "age": round(kept.age), "removed": removed})
    return asdict(done) | {"builds": builds}, "\n".join(text)


def check(
    repair: Annotated[bool, typer.Option("--repair", help="Move damaged files aside, rebuild the rest.")] = False,
    model: Model = "demo",
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Verify every mask and every reference of a store; exit status 1 if damage remains unrepaired."""
    if store is not None and not store.exists() and find_url(store) is None:
        raise InvalidValue(f"there is no store in {store}")
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
    registry: Registry,
    persona: Persona,
    key: Annotated[Path, typer.Option("--key", help="File of the private key.")],
) -> CommandResult:
    """Sign a persona's mask: base, tensors and metadata."""
    revision = registry.resolve(persona)
    mask, private = registry.store.open(revision.digest), key.read_bytes().decode(errors="replace").strip()
    try:
        signed = signing.sign(mask, private)
    except InvalidName as error:
        raise InvalidValue(f"{key}: {error}") from None
    registry.store.replace(signed)
    return identify(revision), f"{revision.digest[:8]} is signed"


def trust(
    registry: Registry,
    label: Annotated[str, typer.Argument(help="Label of the key.")],
    public: Annotated[str, typer.Argument(help="The public key, 64 hex digits.")],
) -> CommandResult:
    """Trust a key: with --require-signed, only masks signed by a trusted key are served and imported."""
    registry.store.keys.trust(public, label)
    return {"trusted": registry.store.keys.trusted()}, f"{label} is trusted"


def distrust(registry: Registry, label: str) -> CommandResult:
    """Remove a trusted key."""
    registry.store.keys.distrust(label)
    return {"trusted": registry.store.keys.trusted()}, f"{label} is not trusted any more"
