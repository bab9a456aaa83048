"""What an engine does on a CUDA device, done on whatever there is: in Triton's interpreter if there is none."""

from __future__ import annotations

import gc
import random
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskstore import Mask
from masquerade.engine import Engine, EngineConfig, Request, SamplingParams
from masquerade.engine.attention import AttentionCall, Scores
from masquerade.engine.cuda import attention as cuda_attention
from masquerade.engine.cuda import graphs
from masquerade.engine.kv_cache import KVCache
from masquerade.engine.scheduler import Chunk
from masquerade.model import AppliedMask, Base, MaskManager, load, make_route
from masquerade.model import manager as manager_module
from tests import world

pytest.importorskip("triton")
from masquerade.engine.cuda import paged

pytestmark = pytest.mark.gpu

COUNT = 4
FORMS = ("cuda-list", "cuda-bits", "cuda-list")


@pytest.fixture
def tiny(tiny_folder: Path) -> Base:
    """On a CUDA device if there is one."""
    return load(str(tiny_folder), dtype="float32")


@pytest.fixture
def masks(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> Iterator[MaskManager]:
    """Masks on the small world as the CUDA kernels have them."""
    for chooser in ("serves", "serves_cuda"):
        monkeypatch.setattr(manager_module, chooser, lambda module: type(module) is nn.Linear)
    attached = MaskManager.attach(tiny.model)
    yield attached
    attached.detach()


@pytest.fixture(params=[False, True], ids=["no flash", "flash"])
def row_groups(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps made of the row groups for CUDA; flash attention, which no CPU has, is replaced by its definition."""
    monkeypatch.setattr(cuda_attention, "is_available", lambda _: True)
    monkeypatch.setattr(graphs, "prepare", lambda *_: None)
    monkeypatch.setattr(paged, "_PROGRAMS", 1)
    if request.param and not torch.cuda.is_available():
        monkeypatch.setattr(cuda_attention, "_supports_flash", lambda _: True)
        monkeypatch.setattr(cuda_attention, "varlen_attn", varlen_attn)


def varlen_attn(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **how: Any
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn as documented: causal from the last row and position back."""
    assert how["window_size"] == (-1, 0)
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    out = []
    for (start, stop), (first, last) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        seen = torch.ones(stop - start, last - first, dtype=torch.bool).tril(last - first - stop + start)
        query, key, value = (part.transpose(0, 1) for part in (q[start:stop], k[first:last], v[first:last]))
        mixed = F.scaled_dot_product_attention(query, key, value, seen, scale=how["scale"], enable_gqa=True)
        out.append(mixed.transpose(0, 1))
    return torch.cat(out)


def make_mask(base: Base, seed: int) -> Mask:
    """On few Linears, others for each mask: the interpreter is slow."""
    whole = world.make_mask(base, 0.05, seed)
    names = ("v_proj", "down_proj"), ("o_proj", "down_proj"), ("gate_proj",)
    return replace(whole, targets={name: whole.targets[name] for name in whole.targets if name.endswith(names[seed])})


def make_requests(base: Base, masks: MaskManager, lengths: list[int]) -> list[tuple]:
    """Lists and bitmaps, hard and soft, in both phases, and the base."""
    rng = random.Random(0)
    made = [make_mask(base, seed) for seed in range(len(FORMS))]
    masked = [(mask, masks.fit(mask, form)) for mask, form in zip(made, FORMS, strict=True)]
    chosen = []
    for number, length in enumerate(lengths):
        prompt = [rng.randrange(6, 260) for _ in range(length)]
        mask, applied = masked[number % len(masked)]
        gamma = (0.0, 0.3)[number % 2]
        phase = ("all", "decode")[number // 2 % 2]
        unmasked = number % 4 == 3
        request = Request(
            prompt,
            COUNT,
            lambda _: None,
            None if unmasked else AppliedMask(applied, gamma),
            phase,
            SamplingParams(temperature=0),
        )
        chosen.append((request, None if unmasked else mask, gamma))
    return chosen


def test_a_forward_pass_that_fails_leaves_no_outputs_of_merged_linears(tiny: Base, masks: MaskManager) -> None:
    """Between the calls of gate and up: the next pass may be another batch's, and memory is short."""
    mlp: Any = tiny.model.model.layers[0].mlp
    ids, kept = torch.tensor([[7, 8, 9]], device=tiny.device), []

    def fail(*_: object) -> None:
        kept.append(len(mlp.up_proj.merged._outputs))
        raise torch.OutOfMemoryError("CUDA out of memory")

    mlp.act_fn.register_forward_pre_hook(fail)
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError):
        tiny.model(ids, route=make_route([]))
    assert kept == [1]
    assert not mlp.up_proj.merged._outputs
    assert mlp.up_proj.merged._input is None


@pytest.mark.usefixtures("row_groups")
def test_tokens_of_the_row_groups_equal_the_oracle(tiny: Base, masks: MaskManager) -> None:
    """Prompts whole and in chunks, several in a step, and decodes beside them."""
    rng = random.Random(1)
    prompts = [[rng.randrange(6, 260) for _ in range(length)] for length in (21, 6, 40, 3)]
    mask = world.make_mask(tiny, 0.003, seed=1)
    applied_masks = [None, AppliedMask(masks.fit(mask), 0.0), None, None]
    requests = [
        Request(prompt, COUNT, lambda _: None, applied, "all", SamplingParams(temperature=0))
        for prompt, applied in zip(prompts, applied_masks, strict=True)
    ]
    engine = Engine(tiny, EngineConfig(max_batch_tokens=32, max_running=4))
    answers = engine.generate(requests)
    engine.stop()
    for request, applied, answer in zip(requests, applied_masks, answers, strict=True):
        masked = world.materialise(tiny.model, mask if applied else None, 0.0)
        assert world.speak(tiny.model, masked, request.prompt, COUNT).agrees(answer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float32])
def test_packed_prompts_equal_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Flash attention on a device: a chunk after cached positions beside a whole prompt, and heads in groups."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(cuda_attention, "varlen_attn", varlen_attn)
    config = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=2, num_attention_heads=6, head_dim=16)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    cache = KVCache(config, 8, dtype, device)
    cache.keys.normal_(), cache.values.normal_()
    table = np.random.default_rng(0).permutation(8).reshape(2, 4) + 1
    sizes = [(20, 33), (0, 7)]
    chunks: list[Any] = [
        Chunk(SimpleNamespace(batch_index=index), start, stop, True)  # type: ignore[arg-type]
        for index, (start, stop) in enumerate(sizes)
    ]
    (group,) = cuda_attention.group_rows(chunks, table, cache)
    q, k, v = (torch.randn(20, heads, 16, device=device).to(dtype) for heads in (6, 2, 2))
    call = AttentionCall(0, Scores(0.25), cache, k, v)
    found = []
    for flash in (True, False):
        monkeypatch.setattr(cuda_attention, "_supports_flash", lambda _, flash=flash: flash)
        found.append(group.attend(q, call).float())
    assert torch.allclose(*found, atol=1e-5 if dtype is torch.float32 else 2e-2, rtol=0)


