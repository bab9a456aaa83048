"""A GGUF file whose weights stay in their blocks is the model that is dequantised, to the bit, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import nn

from masquerade.engine import Engine, EngineConfig, Request, SamplingParams
from masquerade.kernels import QuantisedEmbedding, QuantisedLinear, dense_weight, native, quantised
from masquerade.model import AppliedMask, Base, MaskManager, find_targets, load
from masquerade.model.load import keeps_blocks
from masquerade.plan.footprint import measure_served, measure_weights
from masquerade.plan.outline import read_outline
from masquerade.pruning.builder import _check
from masquerade.sources import find_model
from tests import world
from tests.model import ggufs
from tests.model.test_gguf import MODELS, make

pytestmark = pytest.mark.skipif(native.find_library() is None, reason="the native kernels were not built here")
KINDS = (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0)
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(autouse=True)
def paying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are kept whatever this processor is."""
    monkeypatch.setattr(quantised, "pays", lambda: True)


def load_both(path: Path) -> tuple[Base, Base]:
    kept, plain = (load(str(path), device="cpu", keep_blocks=keep) for keep in (True, False))
    return kept, plain


def run(base: Base, masked: bool) -> list[list[int]]:
    """Greedy tokens of eight requests, half of them of a persona if `masked`, which share batches."""
    manager = MaskManager.attach(base.model)
    applied = AppliedMask(manager.fit(world.make_mask(base, 0.02, 3)), 0.3) if masked else None
    engine = Engine(base, EngineConfig())
    requests = [
        Request(list(range(3, 5 + 6 * one)), 12, lambda _: None, sampling=GREEDY, applied=applied if one % 2 else None)
        for one in range(8)
    ]
    tokens = engine.generate(requests)
    manager.detach()
    return tokens


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["llama-tied", "llama-biased", "qwen3", "gemma3"])
def test_answers_and_personas_are_those_of_the_dequantised_model(tmp_path: Path, name: str, kind: Kind) -> None:
    kept, plain = load_both(ggufs.write(tmp_path / "m.gguf", make(name), ggufs.quantise(kind)).path)
    assert (kept.fingerprint, kept.dtype, kept.quantization) == (plain.fingerprint, plain.dtype, plain.quantization)
    linears = find_targets(plain.model)
    for target, linear in find_targets(kept.model).items():
        assert type(linear) is QuantisedLinear
        assert torch.equal(dense_weight(linear), linears[target].weight)
    for masked in (False, True):
        assert run(kept, masked) == run(plain, masked)


def test_logits_have_the_same_bits(tmp_path: Path) -> None:
    kept, plain = load_both(ggufs.write(tmp_path / "m.gguf", make("llama"), ggufs.quantise(Kind.Q4_1)).path)
    logits = []
    for base in (kept, plain):
        MaskManager.attach(base.model)
        with torch.inference_mode():
            logits.append([base.model(torch.arange(3, 3 + count)[None]).logits for count in (1, 7, 40)])
    assert all(map(torch.equal, *logits))


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    kept, _ = load_both(ggufs.write(tmp_path / "m.gguf", make("llama-tied"), ggufs.quantise(Kind.Q8_0)).path)
    assert type(kept.model.get_input_embeddings()) is QuantisedEmbedding
    assert kept.model.get_output_embeddings().weight is kept.model.get_input_embeddings().weight


def test_scaled_embeddings_and_other_types_are_dequantised(tmp_path: Path) -> None:
    """Gemma's embeddings are no plain ones; a file may mix types."""

    def mix(name: str, weights: Any) -> Any:
        return ggufs.quantise(Kind.F16 if "down" in name else Kind.Q8_0)(name, weights)

    kept, plain = load_both(ggufs.write(tmp_path / "m.gguf", make("gemma"), mix).path)
    for name, linear in find_targets(kept.model).items():
        assert type(linear) is (nn.Linear if "down_proj" in name else QuantisedLinear)
    assert torch.equal(kept.model.get_input_embeddings().weight, plain.model.get_input_embeddings().weight)
    assert run(kept, True) == run(plain, True)


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_counts_the_bytes_of_every_architecture(tmp_path: Path, name: str) -> None:
    path = ggufs.write(tmp_path / "m.gguf", make(name), ggufs.quantise(Kind.Q4_1)).path
    kept = load(str(path), device="cpu", keep_blocks=True)
    outline = read_outline(find_model(str(path)), "cpu")
    assert measure_served(outline) == sum(weight.nbytes for weight in kept.model.parameters())
    assert measure_served(outline) < 0.6 * measure_weights(outline, torch.bfloat16)


def test_blocks_are_kept_only_where_nothing_else_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert keeps_blocks("cpu", "auto", None)
    for other in (("cuda", "auto", None), ("cpu", "bfloat16", None), ("cpu", "float32", None), ("cpu", "auto", "nf4")):
        assert not keeps_blocks(*other)
    monkeypatch.setattr(quantised, "pays", lambda: False)
    assert not keeps_blocks("cpu", "auto", None)


def test_a_scale_that_is_not_finite_is_found_before_a_build(tmp_path: Path) -> None:
    kept, _ = load_both(ggufs.write(tmp_path / "m.gguf", make("llama"), ggufs.quantise(Kind.Q8_0)).path)
    assert all(found is None for found in _check(kept.model))
    name, linear = next(iter(find_targets(kept.model).items()))
    linear.weight.data.view(torch.float16)[linear.weight.nbytes // 2 - 200 :] = float("inf")
    with pytest.raises(Exception, match=f"{name}.weight of the base has NaN or infinite weights"):
        list(_check(kept.model))
