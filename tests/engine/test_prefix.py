"""What was computed for one prompt serves another only where every position is under the same mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from masquerade.engine import Engine, Phase, Request, SamplingParams
from masquerade.engine.prefix import BLOCK_SIZE, PrefixHashes, Salts
from masquerade.model import AppliedMask, Base, MaskManager
from tests import world

Make = Callable[..., Engine]
DOCUMENT = [(7 * place) % 250 + 6 for place in range(100)]
COUNT = 10


def ask(prompt: list[int], applied: AppliedMask | None = None, phase: Phase = "all", **more: object) -> Request:
    return Request(prompt, COUNT, lambda _: None, applied, phase, SamplingParams(temperature=0), **more)  # type: ignore[arg-type]


@pytest.fixture
def apply(tiny: Base, manager: MaskManager) -> Callable[[int, float], AppliedMask]:
    masks: dict[int, AppliedMask] = {}

    def make(seed: int, gamma: float) -> AppliedMask:
        if seed not in masks:
            masks[seed] = AppliedMask(manager.fit(world.make_mask(tiny, 0.3, seed)), 0.0)
        return AppliedMask(masks[seed].mask, gamma)

    return make


class TestSalts:
    def test_every_mask_gamma_and_base_has_its_own(self, apply: Callable[[int, float], AppliedMask]) -> None:
        applied_masks = [None, *(apply(seed, gamma) for seed in (1, 2) for gamma in (0.0, 0.3, 0.30000000000000004))]
        salts = [Salts(base).of(applied) for base in ("a", "b") for applied in applied_masks]
        assert len(set(salts)) == len(salts)
        assert {len(salt) for salt in salts} == {16}

    def test_gamma_one_is_the_base(self, apply: Callable[[int, float], AppliedMask]) -> None:
        assert Salts("a").of(apply(1, 1.0)) == Salts("a").of(None)


IDS = list(range(64))


class TestPrefixHashes:
    def hashes(self, ids: list[int], salt: bytes = b"w", first: int = 0) -> list[bytes]:
        return PrefixHashes(b"base", salt, first).full(ids, len(ids) // BLOCK_SIZE)

    def test_equal_beginnings_share_hashes_until_a_token_differs(self) -> None:
        other = [*IDS[:40], 99, *IDS[41:]]
        same = [ours == theirs for ours, theirs in zip(self.hashes(IDS), self.hashes(other), strict=True)]
        assert same == [True, True, False, False]

    def test_the_end_of_one_block_is_not_the_beginning_of_the_next(self) -> None:
        assert len(set(self.hashes([5] * 64))) == 4

    def test_positions_before_the_mask_are_the_bases(self) -> None:
        base, first, second = (
            self.hashes(IDS, first=64),
            self.hashes(IDS, b"1", 33),
            self.hashes(IDS, b"2", 33),
        )
        assert first[:2] == second[:2] == base[:2]
        assert len({base[2], first[2], second[2]}) == len({base[3], first[3], second[3]}) == 3

    def test_the_place_where_a_mask_begins_matters(self) -> None:
        assert len({tuple(self.hashes(IDS, first=first))[2] for first in range(32, 49)}) == 17

    def test_hashes_do_not_depend_on_when_they_are_asked_for(self) -> None:
        prefix = PrefixHashes(b"base", b"w", 20)
        prefix.full(IDS[:32], 2)
        assert prefix.full(IDS, 4) == self.hashes(IDS, first=20)

    def test_a_partial_block_has_a_hash_of_its_own(self) -> None:
        def partial(salt: bytes, first: int, stop: int) -> bytes:
            return PrefixHashes(b"base", salt, first).partial(IDS, stop)

        assert partial(b"1", 40, 40) == partial(b"2", 40, 40) == partial(b"2", 99, 40)  # all of it is the base's
        hashes = [partial(b"1", first, 40) for first in range(32, 41)] + [partial(b"2", 32, 40), partial(b"1", 32, 39)]
        assert len(set(hashes)) == len(hashes)
        assert partial(b"1", 64, 48) not in self.hashes(IDS, first=64)


@pytest.mark.parametrize("phase", ["all", "decode"])
@pytest.mark.parametrize("order", ["sequential", "concurrent", "repeated"])
def test_one_prompt_under_four_masks_is_never_contaminated(
    tiny: Base, make_engine: Make, apply: Callable[[int, float], AppliedMask], order: str, phase: Phase
) -> None:
    """The same prompt as two personas, one at two gammas, and as the base; engines that forget the salt fail here."""
    applied_masks = [apply(1, 0.0), apply(2, 0.0), apply(1, 0.5), None] * (2 if order == "repeated" else 1)
    engine = make_engine()
    requests = [ask(DOCUMENT, applied, phase) for applied in applied_masks]
    if order == "concurrent":
        engine.generate(requests)
    else:
        for request in requests:
            engine.generate([request])
    for request, applied in zip(requests, applied_masks, strict=True):
        mask = world.make_mask(tiny, 0.3, 1 if applied and applied.mask.digest == applied_masks[0].mask.digest else 2)  # type: ignore[union-attr]
        masked = world.materialise(tiny.model, mask, applied.gamma) if applied else tiny.model
        assert world.speak(tiny.model, masked, DOCUMENT, COUNT, phase=phase).agrees(request.ids[len(DOCUMENT) :])
    cached = [request.num_cached for request in requests]
    if order == "repeated":
        assert cached[4:] == [99] * 4
    if order != "concurrent":
        assert cached[:4] == ([0] * 4 if phase == "all" else [0, 99, 99, 99])


def test_a_second_turn_finds_the_first_one(make_engine: Make, apply: Callable[[int, float], AppliedMask]) -> None:
    engine, applied = make_engine(), apply(1, 0.0)
    (answer,) = engine.generate([ask(DOCUMENT, applied)])
    second = ask([*DOCUMENT, *answer, 9, 9, 9], applied)
    engine.generate([second])
    assert second.num_cached == (len(DOCUMENT) + COUNT - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_a_prompt_that_is_wholly_known_still_computes_its_last_token(make_engine: Make) -> None:
    engine = make_engine()
    first, second = (ask(DOCUMENT[:96]) for _ in range(2))
    assert engine.generate([first]) == engine.generate([second])
    assert second.num_cached == 95


@pytest.mark.parametrize("phase", ["all", "decode"])
def test_many_personas_at_once_share_a_prompt_where_they_can(
    make_engine: Make, apply: Callable[[int, float], AppliedMask], phase: Phase
) -> None:
    """In phase `decode` the first one computes the document and the others wait for it, instead of all doing it."""
    engine = make_engine()
    engine.generate([ask(DOCUMENT, apply(seed, 0.0), phase) for seed in range(5)])
    prompts = engine.counts.computed - 5 * (COUNT - 1)
    assert prompts == (5 * 100 if phase == "all" else 100 + 4 * 1)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 18, 31, 32, 33, 100])
@pytest.mark.parametrize("phase", ["all", "decode"])
def test_an_equal_prompt_costs_one_position(
    tiny: Base, make_engine: Make, apply: Callable[[int, float], AppliedMask], length: int, phase: Phase
) -> None:
    """The copied end of a prompt is the copier's own: both go on, differently, beside each other."""
    engine, prompt = make_engine(), DOCUMENT[:length]
    first, again = ask(prompt, apply(1, 0.0), phase), ask(prompt)
    engine.submit(first)
    engine.step()
    other = apply(1, 0.0) if phase == "all" else apply(2, 0.0)
    second = ask(prompt, other, phase)
    engine.submit(second, again)
    while engine.step():
        pass
    assert second.num_cached == length - 1
    for request, seed in ((first, 1), (second, 1 if phase == "all" else 2), (again, None)):
        masked = world.materialise(tiny.model, world.make_mask(tiny, 0.3, seed), 0.0) if seed else tiny.model
        assert world.speak(tiny.model, masked, prompt, COUNT, phase=phase).agrees(request.ids[length:])
    assert engine._block_manager.num_free == engine._block_manager.num_blocks