def test_heads_are_grouped_with_and_without_a_parameter_for_it() -> None:
    """Torch 2.11, which devices have, has none."""

    def new(q: Tensor, *, scale: float, enable_gqa: bool = False) -> Tensor:
        raise NotImplementedError

    def old(q: Tensor, *, scale: float) -> Tensor:
        raise NotImplementedError

    assert cuda_attention._group_heads(new) == {"enable_gqa": True}
    assert cuda_attention._group_heads(old) == {}


def test_tokens_equal_the_oracle(tiny: Base, masks: MaskManager) -> None:
    requests = make_requests(tiny, masks, [9, 3, 17, 5])
    engine = Engine(tiny, EngineConfig(max_batch_tokens=16, max_running=8))
    answers = engine.generate([request for request, _, _ in requests])
    engine.stop()
    masks.detach()
    for (request, mask, gamma), answer in zip(requests, answers, strict=True):
        oracle = world.speak(
            tiny.model, world.materialise(tiny.model, mask, gamma), request.prompt, COUNT, phase=request.phase
        )
        assert oracle.agrees(answer), (request.phase, gamma)


def test_steps_on_tensors_that_stay_put_equal_the_oracle(
    tiny: Base, masks: MaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that there is to CUDA graphs but the graph: padded sizes, inputs and slots written to before each step."""
    monkeypatch.setattr(paged, "_PROGRAMS", 1)
    captured = []

    def capture(run: graphs.Run) -> graphs.Run:
        captured.append(run)
        return graphs.capture(run) if tiny.device.type == "cuda" else run

    requests = make_requests(tiny, masks, [9, 3, 5])
    engine = Engine(tiny, EngineConfig(max_running=3))
    engine._graphs = graphs.DecodeGraphs(tiny, engine._cache, 3, capture)
    for request, _, _ in requests:  # of one row, of two, and of three that are padded to four
        engine.submit(request)
        engine.step()
    while engine.step():
        pass
    engine.stop()
    masks.detach()
    for request, mask, gamma in requests:
        masked = world.materialise(tiny.model, mask, gamma)
        oracle = world.speak(tiny.model, masked, request.prompt, COUNT, phase=request.phase)
        assert oracle.agrees(request.ids[len(request.prompt) :])
    assert captured
    scratch = slice(engine._cache.scratch_block * engine._cache.kv_heads, None)
    assert engine._cache.keys[:, scratch].any()  # padding went there
    assert not engine._cache.keys[:, : engine._cache.kv_heads].any()  # and not into the block that padding reads


@pytest.mark.parametrize("captures", [True, False])
def test_an_idle_engine_keeps_no_mask(tiny: Base, manager: MaskManager, captures: bool) -> None:
    """A load that needs the room of a mask would wait for it for ever."""

    def capture(run: graphs.Run) -> graphs.Run:
        if not captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        return run

    engine = Engine(tiny, EngineConfig(max_running=2))
    engine._graphs = graphs.DecodeGraphs(tiny, engine._cache, 2, capture)
    mask = manager.fit(world.make_mask(tiny, 0.02, seed=1))
    gone = weakref.ref(mask)
    engine.generate([Request([7, 8, 9], 4, lambda _: None, AppliedMask(mask, 0.0), "all")])
    del mask
    gc.collect()
    assert gone() is None
    engine.stop()


def test_a_mask_goes_with_its_last_request_while_others_run(tiny: Base, masks: MaskManager) -> None:
    """Steps with a prompt are no graphs; the last graph step must not keep what it was about."""
    engine = Engine(tiny, EngineConfig(max_running=2, max_batch_tokens=16))
    engine._graphs = graphs.DecodeGraphs(tiny, engine._cache, 2, lambda run: run)
    mask = masks.fit(make_mask(tiny, 0), FORMS[0])
    gone = weakref.ref(mask)
    engine.submit(Request([7, 8, 9], 3, lambda _: None, AppliedMask(mask, 0.0), "all"))
    del mask
    for _ in range(3):
        engine.step()
    engine.submit(Request([7] * 100, 2, lambda _: None))
    for _ in range(2):
        engine.step()
    gc.collect()
    assert engine.occupancy.running == 1
    assert gone() is None
    engine.stop()


def test_only_decodes_of_known_masks_are_graphs(tiny: Base, manager: MaskManager) -> None:
    """Prompts, and masks that no kernel finds by address, take the ordinary step."""
    engine = Engine(tiny, EngineConfig(max_running=2))
    engine._graphs = graphs.DecodeGraphs(tiny, engine._cache, 2, lambda _: pytest.fail("captured"))
    mask = world.make_mask(tiny, 0.02, seed=1)
    applied = AppliedMask(manager.fit(mask, "reference"), 0.0)
    request = Request([7, 8, 9], COUNT, lambda _: None, applied, "all", SamplingParams(temperature=0))
    (answer,) = engine.generate([request])
    engine.stop()
    assert len(answer) == COUNT


def test_a_step_that_cannot_be_captured_is_run_as_ever(
    tiny: Base, manager: MaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(run: graphs.Run) -> graphs.Run:
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = Engine(tiny, EngineConfig(max_running=2))
    engine._graphs = graphs.DecodeGraphs(tiny, engine._cache, 2, refuse)
    request = Request([7, 8, 9], COUNT, lambda _: None, sampling=SamplingParams(temperature=0))
    (answer,) = engine.generate([request])
    engine.stop()
    assert world.speak(tiny.model, tiny.model, [7, 8, 9], COUNT).agrees(answer)
    assert sum(record.name == graphs.__name__ for record in caplog.records) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_steps_equal_the_oracle(tiny_folder: Path) -> None:
    """The whole path as it is chosen on a CUDA device: kernels, paged attention, graphs."""
    base = load(str(tiny_folder), device="cuda", dtype="float32")
    attached = MaskManager.attach(base.model)
    made = [world.make_mask(base, share, seed) for seed, share in enumerate((0.003, 0.3, 0.01))]
    masked = [attached.fit(mask) for mask in made]
    chosen = [
        (mask, AppliedMask(applied, gamma), gamma)
        for mask, applied in zip(made, masked, strict=True)
        for gamma in (0.0, 0.4)
    ]
    prompts = [[(7 * number + place) % 250 + 6 for place in range(5 + 9 * number)] for number in range(len(chosen))]
    engine = Engine(base, EngineConfig(max_running=8))
    assert engine._graphs is not None
    answers = engine.generate(
        [
            Request(prompt, 24, lambda _: None, applied, "all", SamplingParams(temperature=0))
            for prompt, (_, applied, _) in zip(prompts, chosen, strict=True)
        ]
    )
    engine.stop()
    attached.detach()
    plain = load(str(tiny_folder), device="cpu")
    for prompt, answer, (mask, _, gamma) in zip(prompts, answers, chosen, strict=True):
        assert world.speak(plain.model, world.materialise(plain.model, mask, gamma), prompt, 24).agrees(answer)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_decode_step_waits_for_the_device_once(tiny: Base, manager: MaskManager) -> None:
    """For its tokens: the first steps capture graphs, later ones of the same blocks and masks only replay them."""
    masked = [AppliedMask(manager.fit(world.make_mask(tiny, share, seed=1)), 0.0) for share in (0.003, 0.3)]
    engine = Engine(tiny, EngineConfig(max_running=4))
    assert engine._graphs is not None
    engine.submit(
        *(
            Request([7, 8, 9], 12, lambda _: None, applied, "all", SamplingParams(temperature=0))
            for applied in (None, *masked)
        )
    )
    for _ in range(3):
        engine.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    engine.stop()
    waits = [str(warning.message) for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    assert len(waits) == 1, waits
