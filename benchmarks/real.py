"""A real model: tokens per CPU-second with and without personas, and the statistics of a build.

`python -m benchmarks.real --json [--quick] [--only PART]`. The model is `smollm2` (SmolLM2-135M-Instruct in bf16,
fetched once). All times are CPU time of the whole process, on one thread. `generate` of transformers runs on a second
copy of the model whose Linears are torch's; it gets all prompts of a case as one static, left-padded batch. Runs are
interleaved; rates are medians, ratios are medians of the ratios of each round. Answers are greedy and have no end
token, so that the work is equal. Masks are random, of the size of masks that are built for this model: 55 000 weights
of o_proj and down_proj.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from benchmarks._report import Figure, arguments, report
from benchmarks.engine import PROMPTS_FIRST, make_prompts, run_engine, run_generate
from maskstore import BaseRef as MaskBase
from maskstore import Mask, MaskInfo, encode
from masquerade import demo
from masquerade.errors import UnusableModel
from masquerade.evaluate.dataset import batches, read_examples
from masquerade.evaluate.dataset import encode as encode_examples
from masquerade.model import AppliedMask, Base, MaskManager, find_targets, load
from masquerade.pruning import Builder, PersonaExamples, Recipe
from masquerade.pruning.collector import CalibrationText, StatisticsCollector
from masquerade.pruning.scores import SCORES, ScoreSettings
from masquerade.pruning.scratch import Scratch
from masquerade.pruning.statistics import LinearStatistics, Role

MODEL = "smollm2"
PRUNED = 55_000
GAMMA = 0.5
REQUESTS = (1, 4, 16)
PERSONAS = (0, 1, 8)
LONG = 2000  # tokens of a long prompt


@dataclass(frozen=True)
class Scale:
    """The sizes of a run."""

    rounds: int
    new: int  # tokens of an answer
    pairs: int  # examples a side of a build


FULL = Scale(5, 64, 64)
QUICK = Scale(2, 24, 16)


def main() -> None:
    parser = arguments(__doc__, "fewer rounds, tokens and pairs; within three CPU minutes")
    parser.add_argument("--only", choices=PARTS, help="one part of it")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    scale = QUICK if options.quick else FULL
    try:
        figures = [figure for part in ([options.only] if options.only else PARTS) for figure in PARTS[part](scale)]
    except UnusableModel as error:
        sys.exit(f"{error}")
    report("real", figures, options.json)


def measure_throughput(scale: Scale) -> Iterator[Figure]:
    """1, 4 and 16 concurrent requests on the base, with one persona and with eight."""
    peer, base = load(MODEL, device="cpu"), load(MODEL, device="cpu")
    manager = MaskManager.attach(base.model)
    masks = [AppliedMask(manager.fit(make_mask(base, seed)), GAMMA) for seed in range(max(PERSONAS))]
    for count in REQUESTS:
        prompts = make_prompts(count, (40, 80))
        cases: dict[str, Callable[[], float]] = {"generate": partial(run_generate, peer, prompts, scale.new)}
        for personas in PERSONAS:
            if personas <= count:
                applied: list[AppliedMask | None] = [*masks[:personas]] or [None]
                name = f"{personas} personas"
                cases[name] = partial(run_engine, base, prompts, applied, scale.new, PROMPTS_FIRST)
        yield from compare(cases, scale.rounds, count * scale.new, f"{count} requests")
    manager.detach()


def measure_prefill(scale: Scale) -> Iterator[Figure]:
    """A long prompt and one token, on the base and with a persona."""
    peer, base = load(MODEL, device="cpu"), load(MODEL, device="cpu")
    manager, prompts = MaskManager.attach(base.model), make_prompts(1, (LONG, LONG))
    masked = AppliedMask(manager.fit(make_mask(base, 0)), GAMMA)
    cases: dict[str, Callable[[], float]] = {
        "generate": partial(run_generate, peer, prompts, 1),
        "0 personas": partial(run_engine, base, prompts, [None], 1, PROMPTS_FIRST),
        "1 personas": partial(run_engine, base, prompts, [masked], 1, PROMPTS_FIRST),
    }
    yield from compare(cases, scale.rounds, LONG, f"a prompt of {LONG} tokens", ">= 1.0")
    manager.detach()


def compare(
    cases: Mapping[str, Callable[[], float]], rounds: int, tokens: int, label: str, bound: str | None = None
) -> Iterator[Figure]:
    """Run the cases, of so many tokens each, in turn: their rates, and those over the first one's."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            seconds[name].append(run())
    for name, spent in seconds.items():
        yield Figure(f"{name}, {label}", tokens / float(np.median(spent)), "tokens/CPU-s")
    first, *others = cases
    for name in others:
        ratio = float(np.median(np.array(seconds[first]) / np.array(seconds[name])))
        yield Figure(f"{name} / {first}, {label}", ratio, "x", bound)