def test_prefixes_are_forgotten_when_blocks_are_needed(make_engine: Make) -> None:
    engine = make_engine(cache_bytes=10 * BLOCK_SIZE * 512)
    first = ask(DOCUMENT)
    (answer,) = engine.generate([first])
    engine.generate([ask(list(reversed(DOCUMENT)))])
    again = ask(DOCUMENT)
    assert engine.generate([again]) == [answer]
    assert again.num_cached < 96


def test_a_persona_that_yields_no_numbers_leaves_no_trace(
    tiny: Base, make_engine: Make, apply: Callable[[int, float], AppliedMask]
) -> None:
    """Its blocks are read as padding by the next request; a product of zero and nan would be nan."""
    engine = make_engine(cache_bytes=12 * BLOCK_SIZE * 512)
    alone = engine.generate([ask([9, 8, 7])])
    applied = apply(3, 0.0)
    nothing = {name: lambda x, like=c: like(x) * float("nan") for name, c in applied.mask.corrections.items()}
    applied = AppliedMask(replace(applied.mask, corrections=nothing), 0.0)
    events: list[object] = []
    sick = ask(DOCUMENT, applied)
    sick.emit = events.append  # type: ignore[assignment]
    beside = ask([9, 8, 7])
    engine.generate([sick, beside])
    assert "not a number" in str(events[-1].error)  # type: ignore[attr-defined]
    assert [beside.ids[3:]] == alone
    assert engine.generate([ask([9, 8, 7]) for _ in range(9)]) == alone * 9  # in every block that it had


def test_what_memory_held_before_the_engine_took_it_reaches_no_answer(make_engine: Make) -> None:
    prompts = [DOCUMENT, [9, 8, 7], DOCUMENT[:40]]
    answers = make_engine().generate([ask(prompt) for prompt in prompts])
    torch.use_deterministic_algorithms(True)  # fills new memory with what is not a number
    try:
        engine = make_engine()
    finally:
        torch.use_deterministic_algorithms(False)
    assert engine.generate([ask(prompt) for prompt in prompts]) == answers
