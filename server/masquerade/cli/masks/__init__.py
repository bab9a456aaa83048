"""`masquerade masks`: inspect, transfer and name masks. Only `certify` imports torch."""

from __future__ import annotations

from collections.abc import Callable

import typer

from masquerade.cli.masks import certificates, files, names, upkeep, views

app = typer.Typer(help="Inspect, transfer, name and maintain masks.", no_args_is_help=True)
_COMMANDS: dict[str, Callable[..., None]] = {
    "ls": views.list_masks,
    "show": views.show_mask,
    "verify": views.verify_mask,
    "diff": views.compare_masks,
    "certify": certificates.certify,
    "compose": files.compose_mask,
    "export": files.write_file,
    "import": files.read_file,
    "set": names.set_defaults,
    "rename": names.rename,
    "alias": names.alias,
    "rollback": names.roll_back,
    "pin": names.pin,
    "unpin": names.unpin,
    "rm": names.remove,
    "trim": names.trim,
    "gc": upkeep.collect,
    "fsck": upkeep.check,
    "keygen": upkeep.make_key,
    "sign": upkeep.sign_mask,
    "trust": upkeep.trust,
    "distrust": upkeep.distrust,
}
for command, run in _COMMANDS.items():
    app.command(command)(run)