def make_mask(base: Base, seed: int) -> Mask:
    rng = np.random.default_rng(seed)
    shapes = {
        name: (linear.out_features, linear.in_features)
        for name, linear in find_targets(base.model).items()
        if name.endswith((".o_proj", ".down_proj"))
    }
    share = PRUNED / sum(rows * columns for rows, columns in shapes.values())
    targets = {name: encode(rng.random(shape) < share) for name, shape in shapes.items()}
    return Mask(MaskBase(base.fingerprint, base.name), targets, MaskInfo(persona="p", score="random"))


def measure_build(scale: Scale) -> Iterator[Figure]:
    """The stages of a build with a given score and share, from the demo's formal and casual answers."""
    base = load(MODEL, device="cpu")
    own, other = (read_examples(demo.DATA / f"{name}.train.jsonl")[: scale.pairs] for name in ("formal", "casual"))
    recipe = Recipe(score="attribution-fisher", rho=0.0001, phase="all", force=True)
    sides = PersonaExamples("formal", own), PersonaExamples("casual", other)
    work = Builder(base, MaskManager.attach(base.model), recipe, *sides, ()).run()
    spent: dict[str, float] = defaultdict(float)
    started = time.process_time()
    for step in work:
        now = time.process_time()
        spent[step.stage] += now - started
        started = now
    for stage, seconds in spent.items():
        if seconds >= 0.1:
            yield Figure(f"{stage}, a build of {scale.pairs} pairs", seconds, "CPU-s")
    yield Figure(f"a build of {scale.pairs} pairs, all stages", sum(spent.values()), "CPU-s")


def measure_precision(scale: Scale) -> Iterator[Figure]:
    """The rank correlation of each Linear's scores in bf16 with those in fp32, from the same text."""
    ranks: dict[torch.dtype, dict[str, Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = load(MODEL, device="cpu", dtype=str(dtype).removeprefix("torch."))
        ranks[dtype] = rank_weights(base, scale.pairs // 2)
    found = torch.tensor(
        [
            float(torch.corrcoef(torch.stack([one, ranks[torch.bfloat16][name]]))[0, 1])
            for name, one in ranks[torch.float32].items()
        ]
    )
    for name, value in (("median", found.median()), ("least", found.min())):
        yield Figure(
            f"rank correlation of scores, bf16 with fp32, {name} of {len(found)} Linears", float(value), "", ">= 0.98"
        )


def rank_weights(base: Base, pairs: int) -> dict[str, Tensor]:
    """The ranks of every 16th weight of each Linear by `attribution-fisher`, fp64."""
    roles: dict[Role, str] = {"own": "formal", "contrast": "casual", "neutral": "introvert"}
    texts = {
        role: encode_examples(base, read_examples(demo.DATA / f"{name}.train.jsonl")[:pairs])
        for role, name in roles.items()
    }
    score = SCORES["attribution-fisher"]
    targets, found = find_targets(base.model, score.scope), dict[str, Tensor]()
    calibration = {role: CalibrationText(list(batches(texts[role], base.device)), score.needs) for role in roles}

    def rank(_: int, statistics: Mapping[str, LinearStatistics]) -> Iterator[int]:
        for name, of_linear in statistics.items():
            values = score.function(targets[name].weight.float(), of_linear, ScoreSettings()).flatten()[::16]
            found[name] = values.argsort().argsort().double()
            yield 1

    collector = StatisticsCollector(base, targets, calibration, Scratch())
    for _ in collector.forward(lambda *_: iter(())):
        pass
    for _ in collector.backward(rank):
        pass
    return found


PARTS: Mapping[str, Callable[[Scale], Iterator[Figure]]] = {
    "decoding": measure_throughput,
    "prefill": measure_prefill,
    "build": measure_build,
    "precision": measure_precision,
}

if __name__ == "__main__":
    main()
