"""Models whose attention is more than scaled products, and the ordinary model that an engine's model still is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from masquerade.engine import Engine, EngineConfig, Request, SamplingParams, attention
from masquerade.engine.cuda import attention as cuda_attention
from masquerade.model import AppliedMask, Base, MaskManager, load
from tests import families, world

STRANGE = ("Gemma 2", "gpt-oss", "Mistral", "Llama 4")  # soft caps, sinks, sliding windows, chunks


@pytest.fixture(params=STRANGE)
def strange(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Base, Any]:
    """A base, and the same model with the attention that its authors wrote."""
    folder = families.make_family(tmp_path, request.param)
    return load(str(folder), device="cpu"), AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def test_the_row_groups_of_a_cuda_device_leave_it_to_the_same_code(
    strange: tuple[Base, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts beyond the window, in chunks and whole, with a mask and without, beside each other. The row groups of a
    CPU are tested with every family.
    """
    base, plain = strange
    monkeypatch.setattr(cuda_attention, "is_available", lambda _: True)
    assert not attention.fits_sdpa(base.model, base.context)
    attention._warn_slow.cache_clear()
    assert base.context == 256
    manager = MaskManager.attach(base.model)
    masks = [world.make_mask(base, 0.02, seed=1), None]
    applied_masks = [AppliedMask(manager.fit(mask), 0.0) if mask else None for mask in masks]
    engine = Engine(base, EngineConfig(max_batch_tokens=48))
    prompts = [
        [(7 * place + place**2) % 250 + 6 for place in range(start, start + n)] for start, n in ((0, 90), (5, 20))
    ]
    requests = [
        Request(prompt, 16, lambda _: None, applied, "all", SamplingParams(temperature=0))
        for prompt in prompts
        for applied in applied_masks
    ]
    with caplog.at_level(logging.WARNING):
        answers = engine.generate(requests)
    engine.stop()
    manager.detach()
    for request, answer, mask in zip(requests, answers, masks * 2, strict=True):
        oracle = world.speak(plain, world.materialise(plain, mask, 0.0), request.prompt, 16)
        assert oracle.agrees(answer)
    assert sum(record.name == attention.__name__ for record in caplog.records) == 1


def test_a_call_without_a_plan_is_the_models_own(strange: tuple[Base, Any]) -> None:
    """Building and evaluating use the model while an engine has it, in padded batches too."""
    base, plain = strange
    base.model.set_attn_implementation(attention.NAME)
    ids = torch.randint(6, 260, (2, 40))
    seen = torch.ones_like(ids)
    seen[1, :11] = 0
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    for mask in (None, seen):
        given: dict[str, Any] = {} if mask is None else {"attention_mask": mask, "position_ids": positions}
        with torch.inference_mode():
            ours, theirs = (model(input_ids=ids, **given).logits for model in (base.model, plain))
        real = seen.bool() if mask is not None else torch.ones_like(seen, dtype=torch.bool)
        assert torch.allclose(ours[real], theirs[real], atol=1e-3)
