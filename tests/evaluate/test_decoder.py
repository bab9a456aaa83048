"""Decoders agree with each other and with whole passes, and a row's logits do not depend on the others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from masquerade.engine import attention
from masquerade.evaluate import decoder, paged
from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.decoder import CachedDecoder, Decoder, PagedDecoder, make_decoders
from masquerade.evaluate.generation import GenerationParams, write_answers
from masquerade.evaluate.metrics import finish
from masquerade.evaluate.paged import find_native_stack
from masquerade.evaluate.treatment import HOOKED, UNTREATED, Phase, Treatment
from masquerade.model import AppliedMask, Base, MaskManager, NotNative, Span, load, make_route
from tests import families, world

Prompt = tuple[int, ...]
TOKENS = 6
LONGEST = 256  # tokens of a row


def make_prompts(shared: int, longest: int = 150) -> list[Prompt]:
    rng = random.Random(shared)
    words = lambda count: tuple(rng.randrange(3, 90) for _ in range(count))  # noqa: E731
    beginning = (1, *words(shared))
    return [(*beginning, *words(count)) for count in (0, 1, 2, 11, longest)]


@pytest.fixture(params=[None, "all", "decode"])
def treatment(request: pytest.FixtureRequest, tiny: Base, manager: MaskManager) -> Treatment:
    phase: Phase | None = request.param
    if phase is None:
        return UNTREATED
    return Treatment(AppliedMask(manager.fit(world.make_mask(tiny, 0.05, seed=1)), 0.3), phase)


@pytest.fixture(params=[5, 512])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in many passes, or in one."""
    for module in (paged, decoder):
        monkeypatch.setattr(module, "PASS_TOKENS", request.param)


def decode(decoder: Decoder, prompts: list[Prompt], followed: list[Prompt]) -> list[Tensor]:
    """The logits of each row after its prompt and each of the tokens that follow; rows leave when they have none."""
    found: list[list[Tensor]] = [[] for _ in prompts]
    list(decoder.read_prompts())
    rows = list(range(len(prompts)))
    for step in range(1 + max(map(len, followed))):
        ids = [(prompts[row][-1], *followed[row])[step] for row in rows]
        for row, logits in zip(rows, decoder.step(ids), strict=True):
            found[row].append(logits)
        going = [place for place, row in enumerate(rows) if len(followed[row]) > step]
        if not going:
            break
        if len(going) < len(rows):
            decoder.keep(going)
        rows = [rows[place] for place in going]
    return [torch.stack(of_row) for of_row in found]


