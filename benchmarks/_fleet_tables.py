"""The tables of a page about fleets, from the JSON object that `benchmarks.fleet` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks._fleet import ROUTINGS
from benchmarks._fleet_constants import VARIATIONS, make_settings

REPLICAS = (4, 16, 64)
MIDDLE = 16  # replicas of the tables that do not vary them
OFF, ON = "least load", "affinity"
EMPTY, HOMES = "empty", "at homes"
STARTS = ((EMPTY, 16), (HOMES, 16), (HOMES, 64))  # and replicas, of the table of routers
LATE = 2.0  # seconds; if half of the requests wait longer for the first token, it is an overload
WAYS = ("masks", "prompts", "LoRAs", "models")
PERCENTILES = (50, 95, 99)
_PARTS = ("hits", "first token", "answer")
_SHORT = ("hits", "first token p50 / p95 / p99, s", "answer p50 / p95 / p99, s")
_HEADS = tuple(f"{part}, {routing}" for part in _SHORT for routing in (OFF, ON))


def label(key: str, way: str, replicas: int, routing: str) -> str:
    """The name of a run in the names of its figures."""
    return f"{key}, {way}, {replicas} replicas, {routing}"


def make_tables(found: Mapping[str, Any]) -> dict[str, str]:
    """The tables of a page in Markdown, by the names of their markers, from the JSON object of a full run."""
    value = {figure["name"]: figure["value"] for figure in found["figures"]}
    tables = {"constants": _table(("constant", "value", "", "source"), _list_constants(found["constants"]))}
    for key in make_settings():
        cells = [
            (
                str(replicas),
                way,
                *(_cell(value, label(key, way, replicas, routing), part) for part in _PARTS for routing in (OFF, ON)),
            )
            for replicas in REPLICAS
            for way in WAYS
        ]
        tables[key] = _table(("replicas", "personas as", *_HEADS), cells)
        prices = [(way, *_price(value, key, way)) for way in WAYS]
        always = _round(value[f"{key}, a model for each persona, always on, the load of {MIDDLE} replicas: cost"])
        prices.append(("a replica for each persona, always on, at the load of the table above", "", "", always, always))
        heads = (
            "personas as",
            *(f"{what}, {routing}" for what in ("requests/s a replica", "$ a million tokens") for routing in (OFF, ON)),
        )
        tables[f"{key}-cost"] = _table(heads, prices)
    routers = [
        (
            start,
            str(replicas),
            routing,
            *(_cell(value, label(start, "masks", replicas, routing), part) for part in _PARTS),
        )
        for start, replicas in STARTS
        for routing in ROUTINGS
    ]
    tables["routers"] = _table(("start", "replicas", "router", *_SHORT), routers)
    tables["varied"] = _table(
        ("varied", *(f"{way}: {what}" for way in WAYS[:3] for what in ("hits", "p99, s", "$")), "models: $"),
        [(title, *_varied(value, title)) for title in VARIATIONS],
    )
    return tables


def _cell(value: Mapping[str, float], name: str, part: str) -> str:
    if part == "hits":
        return f"{value[f'{name}: hits']:.2f}"
    if value[f"{name}: first token, 50th percentile"] > LATE:
        return "overload"
    return " / ".join(_round(value[f"{name}: {part}, {percentile}th percentile"]) for percentile in PERCENTILES)


def _price(value: Mapping[str, float], key: str, way: str) -> Iterator[str]:
    rates = [value[f"{label(key, way, MIDDLE, routing)}: capacity"] for routing in (OFF, ON)]
    costs = [value[f"{label(key, way, MIDDLE, routing)}: cost"] for routing in (OFF, ON)]
    yield from (_round(rate) if rate else "none within 2 s" for rate in rates)
    yield from (_round(cost) if rate else f"at least {_round(cost)}" for rate, cost in zip(rates, costs, strict=True))


def _varied(value: Mapping[str, float], title: str) -> Iterator[str]:
    for way in WAYS[:3]:
        name = f"varied, {title}, {way}"
        yield from (
            f"{value[f'{name}: hits']:.2f}",
            _round(value[f"{name}: first token, 99th percentile"]),
            _round(value[f"{name}: cost"]),
        )
    yield _round(value[f"varied, {title}, models: cost"])


def _list_constants(constants: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for name, one in constants.items():
        yield name, f"{one['value']:.6g}", one["unit"], f"{one['kind']}: {one['source']}"


def _round(number: float) -> str:
    """Three digits."""
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:.0f}"


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def record(page: Path, tables: Mapping[str, str]) -> None:
    """Put each table between its markers, in place of what was there."""
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        before, begin, rest = text.partition(f"<!-- fleet: {name} -->")
        _, end, after = rest.partition("<!-- end of the table -->")
        assert begin, f"{page} has no marker of {name}"
        assert end, f"{page} has no end of {name}"
        text = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    page.write_text(text, encoding="utf-8")
