"""Nobody ever hears another's persona: every answer out of a crowd is, token by token, the one its request gets alone.

Knows servers of one store: one is asked everything at once, two others one thing at a time, with no room to keep
anything from one request to the next. A share of the answers is also held against plain transformers on weights that
have the mask multiplied in. Refuses to excuse anything but a tie, which it proves and counts.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import httpx
from torch import Tensor

from masquerade.engine import token_bytes
from tests import world
from tests.reliability.crowd import TIMEOUT, Crowd, Known, Reply, ask, disguise, draw
from tests.reliability.report import Progress, Row, Scale
from tests.reliability.scene import PERSONAS, Scene, make_scene

REQUESTS = 10_000
CLIENTS = 24
JUDGED = 10  # one in so many of the greedy answers is held against transformers, too
SCENARIOS = 400
NARROW = ("--max-running", "1", "--cache-bytes", str(512 * CLIENTS * 32))  # hardly more than one request's blocks
FEW = ("--max-running", "12", "--max-batch-tokens", "96", "--cache-bytes", str(512 * 640))  # preemption, small chunks


@dataclass
class Outcome:
    """What came of the requests, by their number."""

    crowded: dict[int, Reply] = field(default_factory=dict)
    alone: dict[int, Reply] = field(default_factory=dict)


def play(scale: Scale, progress: Progress) -> Iterator[Row]:
    """Ask, compare, judge."""
    rng = random.Random(scale.seed)
    count = scale.of(REQUESTS, 200)
    bodies = [draw(rng) for _ in range(count)]
    with make_scene() as scene:
        store = scene.new_store("store")
        with (
            scene.serve(store, *FEW) as crowded,
            scene.serve(store, *NARROW) as one,
            scene.serve(store, *NARROW) as other,
        ):
            quiet = (one.base_url, other.base_url)
            digests = {name: mask.digest for name, mask in scene.masks.items()}
            outcome = _ask(bodies, crowded.base_url, quiet, digests, scale.seed, progress)
            steps = _count(crowded.base_url)
        different = [one for one in range(count) if outcome.crowded[one] != outcome.alone[one]]
        ties = [one for one in different if is_tie(scene, bodies[one], outcome.crowded[one], outcome.alone[one])]
        wrong = sorted(set(different) - set(ties))
        tokens = sum(len(reply.tokens) for reply in outcome.crowded.values())
        refused = Counter(reply.refusal for reply in outcome.crowded.values() if reply.refusal)
        kinds = Counter((body.get("persona"), body.get("gamma"), body.get("persona_phase")) for body in bodies)
        yield Row(
            "every answer out of the crowd is the one its request gets alone",
            f"{CLIENTS} clients at once, {len(kinds)} combinations of persona, gamma and phase, greedy and drawn, "
            "streamed and whole, beside clients that leave; solo on two other servers",
            f"{count} requests, {tokens} tokens",
            f"{count - len(different)} equal, {len(ties)} after a tie, {len(wrong)} different, {sum(refused.values())} "
            f"refused; {steps}"
            + "".join(f"; {bodies[one]}: {outcome.crowded[one]}, not {outcome.alone[one]}" for one in wrong[:2]),
            kept=not wrong and not refused,
        )
        greedy = [one for one in range(count) if is_plain(bodies[one])][::JUDGED]
        off = [one for one in greedy if not Oracle(scene).agrees(bodies[one], outcome.crowded[one])]
        yield Row(
            "... and the one of plain transformers on materialised weights",
            "a single-request run with W * (M + gamma (1 - M))",
            f"{len(greedy)} greedy answers",
            f"{len(off)} different" + "".join(f"; {bodies[one]}" for one in off[:2]),
            kept=not off,
        )
    yield _play_scenarios(scale)


def _ask(
    bodies: list[dict[str, Any]],
    crowded: str,
    quiet: Sequence[str],
    digests: Mapping[str, str],
    seed: int,
    progress: Progress,
) -> Outcome:
    outcome = Outcome()
    local = threading.local()
    rngs = random.Random(seed + 1)
    seeds = [rngs.randrange(2**31) for _ in bodies]

    def ask_crowded(one: int) -> None:
        if not hasattr(local, "http"):
            local.http = httpx.Client(base_url=crowded, timeout=TIMEOUT)
        asked, headers = disguise(random.Random(seeds[one]), bodies[one], digests)
        outcome.crowded[one] = ask(local.http, asked, headers)
        tell()

    def ask_alone(which: int) -> None:
        """Each quiet server has its share, one request after the other."""
        with httpx.Client(base_url=quiet[which], timeout=TIMEOUT) as http:
            for one in range(which, len(bodies), len(quiet)):
                outcome.alone[one] = ask(http, bodies[one])
                tell()

    def tell() -> None:
        progress(len(outcome.crowded) + len(outcome.alone), 2 * len(bodies), "answers, in the crowd and alone")

    known = Known([(bodies[0], Reply())])
    with (
        ThreadPoolExecutor(CLIENTS) as pool,
        ThreadPoolExecutor(len(quiet)) as solo,
        Crowd(crowded, known, 2, seed, leaving=1.0).chatting() as left,
    ):
        asking = [pool.submit(ask_crowded, one) for one in range(len(bodies))]
        asking += [solo.submit(ask_alone, which) for which in range(len(quiet))]
        for one in asking:
            one.result()
    assert not left.wrong
    return outcome


def _count(base_url: str) -> str:
    """What happened in the engine meanwhile."""
    text = httpx.get(f"{base_url}/metrics").text
    said = []
    for name, words in (("preemptions", "preemptions"), ("steps", "steps")):
        found = re.search(rf"^masquerade_engine_{name}_total (\S+)", text, re.MULTILINE)
        said.append(f"{float(found[1]) if found else 0:.0f} {words}")
    return ", ".join(said)


def is_plain(body: Mapping[str, Any]) -> bool:
    """Whether the answer is the likeliest tokens and nothing else."""
    return not body["temperature"]


class Oracle:
    """Plain transformers, with masks in the weights."""

    _worn: dict[tuple[str, float], Any] = {}  # noqa: RUF012 - one scene a process

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    def agrees(self, body: Mapping[str, Any], reply: Reply) -> bool:
        """Whether an answer is the oracle's, up to the first tie."""
        spoken, tokens = self.speak(body), reply.tokens
        ours = [self.spell(token) for token in spoken.tokens]
        for one, other, margin in zip(ours, tokens, spoken.margins, strict=False):
            if one != other:
                return margin < world.TIE
        return len(ours) == len(tokens) or spoken.margins[min(len(ours), len(tokens)) - 1] < world.TIE

    def spell(self, token: int) -> bytes:
        raw = token_bytes(self._scene.base.tokenizer, token)
        return raw + raw.decode(errors="replace").encode()

    def read(self, token: bytes) -> int:
        """The id of a token as it is spelt."""
        return next(one for one in range(self._scene.base.vocabulary) if self.spell(one) == token)

    def speak(self, body: Mapping[str, Any]) -> world.Spoken:
        bare, worn, prompt, phase = self._map_slots(body)
        return world.speak(bare, worn, prompt, body["max_tokens"], frozenset(self._scene.base.ends), phase)

    def foresee(self, body: Mapping[str, Any], answer: Sequence[bytes]) -> Tensor:
        """Logits of the token after a beginning of an answer."""
        bare, worn, prompt, phase = self._map_slots(body)
        return world.foresee(bare, worn, prompt, [self.read(token) for token in answer], phase)

    def _map_slots(self, body: Mapping[str, Any]) -> tuple[Any, Any, list[int], str]:
        """The base, the base with the persona in its weights, the prompt, and the phase."""
        tokenizer = self._scene.base.tokenizer
        prompt = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
        persona = body.get("persona")
        default, phase = (PERSONAS[persona][1], PERSONAS[persona][2]) if persona else (1.0, "all")
        bare, worn = self._wear("", 1.0), self._wear(persona or "", body.get("gamma", default))
        return bare, worn, list(prompt), body.get("persona_phase", phase)

    def _wear(self, persona: str, gamma: float) -> Any:
        if (persona, gamma) not in self._worn:
            self._worn[persona, gamma] = world.materialise(
                self._scene.base.model, self._scene.masks.get(persona), gamma
            )
        return self._worn[persona, gamma]