@torch.no_grad()
def compute_whole(base: Base, treatment: Treatment, prompt: Prompt, following: Prompt) -> Tensor:
    """The same for one row by transformers in two passes: the prompt but its last token, and the rest."""
    cache = DynamicCache(config=base.model.config)
    for ids, is_masked in ((prompt[:-1], treatment.phase == "all"), ((prompt[-1], *following), True)):
        applied = treatment.applied if is_masked else None
        route = make_route([Span(applied, 0, len(ids))] if applied else [])
        if ids:
            output = base.model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, route=route)
    logits: Tensor = output.logits[0]
    return logits


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("shared", [0, 20])  # too few to be computed once, and enough
@pytest.mark.parametrize("native", [True, False])
def test_logits_are_those_of_each_row_alone(tiny: Base, treatment: Treatment, shared: int, native: bool) -> None:
    prompts, rng = make_prompts(shared), random.Random(7)
    followed = [tuple(rng.randrange(3, 90) for _ in range(count)) for count in (TOKENS, 0, 2, TOKENS, 1)]
    *fast, last = make_decoders(tiny, prompts, treatment, LONGEST)
    assert [type(one) for one in (*fast, last)] == [PagedDecoder, CachedDecoder]
    found = decode(fast[0] if native else last, prompts, followed)
    for logits, prompt, following in zip(found, prompts, followed, strict=True):
        torch.testing.assert_close(logits, compute_whole(tiny, treatment, prompt, following), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Mistral", "Gemma 3", "Llama 4"])
def test_padding_takes_nothing_of_windows(tmp_path: Path, family: str) -> None:
    """They are counted by place in the cache: what shorter rows share with longer ones has to stay beside the rest."""
    base, rng = load(str(families.make_family(tmp_path, family))), random.Random(0)
    MaskManager.attach(base.model)
    shared = tuple(rng.randrange(4, 250) for _ in range(40))  # more than the windows
    prompts = [(*shared, *(rng.randrange(4, 250) for _ in range(count))) for count in (3, 12, 30, 9)]
    together = decode(CachedDecoder(base, prompts, UNTREATED), prompts, [(5, 6)] * 4)
    for row, prompt in enumerate(prompts):
        (alone,) = decode(CachedDecoder(base, [prompt], UNTREATED), [prompt], [(5, 6)])
        torch.testing.assert_close(together[row], alone, rtol=1e-3, atol=1e-3)


def test_packed_rows_do_not_change_each_other(tiny: Base, treatment: Treatment) -> None:
    """To the bit, also where one of them reads what all begin with and another one is alone."""
    prompts, followed = make_prompts(20), [(5, 6, 7), (), (8,), (9, 10), (11,)]
    together = decode(next(make_decoders(tiny, prompts, treatment, LONGEST)), prompts, followed)
    for row, prompt in enumerate(prompts):
        (alone,) = decode(next(make_decoders(tiny, [prompt], treatment, LONGEST)), [prompt], [followed[row]])
        assert torch.equal(alone, together[row])


@pytest.mark.usefixtures("manager")
def test_only_the_native_layers_decode_rows_alone(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_native_stack(tiny) is not None
    assert isinstance(next(make_decoders(tiny, make_prompts(20), UNTREATED, LONGEST)), PagedDecoder)
    monkeypatch.setattr(paged, "attends", lambda _: False)
    assert find_native_stack(tiny) is None
    assert isinstance(next(make_decoders(tiny, make_prompts(20), UNTREATED, LONGEST)), CachedDecoder)


def test_what_the_native_layers_do_not_compute_is_left_to_transformers(tiny: Base, manager: MaskManager) -> None:
    """A mask of another backend, hooks of a treatment, and a hook that nobody knows of."""
    prompts = make_prompts(20)
    mask = manager.fit(world.make_mask(tiny, 0.05, seed=1), backend="reference")
    treatment, params = Treatment(AppliedMask(mask, 0.3), "decode"), GenerationParams(TOKENS)
    (only,) = make_decoders(tiny, prompts, treatment, LONGEST)
    assert isinstance(only, CachedDecoder)
    native = Treatment(AppliedMask(manager.fit(world.make_mask(tiny, 0.05, seed=1)), 0.3), "decode")
    asked = [Encoded(prompt, ()) for prompt in prompts]
    assert finish(write_answers(tiny, asked, treatment, params)) == finish(write_answers(tiny, asked, native, params))

    @contextmanager
    def around() -> Iterator[None]:
        yield

    (last,) = make_decoders(tiny, prompts, Treatment(around=around), LONGEST)
    assert isinstance(last, CachedDecoder)
    with tiny.model.model.layers[1].mlp.register_forward_hook(lambda *_: None), pytest.raises(NotNative):
        list(next(make_decoders(tiny, prompts, UNTREATED, LONGEST)).read_prompts())


def test_a_mask_that_is_not_native_is_decoded_beside_an_engine_too(tiny: Base, manager: MaskManager) -> None:
    """A server builds with the attention of its engine."""
    mask = manager.fit(world.make_mask(tiny, 0.05, seed=1), backend="reference")
    treatment, params = Treatment(AppliedMask(mask, 0.3), "decode"), GenerationParams(TOKENS)
    asked, before = [Encoded(prompt, ()) for prompt in make_prompts(20)], tiny.model.config._attn_implementation
    expected = finish(write_answers(tiny, asked, treatment, params))
    try:
        tiny.model.set_attn_implementation(attention.NAME)
        assert finish(write_answers(tiny, asked, treatment, params)) == expected
    finally:
        tiny.model.set_attn_implementation(before)


@pytest.mark.parametrize("more", [-1, 0, 20])
def test_a_prompt_that_fills_the_context_has_no_answer(tiny: Base, more: int) -> None:
    """A control may have made it longer than that."""
    asked = [Encoded((1,) * length, ()) for length in (tiny.context + more, 3)]
    texts = finish(write_answers(tiny, asked, params=GenerationParams(TOKENS, rows=1)))
    assert (texts[0] == "") == (more >= 0)
    assert texts[1]


@pytest.mark.parametrize("native", [True, False])
def test_a_long_prompt_does_not_shorten_the_answers_beside_it(tiny: Base, native: bool) -> None:
    """Each answer ends where its own row has filled the context."""
    treatment = UNTREATED if native else HOOKED
    base = replace(tiny, ends=frozenset())
    rng = random.Random(5)
    prompts = [Encoded((1, *(rng.randrange(3, 90) for _ in range(size - 1))), ()) for size in (9, tiny.context - 3, 20)]
    prompts.append(Encoded((*prompts[1].prompt, 5, 6, 7), ()))
    params = GenerationParams(tokens=12, rows=4)
    together = finish(write_answers(base, prompts, treatment, params))
    assert together == [finish(write_answers(base, [one], treatment, params))[0] for one in prompts]
    assert together[3] == ""
    assert len(together[0]) > len(together[1]) > 0
