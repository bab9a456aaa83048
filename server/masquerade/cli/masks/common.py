"""What the commands for masks share: the registry, options, records as JSON, and a certificate's curve as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from maskstore import Mask, MaskReader, Registry, Revision
from masquerade.cli.options import AsJson, Model, StoreFolder, say
from masquerade.cli.stores import open_store
from masquerade.sources import find_model

CommandResult = tuple[Mapping[str, Any], str | Table]  # the result of a command: as JSON, and for people
Persona = Annotated[str, typer.Argument(help="A persona, an alias, or name@digest for an older revision.")]
Expected = Annotated[
    str | None, typer.Option("--expect", help="Fail unless this digest is current; `none`: unless the name is new.")
]


def open_registry(
    model: str,
    store: Path | None,
    *,
    creates: bool = False,
    require_signed: bool = False,
    accept_tensors: bool = False,
) -> Registry:
    """The registry of a store, by default the model's; for `creates` see `open_store`."""
    files = find_model(model)
    return open_store(
        store,
        files.name,
        files.fingerprint(),
        creates=creates,
        require_signed=require_signed,
        accept_tensors=accept_tensors,
    )[1]


def on_registry(function: Callable[..., CommandResult], *, creates: bool = False) -> Callable[..., None]:
    """A command that calls a function with the registry of a store, and prints what it returns.

    `creates` is that of `open_store`. Its options are the function's parameters after the registry, then `--model`,
    `--store` and `--json`.
    """

    def run(model: Model = "demo", store: StoreFolder = None, as_json: AsJson = False, **given: Any) -> None:
        say(as_json, *function(open_registry(model, store, creates=creates), **given))

    _, *own = signature(function, eval_str=True).parameters.values()
    *shared, _ = signature(run, eval_str=True).parameters.values()
    run.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]  # typer reads the options from it
    run.__doc__ = function.__doc__
    return run


def summarise(mask: Mask | MaskReader) -> dict[str, Any]:
    """The main fields of a mask, as JSON."""
    return {
        "persona": mask.info.persona,
        "digest": mask.digest,
        "base": {"name": mask.base.name, "fingerprint": mask.base.fingerprint},
        "score": mask.info.score,
    }


_COLUMNS = {  # heads and formats of a curve's figures
    "margin_shift_median": ("median shift", "{:+.3f}"),
    "neutral_ratio": ("neutral", "x{:.3f}"),
    "own_ratio": ("own", "x{:.3f}"),
    "facts_kept": ("facts kept", "{:.0%}"),
}


def tabulate(curve: Sequence[Mapping[str, Any]]) -> Table:
    """A certificate's curve, a row for each gamma, with the figures that were measured at any."""
    shown = {name: how for name, how in _COLUMNS.items() if any(point.get(name) is not None for point in curve)}
    table = Table("gamma", *(Column(head, justify="right") for head, _ in shown.values()))
    for point in curve:
        values = ((point.get(name), form) for name, (_, form) in shown.items())
        table.add_row(f"{point['gamma']:g}", *("-" if value is None else form.format(value) for value, form in values))
    return table


def identify(revision: Revision) -> dict[str, Any]:
    """A revision as JSON."""
    return {
        "persona": revision.name,
        "digest": revision.digest,
        "generation": revision.number,
        "created_at": revision.created_at,
    }
