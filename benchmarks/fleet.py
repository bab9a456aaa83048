"""Fleets of 4, 16 and 64 replicas that serve 10 000 personas, simulated: hit rates, tail latency, cost.

`python -m benchmarks.fleet --json [--quick] [--record docs/scale.md]`. Nothing is served and nothing is timed: the
figures follow from the constants in `_fleet_constants.py`, which are printed with their sources, and from the model in
`_fleet.py`. Personas are masks, system prompts, LoRAs or whole models; routers are those of `_fleet.ROUTINGS`. The same
seed gives the same figures. `--record` writes the tables into a page, and all that was printed into `fleet.json`
beside this file, from which a test makes the tables again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from benchmarks._fleet import ROUTINGS, Load, Machine, Outcome, Way, capacity, simulate
from benchmarks._fleet_constants import CONSTANTS, VARIATIONS, Constant, Setting, make_settings
from benchmarks._fleet_tables import (
    EMPTY,
    MIDDLE,
    OFF,
    ON,
    PERCENTILES,
    REPLICAS,
    STARTS,
    WAYS,
    label,
    make_tables,
    record,
)
from benchmarks._report import Figure, arguments, describe, report

RECORD = Path(__file__).with_name("fleet.json")
SEED = 0


@dataclass(frozen=True)
class Scale:
    """The size of a run."""

    replicas: tuple[int, ...]
    requests: int  # a replica
    settled: int  # a replica, where the fleet starts empty and only the last quarter is measured
    warm: int  # requests before, of the fleet
    search: int  # runs of a search for capacity
    variations: tuple[str, ...]


FULL = Scale(REPLICAS, 700, 3000, 100_000, 6, tuple(VARIATIONS))
QUICK = Scale((4, 16), 200, 400, 60_000, 4, ())


def main() -> None:
    parser = arguments(__doc__, "4 and 16 replicas, fewer requests, constants are not varied; within a minute")
    parser.add_argument("--record", type=Path, help="a page with the markers of the tables")
    options = parser.parse_args()
    figures = list(measure(QUICK if options.quick else FULL))
    found = describe("fleet", figures) | {"constants": {name: asdict(one) for name, one in CONSTANTS.items()}}
    if options.record:
        RECORD.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        record(options.record, make_tables(found))
    if options.json:
        print(json.dumps(found))
        return
    for name, constant in CONSTANTS.items():
        print(f"{name:<20} {constant.value:>14.6g} {constant.unit:<14} {constant.kind}: {constant.source}")
    report("fleet", figures, as_json=False)


def measure(scale: Scale) -> Iterator[Figure]:
    """All figures."""
    settings = make_settings()
    for key, setting in settings.items():
        for replicas in scale.replicas:
            for way in WAYS:
                for routing in (OFF, ON):
                    yield from describe_run(key, setting, way, replicas, routing, scale)
        yield from measure_prices(key, setting, scale)
    for start, replicas in STARTS:
        if replicas in scale.replicas:
            for routing in ROUTINGS:
                yield from describe_run(start, settings["gpu"], "masks", replicas, routing, scale)
    for title in scale.variations:
        changed = {name: replace(CONSTANTS[name], value=value) for name, value in VARIATIONS[title].items()}
        yield from vary(title, CONSTANTS | changed, scale)


def describe_run(key: str, setting: Setting, way: str, replicas: int, routing: str, scale: Scale) -> Iterator[Figure]:
    """The figures of one run at the load of the tables."""
    print(f"{key}: {way}, {replicas} replicas, {routing}", file=sys.stderr)
    found = run(setting, setting.ways[way], replicas, routing, base_rate(setting), scale, settled=key == EMPTY)
    name = label(key, way, replicas, routing)
    yield Figure(f"{name}: hits", found.hits, "of requests")
    for kind, seconds in (("first token", found.first), ("answer", found.total)):
        for percentile, value in zip(PERCENTILES, seconds, strict=True):
            yield Figure(f"{name}: {kind}, {percentile}th percentile", value, "s")
    yield Figure(f"{name}: busy", found.busy, "of the time")


def measure_prices(key: str, setting: Setting, scale: Scale) -> Iterator[Figure]:
    """Capacity within the bound, and the cost there, for each way."""
    for way in WAYS:
        for routing in (OFF, ON):
            print(f"{key}: capacity of {way}, {routing}", file=sys.stderr)
            name = label(key, way, MIDDLE, routing)
            rate, cost = find_cost(setting, setting.ways[way], routing, CONSTANTS, scale)
            yield Figure(f"{name}: capacity", rate, "requests/s a replica")
            yield Figure(f"{name}: cost", cost, "$ a million tokens")
    formula = capacity(setting.machine, Way(1), _value("user tokens"), _value("answer tokens"))
    yield Figure(f"{key}, the bare base, full batches: capacity", formula, "requests/s a replica")
    tokens = MIDDLE * base_rate(setting) * _value("answer tokens") * 3600
    always = _value("personas") * setting.price / tokens * 1e6
    yield Figure(
        f"{key}, a model for each persona, always on, the load of {MIDDLE} replicas: cost", always, "$ a million tokens"
    )


def vary(title: str, constants: dict[str, Constant], scale: Scale) -> Iterator[Figure]:
    """Hits, latency and cost on the GPU with other constants, with affinity."""
    setting = make_settings(constants)["gpu"]
    for way in WAYS:
        print(f"{title}: {way}", file=sys.stderr)
        name = f"varied, {title}, {way}"
        found = run(setting, setting.ways[way], MIDDLE, ON, base_rate(setting), scale, constants)
        yield Figure(f"{name}: hits", found.hits, "of requests")
        yield Figure(f"{name}: first token, 99th percentile", found.first[2], "s")
        yield Figure(
            f"{name}: cost", find_cost(setting, setting.ways[way], ON, constants, scale)[1], "$ a million tokens"
        )


def run(
    setting: Setting,
    way: Way,
    replicas: int,
    routing: str,
    rate: float,
    scale: Scale,
    constants: Mapping[str, Constant] = CONSTANTS,
    settled: bool = False,
) -> Outcome:
    """Simulate a rate of requests a second and replica; `settled`: from an empty fleet, until it is full."""
    values = (constants[name].value for name in ("user tokens", "answer tokens"))
    personas, alpha = int(constants["personas"].value), constants["alpha"].value
    requests, warm, lead = (scale.settled, 0, 0.75) if settled else (scale.requests, scale.warm, 0.25)
    load = Load(personas, alpha, rate * replicas, requests * replicas, *values)
    return _simulate(setting.machine, way, load, replicas, routing, warm, lead)


@cache
def _simulate(machine: Machine, way: Way, load: Load, replicas: int, routing: str, warm: int, lead: float) -> Outcome:
    return replace(simulate(machine, way, load, replicas, routing, SEED, warm, lead), served=())


def find_cost(
    setting: Setting, way: Way, routing: str, constants: Mapping[str, Constant], scale: Scale
) -> tuple[float, float]:
    """The highest rate of a replica within the bound, 0 if there is none, and $ a million tokens of answers there.

    A short run may be within it above what full batches sustain, so the search ends there.
    None means that a thirty-second of the bare base's capacity is too much. The cost is then that of the time in which
    replicas are busy with this overload: the least that it can be.
    """
    second = setting.price / 3600
    tokens = constants["user tokens"].value, constants["answer tokens"].value
    low, high = capacity(setting.machine, Way(1), *tokens) / 32, capacity(setting.machine, way, *tokens)

    def run_at(rate: float) -> Outcome:
        return run(setting, way, MIDDLE, routing, rate, scale, constants)

    bound, least = constants["bound"].value, run_at(low)
    if least.first[2] > bound:
        return 0.0, second * MIDDLE * least.busy * least.span / least.tokens * 1e6
    for _ in range(scale.search):
        rate = (low + high) / 2
        low, high = (rate, high) if run_at(rate).first[2] <= bound else (low, rate)
    return low, second / (low * tokens[1]) * 1e6


def base_rate(setting: Setting) -> float:
    """Requests a second and replica in the tables of latency."""
    return _value("load") * capacity(setting.machine, Way(1), _value("user tokens"), _value("answer tokens"))


def _value(name: str) -> float:
    return CONSTANTS[name].value


if __name__ == "__main__":
    main()
