"""Who runs: nobody starves, who gives way is computed again, and blocks always add up."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from masquerade.engine import Engine, Request, SamplingParams, Token
from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.model import AppliedMask, Base, MaskManager
from tests import world

Make = Callable[..., Engine]
POSITION = 512  # bytes of the small world's keys and values


def ask(prompt: list[int], count: int = 8, **more: object) -> Request:
    return Request(prompt, count, lambda _: None, sampling=SamplingParams(temperature=0), **more)  # type: ignore[arg-type]


def prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(6, 260) for _ in range(length)] for _ in range(count)]


def run(engine: Engine, requests: list[Request]) -> list[Request]:
    """Serve requests; in which order they began."""
    for request in requests:
        engine.submit(request)
    began: list[Request] = []
    while engine.step():
        began += [request for request in requests if request.started and request not in began]
    return began


@pytest.fixture
def applied_masks(tiny: Base, manager: MaskManager) -> list[AppliedMask]:
    return [AppliedMask(manager.fit(world.make_mask(tiny, 0.003, seed)), 0.0) for seed in range(4)]


class TestPreemption:
    def test_answers_are_what_they_would_be_with_room(self, make_engine: Make) -> None:
        asked = prompts(8, 20)
        roomy = make_engine().generate([ask(prompt, 40) for prompt in asked])
        narrow = make_engine(cache_bytes=10 * BLOCK_SIZE * POSITION)
        assert narrow.generate([ask(prompt, 40) for prompt in asked]) == roomy
        assert narrow.counts.preemptions > 0
        assert narrow._block_manager.num_free == 10

    def test_a_seeded_draw_is_not_drawn_again(self, make_engine: Make) -> None:
        def hot(prompt: list[int]) -> Request:
            sampling = SamplingParams(temperature=1.0, seed=5, presence_penalty=1.0, repetition_penalty=1.2)
            return Request(prompt, 40, lambda _: None, sampling=sampling)

        asked = prompts(6, 20)
        narrow = make_engine(cache_bytes=10 * BLOCK_SIZE * POSITION)
        assert narrow.generate(map(hot, asked)) == make_engine().generate(map(hot, asked))
        assert narrow.counts.preemptions > 0

    def test_no_token_is_told_twice(self, make_engine: Make) -> None:
        told: list[list[int]] = [[] for _ in range(6)]
        requests = [ask(prompt, 40) for prompt in prompts(6, 20)]
        for request, heard in zip(requests, told, strict=True):
            request.emit = lambda event, heard=heard: heard.append(event.id) if isinstance(event, Token) else None
        engine = make_engine(cache_bytes=8 * BLOCK_SIZE * POSITION)
        assert engine.generate(requests) == told
        assert engine.counts.preemptions > 0

    def test_the_first_in_rank_is_never_asked_to_give_way(self, make_engine: Make) -> None:
        engine = make_engine(cache_bytes=8 * BLOCK_SIZE * POSITION)
        requests = [ask(prompt, 60) for prompt in prompts(5, 20)]
        for request in requests:
            engine.submit(request)
        longest = 0
        while engine.step():
            if not requests[0].finished:
                assert requests[0].num_computed > longest or requests[0].num_computed == 0 == longest
                longest = requests[0].num_computed
        assert engine.counts.preemptions > 0

    def test_a_request_may_take_the_whole_cache(self, make_engine: Make) -> None:
        engine = make_engine(cache_bytes=6 * BLOCK_SIZE * POSITION)
        whole = ask(list(range(6, 66)), 36)
        beside = [ask(prompt, 10) for prompt in prompts(3, 30)]
        answers = engine.generate([*beside, whole])
        assert [len(answer) for answer in answers] == [10, 10, 10, 36]


class TestFairness:
    def test_a_cold_persona_does_not_wait_behind_a_crowd(
        self, make_engine: Make, applied_masks: list[AppliedMask]
    ) -> None:
        engine = make_engine(max_running=2)
        crowd = [ask(prompt, applied=applied_masks[0]) for prompt in prompts(20, 20)]
        cold, base = ask([9] * 20, applied=applied_masks[1]), ask([8] * 20)
        order = run(engine, [*crowd, cold, base])
        assert max(order.index(cold), order.index(base)) <= 4

    def test_a_new_owner_does_not_wait_behind_another_ones_crowd(
        self, make_engine: Make, applied_masks: list[AppliedMask]
    ) -> None:
        """Not even when that one asks for many personas."""
        engine = make_engine(max_running=2)
        crowd = [ask(prompt, applied=applied_masks[n % 4], owner="many") for n, prompt in enumerate(prompts(20, 20))]
        alone = ask([9] * 20, owner="one")
        assert run(engine, [*crowd, alone]).index(alone) <= 3

    def test_two_owners_get_alike_although_one_asks_for_more(self, make_engine: Make) -> None:
        engine = make_engine(max_running=2)
        many = [ask(prompt, owner="many") for prompt in prompts(16, 20)]
        few = [ask(prompt, owner="few") for prompt in prompts(4, 20, seed=1)]
        order = run(engine, [*many, *few])
        assert [request.owner for request in order[:8]].count("few") >= 3

    def test_long_requests_are_charged_as_such(self, make_engine: Make) -> None:
        engine = make_engine(max_running=1, max_batch_tokens=256)
        long = [ask(prompt, owner="long") for prompt in prompts(6, 100)]
        short = [ask(prompt, owner="short") for prompt in prompts(12, 10, seed=1)]
        order = run(engine, [*long, *short])
        assert sum(request.owner == "short" for request in order[:9]) >= 6

    def test_absence_saves_nothing_up(self, make_engine: Make) -> None:
        engine = make_engine(max_running=1)
        run(engine, [ask(prompt, owner="steady") for prompt in prompts(10, 20)])
        steady = [ask(prompt, owner="steady") for prompt in prompts(6, 20, seed=1)]
        fresh = [ask(prompt, owner="fresh") for prompt in prompts(6, 20, seed=2)]
        owners = [request.owner for request in run(engine, [*steady, *fresh])]
        assert owners[:6].count("steady") >= 2

    def test_of_one_account_the_first_come_is_first_served(self, make_engine: Make) -> None:
        requests = [ask(prompt) for prompt in prompts(6, 20)]
        assert run(make_engine(max_running=1), requests) == requests

    def test_nothing_is_remembered_of_those_who_have_left(self, make_engine: Make) -> None:
        engine = make_engine()
        run(engine, [ask(prompt, owner=str(n)) for n, prompt in enumerate(prompts(10, 5))])
        queue = engine._scheduler.waiting
        assert not queue._active
        assert not queue._queues
        assert not any(queue._active_in.values())


class TestPriority:
    def test_the_higher_goes_first(self, make_engine: Make) -> None:
        low, high = ([ask(prompt, priority=p) for prompt in prompts(3, 20, p)] for p in (0, 1))
        assert run(make_engine(max_running=1), [*low, *high]) == [*high, *low]

    def test_the_lower_gives_its_place(self, make_engine: Make) -> None:
        engine, (prompt, other) = make_engine(max_running=1), prompts(2, 20)
        alone = engine.generate([ask(prompt, 30)])[0]
        low, high = ask(prompt, 30), ask(other, 5, priority=1)
        engine.submit(low)
        for _ in range(4):
            engine.step()
        engine.submit(high)
        engine.step()
        assert high.num_output_tokens == 1
        while engine.step():
            pass
        assert low.ids[20:] == alone

    def test_equals_do_not_give_way(self, make_engine: Make) -> None:
        engine = make_engine(max_running=1)
        run(engine, [ask(prompt, priority=3) for prompt in prompts(3, 20)])
        assert engine.counts.preemptions == 0


@pytest.mark.parametrize("seed", range(3))
def test_blocks_add_up_under_random_traffic(make_engine: Make, applied_masks: list[AppliedMask], seed: int) -> None:
    """Whatever arrives, leaves or gives way: reference counts, batch indices and the block table agree."""
    engine = make_engine(max_running=6, max_batch_tokens=48, cache_bytes=40 * BLOCK_SIZE * POSITION)
    rng, alive, scheduler, blocks = random.Random(seed), [], engine._scheduler, engine._block_manager
    for _ in range(200):
        if rng.random() < 0.4:
            prompt = [6 + rng.randrange(2)] * rng.randint(1, 120)
            alive.append(
                ask(prompt, rng.randint(1, 30), applied=rng.choice([*applied_masks, None]), priority=rng.randrange(2))
            )
            alive[-1].owner = rng.choice("ab")
            engine.submit(alive[-1])
        if alive and rng.random() < 0.1:
            engine.cancel(rng.choice(alive))
        engine.step()
        held = [block for request in scheduler.running for block in request.blocks]
        assert [blocks._ref_counts[block] for block in range(1, 41)] == [held.count(block) for block in range(1, 41)]
        assert len(set(held)) + blocks.num_free == 40
        indices = [request.batch_index for request in scheduler.running]
        assert sorted(indices + scheduler._free_indices) == list(range(6))
        for request in scheduler.running:
            assert scheduler.block_table[request.batch_index, : len(request.blocks)].tolist() == request.blocks
            assert not scheduler.block_table[request.batch_index, len(request.blocks) :].any()
    while engine.step():
        pass
    assert all(request.finished for request in alive)
    assert blocks.num_free == 40
    assert engine.counts.preemptions + engine.counts.cached > 0
