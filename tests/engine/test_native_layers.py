"""Decoder layers in one native call, against transformers' forward of the same layers and the same plan."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from masquerade.engine import Engine, Request, attention
from masquerade.engine.batch import pack
from masquerade.engine.kv_cache import KVCache
from masquerade.engine.scheduler import Chunk
from masquerade.kernels import native
from masquerade.model import AppliedMask, Base, MaskManager, load, make_route
from tests import families, world
from tests.engine.asking import ask, finish

pytestmark = pytest.mark.skipif(native.find_library() is None, reason="the native kernels were not built here")
# by family: how its config differs from that of `families`, and how many of two layers are native
NATIVE: Mapping[str, tuple[dict[str, Any], int]] = {
    "Llama 2": ({}, 2),
    "Llama 3": ({}, 2),
    "Mistral": ({"sliding_window": None}, 2),
    "Qwen2": ({}, 1),  # the other layer has a sliding window
    "Qwen2.5": ({}, 2),
    "Qwen3": ({}, 2),
    "SmolLM3": ({}, 2),
    "Granite": ({}, 2),
    "Seed-OSS": ({}, 2),
    "Hunyuan": ({}, 2),
}
BEFORE, AFTER = 21, 5  # positions of each request that are computed at once, and those of a prompt that follow
BLOCKS = 3  # of a request


class Batches:
    """Requests of the base and of masks of both kinds, whose prompts are computed before the batch that counts: two
    decodes with a mask each and one of the base, and two chunks of prompts.
    """

    def __init__(self, base: Base, manager: MaskManager) -> None:
        masks = [manager.fit(world.make_mask(base, rho, seed=seed)) for seed, rho in enumerate((0.004, 0.3))]
        worn = [AppliedMask(masks[0], 0.0), None, AppliedMask(masks[1], 0.4), AppliedMask(masks[1], 0.0), None]
        rows = (1, 1, 1, AFTER, AFTER)
        rng = np.random.default_rng(1)
        self.base, self.chunks = base, [*zip((self._request(rng, one) for one in worn), rows, strict=True)]
        for index, (request, _) in enumerate(self.chunks):
            request.batch_index = index
        order = 1 + np.random.default_rng(2).permutation(len(worn) * BLOCKS)
        self.table = order.reshape(len(worn), BLOCKS)
        self.keys: ReferenceType[Tensor] | None = None  # of the last cache

    @staticmethod
    def _request(rng: np.random.Generator, applied: AppliedMask | None) -> Request:
        return Request(rng.integers(6, 250, BEFORE + AFTER).tolist(), 4, lambda _: None, applied)

    def run(self, dtype: torch.dtype, only: Sequence[int] = range(5), *, natively: bool = True) -> Tensor:
        """The last hidden states of the rows of some requests, [rows, hidden]."""
        model = self.base.model
        cache = KVCache(model.config, self.table.size, dtype, torch.device("cpu"))
        self.keys = ref(cache.keys)
        cache.zero([*range(1, self.table.size + 1)])
        self._forward(cache, [(self.chunks[place][0], 0, BEFORE) for place in only], natively)
        rows = [(request, BEFORE, BEFORE + count) for request, count in (self.chunks[place] for place in only)]
        return self._forward(cache, rows, natively)

    @torch.inference_mode()
    def _forward(self, cache: KVCache, chunks: Sequence[tuple[Request, int, int]], natively: bool) -> Tensor:
        packed = [Chunk(request, start, stop, False) for request, start, stop in chunks]
        batch = pack(packed, self.table, [cache], make_route)
        plan = batch.plan if natively else replace(batch.plan, paged=None)
        states: list[Tensor] = []
        handle = self.base.model.base_model.register_forward_hook(lambda _, __, output: states.append(output[0][0]))
        try:
            self.base.model(
                input_ids=batch.ids,
                position_ids=batch.positions,
                attention_mask=attention.NO_MASK,
                use_cache=False,
                logits_to_keep=1,
                route=batch.route,
                plan=plan,
            )
        finally:
            handle.remove()
        return states[0]


@pytest.fixture(params=NATIVE, ids=str)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Base, MaskManager]]:
    folder = families.make_family(tmp_path, request.param, **families.WIDE | NATIVE[request.param][0])
    yield from ((request.param, *attached) for attached in attach(load(str(folder), device="cpu")))


@pytest.fixture
def llama(tmp_path: Path) -> Iterator[tuple[Base, MaskManager]]:
    yield from attach(load(str(families.make_family(tmp_path, "Llama 3", **families.WIDE)), device="cpu"))


def attach(base: Base) -> Iterator[tuple[Base, MaskManager]]:
    manager = MaskManager.attach(base.model)
    base.model.set_attn_implementation(attention.NAME)
    yield base, manager
    manager.detach()


def count_native(base: Base) -> int:
    return sum("forward" in vars(module) for module in base.model.modules())


def normalise_in_double(module: Any, x: Tensor) -> Tensor:
    """RMSNorm with a sum that no order of its addends changes; rounded where transformers rounds."""
    variance = x.double().pow(2).mean(-1, keepdim=True).float()
    return module.weight * (x.float() * torch.rsqrt(variance + module.variance_epsilon)).to(x.dtype)


def test_layers_equal_those_of_transformers(family: tuple[str, Base, MaskManager], monkeypatch: Any) -> None:
    """In fp32 up to the last bits. In bf16 a sum of squares or an exponential that differs in its last bits can round
    otherwise; where torch's are computed in double, nearly all rows are equal to the bit.
    """
    name, base, manager = family
    assert count_native(base) == NATIVE[name][1]
    batches = Batches(base, manager)
    found, expected = (batches.run(torch.float32, natively=natively) for natively in (True, False))
    assert not torch.equal(found, expected), "nothing was computed natively"
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    base.model.to(torch.bfloat16)
    batches = Batches(base, manager)  # lists have the weights' values
    norm = type(base.model.model.norm)
    monkeypatch.setattr(norm, "forward", normalise_in_double)
    monkeypatch.setattr(nn.functional, "silu", lambda x: (x.double() * x.double().sigmoid()).float().to(x.dtype))
    found, expected = (batches.run(torch.bfloat16, natively=natively) for natively in (True, False))
    equal = (found == expected).all(-1)
    assert equal.float().mean() >= 0.8, equal
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_row_depends_on_another(llama: tuple[Base, MaskManager], dtype: torch.dtype) -> None:
    base, manager = llama
    base.model.to(dtype)
    batches = Batches(base, manager)
    together, row = batches.run(dtype), 0
    for place, (_, rows) in enumerate(batches.chunks):
        assert torch.equal(batches.run(dtype, [place]), together[row : row + rows])
        row += rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """With so many rows and outputs that everything is divided."""
    wide = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1, "max_position_embeddings": 1024}
    for base, _ in attach(load(str(world.make_model(tmp_path, **wide)), device="cpu")):
        base.model.to(dtype)
        engine = Engine(base)
        found = []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                request, listener = ask([7 + place % 250 for place in range(600)], 2, prompt_logprobs=0)
                engine.submit(request)
                finish(engine)
                found.append(listener.events)
        finally:
            torch.set_num_threads(1)
        engine.stop()
        assert found[0] == found[1]


def test_what_looks_into_layers_sees_transformers(llama: tuple[Base, MaskManager]) -> None:
    """A hook anywhere in the layers, or training, turns the native call off."""
    base, manager = llama
    batches, seen = Batches(base, manager), []
    plain, native_states = (batches.run(torch.float32, natively=natively) for natively in (False, True))
    layers = base.model.model.layers
    for module in (layers[0], layers[1].mlp, layers[1].self_attn.o_proj):
        handle = module.register_forward_hook(lambda module, _, __: seen.append(module))
        assert torch.equal(batches.run(torch.float32), plain)
        handle.remove()
        assert seen[-1] is module
    base.model.train()
    assert torch.equal(batches.run(torch.float32), plain)
    base.model.eval()
    assert torch.equal(batches.run(torch.float32), native_states)


def test_masks_that_the_kernels_do_not_apply_go_to_transformers(llama: tuple[Base, MaskManager]) -> None:
    base, manager = llama
    batches = Batches(base, manager)
    mask = world.make_mask(base, 0.1, seed=3)
    batches.chunks[1][0].applied = AppliedMask(manager.fit(mask, "reference"), 0.0)
    assert torch.equal(*(batches.run(torch.float32, natively=natively) for natively in (True, False)))


def test_a_copy_of_the_model_has_layers_of_its_own(llama: tuple[Base, MaskManager]) -> None:
    base, _ = llama
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        before = base.model(ids).logits
        other = copy.deepcopy(base.model)
        for parameter in other.parameters():
            parameter.mul_(0.5)
        assert torch.equal(base.model(ids).logits, before)
        assert not torch.equal(other(ids).logits, before)
    layer, own = base.model.model.layers[0], other.model.layers[0]
    assert vars(own)["forward"]._layer is own
    assert vars(layer)["forward"]._layer is layer


def test_detaching_restores_every_forward(llama: tuple[Base, MaskManager]) -> None:
    base, manager = llama
    assert count_native(base) == 2
    manager.detach()
    assert count_native(base) == 0
    assert all(type(module).__name__ != "MaskedLinear" for module in base.model.modules())


@pytest.mark.parametrize("name", ["Mistral", "Gemma 2", "ERNIE 4.5", "OLMo 2", "Ministral 3"])
def test_other_layers_stay_as_they_are(tmp_path: Path, name: str) -> None:
    """Windows, caps, and other norms, rotations and orders."""
    for base, _ in attach(load(str(families.make_family(tmp_path, name)), device="cpu")):
        assert count_native(base) == 0


def test_no_cache_lives_for_its_last_step(llama: tuple[Base, MaskManager]) -> None:
    batches = Batches(*llama)
    batches.run(torch.float32)
    gc.collect()
    assert batches.keys is not None
    assert batches.keys() is None
