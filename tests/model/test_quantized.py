"""A masked quantised base computes what its dequantised weights do, whether it or its files were quantised."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from maskstore import Mask
from masquerade.engine import Engine, Request, SamplingParams
from masquerade.errors import UnusableModel
from masquerade.kernels import dense_tiles, dense_weight, weights
from masquerade.model import AppliedMask, Base, MaskManager, Span, find_targets, load, make_route
from masquerade.model.quantized import QUANTIZATIONS, quantize
from tests import world

# Largest difference of logits from the dequantised, masked weights, relative to their spread. NF4 rounds weights only,
# so its products are those of the dequantised weights; int8 rounds every input to 8 bits, which the reference does not.
TOLERANCE = {"nf4": 1e-4, "fp4": 1e-4, "int8": 0.5}


def on_cpu(_: str) -> torch.device:
    """Where each Linear is to be."""
    return torch.device("cpu")


def materialise(base: Base, dense: Any, mask: Mask | None, gamma: float) -> Any:
    """The oracle: a plain model whose Linears hold what the quantised ones stand for, masked."""
    plain = world.materialise(dense.model, None, 1.0)
    for name in find_targets(plain):
        plain.get_submodule(name).weight.data = dense_weight(base.model.get_submodule(name)).to(dense.dtype)
    return world.materialise(plain, mask, gamma)


@pytest.fixture(params=QUANTIZATIONS)
def quantised(request: pytest.FixtureRequest, tiny_folder: Path) -> tuple[str, Base]:
    return request.param, load(str(tiny_folder), device="cpu", quantization=request.param)


def test_logits_are_those_of_the_dequantised_masked_weights(quantised: tuple[str, Base], tiny: Base) -> None:
    how, base = quantised
    check_logits(base, tiny, TOLERANCE[how])


def check_logits(base: Base, dense: Base, near: float) -> None:
    """Logits of a batch of the base, lists and bitmaps at several gammas, within `near` standard deviations."""
    manager = MaskManager.attach(base.model)
    masks = [world.make_mask(base, rho, seed) for seed, rho in enumerate((0.003, 0.3, 0.5))]
    worn = [(None, 1.0), (masks[0], 0.0), (masks[1], 0.0), (masks[1], 0.5), (masks[2], 0.25), (masks[0], 0.75)]
    ids = torch.randint(6, 250, (1, 8), generator=torch.Generator().manual_seed(0))
    resident = {mask: manager.fit(mask) for mask in masks}
    spans = [
        Span(AppliedMask(resident[mask], gamma), 8 * place, 8 * (place + 1))
        for place, (mask, gamma) in enumerate(worn)
        if mask
    ]
    rows = ids.expand(len(worn), -1)
    with torch.no_grad():
        expected = [materialise(base, dense, mask, gamma)(ids).logits[0].float() for mask, gamma in worn]
        for _ in range(2):  # the first product moves int8 weights
            found = base.model(rows, use_cache=False, route=make_route(spans)).logits.float()
            for one, other in zip(found, expected, strict=True):
                assert (one - other).abs().max() < near * other.std()
    assert (expected[0] - expected[2]).abs().max() > near * expected[0].std()  # the mask is felt


@pytest.mark.parametrize("how", ["nf4", "fp4"])
def test_tokens_of_many_personas_in_one_batch_equal_the_oracle(how: str, tiny_folder: Path, tiny: Base) -> None:
    base = load(str(tiny_folder), device="cpu", quantization=how)
    check_tokens(base, tiny)


def check_tokens(base: Base, dense: Base) -> None:
    """Greedy answers of the base, two lists and a bitmap in one batch are those of plain models."""
    manager = MaskManager.attach(base.model)
    masks = [None, *(world.make_mask(base, rho, seed) for seed, rho in enumerate((0.003, 0.01, 0.3)))]
    prompts = [torch.randint(6, 250, (12,), generator=torch.Generator().manual_seed(s)).tolist() for s in range(4)]
    applied_masks = [AppliedMask(manager.fit(mask), 0.25) if mask else None for mask in masks]
    engine = Engine(base)
    answers = engine.generate(
        Request(prompt, 16, lambda _: None, applied, sampling=SamplingParams(temperature=0))
        for prompt, applied in zip(prompts, applied_masks, strict=True)
    )
    engine.stop()
    for prompt, mask, answer in zip(prompts, masks, answers, strict=True):
        plain = materialise(base, dense, mask, 0.25)
        assert world.speak(plain, plain, prompt, 16).agrees(answer)


@pytest.mark.parametrize("tile", [1, 1000, 3000, weights.TILE])
@pytest.mark.parametrize("inputs", [64, 96, 172, 250])
@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_tiles_are_the_rows_of_the_weight(how: str, inputs: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, name = nest(nn.Linear(inputs, 50, bias=False))
    quantize(model, how, on_cpu)
    linear = model.get_submodule(name)
    whole = dense_weight(linear)
    if state := getattr(linear.weight, "quant_state", None):
        assert torch.equal(whole, bitsandbytes.functional.dequantize_4bit(linear.weight.data, state))
    monkeypatch.setattr(weights, "TILE", tile)
    tiles = list(dense_tiles(linear))
    assert [begin for begin, _ in tiles] == list(np.cumsum([0, *(len(part) for _, part in tiles)]))[:-1]
    assert torch.equal(torch.cat([part for _, part in tiles]), whole)
    assert max(len(part) for _, part in tiles) <= max(tile // inputs, 32)


def test_a_bitmap_is_applied_tile_by_tile(
    quantised: tuple[str, Base], tiny: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, base = quantised
    monkeypatch.setattr(weights, "TILE", 1000)
    check_logits(base, tiny, TOLERANCE[how])


def test_it_is_the_same_base_in_fewer_bytes(quantised: tuple[str, Base], tiny: Base) -> None:
    how, base = quantised
    assert base.fingerprint == tiny.fingerprint
    assert find_targets(base.model).keys() == find_targets(tiny.model).keys()
    shrunk, whole = (sum(linear.weight.nbytes for linear in find_targets(one.model).values()) for one in (base, tiny))
    assert whole == shrunk * {"int8": 4, "nf4": 8, "fp4": 8}[how]
    for name, linear in find_targets(base.model).items():
        weight = tiny.model.get_submodule(name).weight
        assert (dense_weight(linear) - weight).norm() < {"int8": 0.02, "nf4": 0.12, "fp4": 0.2}[how] * weight.norm()


def nest(linear: Any) -> tuple[Any, str]:
    """A model that has this Linear alone, and its name."""
    name = "model.layers.0.mlp.up_proj"
    for part in reversed(name.split(".")):
        linear = nn.ModuleDict({part: linear})
    return linear, name


@pytest.mark.parametrize("inputs", [*range(16, 320, 32), 32, 64, 96, 160, 172])
def test_no_row_is_misread_in_nf4(inputs: int) -> None:
    model, name = nest(nn.Linear(inputs, 64, bias=False))
    weight = model.get_submodule(name).weight.detach().clone()
    if inputs % 32 == 16:
        with pytest.raises(UnusableModel, match=rf"{name}: rows of {inputs} weights"):
            quantize(model, "nf4", on_cpu)
    else:
        quantize(model, "nf4", on_cpu)
        assert (dense_weight(model.get_submodule(name)) - weight).norm() < 0.12 * weight.norm()


def test_without_bitsandbytes_it_says_what_to_install(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnusableModel, match=r"masquerade\[quantization\]"):
        load(str(tiny_folder), device="cpu", quantization="nf4")


STORED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A model whose rows are whole blocks of 64."""
    return load(str(world.make_model(tmp_path_factory.mktemp("plain"), intermediate_size=128)), device="cpu")


