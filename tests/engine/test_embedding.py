"""Embeddings equal the pooled hidden states of the plain model on materialised weights, whatever shares the batch."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from maskstore import Mask
from masquerade.engine import Embedding, Engine, Finished, Pooling, Request, SamplingParams
from masquerade.errors import ContextTooLong, InvalidValue, StepFailed
from masquerade.model import AppliedMask, Base, MaskManager
from tests import world
from tests.engine.asking import Listener, ask, finish, is_whole

Make = Callable[..., Engine]
CLOSE = 1e-4  # of a vector of length 1, between fp32 and float64


@torch.no_grad()
def embed(model: Any, prompt: list[int], pooling: Pooling) -> torch.Tensor:
    """The oracle, in float64: [hidden size], of length 1."""
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    states = exact(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
    pooled = states.mean(0) if pooling == "mean" else states[-1]
    vector: torch.Tensor = pooled / pooled.norm()
    return vector


@dataclass
class Case:
    """A request for an embedding, with what the oracle needs."""

    request: Request
    listener: Listener
    mask: Mask | None
    gamma: float
    pooling: Pooling

    def check(self, base: Base) -> None:
        """Compare the vector with the oracle's."""
        assert self.listener.events == [Finished("stop")]
        assert self.request.embedding is not None
        vector = self.request.embedding.vector
        assert vector is not None
        expected = embed(world.materialise(base.model, self.mask, self.gamma), self.request.prompt, self.pooling)
        assert (torch.from_numpy(vector).double() - expected).abs().max() < CLOSE


def request_for(prompt: list[int], pooling: Pooling = "mean", **more: Any) -> tuple[Request, Listener]:
    listener = Listener()
    return Request(prompt, 0, listener, embedding=Embedding(pooling), **more), listener


def make_cases(base: Base, manager: MaskManager, longest: int) -> list[Case]:
    rng = random.Random(longest)
    masks = [None, *(world.make_mask(base, rho, seed) for seed, rho in enumerate((0.003, 0.3)))]
    trunk = [rng.randrange(6, 260) for _ in range(40)]
    cases = []
    for index in range(12):
        mask, gamma, pooling = masks[index % 3], (0.0, 0.3)[index % 2], ("mean", "last")[index // 6]
        prompt = trunk[: rng.randrange(40)] + [rng.randrange(6, 260) for _ in range(rng.randint(1, longest))]
        applied = AppliedMask(manager.fit(mask), gamma) if mask else None
        cases.append(Case(*request_for(prompt, pooling, applied=applied), mask, gamma, pooling))  # type: ignore[arg-type]
    return cases


@pytest.mark.parametrize(
    ("limits", "longest"),
    [
        ({}, 60),
        ({"max_batch_tokens": 32}, 60),  # small chunks
        ({"max_running": 3}, 60),
        ({"cache_bytes": 160 * 512}, 90),
        ({"max_running": 5, "max_batch_tokens": 7}, 200),
    ],
    ids=["plain", "small chunks", "few places", "few blocks", "long"],
)
def test_vectors_equal_the_oracle_beside_answers(
    tiny: Base, manager: MaskManager, make_engine: Make, limits: dict[str, int], longest: int
) -> None:
    engine, cases = make_engine(**limits), make_cases(tiny, manager, longest)
    greedy = SamplingParams(temperature=0)
    answers = []
    for case in cases:  # the same prompts, some of whose blocks are in the cache
        heard = Listener()
        answers.append(Request(case.request.prompt[:120], 8, heard, case.request.applied, "all", greedy))
        engine.submit(answers[-1], case.request)
        engine.step()
    finish(engine)
    for case, answer in zip(cases, answers, strict=True):
        case.check(tiny)
        masked = world.materialise(tiny.model, case.mask, case.gamma)
        assert world.speak(tiny.model, masked, answer.prompt, 8).agrees(answer.ids[len(answer.prompt) :])
    assert is_whole(engine)


def test_one_that_is_preempted_begins_anew(tiny: Base, make_engine: Make) -> None:
    engine = make_engine(max_running=1, max_batch_tokens=16)
    request, listener = request_for(list(range(6, 106)))
    engine.submit(request)
    engine.step()
    engine.step()
    engine.submit(ask(priority=1)[0])
    finish(engine)
    assert engine.counts.preemptions == 1
    Case(request, listener, None, 1.0, "mean").check(tiny)


def test_a_persona_changes_the_vector(tiny: Base, manager: MaskManager, make_engine: Make) -> None:
    applied = AppliedMask(manager.fit(world.make_mask(tiny, 0.3, 1)), 0.0)
    prompt = list(range(6, 40))
    asked = [request_for(prompt, applied=one)[0] for one in (None, applied, AppliedMask(applied.mask, 1.0))]
    make_engine().generate(asked)
    base, masked, gamma_one = (one.embedding.vector for one in asked if one.embedding)
    assert base is not None
    assert masked is not None
    assert (base == gamma_one).all()
    assert abs(base - masked).max() > 0.01


def test_an_embedding_neither_reads_nor_fills_the_prefix_cache(make_engine: Make) -> None:
    engine, prompt = make_engine(), list(range(6, 86))
    engine.generate([ask(prompt)[0]])
    cached = engine.occupancy.blocks_cached
    for _ in range(2):
        request, _ = request_for(prompt)
        engine.generate([request])
        assert request.num_cached == 0
    request, _ = request_for(list(range(90, 170)))
    engine.generate([request])
    assert engine.occupancy.blocks_cached == cached
    again, _ = ask(prompt)
    engine.generate([again])
    assert again.num_cached >= 64


def test_a_failed_pass_is_repeated_and_pools_nothing_twice(tiny: Base, make_engine: Make) -> None:
    engine, failures = make_engine(max_batch_tokens=32), iter([True, False] * 50)
    forward = tiny.model.lm_head.forward

    def fail_after_the_states(states: torch.Tensor) -> Any:
        if states.shape[1] and next(failures):
            raise RuntimeError("injected")
        return forward(states)

    prompts = [list(range(6, 6 + length)) for length in (20, 90)]
    asked = [request_for(prompt) for prompt in prompts]
    other, _ = ask(count=30)
    tiny.model.lm_head.forward = fail_after_the_states
    try:
        engine.submit(other, *(request for request, _ in asked))
        finish(engine)
    finally:
        del tiny.model.lm_head.forward
    assert engine.counts.failures > 0
    for request, listener in asked:
        Case(request, listener, None, 1.0, "mean").check(tiny)


def test_states_that_are_not_numbers_end_their_own_request(tiny: Base, make_engine: Make) -> None:
    engine, (sick, heard), (well, listener) = make_engine(), request_for([7, 8, 9]), request_for([10, 11, 12])

    def spoil(_: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((args[0] == 8).unsqueeze(-1), float("nan"))

    handle = tiny.model.get_input_embeddings().register_forward_hook(spoil)
    engine.generate([sick, well])
    handle.remove()
    assert isinstance(heard.end.error, StepFailed)
    Case(well, listener, None, 1.0, "mean").check(tiny)


def test_what_cannot_be_embedded_is_refused(make_engine: Make) -> None:
    engine = make_engine()
    for prompt, error in (([], InvalidValue), ([10**6], InvalidValue), ([7] * 257, ContextTooLong)):
        with pytest.raises(error):
            engine.submit(request_for(prompt)[0])
    request, listener = request_for([7] * 256)  # the whole context
    engine.generate([request])
    assert listener.events == [Finished("stop")]
