"""Greedy tokens are those of the oracle, whatever else is in the batch and in the cache."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from conftest import WAYS, World, make_world, start
from world import make_prompts

NAMES = [name for name in WAYS if name not in (None, "base")]


def test_the_base(llm: Any, world: World) -> None:
    world.verify(llm, [(prompt, None) for prompt in make_prompts(3)])


@pytest.mark.parametrize("name", NAMES)
def test_one_persona(llm: Any, world: World, name: str) -> None:
    (prompt,) = make_prompts(1, seed=1)
    assert world.oracle.speak(prompt, 8, *WAYS[name])[0] != world.oracle.speak(prompt, 8)[0]
    world.verify(llm, [(prompt, name)])


@pytest.mark.parametrize(
    "names",
    [(None, "calm", "loud", "kind", "soft"), (None, "late", "soft:0", "calm:0.25:decode", "late:all")],
    ids=["all", "decode"],
)
def test_four_personas_beside_the_base_in_one_batch(llm: Any, world: World, names: tuple[str | None, ...]) -> None:
    prompts = make_prompts(15, seed=2)
    world.verify(llm, zip(prompts, itertools.cycle(names), strict=False))


def test_more_personas_than_slots(llm: Any, world: World) -> None:
    assert len(NAMES) > 4
    world.verify(llm, zip(make_prompts(16, seed=3), NAMES * 2, strict=True))


def test_the_prefix_cache_keeps_personas_apart(llm: Any, world: World) -> None:
    (prompt,) = make_prompts(1, seed=4, length=130)
    for name in [None, *NAMES] * 2:
        world.verify(llm, [(prompt, name)])


def test_a_chat_goes_on_after_a_persona_in_phase_decode(llm: Any, world: World) -> None:
    """What the persona has said is a prompt of the next turn, so the base reads it: other blocks."""
    (prompt,) = make_prompts(1, seed=5, length=60)
    answer = world.generate(llm, [(prompt, "late")], 64)[0]
    for name in ("late", None, "calm:0.25:decode"):
        world.verify(llm, [(prompt + answer + prompt[:3], name)])


def test_prompts_in_chunks(world: World) -> None:
    llm = start(world, max_num_batched_tokens=32, max_num_seqs=4, enable_chunked_prefill=True, max_loras=2)
    names = (None, "late", "calm", "calm:0.25:decode")
    world.verify(llm, zip(make_prompts(8, seed=6, length=50), names * 2, strict=True))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phi3", {"rope_scaling": None}),  # qkv and gate_up are fused in the checkpoint
        ("qwen2", {}),  # biases
        ("qwen3", {"head_dim": 32}),
        ("gemma2", {"head_dim": 32, "tie_word_embeddings": True}),
    ],
)
def test_other_families(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    world = make_world(tmp_path, family=family, **changes)
    llm = start(world)
    names = [None, "calm", "loud", "soft", "late"]
    world.verify(llm, zip(make_prompts(10, seed=7), names * 2, strict=True))
