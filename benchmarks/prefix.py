"""Work that the prefix cache saves when many personas answer questions about one document.

`python -m benchmarks.prefix --json [--quick]`. In phase `decode` the document's keys and values are the base's, so the
first persona computes them and all others find them; in phase `all` every persona needs its own. The personas are asked
the same question, or each its own, which cannot be shared. Work is counted in positions that went through the model,
which does not depend on the machine; time to the first token is CPU time on one thread. The model is random.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator

import torch
from transformers.utils import logging

from benchmarks._report import Figure, report
from benchmarks._world import VOCABULARY, make_base
from benchmarks.engine import GREEDY, TINY, make_mask
from masquerade.engine import Engine, Phase, Request
from masquerade.model import AppliedMask, MaskManager

PERSONAS = 32
QUESTION, ANSWER = 20, 4  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a shorter document; within a minute")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    report("prefix", list(measure(300 if options.quick else 1500)), options.json)


def measure(length: int) -> Iterator[Figure]:
    """Total work of concurrent and of sequential requests, and the time to the second persona's first token."""
    base = make_base(TINY | {"num_hidden_layers": 4, "hidden_size": 256})
    manager = MaskManager.attach(base.model)
    applied_masks = [AppliedMask(manager.fit(make_mask(base, seed)), 0.0) for seed in range(PERSONAS)]
    rng = random.Random(0)
    document = [rng.randrange(4, VOCABULARY) for _ in range(length)]

    same = [rng.randrange(4, VOCABULARY) for _ in range(QUESTION)]

    def ask(applied: AppliedMask, phase: Phase, question: list[int]) -> Request:
        return Request([*document, *question], ANSWER, lambda _: None, applied, phase, GREEDY)

    def work(applied_masks: list[AppliedMask], phase: Phase, *, at_once: bool, own: bool = False) -> int:
        """Prompt positions that were computed."""
        engine = Engine(base)
        for group in [applied_masks] if at_once else [[applied] for applied in applied_masks]:
            questions = [[rng.randrange(4, VOCABULARY) for _ in same] if own else same for _ in group]
            engine.generate([ask(applied, phase, asked) for applied, asked in zip(group, questions, strict=True)])
        engine.stop()
        return engine.counts.computed - len(applied_masks) * (ANSWER - 1)

    def wait(engine: Engine, request: Request) -> float:
        """CPU seconds to the first token."""
        started = time.process_time()
        engine.submit(request)
        while not request.num_output_tokens:
            engine.step()
        seconds = time.process_time() - started
        engine.cancel(request)
        engine.step()
        return seconds

    phases: tuple[Phase, ...] = ("decode", "all")
    for phase in phases:
        alone = work(applied_masks[:1], phase, at_once=True)
        for at_once, how in ((True, "at once"), (False, "one after the other")):
            for own, question in ((False, "the same question"), (True, "their own questions")):
                total = work(applied_masks, phase, at_once=at_once, own=own)
                yield Figure(
                    f"prompt work, phase {phase}: {PERSONAS} personas {how}, {question} / one persona",
                    total / alone,
                    "x",
                    "<= 1.15" if phase == "decode" and not own else None,
                )
    for phase in phases:
        ratios = []
        for _ in range(3):
            engine = Engine(base)
            first, second = (wait(engine, ask(applied, phase, same)) for applied in applied_masks[:2])
            ratios.append(second / first)
            engine.stop()
        yield Figure(
            f"time to the first token, phase {phase}: second persona / first",
            sorted(ratios)[1],
            "x",
            "<= 0.2" if phase == "decode" else None,
        )


if __name__ == "__main__":
    main()
