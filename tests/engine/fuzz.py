"""Random scenarios for the engine, each made and judged from one seed.

`python -m tests.engine.fuzz [--first 0] [--count 500]` runs many; a failing one prints its seed. Everything happens at
once: mixed personas, phases and strengths, small chunks, few blocks, shared beginnings, late arrivals, several answers
to one prompt, priorities, cancelled requests, owners that go away, forward passes that fail. The oracle is a
single-request run of the plain model on materialised weights.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from masquerade.engine import Engine, EngineConfig, Event, Request, SamplingParams, ScoredPrompt
from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.model import AppliedMask, Base, MaskManager, load
from tests import world
from tests.engine.asking import Listener, finish, is_whole

POSITION = 512  # bytes of the small world's keys and values
GAMMAS = (0.0, 0.0, 0.3, 1.0)


@dataclass
class World:
    """What all scenarios share: a base, masks, and the oracle's copies of the base with their weights."""

    base: Base
    manager: MaskManager
    oracles: dict[tuple[int, float], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.masks = [world.make_mask(self.base, rho, seed) for seed, rho in enumerate((0.003, 0.3, 0.01, 0.5))]
        self.applied = [self.manager.fit(mask) for mask in self.masks]
        self.plain = world.materialise(self.base.model, None, 1.0)
        self.plain.set_attn_implementation("sdpa")

    def oracle(self, mask: int, gamma: float) -> Any:
        """The base with a mask in its weights."""
        if (mask, gamma) not in self.oracles:
            self.oracles[mask, gamma] = world.materialise(self.plain, self.masks[mask], gamma)
        return self.oracles[mask, gamma]


@dataclass
class Asked:
    """A request of a scenario, and what happens to it."""

    request: Request
    listener: Listener
    mask: tuple[int, float] | None
    arrives: int  # after so many steps
    leaves: int | None  # cancelled after so many steps
    greedy: bool


def make(rng: random.Random, shared: World) -> list[Asked]:
    """The requests of a scenario. Prompts branch off a few beginnings, so that prefixes are found."""
    trunks = [[rng.randrange(6, 260) for _ in range(rng.randint(1, 70))] for _ in range(2)]
    asked: list[Asked] = []
    for _ in range(rng.randint(2, 6)):
        prompt = rng.choice(trunks)[: rng.randint(1, 70)] + [rng.randrange(6, 260) for _ in range(rng.randrange(6))]
        mask = rng.choice([None, (rng.randrange(4), rng.choice(GAMMAS))])
        arrives, count = rng.choice([0, 0, rng.randrange(12)]), rng.randint(1, 40)
        sampling = SamplingParams(
            temperature=rng.choice([0, 0, 0, 1.0]), seed=rng.randrange(9), top_p=rng.choice([1, 0.8])
        )
        ends = frozenset(rng.sample(range(6, 260), rng.choice([0, 10])))
        phase, priority, owner = rng.choice(["all", "decode"]), rng.choice([0, 0, 0, 1, -1]), rng.choice("ab")
        for _ in range(rng.choice([1, 1, 1, 3])):  # n
            request = Request(
                list(prompt),
                count,
                listener := Listener(),
                AppliedMask(shared.applied[mask[0]], mask[1]) if mask else None,
                phase,
                sampling,
                ends,
                owner=owner,
                priority=priority,
                prompt_logprobs=rng.choice([None, None, None, 1]),
            )
            leaves = arrives + rng.randrange(15) if rng.random() < 0.15 else None
            asked.append(Asked(request, listener, mask, arrives, leaves, sampling.temperature == 0))
    return asked


def make_engine(rng: random.Random, shared: World, asked: list[Asked]) -> Engine:
    """An engine that is short of something."""
    running = rng.choice([1, 3, 8, 8])
    longest = max(one.request.max_length for one in asked)
    blocks = -(-longest // BLOCK_SIZE) + rng.choice([0, 1, 2, 4, 40])
    return Engine(
        shared.base,
        EngineConfig(
            max_running=running,
            max_batch_tokens=running + rng.choice([0, 5, 30, 300]),
            cache_bytes=blocks * BLOCK_SIZE * POSITION,
            prefill_budget=rng.choice([1, 7, 64, None]),
        ),
    )


def play(seed: int, shared: World) -> Counter[str]:
    """Run one scenario; raises AssertionError if anything is not as it must be. What happened, counted."""
    rng = random.Random(seed)
    asked = make(rng, shared)
    engine = make_engine(rng, shared, asked)
    forward, faults = shared.base.model.model.forward, rng.choice([0.0, 0.0, 0.15])
    deaf = rng.choice(asked) if rng.random() < 0.1 else None
    if deaf:
        deaf.request.emit = _explode
    chance = random.Random(seed + 1)

    def failing(**kw: Any) -> Any:
        if kw["input_ids"].shape[1] > 1 and chance.random() < faults:  # never for one token: it would be found guilty
            raise RuntimeError("injected")
        return forward(**kw)

    shared.base.model.model.forward = failing
    try:
        for step in range(40):
            for one in asked:
                if one.arrives == step:
                    engine.submit(one.request)
                if one.leaves == step:
                    engine.cancel(one.request)
            engine.step()
        finish(engine)
        assert is_whole(engine), "blocks, batch indices or requests are left over"
    finally:
        del shared.base.model.model.forward
        engine.stop()
    seen = Counter({"requests": len(asked), "preemptions": engine.counts.preemptions, "cached": engine.counts.cached})
    seen["failures"] = engine.counts.failures
    for one in asked:
        assert one.request.finished
        if one is not deaf:
            seen[one.listener.end.reason] += 1
            seen["tokens"] += judge(one, shared)
    return seen


def judge(one: Asked, shared: World) -> int:
    """Compare an answer with the oracle's; of an answer that was cut short, what there is of it."""
    request, end = one.request, one.listener.end
    answer = [token.id for token in one.listener.tokens]
    scored = [event.tokens for event in one.listener.events if isinstance(event, ScoredPrompt)]
    assert len(scored) <= 1
    if answer:
        assert [[score.id for score in scores] for scores in scored] == [request.prompt] * (
            request.prompt_logprobs is not None
        )
    assert answer == request.ids[len(request.prompt) :], "what was told is not what was said"
    if end.reason == "error":
        assert "injected" in str(end.error), end
        return 0
    if end.reason == "cancelled":
        assert one.leaves is not None, "nobody cancelled it"
    if not one.greedy:
        return 0
    masked = shared.oracle(*one.mask) if one.mask else shared.plain
    for place, logits in enumerate(follow(shared.plain, masked, request.prompt, answer, request.phase)):
        said = answer[place] if place < len(answer) else None
        if said is None and end.reason == "cancelled":
            break
        best = int(logits.argmax())
        wanted = None if place == request.max_tokens or best in request.ends else best
        if said != wanted:
            first, second = logits.topk(2).values.tolist()
            assert first - second < world.TIE, f"{one.mask} in phase {request.phase}: {answer} at {place}, not {wanted}"
            break  # after a tie nothing is claimed
    return len(answer)


@torch.no_grad()
def follow(base: Any, masked: Any, prompt: list[int], answer: list[int], phase: str) -> torch.Tensor:
    """The oracle's logits before each token of an answer and after the last: [len(answer) + 1, vocabulary], from one
    pass over all of it, which is much cheaper than to have the oracle speak.
    """
    cache = DynamicCache(config=base.config)
    known = len(prompt) - 1 if phase == "decode" else 0
    if known:
        base(torch.tensor([prompt[:known]]), past_key_values=cache)
    logits: torch.Tensor = masked(torch.tensor([[*prompt[known:], *answer]]), past_key_values=cache).logits[0].float()
    return logits[-len(answer) - 1 :]


def make_world(folder: Path) -> World:
    """The small world of scenarios."""
    base = load(str(world.make_model(folder)), device="cpu")
    return World(base, MaskManager.attach(base.model))


def main() -> None:
    """Many scenarios, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        shared = make_world(Path(folder))
        for seed in range(options.first, options.first + options.count):
            try:
                total += play(seed, shared)
            except AssertionError as fault:
                sys.exit(f"seed {seed}: {fault}")
    print(f"{options.count} scenarios from seed {options.first}:", dict(total))


def _explode(_: Event) -> None:
    raise RuntimeError("nobody is there")


if __name__ == "__main__":
    main()
