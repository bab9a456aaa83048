"""`masquerade masks`: inspect, transfer and name masks. Only `certify` and `export --as` import torch."""

from __future__ import annotations

from collections.abc import Callable

import typer

from masquerade.cli.masks import certificates, files, names, upkeep, views
from masquerade.cli.masks.common import on_registry

app = typer.Typer(help="Inspect, transfer, name and maintain masks.", no_args_is_help=True)
_COMMANDS: dict[str, Callable[..., None]] = {
    "ls": on_registry(views.list_masks),
    "show": views.show_mask,
    "verify": views.verify_mask,
    "diff": on_registry(views.compare_masks),
    "certify": certificates.certify,
    "compose": on_registry(files.compose_mask),
    "export": files.write_file,
    "import": files.read_file,
    "set": on_registry(names.set_defaults),
    "rename": on_registry(names.rename),
    "alias": on_registry(names.alias),
    "rollback": on_registry(names.roll_back),
    "pin": on_registry(names.pin),
    "unpin": on_registry(names.unpin),
    "rm": on_registry(names.remove),
    "trim": on_registry(names.trim),
    "gc": on_registry(upkeep.collect),
    "fsck": upkeep.check,
    "keygen": upkeep.make_key,
    "sign": on_registry(upkeep.sign_mask),
    "trust": on_registry(upkeep.trust, creates=True),
    "distrust": on_registry(upkeep.distrust),
}
for command, run in _COMMANDS.items():
    app.command(command)(run)
