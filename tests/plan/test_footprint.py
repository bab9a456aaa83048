"""What is planned is what is taken: weights, KV cache and masks of models that are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from maskstore import BaseRef, Mask, MaskInfo, encode
from masquerade import kernels
from masquerade.engine import Engine, EngineConfig, Request, SamplingParams
from masquerade.errors import UnusableModel
from masquerade.model import Base, MaskManager, find_targets, load
from masquerade.model.quantized import QUANTIZATIONS, measure_weight
from masquerade.packaged import find_packaged
from masquerade.plan.fit import Workload, fit
from masquerade.plan.footprint import RHOS, find_window, measure_persona, measure_pool, measure_weights
from masquerade.plan.outline import Outline, read_outline
from masquerade.sources import find_model
from tests import world
from tests.cli.running import masquerade

WAYS = [None, *QUANTIZATIONS]


def outline_of(path: Path | str, device: str = "cpu", dtype: str = "auto") -> Outline:
    return read_outline(find_model(str(path)), device, dtype)


def weigh(model: nn.Module) -> int:
    """Bytes of every tensor that a model keeps as weights, bitsandbytes' own included."""
    return sum(sum(tensor.nbytes for tensor in _tensors(parameter)) for parameter in model.parameters())


def _tensors(parameter: Any) -> Iterator[torch.Tensor]:
    yield parameter.data
    if (scales := getattr(parameter, "SCB", None)) is not None:
        yield scales
    if (state := getattr(parameter, "quant_state", None)) is not None:
        yield from (state.absmax, state.code)


