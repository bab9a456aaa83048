"""A masked model computes what materialised weights compute, and `detach` restores it."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from maskstore import BaseRef as MaskBase
from maskstore import Mask, MaskInfo, MaskMismatch, encode
from masquerade.model import AppliedMask, Base, MaskManager, Span, load, make_route
from tests import world

# Largest difference of logits from the same dtype on materialised weights, relative to the logits' spread. Half
# precision rounds the dense product before the correction is subtracted, so it differs by a few units in the last place
# at every layer.
TOLERANCE = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}


def logits_of(base: Base, ids: torch.Tensor, spans: list[Span]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = base.model(ids, use_cache=False, route=make_route(spans)).logits
    return logits.float()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rho", [0.003, 0.3])
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_logits_equal_materialised_weights(tiny_folder: Path, dtype: str, rho: float, gamma: float) -> None:
    base = load(str(tiny_folder), device="cpu", dtype=dtype)
    mask = world.make_mask(base, rho, seed=1)
    ids = torch.randint(6, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = world.materialise(base.model, mask, gamma)(ids).logits.float()
        unmasked = base.model(ids).logits.float()
    manager = MaskManager.attach(base.model)
    found = logits_of(base, ids, [Span(AppliedMask(manager.fit(mask), gamma), 0, 40)])
    assert (found - expected).abs().max() <= TOLERANCE[dtype] * expected.std()
    assert (unmasked - expected).abs().max() > 10 * (found - expected).abs().max()  # the mask has an effect


@pytest.mark.parametrize("backend", ["reference", "sparse"])
def test_rows_of_one_batch_have_different_masks(tiny: Base, manager: MaskManager, backend: str) -> None:
    masks = [world.make_mask(tiny, rho, seed) for seed, rho in enumerate((0.01, 0.3))]
    resident = [manager.fit(mask, backend) for mask in masks]
    applied_masks = [
        None,
        AppliedMask(resident[0], 0.0),
        AppliedMask(resident[1], 0.5),
        AppliedMask(resident[0], 0.5),
        AppliedMask(resident[1], 1.0),
    ]
    ids = torch.randint(6, 250, (len(applied_masks), 12), generator=torch.Generator().manual_seed(0))
    spans = [Span(applied, 12 * row, 12 * row + 12) for row, applied in enumerate(applied_masks) if applied]
    together = logits_of(tiny, ids, spans)
    for row, applied in enumerate(applied_masks):
        chosen = masks[resident.index(applied.mask)] if applied else None
        with torch.no_grad():
            alone = world.materialise(tiny.model, chosen, applied.gamma if applied else 1.0)(ids[row : row + 1]).logits
        assert torch.allclose(together[row], alone[0], atol=1e-3), row


def test_gamma_one_is_the_base_to_the_bit(tiny: Base, manager: MaskManager) -> None:
    ids = torch.arange(6, 46).unsqueeze(0)
    applied = AppliedMask(manager.fit(world.make_mask(tiny, 0.3, seed=1)), 1.0)
    assert torch.equal(logits_of(tiny, ids, [Span(applied, 0, 40)]), logits_of(tiny, ids, []))


def test_a_route_lasts_for_one_call(tiny: Base, manager: MaskManager) -> None:
    ids = torch.arange(6, 46).unsqueeze(0)
    before = tiny.model(ids).logits.float()
    logits_of(tiny, ids, [Span(AppliedMask(manager.fit(world.make_mask(tiny, 0.3, seed=1)), 0.0), 0, 40)])
    assert torch.equal(tiny.model(ids).logits.float(), before)


def test_a_route_does_not_outlive_a_failing_call(tiny: Base, manager: MaskManager) -> None:
    ids = torch.arange(6, 46).unsqueeze(0)
    before = tiny.model(ids).logits.float()
    spans = [Span(AppliedMask(manager.fit(world.make_mask(tiny, 0.3, seed=1)), 0.0), 0, 40)]
    with pytest.raises(IndexError):
        logits_of(tiny, torch.full((1, 40), 10**6), spans)
    assert torch.equal(tiny.model(ids).logits.float(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rho", [0.003, 0.3])
def test_a_linear_takes_inputs_of_any_form(tiny_folder: Path, rho: float, dtype: torch.dtype) -> None:
    """Without rows, as one row or a vector, in pieces of other memory: as a plain Linear does."""
    base = load(str(tiny_folder), device="cpu", dtype=str(dtype).removeprefix("torch."))
    mask, name = world.make_mask(base, rho, seed=1), "model.layers.0.mlp.down_proj"
    manager = MaskManager.attach(base.model)
    linear = base.model.get_submodule(name)
    effective = linear.weight * torch.from_numpy(mask.targets[name].to_keep())
    applied, wide = AppliedMask(manager.fit(mask), 0.0), torch.randn(3, 2 * linear.in_features, 4).to(dtype)
    forms = {
        "no rows": (wide[:0, : linear.in_features, 0], []),
        "no rows, though some are planned": (wide[:0, : linear.in_features, 0], [Span(applied, 0, 3)]),
        "an empty batch of sequences": (wide[:0].transpose(1, 2)[..., : linear.in_features], []),
        "one row": (wide[:1, : linear.in_features, 0], [Span(applied, 0, 1)]),
        "a vector": (wide[0, : linear.in_features, 0].contiguous(), [Span(applied, 0, 1)]),
        "every other input": (wide[:, ::2, 0], [Span(applied, 0, 3)]),
        "transposed": (wide[:, : linear.in_features].transpose(1, 2), [Span(applied, 0, 12)]),
        "expanded": (wide[:1, : linear.in_features, 0].expand(5, -1), [Span(applied, 0, 5)]),
    }
    for form, (x, spans) in forms.items():
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                manager._current.route = make_route(spans)
                found = linear(x.detach().requires_grad_(grad))
            expected = torch.nn.functional.linear(x, effective)
            assert found.shape == expected.shape, form
            assert torch.allclose(found, expected, atol=5e-2 if dtype.itemsize == 2 else 1e-5), form


def test_detach_restores_the_model_to_the_bit(tiny: Base) -> None:
    ids = torch.arange(6, 46).unsqueeze(0)
    weights = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    modules = dict(tiny.model.named_modules())
    logits = tiny.model(ids).logits
    manager = MaskManager.attach(tiny.model)
    logits_of(tiny, ids, [Span(AppliedMask(manager.fit(world.make_mask(tiny, 0.3, seed=1)), 0.0), 0, 40)])
    manager.detach()
    manager.detach()  # twice is harmless
    assert weights.keys() == tiny.model.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tiny.model.state_dict().items())
    assert all(module is modules[name] for name, module in tiny.model.named_modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.model.modules())
    assert torch.equal(tiny.model(ids).logits, logits)


def test_an_attached_model_shares_its_weights_and_can_be_copied(tiny: Base, manager: MaskManager) -> None:
    twin, ids = copy.deepcopy(tiny.model), torch.arange(6, 46).unsqueeze(0)
    mask = world.make_mask(tiny, 0.3, seed=1)
    route = make_route([Span(AppliedMask(manager.fit(mask), 0.0), 0, 40)])
    assert torch.allclose(twin(ids, route=route).logits, tiny.model(ids, route=route).logits)
    weights = {name: tensor.data_ptr() for name, tensor in tiny.model.state_dict().items()}
    linears = {name for name, module in tiny.model.named_modules() if isinstance(module, torch.nn.Linear)}
    manager.detach()
    assert weights == {name: tensor.data_ptr() for name, tensor in tiny.model.state_dict().items()}
    assert linears == {name for name, module in tiny.model.named_modules() if isinstance(module, torch.nn.Linear)}


def test_every_linear_but_the_head_is_maskable(tiny: Base) -> None:
    names = set(world.find_targets(tiny.model))
    linears = {name for name, module in tiny.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears - names == {"lm_head"}
    assert len(names) == 2 * 7


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("lm_head", (262, 64), "not a maskable Linear"),
        ("model.layers.0.mlp.up_proj", (96, 65), r"\(96, 64\) here, but \(96, 65\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(
    tiny: Base, manager: MaskManager, name: str, shape: tuple[int, int], words: str
) -> None:
    target = encode(np.random.default_rng(0).random(shape) < 0.1)
    mask = Mask(MaskBase(tiny.fingerprint, tiny.name), {name: target}, MaskInfo(persona="p", score="random"))
    with pytest.raises(MaskMismatch, match=words):
        manager.fit(mask)
