"""Drafts change no answer: random mixed requests with and without them, and what becomes of rejected positions.

`MASQUERADE_SPECULATE=2000` compares so many requests.
"""

from __future__ import annotations

import itertools
import os
import random

import pytest
import torch

from masquerade.engine import AnswerFormat, AnswerText, Engine, EngineConfig, JsonFormat, Request, SamplingParams
from masquerade.engine.prompt_lookup import FIRST_DRAFT, LONGEST_DRAFT, NGRAM, PromptLookup
from masquerade.engine.sampler import Sampler
from masquerade.model import AppliedMask
from tests import world
from tests.engine import fuzz
from tests.engine.asking import Listener, ask, finish, is_whole

COUNT = int(os.environ.get("MASQUERADE_SPECULATE", "100"))
GROUP, GROUPS = 25, 4  # requests at once, and how often a test asks so many
FEW = [80, 81, 82, 83, 84]  # answers of these tokens only repeat themselves
TIE = 1e-4


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> fuzz.World:
    return fuzz.make_world(tmp_path_factory.mktemp("speculation"))


def make_requests(seed: int, shared: fuzz.World, engine: Engine) -> list[tuple[Request, Listener]]:
    """Requests of every kind, whose tokens are few; the same for each engine."""
    rng = random.Random(seed)
    asked = []
    for number in range(GROUP):
        prompt = [rng.choice(FEW) for _ in range(rng.randint(1, 60))]
        mask = rng.choice([None, (rng.randrange(4), rng.choice(fuzz.GAMMAS))])
        sampling = SamplingParams(
            temperature=rng.choice([0, 0, 0.7, 1.5]),
            top_p=rng.choice([1, 1, 0.8]),
            top_k=rng.choice([0, 0, 2]),
            min_p=rng.choice([0, 0, 0.1]),
            seed=rng.randrange(99),
            repetition_penalty=rng.choice([1, 1, 1.3]),
            presence_penalty=rng.choice([0, 0, 0.5]),
            frequency_penalty=rng.choice([0, 0, -0.4]),
            bias=dict.fromkeys(FEW, 60.0) | {2: rng.choice([0.0, 58.0])},
            logprobs=rng.choice([None, 2]),
        )
        stops = rng.choice([[], [], [engine.base.tokenizer.decode(rng.sample(FEW, 2))]])
        length = rng.randint(1, 40)
        schema = AnswerFormat([JsonFormat({"enum": [1, "abc"]})])
        request = Request(
            prompt,
            length,
            listener := Listener(),
            AppliedMask(shared.applied[mask[0]], mask[1]) if mask else None,
            rng.choice(["all", "decode"]),
            sampling,
            engine.base.ends | frozenset(rng.sample(FEW, rng.choice([0, 0, 1]))),
            text=AnswerText(engine.base.tokenizer, stops),
            min_tokens=rng.choice([0, 0, length // 2]),
            prompt_logprobs=rng.choice([None, None, 1]),
            grammar=engine.grammars.compile(schema)[0] if number % GROUP == 0 else None,
            priority=rng.choice([0, 0, 1]),
        )
        asked.append((request, listener))
    return asked


def answer(seed: int, shared: fuzz.World, *, speculate: bool) -> tuple[Engine, list[tuple[Request, Listener]]]:
    """The requests, answered by an engine that is short of blocks and places."""
    rng = random.Random(seed)
    config = EngineConfig(
        max_running=rng.choice([1, 3, 6]),
        max_batch_tokens=rng.choice([8, 40, 200]),
        cache_bytes=rng.choice([7, 12, 40]) * 16 * fuzz.POSITION,
        speculate=speculate,
    )
    engine = Engine(shared.base, config)
    asked = make_requests(seed, shared, engine)
    try:
        for number, (request, _) in enumerate(asked):
            engine.submit(request)
            if number % 3 == 0:
                engine.step()
        finish(engine)
        assert is_whole(engine)
    finally:
        engine.stop()
    return engine, asked


def is_tie(shared: fuzz.World, request: Request, tokens: list[int], choices: set[int | None]) -> bool:
    """Whether rounding decides which of the choices follows these tokens."""
    index = next((i for i, one in enumerate(shared.applied) if request.flow[1] == one.digest), None)
    assert index is not None or request.flow[1] is None
    oracles = [shared.plain] if index is None else [shared.oracle(index, gamma) for gamma in set(fuzz.GAMMAS)]
    found: set[int | None] = set()
    for oracle in oracles:
        logits = world.foresee(shared.plain, oracle, request.prompt, tokens, request.phase).float()
        again, _ = ask(request.prompt, request.max_tokens, sampling=request.sampling, ends=request.ends)
        again.min_tokens = request.min_tokens
        again.ids += tokens
        noise = TIE * torch.randn(64, len(logits), generator=torch.Generator().manual_seed(0))
        found |= {Sampler().sample(row[None], [again])[0].token for row in logits + noise}
    return choices <= found


@pytest.mark.parametrize("first", range(0, COUNT // GROUP, GROUPS))
def test_answers_are_those_without_drafts(shared: fuzz.World, first: int) -> None:
    drafted = accepted = ties = 0
    for seed in range(first, first + GROUPS):
        engine, with_drafts = answer(seed, shared, speculate=True)
        plain, without = answer(seed, shared, speculate=False)
        drafted, accepted = drafted + engine.counts.drafted, accepted + engine.counts.accepted
        assert plain.counts.drafted == 0
        for (one, heard), (other, expected) in zip(with_drafts, without, strict=True):
            ours, theirs = one.ids[len(one.prompt) :], other.ids[len(other.prompt) :]
            if ours == theirs:
                assert (heard.text, heard.end.reason) == (expected.text, expected.end.reason), seed
                for token, same in zip(heard.tokens, expected.tokens, strict=True):
                    assert token.text == same.text
                    assert (token.logprob or 0) == pytest.approx(same.logprob or 0, abs=1e-3)
                continue
            pairs = zip([*ours, None], [*theirs, None], strict=False)
            place, differing = next((place, {*pair}) for place, pair in enumerate(pairs) if len({*pair}) == 2)
            assert is_tie(shared, other, theirs[:place], differing - {None}), (seed, ours, theirs)
            ties += 1
    assert accepted > drafted / 20, "else little was tested"
    assert drafted > 2 * GROUP * GROUPS
    assert ties <= 1


def test_the_answer_is_what_it_was_after_a_rejected_draft(shared: fuzz.World) -> None:
    """A draft that is wrong everywhere costs positions, and leaves nothing behind in the cache."""
    prompt = [80 + number % 7 for number in range(40)]
    for wrong in (False, True):
        engine = Engine(shared.base, EngineConfig(speculate=True))
        first, _ = ask(prompt, 50)
        second, _ = ask([*prompt, 99], 50)
        if wrong:
            for request in (first, second):
                request.lookup.draft = lambda _, most: tuple([3] * min(most, 9))  # type: ignore[method-assign]
        answers = engine.generate([first]), engine.generate([second]), engine.generate([ask(prompt, 50)[0]])
        engine.stop()
        assert answers[0] == answers[2]
        if not wrong:
            expected = answers
    assert answers == expected
    assert engine.counts.drafted > 300
    assert engine.counts.accepted == 0


def test_a_pass_that_fails_with_a_draft_is_repeated_without_it(shared: fuzz.World) -> None:
    engine = Engine(shared.base, EngineConfig(speculate=True))
    forward = shared.base.model.model.forward
    request, listener = ask([80, 81, 82, 83] * 5, 20)
    request.lookup.draft = lambda _, most: tuple([80] * min(most, 4))  # type: ignore[method-assign]
    engine.submit(request)
    engine.step()

    def failing(**kw: object) -> object:
        if kw["input_ids"].shape[1] > 1:  # type: ignore[attr-defined]
            raise RuntimeError("injected")
        return forward(**kw)

    shared.base.model.model.forward = failing
    try:
        finish(engine)
    finally:
        del shared.base.model.model.forward
        engine.stop()
    assert listener.end.reason == "length"
    assert engine.counts.failures


def test_drafts_leave_prompts_their_share_of_small_batches(shared: fuzz.World) -> None:
    engine = Engine(shared.base, EngineConfig(max_running=4, max_batch_tokens=8, speculate=True))
    talker, _ = ask([80, 81, 82, 83] * 5, 200)
    talker.lookup.draft = lambda _, most: tuple([80] * most)  # type: ignore[method-assign]
    engine.submit(talker)
    while not talker.num_output_tokens:
        engine.step()
    newcomer, heard = ask(list(range(80, 100)), 1)
    engine.submit(newcomer)
    for _ in range(20):
        engine.step()
    assert heard.ended.is_set()
    engine.stop()


def test_large_batches_have_no_drafts(shared: fuzz.World) -> None:
    counts = []
    for running in (1, 32):
        engine = Engine(shared.base, EngineConfig(max_running=32, speculate=True))
        engine.generate([ask([80, 81, 82] * 6, 20)[0] for _ in range(running)])
        counts.append(engine.counts.drafted)
        engine.stop()
    assert counts[0] > 0 == counts[1]


class TestPromptLookup:
    def test_a_draft_is_what_followed_last_time(self) -> None:
        lookup = PromptLookup()
        ids = [1, 2, 3, 4, 5, 9, 1, 2, 3, 6, 7, 8, 1, 2, 3]
        assert lookup.draft(ids, 20) == (6, 7, 8, 1, 2, 3)[:FIRST_DRAFT]
        assert lookup.draft(ids, 2) == (6, 7)
        assert lookup.draft(ids, 0) == lookup.draft([*ids, 6, 5], 5) == ()
        assert lookup.draft(ids[: NGRAM - 1], 5) == ()

    def test_the_length_adapts(self) -> None:
        lookup, ids = PromptLookup(), [*range(40), 0, 1, 2]
        assert len(lookup.draft(ids, 99)) == FIRST_DRAFT
        lookup.record(len(ids), FIRST_DRAFT, FIRST_DRAFT)
        lookup.record(len(ids), LONGEST_DRAFT, LONGEST_DRAFT)
        assert len(lookup.draft(ids, 99)) == LONGEST_DRAFT
        lookup.record(len(ids), LONGEST_DRAFT, 3)
        assert len(lookup.draft(ids, 99)) == 3

    def test_rejected_drafts_are_followed_by_longer_and_longer_pauses(self) -> None:
        lookup, ids, drafts = PromptLookup(), [5] * 1000, []
        for length in range(10, 1000):
            if lookup.draft(ids[:length], 4):
                drafts.append(length)
                lookup.record(length, 4, 0)
        gaps = [later - earlier for earlier, later in itertools.pairwise(drafts)]
        assert gaps[:3] == [4, 8, 16]
        assert max(gaps) == gaps[-1] == 64
