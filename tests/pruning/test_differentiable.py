"""Layers between whose Linears are kernels with gradients: those of transformers, in every structure that is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from masquerade.evaluate.dataset import Encoded
from masquerade.kernels.native import find_library
from masquerade.model import MaskManager, load
from masquerade.pruning import differentiable
from masquerade.pruning.differentiable import find_replacements
from masquerade.pruning.layerwise import LayerwiseModel
from masquerade.pruning.responses import ResponseBatch
from masquerade.pruning.scratch import Scratch
from tests import families

KNOWN = ("Llama 2", "Llama 3", "Qwen2.5", "Qwen3", "SmolLM3", "Granite", "Hunyuan", "Seed-OSS")
OTHERS = ("Gemma 3", "Phi-3", "OLMo 2", "Mistral")
TEXTS = [Encoded(tuple(range(5, 9)), tuple(range(20, 26))), Encoded(tuple(range(40, 51)), (7, 9))]
pytestmark = pytest.mark.skipif(find_library() is None, reason="needs the native kernels")


def run(base: Any, model: LayerwiseModel, through: str) -> tuple[Tensor, Tensor]:
    """All layers' output, and the gradient of the first one's input, of texts or of responses after stored prompts."""
    if through == "texts":
        ids = torch.tensor([one.prompt[:4] + one.response[:2] for one in TEXTS])
        first, arguments = model.enter(input_ids=ids, use_cache=False)
        layers = [lambda x, layer=layer: model.run(layer, x, arguments[layer]) for layer in range(len(model.layers))]
        counted = torch.ones_like(ids, dtype=torch.bool)
    else:
        batch = ResponseBatch(base, model, Scratch(), "batch", TEXTS, 8)
        list(batch.store_prompts())
        first, counted = batch.enter(), batch.counted
        layers = [lambda x, layer=layer: batch.run(layer, x) for layer in range(len(model.layers))]
    hidden = first.detach().requires_grad_(True)
    output = hidden
    for layer in layers:
        output = layer(output)
    above = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    (gradient,) = torch.autograd.grad(output, hidden, above * counted.unsqueeze(-1))
    return output[counted].detach(), gradient


@pytest.mark.parametrize("through", ["texts", "responses"])
@pytest.mark.parametrize("family", KNOWN)
def test_outputs_and_gradients_are_those_of_transformers(tmp_path: Path, family: str, through: str) -> None:
    base = load(str(families.make_family(tmp_path, family)), dtype="float32")
    expected = run(base, LayerwiseModel(base), through)  # no masks are attached yet
    MaskManager.attach(base.model)
    model = LayerwiseModel(base)
    assert all(model._replacements[layer][0] for layer in range(len(model.layers)))
    for found, wanted in zip(run(base, model, through), expected, strict=True):
        assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("why", ["long", "masks are added to the scores"])
def test_attention_of_other_kinds_is_left_to_transformers(
    tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(str(families.make_family(tmp_path, "Llama 3")), dtype="float32")
    if why == "long":
        monkeypatch.setattr(differentiable, "MOST_PRODUCTS", 1)
    else:
        base.model.set_attn_implementation("eager")
    expected = run(base, LayerwiseModel(base), "responses")
    MaskManager.attach(base.model)
    monkeypatch.setattr(differentiable, "attend", None)  # it would fail
    for found, wanted in zip(run(base, LayerwiseModel(base), "responses"), expected, strict=True):
        assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("family", OTHERS)
def test_other_structures_are_left_to_transformers(tmp_path: Path, family: str) -> None:
    base = load(str(families.make_family(tmp_path, family)), dtype="float32")
    MaskManager.attach(base.model)
    assert all(find_replacements(layer) == ((), ()) for layer in LayerwiseModel(base).layers)