def prune_exactly(base: Base, rho: float) -> Mask:
    """A mask that prunes the share of each Linear, at random places."""
    rng, targets = np.random.default_rng(0), {}
    for name, linear in find_targets(base.model).items():
        out, columns = linear.out_features, linear.in_features
        pruned = np.zeros(out * columns, np.bool_)
        pruned[rng.permutation(out * columns)[: round(rho * out * columns)]] = True
        targets[name] = encode(pruned.reshape(out, columns))
    return Mask(BaseRef(base.fingerprint, base.name), targets, MaskInfo(persona="p", score="random"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", WAYS)
def test_weights(tiny_folder: Path, how: str | None, dtype: str) -> None:
    base = load(str(tiny_folder), device="cpu", dtype=dtype, quantization=how)
    outline = outline_of(tiny_folder, dtype=dtype)
    assert measure_weights(outline, outline.dtype, how) == weigh(base.model)


@pytest.mark.parametrize("how", QUANTIZATIONS)
def test_weights_that_are_quantised_in_their_files(tmp_path: Path, how: str) -> None:
    plain = world.make_model(tmp_path / "plain", intermediate_size=128)
    config = {"load_in_8bit": True} if how == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": how}
    AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(**config), dtype=torch.float32, device_map={"": "cpu"}
    ).save_pretrained(tmp_path / "stored")
    world.make_tokenizer().save_pretrained(tmp_path / "stored")
    outline = outline_of(tmp_path / "stored")
    assert outline.stored == how
    assert measure_weights(outline, outline.dtype, how) == weigh(load(str(tmp_path / "stored"), device="cpu").model)
    workload = Workload(1, 16, 1, 0.0001)
    assert fit(outline, workload, 2**40, how).lines[1].nbytes == measure_weights(outline, outline.dtype, how)
    for device in ("cpu", "cuda"):
        done = masquerade("plan", "--model", tmp_path / "stored", "--device", device, "--memory", "1GiB")
        assert done.status == 0
        assert [line.split(":")[0] for line in done.stdout.splitlines() if line.endswith("; served")] == [f"  {how}"]


def test_rows_that_cannot_be_kept_in_4_bits_are_refused_as_they_are_when_loading(tmp_path: Path) -> None:
    folder = world.make_model(tmp_path, hidden_size=48, intermediate_size=80)
    with pytest.raises(ValueError, match="rows of 48 weights"):
        measure_weight(nn.Linear(48, 48), "nf4")
    with pytest.raises(UnusableModel, match="rows of 48 weights"):
        load(str(folder), device="cpu", quantization="nf4")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("rho", [*RHOS, 0.5])
def test_a_persona_is_as_large_as_its_mask_on_the_device(
    tiny_folder: Path, how: str | None, dtype: str, rho: float
) -> None:
    base = load(str(tiny_folder), device="cpu", dtype=dtype, quantization=how)
    resident = MaskManager.attach(base.model).fit(prune_exactly(base, rho))
    planned = measure_persona(outline_of(tiny_folder, dtype=dtype), rho, how)
    assert planned.nbytes == resident.nbytes
    assert planned.pruned == sum(target.pruned for target in prune_exactly(base, rho).targets.values())


@pytest.mark.parametrize("backends", [("list", "bits"), ("sparse", "reference")])
def test_both_forms_are_measured(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, backends: tuple[str, str]) -> None:
    if "sparse" in backends:
        monkeypatch.setattr(kernels.native, "find_library", lambda: None)
    base = load(str(tiny_folder), device="cpu")
    planned = measure_persona(outline_of(tiny_folder), 0.003)
    manager, mask = MaskManager.attach(base.model), prune_exactly(base, 0.003)
    assert [manager.fit(mask, backend).nbytes for backend in backends] == [planned.listed, planned.bitmaps]
    assert planned.forms == backends[:1]


def test_a_cuda_device_that_is_not_here_has_its_own_forms(tiny_folder: Path) -> None:
    outline = outline_of(tiny_folder, "cuda", "bfloat16")
    planned = [measure_persona(outline, rho) for rho in (0.003, 0.5)]
    assert [one.forms for one in planned] == [("cuda-list",), ("cuda-bits",)]
    rows = sum(linear.out_features + 1 for linear in outline.linears.values())
    assert planned[0].nbytes == 4 * rows + 4 * planned[0].pruned


@pytest.mark.parametrize(("running", "cache_bytes"), [(2, 2**30), (4, 100_000), (1, 1)])
def test_the_cache_is_the_engines(tiny: Base, tiny_folder: Path, running: int, cache_bytes: int) -> None:
    MaskManager.attach(tiny.model)
    config = EngineConfig(max_running=running, cache_bytes=cache_bytes)
    engine = Engine(tiny, config)
    cache = engine._cache
    planned = measure_pool(outline_of(tiny_folder), running, cache_bytes)
    assert planned == (engine.occupancy.blocks_empty, cache.keys.nbytes + cache.values.nbytes)
    engine.stop()


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": 64}, (64, 6)),
        ("mistral", {"sliding_window": None}, None),
        ("gemma2", {"sliding_window": 32}, (32, 3)),
        ("gemma3_text", {"sliding_window": 32}, (32, 5)),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": False}, None),
    ],
)
def test_sliding_windows_are_found(family: str, changes: dict[str, Any], window: tuple[int, int] | None) -> None:
    assert find_window(AutoConfig.for_model(family, num_hidden_layers=6, **changes)) == window


def test_a_cache_of_the_planned_bytes_holds_the_planned_requests(tiny: Base, tiny_folder: Path) -> None:
    found = fit(outline_of(tiny_folder), Workload(2, 100, 3, 0.01), 2**30)
    MaskManager.attach(tiny.model)
    engine = Engine(tiny, EngineConfig(max_running=3, cache_bytes=found.cache_bytes))
    prompts = [[number + 6] * 80 for number in range(3)]
    answers = engine.generate(
        Request(prompt, 20, lambda _: None, min_tokens=20, sampling=SamplingParams(temperature=0)) for prompt in prompts
    )
    assert [len(answer) for answer in answers] == [20, 20, 20]
    assert engine.counts.preemptions == 0
    engine.stop()


@pytest.mark.real
def test_smollm2_takes_what_is_planned() -> None:
    try:
        find_packaged("smollm2")
    except UnusableModel as error:
        pytest.skip(str(error))
    base, outline = load("smollm2", device="cpu"), outline_of("smollm2")
    assert (outline.parameters, outline.dtype) == (134_515_008, base.dtype)
    assert measure_weights(outline, outline.dtype) == weigh(base.model)
    resident = MaskManager.attach(base.model).fit(prune_exactly(base, 0.0008))
    assert measure_persona(outline, 0.0008).nbytes == resident.nbytes
