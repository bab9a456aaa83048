"""Models whose attention is more than scaled products, and the ordinary model that an engine's model still is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, MistralConfig

from masquerade.engine import Engine, EngineConfig, Request, SamplingParams, attention
from masquerade.engine.cuda import attention as cuda_attention
from masquerade.model import AppliedMask, Base, MaskManager, load
from tests import world

WINDOW = 24
SHAPE = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": WINDOW,
    "eos_token_id": 2,
}
CONFIGS = {
    "soft caps and windows": Gemma2Config(**SHAPE, attn_logit_softcapping=5.0, final_logit_softcapping=20.0),
    "sinks and windows": GptOssConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1),
    "windows": MistralConfig(**SHAPE),
}


def write(folder: Path, config: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.normal_(0, 2)
            elif parameter.ndim == 2:
                parameter.mul_(20.0 if "embed" in name else 8.0)
    model.save_pretrained(folder)
    world.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=CONFIGS, ids=str)
def strange(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Base, Any]:
    """A base, and the same model with the attention that its authors wrote."""
    folder = write(tmp_path, CONFIGS[request.param])
    return load(str(folder), device="cpu"), AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tokens_equal_those_of_the_models_own_attention(
    strange: tuple[Base, Any], device: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts beyond the window, in chunks and whole, with a mask and without, beside each other; with the row
    groups of a CUDA device, too, which leave such scores to the same code.
    """
    base, plain = strange
    if device == "cuda":
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
