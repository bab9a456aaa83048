"""`masks certify`: measure an existing mask."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from maskstore import Mask, Measurement, Registry, Revision
from maskstore.mask import Phase, now
from masquerade.cli.masks.common import Persona, identify, tabulate
from masquerade.cli.options import AsJson, Device, Dtype, Model, Quantization, StoreFolder
from masquerade.cli.progress import follow, follow_loading
from masquerade.cli.stores import open_opposite, open_store

if TYPE_CHECKING:
    from masquerade.pruning.measurement import ServedMask


def certify(
    persona: Persona,
    data: Annotated[Path, typer.Option(help="Held-out JSONL of the persona's answers.")],
    contrast: Annotated[
        Path | None,
        typer.Option(help="The opposite's answers to the same prompts; by default --data, if it has both sides."),
    ] = None,
    neutral: Annotated[
        Path | None, typer.Option(help="JSONL that the persona should not change; by default the base generates it.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the intervals.")] = 0,
    model: Model = "demo",
    store: StoreFolder = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    as_json: AsJson = False,
) -> None:
    """Measure a persona's certificate on this machine, and store it beside the unchanged mask file.

    With --quantization it holds for a base that is quantised so, and is kept beside that of the unquantised base.
    """
    from masquerade.evaluate.dataset import holds_both_sides, read_examples
    from masquerade.model import MaskManager, load
    from masquerade.pruning.measurement import HeldOutExamples, measure

    if contrast is None and holds_both_sides(data):
        contrast = data
    held = HeldOutExamples(
        read_examples(data),
        read_examples(contrast, "contrast") if contrast else (),
        read_examples(neutral) if neutral else (),
    )
    with follow_loading() as progress:
        base = load(model, device=device, dtype=dtype, quantization=quantization, report=progress)
    _, registry = open_store(store, base.name, base.fingerprint, creates=False)
    revision = registry.resolve(persona)
    mask = registry.store.open(revision.digest, base=base.fingerprint)
    served, phase = _serve(registry, revision, mask)
    manager = MaskManager.attach(base.model)
    found = open_opposite(registry, mask)
    opposite = _serve(registry, *found)[0] if found else None
    certificate, measured_on = follow(measure(base, manager, served, phase, held, opposite, seed))
    measurement = Measurement(revision.digest, certificate, served.gamma, phase, measured_on, now(), base.quantization)
    registry.record(measurement)
    if as_json:
        print(json.dumps(identify(revision) | asdict(measurement) | {"certificate_source": "measured"}))
    else:
        _print(revision, measurement)


def _serve(registry: Registry, revision: Revision, mask: Mask) -> tuple[ServedMask, Phase]:
    """The mask of a revision with its default gamma, and its default phase."""
    from masquerade.pruning.measurement import ServedMask

    served = registry.served_info(revision, mask.info)
    gamma, phase = served.gamma, served.phase
    return ServedMask(mask, gamma), phase


def _print(revision: Revision, measurement: Measurement) -> None:
    certificate = measurement.certificate
    quantization = measurement.quantization
    table = Table("", f"{revision.name} on {quantization} weights" if quantization else revision.name)
    for name in ("flip", "margin_shift", "margin_shift_median", "own_ratio", "neutral_ratio", "kl", "pairs", "passed"):
        if name in certificate:
            interval = certificate["intervals"].get(name)
            table.add_row(name, f"{certificate[name]}" + (f" {interval}" if interval else ""))
    Console().print(table)
    if curve := certificate.get("curve"):
        Console().print(tabulate(curve))
    for line in (*certificate["reasons"], *certificate["remarks"]):
        print(f"{revision.name}: {line}")
