"""Greedy tokens are those of the oracle, whatever else is in the batch."""

from __future__ import annotations

from typing import Any

from conftest import World
from world import check, make_prompts

from vllm_masquerade import make_request

NEW = 24


def generate(llm: Any, requests: list[tuple[list[int], str | None]], **sampling: Any) -> list[list[int]]:
    """The tokens of (prompt, persona or None), in one batch."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in requests],
        SamplingParams(**({"temperature": 0, "max_tokens": NEW, "ignore_eos": True} | sampling)),
        lora_request=[name and make_request(name) for _, name in requests],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_the_base(llm: Any, world: World) -> None:
    prompts = make_prompts(3)
    for prompt, tokens in zip(prompts, generate(llm, [(prompt, None) for prompt in prompts]), strict=True):
        check(tokens, world.oracle.speak(prompt, NEW))


def test_one_persona(llm: Any, world: World) -> None:
    (prompt,) = make_prompts(1)
    expected = world.oracle.speak(prompt, NEW, "calm")
    assert expected[0] != world.oracle.speak(prompt, NEW)[0]
    check(generate(llm, [(prompt, "calm")])[0], expected)


def test_four_personas_beside_the_base_in_one_batch(llm: Any, world: World) -> None:
    names = [None, "calm", "loud", "kind", "soft"]
    requests = [(prompt, names[n % 5]) for n, prompt in enumerate(make_prompts(15))]
    for (prompt, name), tokens in zip(requests, generate(llm, requests), strict=True):
        check(tokens, world.oracle.speak(prompt, NEW, name, 0.5 if name == "soft" else 0.0))
