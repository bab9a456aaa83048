"""The arithmetic of what fits, and what is said of what does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from masquerade.engine import EngineConfig
from masquerade.errors import UnusableModel
from masquerade.plan.build import estimate_build
from masquerade.plan.fit import PROCESS, Fit, Workload, find_remedies, fit
from masquerade.plan.footprint import PADDING, measure_persona, measure_weights
from masquerade.plan.memory import MachineMemory
from masquerade.plan.outline import Outline, read_outline
from masquerade.plan.reservation import check_loadable, reserve
from masquerade.sources import find_model
from tests.model import ggufs

WORKLOAD = Workload(personas=10, context=200, requests=8, rho=0.003)
PLENTY = 2**40


@pytest.fixture
def outline(tiny_folder: Path) -> Outline:
    return read_outline(find_model(str(tiny_folder)), "cpu")


@pytest.fixture
def found(outline: Outline) -> Fit:
    return fit(outline, WORKLOAD, PLENTY)


def test_the_need_is_the_sum_of_the_parts(outline: Outline, found: Fit) -> None:
    weights, persona = measure_weights(outline, outline.dtype), measure_persona(outline, 0.003).nbytes
    token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head size, float32
    assert [line.nbytes for line in found.lines] == [PROCESS, weights, 10 * persona, (13 + PADDING) * 16 * token]
    assert found.needed == sum(line.nbytes for line in found.lines)
    assert "Python" in found.lines[0].what
    on_gpu = fit(replace(outline, device="cuda"), WORKLOAD, PLENTY)
    assert not any("Python" in line.what for line in on_gpu.lines)


def test_the_memory_that_is_needed_is_enough_and_a_byte_less_is_not(outline: Outline, found: Fit) -> None:
    assert fit(outline, WORKLOAD, found.needed).missing == 0
    assert fit(outline, WORKLOAD, found.needed).requests == 1
    less = fit(outline, WORKLOAD, found.needed - 1)
    assert (less.missing, less.requests) == (1, 0)


@pytest.mark.parametrize("spare", [0, 1000, 100_000, 1_000_000, 10_000_000])
def test_no_more_fits_than_has_room(outline: Outline, found: Fit, spare: int) -> None:
    roomy = fit(outline, WORKLOAD, found.needed + spare)
    for requests in (1, 3):
        personas = roomy.count_personas(requests, roomy.persona)

        def take(personas: int, requests: int = requests) -> int:
            fixed = sum(line.nbytes for line in roomy.lines[:2])
            return fixed + personas * roomy.persona + (requests * roomy.request + PADDING) * roomy.block

        if personas:
            assert take(personas) <= roomy.memory < take(personas + 1)
            assert roomy.count_requests(personas) >= requests
        else:
            assert take(1) > roomy.memory


def test_no_more_requests_are_planned_than_run(outline: Outline, found: Fit) -> None:
    assert found.requests == WORKLOAD.requests
    assert found.count_requests(10) > WORKLOAD.requests


def test_a_remedy_saves_what_it_says(outline: Outline, tiny_folder: Path, found: Fit) -> None:
    tight = fit(outline, WORKLOAD, found.needed - 20_000)
    remedies = {one.option: one.saves for one in find_remedies(outline, tight)}
    narrow = read_outline(find_model(str(tiny_folder)), "cpu", "bfloat16")
    assert remedies.pop("--dtype bfloat16") == tight.needed - fit(narrow, WORKLOAD, PLENTY).needed
    for option, saves in remedies.items():
        name, value = option.split()
        how = value if name == "--quantization" else None
        changes = {} if how else {name.removeprefix("--"): int(value)}
        assert saves == tight.needed - fit(outline, replace(WORKLOAD, **changes), PLENTY, how).needed > 0
    assert {"--context", "--personas"} <= {option.split()[0] for option in remedies}
    assert max(remedies.values()) >= tight.missing


@pytest.mark.parametrize("memory", [1, PROCESS, PROCESS + 10_000])
def test_where_the_weights_alone_do_not_fit_remedies_are_still_possible_values(outline: Outline, memory: int) -> None:
    tight = fit(outline, WORKLOAD, memory)
    assert tight.requests == 0
    options = dict(one.option.split() for one in find_remedies(outline, tight))
    assert 1 <= int(options["--context"]) < WORKLOAD.context
    assert int(options["--personas"]) == 1


def test_quantisation_does_not_lower_what_loading_takes_on_a_cpu(outline: Outline) -> None:
    one = Workload(1, 16, 1, 0.0001)
    dense = measure_weights(outline, outline.dtype)
    assert fit(outline, one, PLENTY, "nf4").needed == PROCESS + dense
    on_gpu = fit(replace(outline, device="cuda"), one, PLENTY, "nf4")
    assert on_gpu.lines[0].nbytes == measure_weights(outline, outline.dtype, "nf4") < dense / 2


def test_blocks_of_a_file_are_loaded_as_they_are(tmp_path: Path) -> None:
    path = ggufs.write(tmp_path / "m.gguf", ggufs.make_model("llama"), ggufs.quantise(ggufs.Kind.Q8_0)).path
    outline, one = read_outline(find_model(str(path)), "cpu"), Workload(1, 16, 1, 0.0001)
    found = fit(outline, one, PLENTY, "a8")
    assert found.lines[1].nbytes == measure_weights(outline, outline.dtype, "a8")
    assert found.needed < PROCESS + measure_weights(outline, outline.dtype)


def test_a_server_reserves_its_limits(outline: Outline) -> None:
    found = reserve(outline, EngineConfig(max_running=2, cache_bytes=2**30), 10**6, 0.003)
    assert found.tokens == 2 * 2 * 256
    assert found.personas == 10**6 // measure_persona(outline, 0.003).nbytes
    assert found.nbytes == sum(line.nbytes for line in found.lines)
    assert "room for 1024 tokens" in found.describe()


def test_only_weights_that_cannot_be_loaded_are_refused(outline: Outline) -> None:
    weights = measure_weights(outline, outline.dtype)
    small = MachineMemory(weights - 1, 0)
    check_loadable(outline, small)  # they stay in the mapped file
    check_loadable(replace(outline, files={}), small)  # loading says that there are none
    with pytest.raises(UnusableModel, match="does not fit: its weights in float32 take"):
        check_loadable(outline, small, "int8")
    check_loadable(outline, replace(small, swap=1), "int8")
    check_loadable(replace(outline, device="cuda"), small, "int8")
    with pytest.raises(UnusableModel, match="and cuda has"):
        check_loadable(replace(outline, device="cuda"), small)


def test_a_build_keeps_copies_and_gains_of_what_it_may_mask(outline: Outline) -> None:
    cost = estimate_build(outline)
    weights = measure_weights(outline, outline.dtype)
    assert cost.memory == weights + 2 * outline.maskable * (4 + 4)  # a process for each side
    gpu = estimate_build(replace(outline, device="cuda"))
    assert gpu.memory == weights + outline.maskable * (4 + 4)
    assert cost.cpu_seconds
    assert cost.cpu_seconds > 0
    assert estimate_build(replace(outline, device="cuda")).cpu_seconds is None
    assert estimate_build(outline, "nf4").memory < cost.memory
