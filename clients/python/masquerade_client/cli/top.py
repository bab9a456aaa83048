"""`masq top`: the load of the server, as rates between two readings of its metrics."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from masquerade_client import Client
from masquerade_client.cli.options import DEFAULT_URL, AsJson, Key, Url

_SAMPLE = re.compile(r"^(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def top(
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two readings.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one reading and exit.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show throughput, latencies, queue and memory, continuously."""
    with Client(url, key) as client:
        readings = _rates(lambda: parse(client.metrics()), interval)
        if as_json or once or not sys.stdout.isatty():
            first = next(readings)
            print(json.dumps(first)) if as_json else Console().print(_draw(first))
            return
        with suppress(KeyboardInterrupt), Live(console=Console(), screen=True, auto_refresh=False) as live:
            for reading in readings:
                live.update(_draw(reading), refresh=True)


@dataclass(frozen=True)
class Sample:
    """One sample of the metrics."""

    name: str
    labels: Mapping[str, str]
    value: float


def parse(text: str) -> list[Sample]:
    """The samples of Prometheus' text format; comments are ignored."""
    samples = []
    for line in text.splitlines():
        if match := _SAMPLE.match(line):
            labels = dict(_LABEL.findall(match["labels"] or ""))
            samples.append(Sample(match["name"].removeprefix("masquerade_"), labels, float(match["value"])))
    return samples


def _rates(read: Any, interval: float) -> Iterator[dict[str, Any]]:
    """Yield gauges, and rates per second since the previous reading."""
    before, since = read(), time.monotonic()
    while True:
        time.sleep(interval)
        now, at = read(), time.monotonic()
        yield summarise(before, now, at - since)
        before, since = now, at


def summarise(before: list[Sample], now: list[Sample], seconds: float) -> dict[str, Any]:
    """Gauges, rates per second, and mean times in seconds (None without samples)."""

    def sum_of(samples: list[Sample], name: str, **labels: str) -> float:
        return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())

    def rate(name: str, **labels: str) -> float:
        return max(0.0, sum_of(now, name, **labels) - sum_of(before, name, **labels)) / seconds

    def mean(name: str, **labels: str) -> float | None:
        count = rate(f"{name}_count", **labels)
        return rate(f"{name}_sum", **labels) / count if count else None

    def merge(how: Callable[[list[float]], float], name: str, label: str) -> dict[str, float]:
        values: dict[str, list[float]] = {}
        for one in now:
            if one.name == name:
                values.setdefault(one.labels[label], []).append(one.value)
        return {key: how(found) for key, found in values.items()}

    personas = sorted({one.labels["persona"] for one in now if one.name == "tokens_total"})
    return {
        "requests_per_second": rate("requests_total"),
        "tokens_per_second": rate("tokens_total", kind="completion"),
        "prompt_tokens_per_second": rate("tokens_total", kind="prompt"),
        "errors_per_second": rate("errors_total"),
        "running": sum_of(now, "batch_requests"),
        "waiting": sum_of(now, "queue_requests"),
        "batch_capacity": sum_of(now, "batch_capacity_requests"),
        "batch_personas": sum_of(now, "batch_personas"),
        "masks": merge(max, "personas", "tier"),  # replicas share the personas of their store
        "kv_pages": merge(sum, "kv_pages", "state"),
        "mask_bytes": sum_of(now, "mask_bytes"),
        "builds": merge(max, "jobs", "state"),
        "personas": {
            name: {
                "tokens_per_second": rate("tokens_total", persona=name, kind="completion"),
                "first_token_seconds": mean("first_token_seconds", persona=name),
                "inter_token_seconds": mean("inter_token_seconds", persona=name),
            }
            for name in personas
        },
    }


def _draw(figures: Mapping[str, Any]) -> Group:
    builds = ", ".join(f"{count:.0f} {state}" for state, count in figures["builds"].items() if count)
    pages = ", ".join(f"{count:.0f} {state}" for state, count in figures["kv_pages"].items())
    masks = ", ".join(f"{count:.0f} {tier}" for tier, count in figures["masks"].items())
    running = "{running:.0f} of {batch_capacity:.0f} requests, {waiting:.0f} wait"
    state = Table(show_header=False, box=None)
    for name, value in {
        "requests": "{requests_per_second:.1f}/s, {errors_per_second:.1f} errors/s".format(**figures),
        "tokens": "{tokens_per_second:.1f}/s out, {prompt_tokens_per_second:.1f}/s in".format(**figures),
        "batch": running.format(**figures),
        "active": f"{figures['batch_personas']:.0f} personas",
        "masks": f"{masks}; {figures['mask_bytes'] / 1e6:.1f} MB in memory",
        "KV pages": pages,
        "builds": builds or "none",
    }.items():
        state.add_row(name, value)
    table = Table("persona", "tokens/s", "first token", "between tokens")
    for name, one in figures["personas"].items():
        times = map(_time, (one["first_token_seconds"], one["inter_token_seconds"]))
        table.add_row(name, f"{one['tokens_per_second']:.1f}", *times)
    return Group(state, table)


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f} ms"
