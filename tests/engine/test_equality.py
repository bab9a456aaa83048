"""Whatever shares a batch, every request gets the tokens of a single-request run on materialised weights."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from masquerade.engine import Engine, Request, SamplingParams, row_groups
from masquerade.model import AppliedMask, Base, MaskManager
from tests import world

GREEDY = SamplingParams(temperature=0)
COUNT = 24
RHOS = (0.003, 0.3)  # listed and bitmap masks side by side


def make_requests(base: Base, manager: MaskManager, length: tuple[int, int], seed: int = 0) -> list[tuple]:
    """27 requests: eight personas and the base, at gamma 0, 0.3 and 1; prompts of random lengths."""
    rng = random.Random(seed)
    masks = [world.make_mask(base, RHOS[index % 2], seed=index) for index in range(8)]
    masked = [manager.fit(mask) for mask in masks]
    chosen = []
    for index, gamma in itertools.product(range(9), (0.0, 0.3, 1.0)):
        prompt = [rng.randrange(6, 260) for _ in range(rng.randint(*length))]
        mask, applied = (masks[index], AppliedMask(masked[index], gamma)) if index < 8 else (None, None)
        phase = "decode" if (index + int(gamma * 10)) % 2 else "all"
        chosen.append((Request(prompt, COUNT, lambda _: None, applied, phase, GREEDY), mask, gamma))
    return chosen


def check(base: Base, requests: list[tuple], answers: list[list[int]]) -> None:
    """Every answer equals the oracle's, one by one."""
    for (request, mask, gamma), answer in zip(requests, answers, strict=True):
        masked = world.materialise(base.model, mask, gamma)
        oracle = world.speak(base.model, masked, request.prompt, COUNT, phase=request.phase)
        assert oracle.agrees(answer), (request.phase, gamma)


@pytest.mark.parametrize(
    ("limits", "length"),
    [
        ({}, (2, 60)),
        ({"max_batch_tokens": 32}, (2, 60)),  # prompts in small chunks
        ({"max_running": 3}, (2, 60)),  # places are few
        ({"cache_bytes": 96 * 512}, (2, 60)),  # blocks are few: 96 positions of 512 bytes
        ({"max_running": 5, "max_batch_tokens": 7}, (1, 90)),
    ],
    ids=["plain", "small chunks", "few places", "few blocks", "all at once"],
)
def test_tokens_equal_the_oracle(
    tiny: Base, manager: MaskManager, make_engine: Callable[..., Engine], limits: dict, length: tuple[int, int]
) -> None:
    requests = make_requests(tiny, manager, length)
    answers = make_engine(**limits).generate([request for request, _, _ in requests])
    check(tiny, requests, answers)


def test_requests_that_join_a_running_batch_equal_the_oracle(
    tiny: Base, manager: MaskManager, make_engine: Callable[..., Engine]
) -> None:
    engine, requests = make_engine(), make_requests(tiny, manager, (2, 60), seed=1)
    for request, _, _ in requests:
        engine.submit(request)
        engine.step()
    while engine.step():
        pass
    check(tiny, requests, [request.ids[len(request.prompt) :] for request, _, _ in requests])


def test_torch_attends_where_the_native_kernel_does_not(
    tiny: Base, manager: MaskManager, make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decodes of all lengths beside prompts in chunks."""
    monkeypatch.setattr(row_groups, "attends", lambda _: False)
    engine, requests = make_engine(max_batch_tokens=32), make_requests(tiny, manager, (2, 200), seed=2)
    check(tiny, requests, engine.generate([request for request, _, _ in requests]))


def test_gamma_one_gives_the_tokens_of_the_base(
    tiny: Base, manager: MaskManager, make_engine: Callable[..., Engine]
) -> None:
    applied = AppliedMask(manager.fit(world.make_mask(tiny, 0.3, seed=1)), 1.0)
    prompt = list(range(6, 40))
    masked, unmasked = make_engine().generate(
        [
            Request(prompt, COUNT, lambda _: None, applied, "all", GREEDY),
            Request(prompt, COUNT, lambda _: None, sampling=GREEDY),
        ]
    )
    assert masked == unmasked


def test_a_mask_changes_the_tokens(tiny: Base, manager: MaskManager, make_engine: Callable[..., Engine]) -> None:
    """The equality above would hold of a server that ignores masks and an oracle that does, too."""
    applied = AppliedMask(manager.fit(world.make_mask(tiny, 0.3, seed=1)), 0.0)
    prompt = list(range(6, 40))
    masked, decoded, unmasked = make_engine().generate(
        [
            Request(prompt, COUNT, lambda _: None, applied, "all", GREEDY),
            Request(prompt, COUNT, lambda _: None, applied, "decode", GREEDY),
            Request(prompt, COUNT, lambda _: None, sampling=GREEDY),
        ]
    )
    assert masked != unmasked
    assert decoded != masked


def test_an_engine_gives_the_model_back(tiny: Base, make_engine: Callable[..., Engine]) -> None:
    before = tiny.model.config._attn_implementation
    engine = make_engine()
    assert tiny.model.config._attn_implementation != before
    engine.stop()
    assert tiny.model.config._attn_implementation == before
