"""What prompts begin with is computed once, and rows leave a batch when they end: no figure and no answer changes."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.generation import GenerationParams, _choose, _draw, write_answers
from masquerade.evaluate.metrics import divergence, finish, likelihoods
from masquerade.evaluate.prefix import WORTH, count_shared
from masquerade.evaluate.treatment import UNTREATED, Phase, Treatment
from masquerade.model import AppliedMask, Base, MaskManager
from tests import world

SYSTEM = (1, *range(40, 60))


def make_texts(count: int = 9) -> list[Encoded]:
    rng = random.Random(0)
    words = lambda: tuple(rng.randrange(3, 90) for _ in range(rng.randrange(1, 12)))  # noqa: E731
    return [Encoded((*SYSTEM, *words()), (*words(), 2)) for _ in range(count)]


@pytest.fixture(params=[None, "all", "decode"])
def treatment(request: pytest.FixtureRequest, tiny: Base, manager: MaskManager) -> Treatment:
    phase: Phase | None = request.param
    if phase is None:
        return UNTREATED
    mask = manager.fit(world.make_mask(tiny, 0.05, seed=1))
    return Treatment(applied=AppliedMask(mask, 0.3), phase=phase)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=100).map(tuple), min_size=1, max_size=5))
def test_what_is_shared_begins_all_prompts_and_is_all_of_none(prompts: list[tuple[int, ...]]) -> None:
    for given_prompts in (prompts, [(0,) * 64 + prompt for prompt in prompts]):
        shared = count_shared(given_prompts)
        assert len({prompt[:shared] for prompt in given_prompts}) == 1
        assert all(shared < len(prompt) for prompt in given_prompts)
        assert not shared or shared * (len(prompts) - 1) >= WORTH
    assert len(prompts) == 1 or shared >= 64


def test_likelihoods_are_those_of_each_text_alone(tiny: Base, treatment: Treatment) -> None:
    texts = make_texts()
    assert count_shared([text.prompt for text in texts]) >= len(SYSTEM)
    together, alone = likelihoods(tiny, texts, treatment), [likelihoods(tiny, [one], treatment)[0] for one in texts]
    assert [one.log for one in together] == pytest.approx([one.log for one in alone], abs=1e-3)
    if treatment is not UNTREATED:
        parts = [divergence(tiny, [one], treatment) * len(one.response) for one in texts]
        expected = sum(parts) / sum(len(one.response) for one in texts)
        assert divergence(tiny, texts, treatment) == pytest.approx(expected, rel=1e-3)


def test_answers_are_those_of_each_prompt_alone(tiny: Base, treatment: Treatment) -> None:
    """Some end at once, some go on to the limit."""
    prompts, params = make_texts(24), GenerationParams(30)
    together = finish(write_answers(tiny, prompts, treatment, params))
    assert together == [finish(write_answers(tiny, [one], treatment, params))[0] for one in prompts]
    assert len({len(text) for text in together}) > 3


def test_tokens_are_drawn_as_torch_draws_them() -> None:
    mine, its = (torch.Generator().manual_seed(3) for _ in range(2))
    for _ in range(5):
        logits = 3 * torch.randn(7, 500)
        drawn = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=its).squeeze(1)
        noise = _draw(7, 500, mine)
        assert torch.equal(_choose(logits, 0.7, noise), drawn)
        assert torch.equal(_choose(logits[[1, 4]], 0.7, noise[[1, 4]]), drawn[[1, 4]])  # after others have ended
