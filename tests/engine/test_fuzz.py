"""A share of the random scenarios of `tests/engine/fuzz.py`; MASQUERADE_FUZZ=500 runs so many."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.engine import fuzz

COUNT = int(os.environ.get("MASQUERADE_FUZZ", "80"))
BLOCK = 10


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> fuzz.World:
    return fuzz.make_world(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("first", range(0, COUNT, BLOCK))
def test_scenarios_equal_the_oracle(shared: fuzz.World, first: int) -> None:
    total: Counter[str] = Counter()
    for seed in range(first, first + BLOCK):
        try:
            total += fuzz.play(seed, shared)
        except AssertionError as fault:
            pytest.fail(f"seed {seed}: {fault}")
    for what in ("length", "preemptions", "cached"):  # otherwise little was tested
        assert total[what], what