def is_tie(scene: Scene, body: Mapping[str, Any], one: Reply, other: Reply) -> bool:
    """Whether two answers part where the oracle says, in float64, that both their tokens are equally likely: then
    rounding decides which is the likeliest, or which of the `top_k` is the one that was drawn.
    """
    if one.refusal or other.refusal:
        return False
    same = [*takewhile(lambda pair: pair[0] == pair[1], zip(one.tokens, other.tokens, strict=False))]
    at, oracle = len(same), Oracle(scene)
    logits = oracle.foresee(body, one.tokens[:at])
    first, second = (
        logits[oracle.read(reply.tokens[at])] if at < len(reply.tokens) else logits[list(scene.base.ends)].max()
        for reply in (one, other)
    )
    return abs(float(first - second)) < world.TIE


def _play_scenarios(scale: Scale) -> Row:
    """The engine's own random scenarios, with faults, preemption and owners that go away."""
    count = scale.of(SCENARIOS, 20)
    command = [sys.executable, "-m", "tests.engine.fuzz", "--first", str(scale.seed), "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = (done.stdout or done.stderr).strip().splitlines()[-1:]
    return Row(
        "whatever happens to a batch, what its requests say stays theirs",
        "random scenarios with failing passes, few blocks, late arrivals, cancelled requests (`tests.engine.fuzz`)",
        f"{count} scenarios from seed {scale.seed}",
        "".join(said).partition(": ")[2],
        kept=done.returncode == 0,
    )


if __name__ == "__main__":
    from tests.reliability.run import main

    main(["--only", "isolation", *sys.argv[1:]])
