"""`masq personas`: the list of personas, or one of them in full."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.table import Column, Table
from rich.text import Text

from masquerade_client import Certificate, Client, CurvePoint, Persona
from masquerade_client.cli.options import DEFAULT_URL, AsJson, Key, Url, complete_persona, plain


def show(
    name: Annotated[str | None, typer.Argument(help="Show this one in full.", autocompletion=complete_persona)] = None,
    tag: Annotated[str | None, typer.Option(help="Only personas with this tag.")] = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """List the personas of a server, or show one."""
    with Client(url, key) as client:
        if name is not None:
            persona = client.personas.get(name)
            print(json.dumps(asdict(persona))) if as_json else Console().print(describe(persona))
            return
        personas = client.personas.list(tag)
    if as_json:
        print(json.dumps({"personas": [asdict(persona) for persona in personas]}))
        return
    table = Table(Column("persona", no_wrap=True), "generation", "phase", "gamma", "bytes", "requests", "in memory")
    for one in personas:
        cells = (one.generation[:8], one.phase, one.gamma, one.bytes, one.requests, "yes" if one.resident else "no")
        table.add_row(one.name, *map(str, cells))
    Console().print(table)
    for one in personas:
        if one.warning:
            print(f"{one.name} is {'served' if one.served else 'not served'}: {one.warning}", file=sys.stderr)


_FIGURES: dict[str, tuple[str, str]] = {
    "margin_shift": ("shift, nats a token", "{:+.3f}"),
    "margin_shift_median": ("median shift", "{:+.3f}"),
    "flip": ("of prompts flip", "{:.0%}"),
    "neutral_ratio": ("perplexity, neutral text", "x{:.3f}"),
    "own_ratio": ("perplexity, its own text", "x{:.3f}"),
}


def describe(persona: Persona) -> Group:
    """The main figures and parameters of a persona, and its curve over gamma; `--json` has everything."""
    table = Table("", Column(Text(persona.name), overflow="fold"))
    for name, value in _identity(persona) + _provenance(persona) + _measured(persona.certificate):
        table.add_row(name, Text(plain(value)))
    curve = persona.certificate.get("curve")
    return Group(table, tabulate(curve)) if curve else Group(table)


_COLUMNS: dict[str, tuple[str, str]] = {
    "margin_shift_median": ("median shift", "{:+.3f}"),
    "neutral_ratio": ("neutral text", "x{:.3f}"),
    "own_ratio": ("its own text", "x{:.3f}"),
    "facts_kept": ("facts kept", "{:.0%}"),
}


def tabulate(curve: Sequence[CurvePoint]) -> Table:
    """The dose-response curve of a mask, a row for each gamma, with the figures that were measured at any."""
    shown = {name: how for name, how in _COLUMNS.items() if any(point.get(name) is not None for point in curve)}
    table = Table("gamma", *(Column(label, justify="right") for label, _ in shown.values()))
    for point in curve:
        values = ((point.get(name), form) for name, (_, form) in shown.items())
        table.add_row(f"{point['gamma']:g}", *("-" if value is None else form.format(value) for value, form in values))
    return table


def _identity(persona: Persona) -> list[tuple[str, str]]:
    rows = [("generation", f"{persona.generation[:8]} (no. {persona.current.number})"), ("bytes", f"{persona.bytes:,}")]
    rows += [(key, str(persona.built[key])) for key in ("score", "opposite") if persona.built.get(key)]
    rho = persona.built.get("parameters", {}).get("rho")
    return [*rows, *([("rho", str(rho))] if rho else []), ("phase", persona.phase), ("gamma", str(persona.gamma))]


_SOURCES = {"measured": "measured by this server", "claimed": "claimed by its maker, not measured here"}
_COVERS = {"everything": "tensors and metadata", "tensors": "tensors only"}


def _provenance(persona: Persona) -> list[tuple[str, str]]:
    """The source of the certificate, and the signature of the mask."""
    rows = [("certificate", _SOURCES[persona.certificate_source])] if persona.certificate_source in _SOURCES else []
    if persona.certificate.get("passed") is False:
        rows.append(("passed", "no"))
    if persona.warning:
        rows.append(("served" if persona.served else "not served", persona.warning))
    if (signed := persona.signature) is not None:
        fits = {True: "", False: ", does not fit", None: ", not checked"}[signed["valid"]]
        by = signed["label"] or f"an untrusted key, {signed['key'][:16]}"
        rows.append(("signature", f"{_COVERS[signed['covers']]}, by {by}{fits}"))
    return rows


def _measured(certificate: Certificate) -> list[tuple[str, str]]:
    """The figures with their 95 % intervals, the remarks, and the reason of the choice."""
    rows = []
    if preferred := certificate.get("preferred"):
        rows.append(("prefers its answers", f"{preferred['masked']:.0%} (base {preferred['base']:.0%})"))
    for name, (label, form) in _FIGURES.items():
        value = certificate.get(name)
        if isinstance(value, int | float):
            low_high = certificate.get("intervals", {}).get(name, ())
            bounded = None not in low_high  # an end is None where a perplexity has no bound
            interval = f" ({' to '.join(map(form.format, low_high))})" if low_high and bounded else ""
            rows.append((label, form.format(value) + interval))
    if answers := certificate.get("changed_answers"):
        rows.append(("greedy answers it changes", f"{answers['changed']} of {answers['of']}"))
    if (facts := certificate.get("facts")) and facts["kept"] is not None:
        rows.append(("facts kept", f"{facts['kept']:.0%} of {facts['known']} known"))
    if loops := certificate.get("loops"):
        rows.append(("greedy answers that loop", f"{loops['masked']:.0%} (base {loops['base']:.0%}) of {loops['of']}"))
    if verdict := certificate.get("verdict"):
        rows.append(("verdict", str(verdict)))
    rows += [("reasons", str(one)) for one in certificate.get("reasons", ())]
    rows += [("remarks", str(one)) for one in certificate.get("remarks", ())]
    if why := certificate.get("choice", {}).get("why"):
        rows.append(("chosen because it", str(why)))
    return rows
