"""Requests of negative priority, which nobody waits for, give way to all others."""

from __future__ import annotations

import random
from collections.abc import Callable

from masquerade.engine import Engine, SamplingParams
from masquerade.engine.request import DRAFTED_BIASES
from tests.engine.asking import ask, finish

Make = Callable[..., Engine]


def prompts(count: int, length: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(6, 260) for _ in range(length)] for _ in range(count)]


def test_answers_are_those_of_any_request(make_engine: Make) -> None:
    given = prompts(6, 40)
    alone = make_engine().generate([ask(prompt, 12)[0] for prompt in given])
    engine = make_engine(max_running=4, max_batch_tokens=48)
    asked = [ask(prompt, 12, priority=-(index % 2))[0] for index, prompt in enumerate(given)]
    assert engine.generate(asked) == alone


def test_beside_an_answer_they_take_part_in_few_steps(make_engine: Make) -> None:
    engine = make_engine(speculate=False)
    chat, batch = ask([9] * 5, 100)[0], [ask(prompt, 100, priority=-1)[0] for prompt in prompts(4, 20)]
    engine.submit(*batch)
    for _ in range(3):
        engine.step()
    before = sum(one.num_computed for one in batch)
    engine.submit(chat)
    steps = engine.counts.steps
    while not chat.finished:
        engine.step()
    assert engine.counts.steps - steps == 100  # a token a step, from the first on
    assert 0 < sum(one.num_computed for one in batch) - before <= 4 * (4 * (1 + 20))
    finish(engine)
    assert all(one.num_output_tokens == 100 for one in batch)


def test_beside_an_answer_they_have_no_drafts(make_engine: Make) -> None:
    engine = make_engine()
    repetitive = SamplingParams(temperature=0, bias={9: 100.0})
    batch = ask([9] * 20, 150, priority=-1, sampling=repetitive)[0]
    many = dict.fromkeys(range(DRAFTED_BIASES + 1), 0.0)  # so that the answer itself has no drafts
    chat = ask([8] * 20, 100, sampling=SamplingParams(temperature=0, bias=many))[0]
    engine.submit(batch, chat)
    while not chat.finished:
        engine.step()
    assert batch.num_output_tokens
    assert not engine.counts.drafted
    finish(engine)
    assert engine.counts.drafted


def test_a_new_request_does_not_wait_for_a_long_prompt(make_engine: Make) -> None:
    engine = make_engine(max_running=8, max_batch_tokens=64, prefill_budget=16)
    long = ask([9] * 200, 2, priority=-1)[0]
    engine.submit(long)
    engine.step()
    assert long.num_computed == 16  # a short step, although nothing else runs
    chat = ask([8] * 60, 3)[0]
    engine.submit(chat)
    engine.step()
    assert chat.num_output_tokens == 1


def test_places_and_blocks_are_given_up(make_engine: Make) -> None:
    engine = make_engine(max_running=2, cache_bytes=16 * 16 * 512)
    batch = [ask([9 + index] * 80, 40, priority=-1)[0] for index in range(2)]
    engine.submit(*batch)
    for _ in range(8):
        engine.step()
    chats = [ask([20 + index] * 90, 4)[0] for index in range(2)]
    engine.submit(*chats)
    while not all(chat.finished for chat in chats):
        assert engine.step()
    assert not any(one.finished for one in batch)
    finish(engine)
    assert engine.counts.preemptions > 0
    assert all(one.num_output_tokens == 40 for one in batch)


def test_a_prefix_that_they_compute_is_not_waited_for(make_engine: Make) -> None:
    engine = make_engine(prefill_budget=16)
    shared = list(range(6, 206))
    engine.submit(ask(shared, 2, priority=-1)[0])
    engine.step()
    chat = ask(shared, 2)[0]
    engine.submit(chat)
    engine.step()
    assert chat.num_output_tokens == 1


def test_a_drain_ends_them_at_once(make_engine: Make) -> None:
    engine = make_engine()
    chat, listener = ask([9] * 5, 40)
    batch, ended = ask([8] * 5, 240, priority=-1)
    engine.start()
    engine.submit(chat, batch)
    engine.drain(60)
    assert listener.end.reason == "length"
    assert ended.end.reason == "cancelled"
    assert batch.num_output_tokens < 200
