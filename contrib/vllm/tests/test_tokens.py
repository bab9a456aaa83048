"""Greedy tokens are those of the oracle, whatever else is in the batch and in the cache."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from conftest import World, generate, start
from world import check, make_prompts

NEW = 24
WAYS = {  # name -> what the oracle is told
    None: (None,),
    "calm": ("calm",),
    "loud": ("loud",),
    "kind": ("kind",),
    "soft": ("soft", 0.5),
    "soft:0": ("soft",),
    "late": ("late", 0.0, "decode"),
    "late:all": ("late",),
    "calm:0.25:decode": ("calm", 0.25, "decode"),
}


def verify(world: World, llm: Any, requests: list[tuple[list[int], str | None]]) -> None:
    for (prompt, name), tokens in zip(requests, generate(llm, requests, NEW), strict=True):
        check(tokens, world.oracle.speak(prompt, NEW, *WAYS[name]))


def test_the_base(llm: Any, world: World) -> None:
    verify(world, llm, [(prompt, None) for prompt in make_prompts(3)])


@pytest.mark.parametrize("name", [name for name in WAYS if name])
def test_one_persona(llm: Any, world: World, name: str) -> None:
    (prompt,) = make_prompts(1, seed=1)
    assert world.oracle.speak(prompt, NEW, *WAYS[name])[0] != world.oracle.speak(prompt, NEW)[0]
    verify(world, llm, [(prompt, name)])


@pytest.mark.parametrize(
    "names",
    [(None, "calm", "loud", "kind", "soft"), (None, "late", "soft:0", "calm:0.25:decode", "late:all")],
    ids=["all", "decode"],
)
def test_four_personas_beside_the_base_in_one_batch(llm: Any, world: World, names: tuple[str | None, ...]) -> None:
    prompts = make_prompts(15, seed=2)
    verify(world, llm, [*zip(prompts, itertools.cycle(names))])  # noqa: B905


def test_more_personas_than_slots(llm: Any, world: World) -> None:
    names = [name for name in WAYS if name]
    assert len(names) > 4
    verify(world, llm, [*zip(make_prompts(16, seed=3), names * 2, strict=True)])


def test_the_prefix_cache_keeps_personas_apart(llm: Any, world: World) -> None:
    (prompt,) = make_prompts(1, seed=4, length=130)
    for name in [*WAYS, *WAYS]:
        verify(world, llm, [(prompt, name)])


def test_a_chat_goes_on_after_a_persona_in_phase_decode(llm: Any, world: World) -> None:
    """What the persona has said is a prompt of the next turn, so the base reads it: other blocks."""
    (prompt,) = make_prompts(1, seed=5, length=60)
    answer = generate(llm, [(prompt, "late")], 64)[0]
    for name in ("late", None, "calm:0.25:decode"):
        verify(world, llm, [(prompt + answer + prompt[:3], name)])


def test_prompts_in_chunks(world: World) -> None:
    llm = start(world, max_num_batched_tokens=32, max_num_seqs=4, enable_chunked_prefill=True, max_loras=2)
    names = (None, "late", "calm", "calm:0.25:decode")
    verify(world, llm, [*zip(make_prompts(8, seed=6, length=50), names * 2, strict=True)])
