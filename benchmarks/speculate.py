"""Speculative decoding by prompt lookup: the time of answers with drafts and without, on a real model.

`python -m benchmarks.speculate --json [--quick]`. The model is `smollm2` (SmolLM2-135M-Instruct, fetched once). All
times are CPU time of the whole process on one thread, for each token after all prompts are computed. Runs are
interleaved, and ratios are medians of the ratios of each round. The share of an answer that is in its prompt is that of
the tokens at the end of a 4-gram of the prompt. Answers with and without drafts must be equal, except after a tie.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers.utils import logging

from benchmarks._report import Figure, arguments, report
from maskstore import BaseRef as MaskBase
from maskstore import Mask, MaskInfo, encode
from masquerade.engine import Engine, EngineConfig, Request, SamplingParams
from masquerade.errors import UnusableModel
from masquerade.model import AppliedMask, Base, MaskManager, find_targets, load, render_chat

MODEL = "smollm2"
STREAMS = (1, 4)
GRAM = 4
CLINIC = (
    "Dr. Helena Marquez opened the Northwind clinic on 14 March 2019 at 27 Harbour Street. The clinic treats about 340 "
    "patients a week and employs 12 nurses, 4 doctors and a pharmacist named Tomas Lindqvist. In the summer of 2021 it "
    "moved to a larger building near the railway station, where the waiting room has 40 seats and a small library for "
    "children."
)
FUNCTION = """```python
def mean_and_range(values):
    total = 0
    smallest = largest = values[0]
    for value in values:
        total += value
        smallest = min(smallest, value)
        largest = max(largest, value)
    return total / len(values), largest - smallest
```"""


@dataclass(frozen=True)
class Task:
    """Prompts of one kind, and how their answers are sampled."""

    name: str
    prompts: Sequence[str]
    temperature: float
    bounds: dict[int, str]  # of the ratio, by streams


TASKS = (
    Task(
        "extraction",
        [
            f"{CLINIC}\n\nCopy the sentences of the text that contain a number, word for word, as a list.",
            f"{CLINIC}\n\nWho works at the clinic? Quote the sentence that says it, then answer in your own words.",
        ],
        0,
        {1: ">= 1.5"},
    ),
    Task(
        "rewriting",
        [
            f"Rewrite this text. Change Northwind to Eastgate and leave everything else as it is.\n\n{CLINIC}",
            f"Rename this function to `statistics` and print the whole function.\n\n{FUNCTION}",
        ],
        0,
        {1: ">= 1.5"},
    ),
    Task(
        "free text",
        [
            "Write a story about a lighthouse keeper who finds a letter.",
            "Why is the sky blue? Explain it to a child.",
            "Describe a walk through a town at night.",
        ],
        1.0,
        dict.fromkeys(STREAMS, ">= 0.97"),
    ),
)


@dataclass(frozen=True)
class Scale:
    """The sizes of a run."""

    rounds: int
    new: int  # most tokens of an answer
    streams: Sequence[int]


FULL = Scale(3, 96, STREAMS)
QUICK = Scale(1, 48, STREAMS[:1])


@dataclass
class Run:
    """Answers, and what they took."""

    seconds: float  # of a token, once all prompts are computed
    answers: list[list[int]]
    drafted: int
    accepted: int


def main() -> None:
    options = arguments(__doc__, "one round of short answers at one stream").parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        base = load(MODEL, device="cpu")
    except UnusableModel as error:
        sys.exit(f"{error}")
    manager = MaskManager.attach(base.model)
    masks: list[AppliedMask | None] = [None, AppliedMask(manager.fit(make_mask(base)), 0.5)]
    figures = [figure for task in TASKS for figure in measure(base, masks, task, QUICK if options.quick else FULL)]
    report("speculate", figures, options.json)


def make_mask(base: Base) -> Mask:
    """A random mask of 55 000 weights of o_proj and down_proj."""
    rng = np.random.default_rng(0)
    linears = {name: one for name, one in find_targets(base.model).items() if name.endswith(("o_proj", "down_proj"))}
    rho = 55_000 / sum(one.weight.numel() for one in linears.values())
    targets = {name: encode(rng.random(tuple(one.weight.shape)) < rho) for name, one in linears.items()}
    return Mask(MaskBase(base.fingerprint, base.name), targets, MaskInfo(persona="random", score="random"))


def measure(base: Base, masks: Sequence[AppliedMask | None], task: Task, scale: Scale) -> Iterator[Figure]:
    """A task at each number of streams, half of them with a persona."""
    for streams in scale.streams:
        ratios, runs, shares, differing = [], list[Run](), list[float](), 0
        for number in range(scale.rounds):
            requests = [
                (
                    render_chat(base.tokenizer, [{"role": "user", "content": task.prompts[place % len(task.prompts)]}]),
                    masks[(place + number) % 2],
                    place,
                )
                for place in range(number, number + streams)
            ]
            plain, drafted = (run(base, requests, task, scale.new, speculate=speculate) for speculate in (False, True))
            differing += sum(one != other for one, other in zip(plain.answers, drafted.answers, strict=True))
            ratios.append(plain.seconds / drafted.seconds)
            runs.append(drafted)
            shares += [share(prompt, answer) for (prompt, _, _), answer in zip(requests, plain.answers, strict=True)]
        name = f"{task.name}, {streams} streams"
        yield Figure(f"{name}: without / with drafts", float(np.median(ratios)), "x", task.bounds.get(streams))
        yield Figure(f"{name}: share of the answer in the prompt", float(np.mean(shares)), "")
        accepted = sum(one.accepted for one in runs)
        yield Figure(f"{name}: accepted / drafted tokens", accepted / max(1, sum(one.drafted for one in runs)), "")
        tokens = sum(len(answer) for one in runs for answer in one.answers)
        yield Figure(f"{name}: accepted / output tokens", accepted / max(1, tokens), "")
        yield Figure(f"{name}: answers that differ", differing, "", "<= 0")


def run(
    base: Base, asked: Sequence[tuple[list[int], AppliedMask | None, int]], task: Task, new: int, *, speculate: bool
) -> Run:
    """Answer prompts at once. The prompts are computed before the time begins."""
    engine = Engine(base, EngineConfig(max_running=max(STREAMS), speculate=speculate))
    requests = [
        Request(
            list(prompt),
            new,
            lambda _: None,
            mask,
            sampling=SamplingParams(temperature=task.temperature, seed=seed),
            ends=base.ends,
        )
        for prompt, mask, seed in asked
    ]
    engine.submit(*requests)
    while any(not request.num_output_tokens for request in requests):
        engine.step()
    done = sum(request.num_output_tokens for request in requests)
    started = time.process_time()
    while engine.step():
        pass
    seconds = time.process_time() - started
    engine.stop()
    answers = [request.ids[len(request.prompt) :] for request in requests]
    left = sum(map(len, answers)) - done
    return Run(seconds / max(1, left), answers, engine.counts.drafted, engine.counts.accepted)


def share(prompt: Sequence[int], answer: Sequence[int]) -> float:
    """The share of an answer's tokens that end a 4-gram of the prompt."""
    known = {tuple(prompt[end - GRAM : end]) for end in range(GRAM, len(prompt) + 1)}
    found = sum(tuple(answer[end - GRAM : end]) in known for end in range(GRAM, len(answer) + 1))
    return found / max(1, len(answer))


if __name__ == "__main__":
    main()
