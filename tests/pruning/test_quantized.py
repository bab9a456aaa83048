"""Calibration on a quantised base: statistics are those of the weights that it stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from masquerade.kernels import dense_weight
from masquerade.model import Base, MaskManager, find_targets, load
from masquerade.model.quantized import QUANTIZATIONS
from masquerade.pruning.scores import SCORES
from tests.pruning.test_builder import FREE, make, run
from tests.pruning.test_collector import collect

NEAR = {"nf4": 1e-4, "fp4": 1e-4, "int8": 0.1}  # of the norm; int8 rounds what a Linear gets, too


@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_statistics_are_those_of_the_dequantised_weights(tiny_folder: Path, how: str) -> None:
    """Activations and gradients alike: what is added to a quantised Linear's sums never passes through its codes."""
    dense, base = (load(str(tiny_folder), device="cpu", quantization=q) for q in (None, how))
    for name, linear in find_targets(dense.model).items():
        linear.weight.data = dense_weight(base.model.get_submodule(name))
    for found, expected in zip(collect(base), collect(dense), strict=True):
        assert found.keys() == expected.keys()
        for name, statistics in expected.items():
            for kind in ("hessian", "gradient", "squared_gradient"):
                wanted = getattr(statistics.own, kind)
                if wanted is not None:
                    far = getattr(found[name].own, kind) - wanted
                    assert far.norm() < NEAR[how] * wanted.norm()


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def quantised(tiny_folder: Path, request: pytest.FixtureRequest) -> tuple[Base, MaskManager]:
    base = load(str(tiny_folder), device="cpu", quantization=request.param)
    return base, MaskManager.attach(base.model)


@pytest.mark.parametrize("score", SCORES)
def test_a_mask_is_built_with_every_score(quantised: tuple[Base, MaskManager], score: str) -> None:
    base, manager = quantised
    _, masks = run(make(base, manager, replace(FREE, score=score, rho=0.1)))
    for mask in masks:
        assert mask.base.fingerprint == base.fingerprint
        least = 0 if score == "refined" else 0.09  # a search prunes no weight whose loss would only hurt
        assert least < mask.pruned / mask.size < 0.11


def test_auto_searches_as_on_a_dense_base(quantised: tuple[Base, MaskManager]) -> None:
    base, manager = quantised
    _, masks = run(make(base, manager, replace(FREE, score="auto", rho="auto")))
    for mask in masks:
        assert {trial["score"] for trial in mask.info.certificate["choice"]["tried"]} == {"refined"}
