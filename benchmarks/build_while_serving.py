"""How a build and streams of answers slow each other down.

`python -m benchmarks.build_while_serving --json [--quick]`. Four greedy streams run on the demo model, first alone,
then while a persona is built between their steps, turn by turn; the figure is the 95th percentile of the time between
two tokens of a stream, building over quiet. One thread computes. The build runs alone too, for its own slow-down.
"""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from benchmarks._report import Figure, arguments, report
from masquerade import demo
from masquerade.engine import Engine, Event, Finished, Request, SamplingParams, Token
from masquerade.evaluate.dataset import read_examples
from masquerade.model import Base, MaskManager, load, render_chat
from masquerade.pruning import Builder, PersonaExamples, Recipe

REACH = 2.0


class Stream:
    """Repeats the same request, and records the times between tokens."""

    def __init__(self, engine: Engine, prompt: list[int]) -> None:
        self._engine, self._prompt = engine, prompt
        self._last: float | None = None
        self.gaps: list[float] = []
        self.running = True
        self.ended = threading.Event()
        self._ask()

    def _ask(self) -> None:
        self._last = None
        room = self._engine.base.context - len(self._prompt)
        self._engine.submit(Request(self._prompt, room, self._on_event, sampling=SamplingParams(temperature=0)))

    def _on_event(self, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, Token):
            if self._last is not None:
                self.gaps.append(now - self._last)
            self._last = now
        elif isinstance(event, Finished):
            if self.running:
                threading.Thread(target=self._ask).start()  # the engine's thread must not submit
            else:
                self.ended.set()


def main() -> None:
    options = arguments(__doc__, "one turn; within a minute").parse_args()
    torch.set_num_threads(1)
    base = load("demo", device="cpu")
    manager = MaskManager.attach(base.model)
    engine = Engine(base)
    engine.start()
    figures = list(measure(engine, base, manager, turns=1 if options.quick else 3))
    engine.stop()
    report("build_while_serving", figures, options.json)


def measure(engine: Engine, base: Base, manager: MaskManager, turns: int) -> Iterator[Figure]:
    """Quiet and building, turn by turn."""
    alone = timed(lambda: build(engine, base, manager))
    gaps: dict[str, list[float]] = {"quiet": [], "building": []}
    seconds = []
    for _ in range(turns):
        gaps["quiet"] += measure_gaps(engine, base, lambda: time.sleep(alone))
        gaps["building"] += measure_gaps(
            engine, base, lambda: seconds.append(timed(lambda: build(engine, base, manager)))
        )
    p95 = {name: float(np.percentile(values, 95)) for name, values in gaps.items()}
    for name, values in gaps.items():
        yield Figure(f"median time between tokens, {name}", float(np.median(values)) * 1e3, "ms")
        yield Figure(f"p95 time between tokens, {name}", p95[name] * 1e3, "ms")
        yield Figure(f"longest time between tokens, {name}", max(values) * 1e3, "ms")
    yield Figure("p95 building / quiet", p95["building"] / p95["quiet"], "x", f"<= {REACH}")
    yield Figure("build alone", alone, "s")
    yield Figure("build while serving", min(seconds), "s")


def build(engine: Engine, base: Base, manager: MaskManager) -> None:
    """A pair of opposites from the demo's files, each item of the work a background task of the engine."""
    sides = [PersonaExamples(name, read_examples(demo.DATA / f"{name}.train.jsonl")) for name in ("formal", "casual")]
    facts = read_examples(demo.DATA / "facts.jsonl")
    work = Builder(base, manager, Recipe(score="attribution", rho=0.003), sides[0], sides[1], facts).run()

    def advance() -> bool:
        try:
            next(work)
        except StopIteration:
            return False
        return True

    while engine.run_background(advance).result():
        pass


def measure_gaps(engine: Engine, base: Base, work: Callable[[], object]) -> list[float]:
    """The gaps between tokens of all streams while something goes on."""
    prompts = (f"Tell me about the {thing}." for thing in ("exam", "soup", "film", "trip"))
    streams = [Stream(engine, render_chat(base.tokenizer, [{"role": "user", "content": text}])) for text in prompts]
    time.sleep(1)
    for stream in streams:
        stream.gaps.clear()
    work()
    gaps = [gap for stream in streams for gap in list(stream.gaps)]
    for stream in streams:
        stream.running = False
    for stream in streams:
        stream.ended.wait(60)
    return gaps


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
