"""A masked quantised base computes what its dequantised weights do, and has the same fingerprint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maskstore import Mask
from masquerade.engine import Engine, Request, SamplingParams
from masquerade.errors import UnusableModel
from masquerade.kernels import dense_weight
from masquerade.model import AppliedMask, Base, MaskManager, Span, find_targets, load, make_route
from masquerade.model.quantized import QUANTIZATIONS, quantize
from tests import world

# Largest difference of logits from the dequantised, masked weights, relative to their spread. NF4 rounds weights only,
# so its products are those of the dequantised weights; int8 rounds every input to 8 bits, which the reference does not.
TOLERANCE = {"nf4": 1e-4, "int8": 0.5}


def materialise(base: Base, dense: Any, mask: Mask | None, gamma: float) -> Any:
    """The oracle: a plain model whose Linears hold what the quantised ones stand for, masked."""
    plain = world.materialise(dense.model, None, 1.0)
    for name in find_targets(plain):
        plain.get_submodule(name).weight.data = dense_weight(base.model.get_submodule(name)).to(dense.dtype)
    return world.materialise(plain, mask, gamma)


@pytest.fixture(params=QUANTIZATIONS)
def quantised(request: pytest.FixtureRequest, tiny_folder: Path) -> tuple[str, Base]:
    return request.param, load(str(tiny_folder), device="cpu", quantization=request.param)


@pytest.mark.parametrize("rho", [0.003, 0.3])
def test_logits_are_those_of_the_dequantised_masked_weights(
    quantised: tuple[str, Base], tiny: Base, rho: float
) -> None:
    how, base = quantised
    mask = world.make_mask(tiny, rho, 1)  # made for the dense base
    resident = MaskManager.attach(base.model).fit(mask)
    ids = torch.randint(6, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = materialise(base, tiny, mask, 0.0)(ids).logits
        unmasked = materialise(base, tiny, None, 1.0)(ids).logits
        for _ in range(2):  # the first product moves int8 weights
            found = base.model(
                ids, use_cache=False, route=make_route([Span(AppliedMask(resident, 0.0), 0, 40)], base.device)
            ).logits
            assert (found - expected).abs().max() < TOLERANCE[how] * expected.std()
    assert (unmasked - expected).abs().max() > TOLERANCE[how] * expected.std()  # the mask is felt


def test_tokens_of_many_personas_in_one_batch_equal_the_oracle_in_nf4(tiny_folder: Path, tiny: Base) -> None:
    base = load(str(tiny_folder), device="cpu", quantization="nf4")
    manager = MaskManager.attach(base.model)
    masks = [None, *(world.make_mask(tiny, rho, seed) for seed, rho in enumerate((0.003, 0.01, 0.3)))]
    prompts = [torch.randint(6, 250, (12,), generator=torch.Generator().manual_seed(s)).tolist() for s in range(4)]
    applied_masks = [AppliedMask(manager.fit(mask), 0.25) if mask else None for mask in masks]
    engine = Engine(base)
    answers = engine.generate(
        Request(prompt, 16, lambda _: None, applied, sampling=SamplingParams(temperature=0))
        for prompt, applied in zip(prompts, applied_masks, strict=True)
    )
    engine.stop()
    for prompt, mask, answer in zip(prompts, masks, answers, strict=True):
        plain = materialise(base, tiny, mask, 0.25)
        assert world.speak(plain, plain, prompt, 16).agrees(answer)


def test_it_is_the_same_base_in_fewer_bytes(quantised: tuple[str, Base], tiny: Base) -> None:
    how, base = quantised
    assert base.fingerprint == tiny.fingerprint
    assert find_targets(base.model).keys() == find_targets(tiny.model).keys()
    shrunk, whole = (sum(linear.weight.nbytes for linear in find_targets(one.model).values()) for one in (base, tiny))
    assert whole == shrunk * {"int8": 4, "nf4": 8}[how]
    for name, linear in find_targets(base.model).items():
        weight = tiny.model.get_submodule(name).weight
        assert (dense_weight(linear) - weight).norm() < {"int8": 0.02, "nf4": 0.12}[how] * weight.norm()


@pytest.mark.parametrize("inputs", [*range(16, 320, 32), 32, 64, 96, 160, 172])
def test_no_row_is_misread_in_nf4(inputs: int) -> None:
    name = "model.layers.0.mlp.up_proj"
    model: nn.Module = nn.Linear(inputs, 64, bias=False)
    for part in reversed(name.split(".")):
        model = nn.ModuleDict({part: model})
    weight = model.get_submodule(name).weight.detach().clone()
    if inputs % 32 == 16:
        with pytest.raises(UnusableModel, match=rf"{name}: rows of {inputs} weights"):
            quantize(model, "nf4", torch.device("cpu"))
    else:
        quantize(model, "nf4", torch.device("cpu"))
        assert (dense_weight(model.get_submodule(name)) - weight).norm() < 0.12 * weight.norm()


def test_without_bitsandbytes_it_says_what_to_install(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnusableModel, match=r"masquerade\[quantization\]"):
        load(str(tiny_folder), device="cpu", quantization="nf4")
