"""The simulation of fleets agrees with closed forms, loses nothing, repeats itself; its page says what it printed."""

from __future__ import annotations

import doctest
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import fleet
from benchmarks._fleet import PICKER, ROUTINGS, Load, Machine, Outcome, Way, capacity, hit_rate, popularity, simulate
from benchmarks._fleet_constants import CONSTANTS, make_settings
from benchmarks._fleet_tables import MIDDLE, WAYS, label, make_tables, record

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scale.md"
RECORDED = json.loads(fleet.RECORD.read_text(encoding="utf-8"))
ONE_AT_A_TIME = Machine(fixed=0.1, row=0.0, prefill=0.0, position=0.0, rows=1, chunk=2**30, budget=10**9)
FREE = Way(nbytes=1, load=1e-9)
GPU = make_settings()["gpu"]


def first_tokens(found: Outcome) -> np.ndarray:
    return np.array([request.first - request.arrival for request in found.served])


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.8])
def test_the_wait_for_one_row_is_that_of_an_m_d_1_queue(busy: float) -> None:
    service = ONE_AT_A_TIME.fixed
    load = Load(personas=1, alpha=1.0, rate=busy / service, requests=60_000, prompt=1.0, answer=1e-9)
    found = simulate(ONE_AT_A_TIME, FREE, load, 1, "least load", seed=3, warm=1)
    wait = first_tokens(found).mean() - service
    assert wait == pytest.approx(busy * service / (2 * (1 - busy)), rel=0.05)  # Pollaczek and Khinchine
    assert found.busy == pytest.approx(busy, rel=0.02)


@pytest.mark.parametrize("way", ["masks", "LoRAs", "prompts"])
def test_an_overload_is_served_at_the_capacity_of_the_formula(way: str) -> None:
    load = Load(personas=400, alpha=0.0, rate=100.0, requests=6000, prompt=230.0, answer=203.0)
    found = simulate(GPU.machine, GPU.ways[way], load, 1, "least load", seed=0, warm=5000)
    expected = capacity(GPU.machine, GPU.ways[way], load.prompt, load.answer)
    assert len(found.served) / found.span == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("alpha", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("slots", [50, 500])
def test_hits_are_those_of_ches_approximation(alpha: float, slots: int) -> None:
    machine = replace(ONE_AT_A_TIME, fixed=1e-6, rows=64, budget=slots)
    load = Load(personas=2000, alpha=alpha, rate=10.0, requests=40_000, prompt=1.0, answer=1e-9)
    found = simulate(machine, FREE, load, 1, "least load", seed=1, warm=20_000)
    assert found.hits == pytest.approx(hit_rate(popularity(2000, alpha), slots), abs=0.01)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("way", WAYS)
def test_every_request_is_served_once(way: str, routing: str) -> None:
    load = Load(personas=3000, alpha=1.0, rate=40.0, requests=1500, prompt=230.0, answer=203.0)
    found = simulate(GPU.machine, GPU.ways[way], load, 4, routing, seed=2, warm=5000)
    fixed = GPU.machine.fixed
    assert found.tokens == sum(request.answer for request in found.served)  # so no row stayed, and none ran twice
    for request in found.served:
        assert request.arrival + fixed <= request.first <= request.end
        assert request.end - request.first >= (request.answer - 1) * fixed * (1 - 1e-9)
    assert 0 < found.busy <= 1 + 1e-9


def test_a_miss_waits_for_its_persona_and_a_hit_does_not() -> None:
    way = replace(GPU.ways["masks"], load=5.0)
    load = Load(personas=3000, alpha=1.0, rate=0.5, requests=1000, prompt=230.0, answer=20.0)
    found = simulate(GPU.machine, way, load, 1, "least load", seed=2, warm=5000)
    waits = first_tokens(found)
    hits = np.array([request.hit for request in found.served])
    assert (waits[hits] < 1).all()
    shared = waits[~hits] < way.load  # whose persona was on its way already
    assert 0.9 < 1 - shared.mean() <= 1


def test_a_seed_decides_everything() -> None:
    load = Load(personas=500, alpha=1.0, rate=40.0, requests=800, prompt=230.0, answer=203.0)
    one, same, other = (
        simulate(GPU.machine, GPU.ways["masks"], load, 4, "picker.yaml", seed, warm=1000) for seed in (7, 7, 8)
    )
    assert one == same
    assert one != other


def test_affinity_keeps_more_personas_and_nobody_queues_beside_an_idle_replica() -> None:
    load = Load(personas=10_000, alpha=1.0, rate=64.0, requests=6000, prompt=230.0, answer=203.0)
    spread, homes = (
        simulate(GPU.machine, GPU.ways["masks"], load, 8, routing, seed=0, warm=50_000)
        for routing in ("least load", "affinity")
    )
    assert homes.hits > spread.hits + 0.15
    assert homes.total[0] < 1.05 * spread.total[0]


def test_a_small_run_has_every_kind_of_figure_once() -> None:
    tiny = fleet.Scale(replicas=(4,), requests=20, settled=20, warm=500, search=1, variations=("as assumed",))
    names = [figure.name for figure in fleet.measure(tiny)]
    assert len(names) == len(set(names))
    assert set(names) <= {figure["name"] for figure in RECORDED["figures"]}


def test_the_picker_has_the_weights_of_its_configuration() -> None:
    (profile,) = yaml.safe_load((ROOT / "docker/gateway/picker.yaml").read_text(encoding="utf-8"))["schedulingProfiles"]
    weights = {one["pluginRef"]: one["weight"] for one in profile["plugins"] if "weight" in one}
    names = ("lora-affinity-scorer", "queue-scorer", "kv-cache-utilization-scorer")
    assert tuple(weights[name] for name in names) == PICKER


@pytest.mark.parametrize("name", ["gpu weights", "gpu position", "gpu mask file"])
def test_bytes_are_those_of_the_operations_page(name: str) -> None:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    assert f"{int(CONSTANTS[name].value):,}".replace(",", " ") in page


def test_the_page_says_what_the_command_printed(tmp_path: Path) -> None:
    copy = Path(shutil.copy(PAGE, tmp_path))
    record(copy, make_tables(RECORDED))
    assert copy.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    assert RECORDED["constants"] == {name: asdict(one) for name, one in CONSTANTS.items()}


@pytest.mark.parametrize(("key", "way"), [("gpu", "masks"), ("cpu", "prompts")])
def test_a_run_gives_what_was_recorded(key: str, way: str) -> None:
    recorded = {figure["name"]: figure["value"] for figure in RECORDED["figures"]}
    figures = list(fleet.describe_run(key, make_settings()[key], way, MIDDLE, "affinity", fleet.FULL))
    assert all(figure.name.startswith(label(key, way, MIDDLE, "affinity")) for figure in figures)
    assert {figure.name: round(figure.value, 4) for figure in figures}.items() <= recorded.items()


def test_the_examples_of_the_page_are_right() -> None:
    example = doctest.DocTestParser().get_doctest(PAGE.read_text(encoding="utf-8"), {}, "scale.md", str(PAGE), 0)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
