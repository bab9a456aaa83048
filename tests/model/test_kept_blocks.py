"""A GGUF file whose weights stay in their blocks is the model that is dequantised, to the bit, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import nn

from masquerade.engine import Engine, EngineConfig, Request, SamplingParams
from masquerade.errors import UnusableModel
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
KINDS = tuple(map(Kind.__getitem__, quantised.FORMS))
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


def make_wide() -> Any:
    """Rows of one and of two blocks of the K types."""
    return ggufs.make_model("llama", hidden_size=256, intermediate_size=512)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_answers_and_personas_are_those_of_the_dequantised_model(tmp_path: Path, kind: Kind) -> None:
    check_same(*load_both(ggufs.write(tmp_path / "m.gguf", make_wide(), ggufs.quantise(kind)).path))


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q4_K], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["llama-tied", "llama-biased", "qwen3", "gemma3"])
def test_so_are_those_of_other_architectures_and_of_rows_that_no_k_type_fits(
    tmp_path: Path, name: str, kind: Kind
) -> None:
    check_same(*load_both(ggufs.write(tmp_path / "m.gguf", make(name), ggufs.quantise(kind)).path))


def check_same(kept: Base, plain: Base) -> None:
    """Weights, greedy answers and those of a persona."""
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
    assert measure_served(outline, "a8") == measure_served(outline)
    assert measure_served(outline) < 0.6 * measure_weights(outline, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rounded_inputs_change_logits_a_little_and_leave_rows_alone(tmp_path: Path, kind: Kind) -> None:
    path = str(ggufs.write(tmp_path / "m.gguf", make_wide(), ggufs.quantise(kind)).path)
    rounding, exact = load(path, device="cpu", quantization="a8"), load(path, device="cpu")
    assert (rounding.quantization, rounding.fingerprint) == ("a8", exact.fingerprint)
    tokens = torch.arange(3, 43)[None]
    manager = MaskManager.attach(rounding.model)
    with torch.inference_mode():
        logits, expected = (base.model(tokens).logits.float() for base in (rounding, exact))
    manager.detach()
    assert 0 < (logits - expected).abs().mean() < 0.05 * expected.std()
    for masked in (False, True):
        together = run(rounding, masked)
        alone = Engine(rounding, EngineConfig()).generate(
            [Request(list(range(3, 17)), 12, lambda _: None, sampling=GREEDY)]
        )
        assert together[2] == alone[0]  # the third has no persona


def test_what_cannot_be_rounded_is_refused_by_name(tmp_path: Path, tiny_folder: Path) -> None:
    half = str(ggufs.write(tmp_path / "half.gguf", make("llama"), ggufs.quantise(Kind.F16)).path)
    ours = str(ggufs.write(tmp_path / "m.gguf", make("llama"), ggufs.quantise(Kind.Q8_0)).path)
    for name, dtype, said in (
        (str(tiny_folder), "auto", "`--quantization a8` needs a GGUF file .* is none"),
        (half, "auto", "with weights of the types Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K; half has F16"),
        (ours, "float32", "runs on a CPU, in bfloat16"),
    ):
        with pytest.raises(UnusableModel, match=said):
            load(name, device="cpu", dtype=dtype, quantization="a8")


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
