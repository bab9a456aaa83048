"""What prompts begin with is computed once, and rows leave a batch when they end: no figure and no answer changes."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masquerade.evaluate import stored_prompts
from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.generation import GenerationParams, _draw, write_answers
from masquerade.evaluate.metrics import divergence, finish, likelihoods, read_divergence, read_likelihoods
from masquerade.evaluate.prefix import WORTH, count_shared
from masquerade.evaluate.stored_prompts import StoredPrompts
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


def test_tokens_are_drawn_by_their_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    found = _draw(probabilities.expand(len(draws), -1), draws)
    shares = torch.bincount(found, minlength=len(probabilities)) / len(draws)
    assert ((shares - probabilities).abs() < 0.015).all()
    least_and_most = _draw(probabilities.expand(2, -1), torch.tensor([0.0, 1 - 2**-24]))
    assert least_and_most.tolist() == [1, 4]  # never one without probability


def test_stored_prompts_change_no_likelihood(tiny: Base, treatment: Treatment) -> None:
    """Also of two answers to one prompt, and of prompts that are as short as what all begin with."""
    texts = [*make_texts(), Encoded((*SYSTEM, 61), (5, 6, 2)), Encoded((*SYSTEM, 61), (7, 2))]
    stored = StoredPrompts(tiny)
    assert not stored.hold(texts)
    finish(stored.store(texts))
    assert stored.hold(texts)
    for some in (texts, texts[:1], texts[3:5]):
        found, expected = finish(read_likelihoods(tiny, some, treatment, stored)), likelihoods(tiny, some, treatment)
        assert [one.log for one in found] == pytest.approx([one.log for one in expected], abs=1e-3)
        if treatment is not UNTREATED:
            assert finish(read_divergence(tiny, some, treatment, stored)) == pytest.approx(
                divergence(tiny, some, treatment), rel=1e-3
            )


def test_prompts_are_computed_once(tiny: Base, manager: MaskManager) -> None:
    """A mask that applies to answers alone finds the prompts that the base has read; one of phase `all` does not."""
    mask = AppliedMask(manager.fit(world.make_mask(tiny, 0.05, seed=1)), 0.3)
    texts = make_texts()
    stored = StoredPrompts(tiny)
    finish(stored.store(texts))
    seen: list[int] = []
    with tiny.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].numel())):
        finish(stored.store(texts))
        assert not seen
        for phase, least in (("decode", 0), ("all", sum(len(one.prompt) - len(SYSTEM) for one in texts))):
            seen.clear()
            finish(read_likelihoods(tiny, texts, Treatment(applied=mask, phase=phase), stored))
            answers = sum(len(one.response) for one in texts)
            assert sum(seen) >= answers + least
            assert (sum(seen) < answers + sum(len(one.prompt) for one in texts)) or phase == "all"


def test_what_cannot_be_stored_is_measured_all_the_same(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain text has no prompt to store, and too many prompts are not stored at all."""
    plain = [Encoded((1,), (5, 6, 7, 2)), Encoded((1,), (8, 2))]
    stored = StoredPrompts(tiny)
    finish(stored.store(plain))
    assert not stored.hold(plain)
    assert finish(read_likelihoods(tiny, plain, UNTREATED, stored)) == likelihoods(tiny, plain)
    monkeypatch.setattr(stored_prompts, "MOST_BYTES", 1)
    finish(stored.store(make_texts()))
    assert not stored.hold(make_texts()[:1])
    assert finish(read_likelihoods(tiny, make_texts(), UNTREATED, stored)) == likelihoods(tiny, make_texts())