@pytest.fixture(scope="module", params=STORED)
def stored(request: pytest.FixtureRequest, plain: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that transformers quantised and saved."""
    folder = tmp_path_factory.mktemp("stored") / str(request.param)
    how = BitsAndBytesConfig(**STORED[request.param])
    AutoModelForCausalLM.from_pretrained(
        plain.path, quantization_config=how, dtype=torch.float32, device_map={"": "cpu"}
    ).save_pretrained(folder)
    world.make_tokenizer().save_pretrained(folder)
    return folder


def test_a_checkpoint_of_bitsandbytes_is_served_as_it_is(stored: Path, plain: Base) -> None:
    base = load(str(stored), device="cpu")
    assert base.fingerprint != plain.fingerprint
    assert base.quantization is None
    assert find_targets(base.model).keys() == find_targets(plain.model).keys()
    if stored.name != "int8":
        check_tokens(base, plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_logits_are_those_of_its_dequantised_masked_weights(stored: Path, plain: Base, dtype: str) -> None:
    how = "int8" if stored.name == "int8" else "nf4"
    near = TOLERANCE[how] if dtype == "float32" else 0.5
    check_logits(load(str(stored), device="cpu", dtype=dtype), plain, near)


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_what_is_quantised_is_not_quantised_again(stored: Path, how: str) -> None:
    with pytest.raises(UnusableModel, match=r"is already quantised; leave the option out"):
        load(str(stored), device="cpu", quantization=how)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "'gptq'"),
        ({"quant_method": "awq", "bits": 4, "zero_point": True}, "'awq'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "'compressed-tensors'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "'fp8'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),
        ({"bits": 4}, "None"),
        ("int4", "'int4'"),
        (["awq"], "awq"),
        ("bitsandbytes", "'bitsandbytes'"),
    ],
)
def test_another_quantisation_is_refused_by_name(tmp_path: Path, config: Any, method: str) -> None:
    folder = rewrite_config(world.make_model(tmp_path / "m"), quantization_config=config)
    with pytest.raises(UnusableModel, match=rf"'m' is quantised with .*{method}.* in its files; take the unquantised"):
        load(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("method", "message"),
    [("awq", "is quantised with 'awq' in its files"), ("bitsandbytes", "model of text and images")],
)
def test_a_part_for_text_that_is_quantised_is_refused(tmp_path: Path, method: str, message: str) -> None:
    text = {"quantization_config": {"quant_method": method, "load_in_4bit": True}}
    folder = rewrite_config(world.make_model(tmp_path / "m"), text_config=text)
    with pytest.raises(UnusableModel, match=message):
        load(str(folder), device="cpu")


def test_a_config_that_claims_a_quantisation_that_is_not_there_is_refused(plain: Base, tmp_path: Path) -> None:
    """It would load, and fail at the first request."""
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = rewrite_config(shutil.copytree(plain.path, tmp_path / "m"), quantization_config=how)
    with pytest.raises(UnusableModel, match="and they are not; remove its `quantization_config`"):
        load(str(folder), device="cpu")


@pytest.mark.parametrize("kind", ["nf5", None, ["nf4"]])
def test_a_4_bit_form_that_is_none_is_refused(stored: Path, tmp_path: Path, kind: Any) -> None:
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    folder = rewrite_config(shutil.copytree(stored, tmp_path / "m"), quantization_config=how)
    with pytest.raises(UnusableModel, match="it must be nf4 or fp4"):
        load(str(folder), device="cpu")


def test_packed_weights_without_a_word_in_the_config_are_refused(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "m")
    rewrite_config(tmp_path / "m", quantization_config=None)
    with pytest.raises(UnusableModel, match=r"'m' has the quantised tensor model\.layers\.0.*no `quantization_config`"):
        load(str(tmp_path / "m"), device="cpu")


def test_rows_that_bitsandbytes_misreads_are_refused_in_a_checkpoint(tmp_path: Path) -> None:
    dense = world.make_model(tmp_path / "dense", hidden_size=48, intermediate_size=80)
    AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    ).save_pretrained(tmp_path / "m")
    world.make_tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(UnusableModel, match="rows of 48 weights in blocks of 64"):
        load(str(tmp_path / "m"), device="cpu")


def rewrite_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder
