"""An exported adapter, loaded by PEFT, is the masked model; what an adapter cannot say is refused."""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from maskstore import BaseRef as MaskBase
from maskstore import Mask, MaskInfo, MaskMismatch, encode
from masquerade.errors import InvalidValue, UnusableModel
from masquerade.model import AdapterKind, AppliedMask, Base, MaskManager, Span, export_adapter, find_targets, load
from tests import families, world
from tests.model import ggufs
from tests.model.test_manager import logits_of

# Largest difference of logits, relative to their spread. In float32 the materialised model itself is up to 9e-6 away
# from its float64 logits, and others round other sums. In float64 only the adapter's values are rounded, to float32.
TOLERANCE = {torch.float32: 5e-5, torch.float64: 2e-6}
KINDS: tuple[AdapterKind, ...] = ("lora", "shira")
COUNTS = (0, 1, 3)  # pruned channels, in turn
with_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")


@pytest.fixture(scope="module", params=["Llama 3", "Phi-3"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A Llama with a tied head, and a family with fused Linears."""
    return load(str(families.make_family(tmp_path_factory.mktemp("family"), request.param)), device="cpu")


def make_mask(base: Base, kind: AdapterKind) -> Mask:
    """Channels for a LoRA, not as many in all Linears; for SHiRA single weights, from none to 2 % of a Linear."""
    rng, targets = np.random.default_rng(1), {}
    for number, (name, linear) in enumerate(find_targets(base.model).items()):
        shape, count = (linear.out_features, linear.in_features), COUNTS[number % len(COUNTS)]
        pruned = rng.random(shape) < 0.01 * (number % 3)
        if kind == "lora":
            pruned = np.zeros(shape, bool)
            pruned[:, rng.choice(shape[1], count, replace=False)] = True
        targets[name] = encode(pruned)
    return Mask(MaskBase(base.fingerprint, base.name), targets, MaskInfo(persona="p", score="random"))


@pytest.fixture(autouse=True)
def _valid_indices() -> Iterator[None]:
    with torch.sparse.check_sparse_tensor_invariants():
        yield


def read_plain(base: Base) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.path, dtype=base.dtype)


def load_peft(base: Base, folder: Path) -> Any:
    """PEFT's model of an adapter. A warning of a missing or an unexpected key is an error, as all are."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # PEFT reads attributes that transformers has renamed
            warnings.simplefilter("ignore", category)
        from peft import PeftModel

        return PeftModel.from_pretrained(read_plain(base), folder)


def read(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


@with_peft
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_peft_computes_what_the_mask_does(base: Base, tmp_path: Path, kind: AdapterKind, gamma: float) -> None:
    mask = make_mask(base, kind)
    export_adapter(base, mask, kind, gamma, tmp_path)
    adapted, materialised = load_peft(base, tmp_path), world.materialise(base.model, mask, gamma)
    ids = torch.randint(6, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected, unmasked = (model(ids).logits for model in (adapted, materialised, base.model))
    manager = MaskManager.attach(base.model)
    ours = logits_of(base, ids, [Span(AppliedMask(manager.fit(mask), gamma), 0, 40)])
    manager.detach()
    for other in (expected, ours):
        assert (found - other).abs().max() <= TOLERANCE[torch.float32] * expected.std()
    with torch.no_grad():
        exact, found = (copy.deepcopy(model).double()(ids).logits for model in (materialised, adapted))
    assert (found - exact).abs().max() <= TOLERANCE[torch.float64] * exact.std()
    assert (unmasked - expected).abs().max() > 1e-2 * expected.std()  # the mask has an effect
    prompt = ids[0, :20].tolist()
    tokens = adapted.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 20), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert world.speak(base.model, materialised, prompt, 12).agrees(tokens[0, 20:].tolist())


@with_peft
@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_merges_it_into_the_weights_and_saves_it_as_it_was(family: str, tmp_path: Path, kind: AdapterKind) -> None:
    base = load(str(families.make_family(tmp_path / "base", family)), device="cpu")
    mask = make_mask(base, kind)
    export_adapter(base, mask, kind, 0.0, tmp_path / "a")
    adapted = load_peft(base, tmp_path / "a")
    adapted.save_pretrained(tmp_path / "b", save_embedding_layers=False)  # the base is on no hub
    written, again = read(tmp_path / "a")[1], read(tmp_path / "b")[1]
    assert written.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in written.items())
    merged, expected = adapted.merge_and_unload(), world.materialise(base.model, mask, 0.0)
    for name in mask.targets:  # W - W is exactly 0
        assert torch.equal(merged.get_submodule(name).weight, expected.get_submodule(name).weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_has_one_rank_and_scale_for_every_engine(base: Base, tmp_path: Path, dtype: str) -> None:
    """And all Linears of a kind, and all of a group that engines fuse: some read no part of it."""
    base = load(str(base.path), device="cpu", dtype=dtype)
    mask = make_mask(base, "lora")
    some = (".1.self_attn.k_proj", ".1.self_attn.o_proj")
    kept = {name: target for name, target in mask.targets.items() if name.endswith(some)}
    done = export_adapter(base, replace(mask, targets=kept), "lora", 0.25, tmp_path)
    config, tensors = read(tmp_path)
    assert config["r"] == config["lora_alpha"] == done.rank == max(t.pruned // t.shape[0] for t in kept.values())
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj"} if any(name.endswith("k_proj") for name in kept) else {"o_proj"}
    assert set(config["target_modules"]) == kinds
    adapted = {name: linear for name, linear in find_targets(base.model).items() if name.rpartition(".")[2] in kinds}
    assert done.modules == len(adapted)
    assert tensors.keys() == {f"base_model.model.{name}.lora_{x}.weight" for name in adapted for x in "AB"}
    for name, linear in adapted.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert (a.shape, b.shape) == ((done.rank, linear.in_features), (linear.out_features, done.rank))
        assert a.dtype == b.dtype == base.dtype
        assert name in kept or not b.any()
    assert done.nbytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        origin = json.loads(file.metadata()["masquerade"])
    assert (origin["base"], origin["gamma"]) == (base.fingerprint, 0.25)


def test_it_subtracts_the_weights_that_a_gguf_file_has_rounded(tmp_path: Path) -> None:
    file = ggufs.write(tmp_path / "m.gguf", ggufs.make_model("llama"), ggufs.quantise(GGMLQuantizationType.Q8_0))
    base = load(str(file.path), device="cpu")
    mask = make_mask(base, "lora")
    export_adapter(base, mask, "lora", 0.0, tmp_path)
    for name, target in mask.targets.items():
        a, b = (read(tmp_path)[1][f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        kept = torch.from_numpy(target.to_keep())
        assert torch.equal(b @ a, -file.expected[f"{name}.weight"].masked_fill(kept, 0))


def test_what_an_adapter_cannot_say_is_refused(tiny: Base, tmp_path: Path) -> None:
    single, name = make_mask(tiny, "shira"), "model.layers.0.mlp.up_proj"
    pruned = np.zeros((96, 64), bool)
    pruned[:, 3] = pruned[:5, 7] = True
    partly = replace(single, targets={name: encode(pruned)})
    nothing = replace(single, targets={name: encode(np.zeros((96, 64), bool))})
    small = "model.layers.0.self_attn.k_proj"
    dense = {name: encode(np.arange(64) < np.full((96, 1), 38)), small: encode(np.eye(32, 64) > 0)}
    missing = replace(single, targets={"model.embed_tokens": encode(np.eye(96, 64) > 0)})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {}}))
    cases: list[tuple[Base, Mask, AdapterKind, float, type[Exception], str]] = [
        (tiny, partly, "lora", 0, InvalidValue, "5 of the 101 weights .*--structure channels.*--as shira"),
        (tiny, nothing, "lora", 0, InvalidValue, "'p' is the base, as its mask prunes no weight"),
        (tiny, single, "lora", 1.5, InvalidValue, r"gamma is 1\.5; it must lie in \[0, 1\]"),
        (tiny, single, "shira", 1, InvalidValue, "'p' is the base, as its gamma is 1"),
        (tiny, replace(single, targets=dense), "shira", 0, InvalidValue, "needs 23, and .*k_proj has room for 21"),
        (tiny, missing, "lora", 0, MaskMismatch, "'model.embed_tokens' is not a maskable Linear"),
        (replace(tiny, path=tmp_path), single, "shira", 0, UnusableModel, "is a model of text and images"),
    ]
    for base, mask, kind, gamma, error, words in cases:
        with pytest.raises(error, match=words):
            export_adapter(base, mask, kind, gamma, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_quantised_base_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = load(str(tiny_folder), device="cpu", quantization="nf4")
    with pytest.raises(UnusableModel, match=r"model\.layers\.0\.self_attn\.q_proj of .* is quantised in its files"):
        export_adapter(base, make_mask(base, "shira"), "shira", 0.0, tmp_path)
