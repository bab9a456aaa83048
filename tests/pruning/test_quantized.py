"""Calibration on a quantised base: statistics are those of the weights that it stands for."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from masquerade.kernels import dense_weight, weights
from masquerade.model import Base, MaskManager, find_targets, load
from masquerade.model.quantized import QUANTIZATIONS
from tests import world
from tests.pruning.test_builder import FREE, make, run
from tests.pruning.test_collector import collect

pytestmark = pytest.mark.usefixtures("short_builds")
NEAR = {"nf4": 1e-4, "fp4": 1e-4, "int8": 0.1}  # of the norm; int8 rounds what a Linear gets, too
TWO = ("int8", "nf4")  # fp4 differs from nf4 in its code book only, whose values the statistics show


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


@pytest.fixture(scope="module")
def quantised(tiny_folder: Path) -> tuple[Base, MaskManager]:
    """In 4 bits; scores see statistics, and those of every quantisation are compared above."""
    base = load(str(tiny_folder), device="cpu", quantization="nf4")
    return base, MaskManager.attach(base.model)


@pytest.mark.parametrize("score", ["contrastive-wanda", "sparsegpt", "attribution-fisher", "refined"])
def test_a_mask_is_built_with_every_kind_of_statistics(quantised: tuple[Base, MaskManager], score: str) -> None:
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


@pytest.mark.parametrize("score", ["refined", "attribution"])
@pytest.mark.parametrize("how", TWO)
def test_a_base_in_bfloat16_is_built_on(tiny_folder: Path, how: str, score: str) -> None:
    base = load(str(tiny_folder), device="cpu", dtype="bfloat16", quantization=how)
    _, masks = run(make(base, MaskManager.attach(base.model), replace(FREE, score=score, rho=0.1)))
    assert [mask.info.certificate["quantization"] for mask in masks] == [how, how]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_checkpoint_that_was_quantised_in_another_dtype_is_built_on(tmp_path: Path, dtype: str) -> None:
    dense = world.make_model(tmp_path / "dense", intermediate_size=128)
    nested = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=nested, dtype=torch.float16, device_map={"": "cpu"}
    ).save_pretrained(tmp_path / "m")
    world.make_tokenizer().save_pretrained(tmp_path / "m")
    base = load(str(tmp_path / "m"), device="cpu", dtype=dtype)
    _, masks = run(make(base, MaskManager.attach(base.model), replace(FREE, score="refined", rho=0.1)))
    assert all(mask.pruned and "quantization" not in mask.info.certificate for mask in masks)


class _Alive:
    """Counts the bytes of dequantised weights that exist at the same time."""

    def __init__(self, dequantize: Callable[..., Tensor]) -> None:
        self._dequantize = dequantize
        self.now = self.most = 0

    def __call__(self, *given: Any) -> Tensor:
        dense = self._dequantize(*given)
        self.now += dense.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(dense, self._release, dense.nbytes)
        return dense

    def _release(self, nbytes: int) -> None:
        self.now -= nbytes


@pytest.mark.parametrize("score", ["refined", "attribution"])
@pytest.mark.parametrize("how", TWO)
def test_no_more_than_a_layer_is_dequantised_at_once(
    tmp_path: Path, how: str, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a search keeps of the weights, the masked ones, is counted in `plan/build.py`."""
    folder = world.make_model(tmp_path, num_hidden_layers=4)
    base = load(str(folder), device="cpu", quantization=how)
    manager = MaskManager.attach(base.model)
    layer = sum(4 * one.out_features * one.in_features for one in find_targets(base.model).values()) // 4
    alive = _Alive(weights._dequantize)
    monkeypatch.setattr(weights, "_dequantize", alive)
    _, masks = run(make(base, manager, replace(FREE, score=score, rho=0.1)))
    del masks
    assert 0 < alive.most <= layer
