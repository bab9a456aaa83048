"""Variants of the search for a mask, each alone, at equal cost on neutral text.

`python -m benchmarks.searches --json [--quick] [--model NAME] [--device cpu] [--data FOLDER] [--axes EI,PJ,POW,STYLE]
[--seeds 0,1,2] [--variants NAMES] [--steps N] [--earlier LOGS]`. A seed draws the 256 training and the 64 validation
pairs of an axis, and searches for one of its sides: the first for an even seed, else the second. All variants of a seed
start from the same statistics and neutral text. The figures are those of up to 60 test pairs, the same for all seeds,
and of the neutral text of the report, which no search reads: the median shift at a neutral ratio of 1.05, interpolated
over gammas, and the own ratio and the share of facts that are kept there. Progress is on stderr.

Last come the differences of each variant to the product's search on the same sides, with 95 % intervals: of shifts, in
shares of the product's mean shift on the axis, of own ratios, and of facts kept. `--earlier` names files with what
other runs wrote on stderr, separated by commas; their sides count too. With `--seeds ""` nothing else does.
"""

import argparse
import math
import random
import re
import sys
import time
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._pairs import Pair, Sizes, pair_arguments, split_pairs
from benchmarks._report import Figure, follow, report
from maskstore import MaskInfo, Target
from masquerade.evaluate.bootstrap import mean_interval
from masquerade.evaluate.dataset import encode
from masquerade.evaluate.evaluation_set import EvaluationSet
from masquerade.evaluate.facts import check_facts, find_known_facts, read_facts, share_kept
from masquerade.evaluate.metrics import finish
from masquerade.evaluate.treatment import Treatment
from masquerade.kernels import Correction, dense_weight
from masquerade.model import AppliedMask, Base, MaskManager, ResidentMask, find_targets, load
from masquerade.pruning import PersonaExamples, Recipe
from masquerade.pruning.builder import JUDGED, JUDGED_TOKENS, TRACED, Builder
from masquerade.pruning.data import gather
from masquerade.pruning.hooks import replaced
from masquerade.pruning.responses import ResponseBatch
from masquerade.pruning.scratch import Scratch
from masquerade.pruning.search import Items, MaskSearch, SearchSettings, _State
from masquerade.pruning.statistics import LinearStatistics
from masquerade.pruning.strength import StrengthTuner

NEUTRAL_RATIO = 1.05
GAMMAS = (1.0, 0.75, 0.5, 0.25, 0.0)
TOKENS = 64  # most of a measured response
NAME = re.compile(r"(\w+ seed \d+), (.+): (.+)")  # side, variant, figure
LINE = re.compile(r"(\w+ seed .+): (\S+) (.+)")  # of progress
COMPARED = {"shift": "of the product's", "own": "x", "facts kept": "share"}  # figure -> unit of its differences
PREPARED = "_pairs", "_neutral", "_likelihoods", "_answers"  # what `MaskSearch.prepare` computes


class LinearSearch(MaskSearch):
    """Ranks by gain / cost instead of gain² / cost."""

    def _value(self, side: int, name: str, gains: Tensor) -> Tensor:
        return super()._value(side, name, gains.clamp(min=0).sqrt())


class PathSearch(MaskSearch):
    """Takes each step's gradients at a point drawn from the path between the base and the masked model.

    The mean over steps is that of integrated gradients (Sundararajan et al. 2017).
    """

    def _select(self, side: int, state: _State) -> Items:
        draw = random.Random(f"{self._settings.seed}/{state.step}").random()
        self._point = 1 - draw * (1 - self._settings.gamma)
        yield from super()._select(side, state)

    def _mask(self, linear: nn.Linear, pruned: Tensor) -> Tensor:
        weight = dense_weight(linear).to(self._base.dtype, copy=True)
        weight.view(-1)[pruned] *= self._point
        return weight


class DecayingSearch(MaskSearch):
    """Lets gains of earlier steps, taken at other masks, count less: each step multiplies them by 0.9."""

    def _accumulate(self, side: int, state: _State) -> Items:
        for gains in state.gains.values():
            gains.mul_(0.9)
        yield from super()._accumulate(side, state)


class PropagationSearch(MaskSearch):
    """Takes gradients with the rules of relevance propagation: norms and gates are constants, products are halved.

    As in RelP (Jafari et al. 2025), but for the attention weights, whose gradients the queries and keys need.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._model._replacements = [((), ()) for _ in self._model.layers]  # they would take the place of these

    def _backpropagate(self, batch: ResponseBatch, state: _State, loss: Callable[[Tensor], Tensor]) -> Items:
        norms = [module for module in self._base.model.modules() if type(module).__name__.endswith("RMSNorm")]
        blocks = [module for name, module in self._base.model.named_modules() if name.endswith(".mlp")]
        with ExitStack() as rules:
            rules.enter_context(replaced(norms, [partial(_normalise, norm) for norm in norms]))
            rules.enter_context(replaced(blocks, [partial(_gate, block) for block in blocks]))
            yield from super()._backpropagate(batch, state, loss)


class StrengthSearch(MaskSearch):
    """Searches for a strength of each pruned weight beside the weight: a mask of more than one bit a weight.

    `_steps` says by how much of the gate's step a weight is changed, by its gain / cost over the median of all that are
    pruned. What no format of masks holds is measured through corrections of its own.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._found: dict[tuple[int, ...], Mapping[str, Correction]] = {}  # by the sizes of a state's targets

    def correct(self, targets: Mapping[str, Target]) -> Mapping[str, Correction]:
        """The corrections of a state that was judged."""
        return self._found[_sizes(targets)]

    def _steps(self, ratios: Tensor) -> Tensor:
        """Two bits: a half, one, one and a half, or two steps."""
        return (2 * ratios).round().clamp(1, 4) / 2

    def _select(self, side: int, state: _State) -> Items:
        yield from super()._select(side, state)
        ratios = {name: self._find_ratios(side, name, state) for name in state.pruned}
        median = torch.cat([one.abs() for one in ratios.values()]).median().clamp(min=1e-30)
        corrections = {}
        for name, linear in self._targets.items():
            changes = torch.zeros_like(state.gains[name])
            changes.view(-1)[state.pruned[name]] = self._steps(ratios[name] / median)
            changes.mul_(dense_weight(linear))
            weight = dense_weight(linear).float() - (1 - self._settings.gamma) * changes
            state.weights[name] = weight.to(self._base.dtype)
            corrections[name] = StrengthCorrection(changes.to(self._base.dtype))
        if self._is_judged(state.step):
            self._found[tuple(map(len, state.pruned.values()))] = corrections

    def _find_ratios(self, side: int, name: str, state: _State) -> Tensor:
        worth = self._scratch.get(f"start/{side}/{name}")["worth"]
        return (state.gains[name] * worth).view(-1)[state.pruned[name]]


class DoublingSearch(StrengthSearch):
    """Doubles weights where that helps as it prunes others where that does."""

    def _value(self, side: int, name: str, gains: Tensor) -> Tensor:
        return super()._value(side, name, gains.abs())

    def _steps(self, ratios: Tensor) -> Tensor:
        return ratios.sign()


class StrengthCorrection:
    """The changes of a Linear's weights [out, in] as a `Correction`."""

    def __init__(self, changes: Tensor) -> None:
        self._changes = changes
        self.nbytes = changes.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """See `Correction`."""
        return F.linear(x, self._changes.to(x.dtype)).float()


def _sizes(targets: Mapping[str, Target]) -> tuple[int, ...]:
    return tuple(one.pruned for one in targets.values())


def _normalise(norm: Any, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.variance_epsilon).detach()
    result: Tensor = norm.weight * (x.float() * scale).to(x.dtype)
    return result


def _gate(block: Any, x: Tensor) -> Tensor:
    gate, up = block.gate_proj(x), block.up_proj(x)
    gate = gate * torch.sigmoid(gate).detach()  # SiLU
    product = gate * up
    result: Tensor = block.down_proj((product + product.detach()) / 2)
    return result


# name -> the search, and its settings where they differ from the product's
VARIANTS: Mapping[str, tuple[type[MaskSearch], Mapping[str, Any]]] = {
    "product": (MaskSearch, {}),
    "36 steps": (MaskSearch, {"steps": 36, "patience": 3}),
    "12 steps": (MaskSearch, {"steps": 12}),
    "half the pairs": (MaskSearch, {"batches_a_step": 2}),
    "a ranking for each Linear": (MaskSearch, {"concentration": 1.0}),
    "gain / cost": (LinearSearch, {}),
    "no cost cap": (MaskSearch, {"protected": 0.0}),
    "cost cap of 10 %": (MaskSearch, {"protected": 0.1}),
    "more weights": (MaskSearch, {"rho": 0.0012}),
    "path-averaged": (PathSearch, {}),
    "decaying gains": (DecayingSearch, {}),
    "relevance propagation": (PropagationSearch, {}),
    "gradients at gamma 0.25": (MaskSearch, {"gamma": 0.25}),
    "two-bit strengths": (StrengthSearch, {}),
    "prune or double": (DoublingSearch, {}),
}


def main() -> None:
    parser = pair_arguments(__doc__, "one axis, one seed, 6 steps, few pairs")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of these, separated by commas")
    parser.add_argument("--steps", type=int, help="of every search, instead of the product's or the variant's")
    parser.add_argument("--earlier", default="", help="files of other runs' progress, separated by commas")
    options = parser.parse_args()
    if not options.data.is_dir():
        print(f"no data in {options.data}: nothing to measure", file=sys.stderr)
        report("searches", [], options.json)
        return
    figures = list(_read_progress(map(Path, filter(None, options.earlier.split(",")))))
    figures += follow("searches", _measure(options))
    report("searches", [*figures, *compare(figures)], options.json)


def _measure(options: argparse.Namespace) -> Iterator[Figure]:
    axes, seeds = (list(filter(None, names.split(","))) for names in (options.axes, options.seeds))
    if not seeds:
        return
    torch.set_num_threads(1)
    base = load(options.model, device=options.device, dtype=options.dtype)
    manager, most = MaskManager.attach(base.model), 1 if options.quick else None
    sizes, steps = (Sizes(training=48), 6) if options.quick else (Sizes(), options.steps)
    for axis in axes[:most]:
        for seed in map(int, seeds[:most]):
            bench = Bench(base, manager, split_pairs(options.data, axis, seed, sizes), axis, seed, steps)
            for variant in options.variants.split(","):
                yield from bench.measure(variant)


def _read_progress(logs: Iterable[Path]) -> Iterator[Figure]:
    for log in logs:
        for name, value, unit in LINE.findall(log.read_text()):
            yield Figure(name, float(value), unit)


def compare(figures: Iterable[Figure]) -> Iterator[Figure]:
    """The mean differences of each variant to the product's search, on the sides that both were measured on."""
    found: dict[tuple[str, str], dict[str, float]] = {}  # (figure, variant) -> side -> value
    for figure in figures:
        if name := NAME.fullmatch(figure.name):
            found.setdefault((name[3], name[2]), {})[name[1]] = figure.value
    for (kind, variant), values in found.items():
        product = found.get((kind, "product"), {})
        sides = [side for side in values if side in product]
        if kind in COMPARED and variant != "product" and sides:
            scales = [_find_mean(product, side.split()[0]) if kind == "shift" else 1.0 for side in sides]
            differences = np.array([values[side] - product[side] for side in sides]) / scales
            low, high = mean_interval(differences)
            label, unit = f"{variant}: {kind}, difference on {len(sides)} sides", COMPARED[kind]
            yield Figure(label, float(differences.mean()), unit)
            yield Figure(f"{label}, low", low, unit)
            yield Figure(f"{label}, high", high, unit)


def _find_mean(values: Mapping[str, float], axis: str) -> float:
    return float(np.mean([value for side, value in values.items() if side.split()[0] == axis]))


class Bench:
    """An axis and a seed: the side's examples, statistics, neutral text and test pairs."""

    def __init__(
        self, base: Base, manager: MaskManager, splits: Sequence[list[Pair]], axis: str, seed: int, steps: int | None
    ) -> None:
        self._base, self._name, self._steps = base, f"{axis} seed {seed}", {"steps": steps} if steps else {}
        train, validation, test = splits
        order = (1, 0) if seed % 2 else (0, 1)  # the side that is searched for comes first
        own, contrast = (
            PersonaExamples(name, [pair[at] for pair in train], [pair[at] for pair in validation])
            for at, name in zip(order, ("own", ""), strict=True)
        )
        self._recipe = Recipe(score="refined", seed=seed, force=True)
        self._builder = Builder(base, manager, self._recipe, own, contrast)
        self._targets = find_targets(base.model)
        gathering = gather(base, self._recipe, {1: own, -1: contrast}, (), calibrates=True, chooses=True, searches=True)
        self._data = finish(gathering)
        self._tune_set = self._data.evaluation_set(base, "tune", JUDGED, JUDGED_TOKENS)
        texts = ([one.cut(TOKENS) for one in encode(base, [pair[at] for pair in test])] for at in order)
        self._test_set = EvaluationSet(base, *texts, [one.cut(TOKENS) for one in self._data.neutral.report])
        self._facts = read_facts("report")
        self._known = finish(find_known_facts(base, self._facts))
        self._collect(self._recipe.search_settings)

    def measure(self, variant: str) -> Iterator[Figure]:
        """Search with a variant, and measure its mask at several gammas."""
        kind, changed = VARIANTS[variant]
        settings = replace(self._recipe.search_settings, **{**changed, **self._steps})
        search = kind(self._base, self._targets, (1,), settings, self._scratches[settings.protected])
        for name in PREPARED:
            setattr(search, name, getattr(self._prepared, name))
        draft = partial(self._correct, search) if isinstance(search, StrengthSearch) else self._draft
        tuner = StrengthTuner(self._tune_set, draft, 1, self._recipe.limits)
        started = time.process_time()
        targets = finish(search.run(1, partial(tuner.judge, gamma=settings.gamma)))
        self._scratches[settings.protected].drop("states")
        yield Figure(f"{self._name}, {variant}: search", time.process_time() - started, "CPU-s")
        yield Figure(f"{self._name}, {variant}: pruned", sum(one.pruned for one in targets.values()), "weights")
        yield from self._measure_at_cost(f"{self._name}, {variant}", partial(draft, targets))

    def _collect(self, settings: SearchSettings) -> None:
        """Collect the statistics that all variants start from, with the costs capped as each of them does."""
        caps = {VARIANTS[name][1].get("protected", settings.protected) for name in VARIANTS}
        self._scratches = {cap: Scratch() for cap in sorted(caps)}
        starts = [
            MaskSearch(self._base, self._targets, (1,), replace(settings, protected=cap), scratch)
            for cap, scratch in self._scratches.items()
        ]

        def add(stage: str, _: int, statistics: Mapping[str, LinearStatistics]) -> Iterator[int]:
            linears = {name: self._targets[name] for name in statistics}
            for start in starts if stage == "backward" else ():
                yield from start.add_layer(linears, statistics)

        finish(self._builder._collect(self._targets, self._builder._pad(self._data, TRACED, settings.tokens), add))
        self._prepared = starts[0]
        finish(self._prepared.prepare(self._data.calibration_pairs(), self._data.neutral.calibration))

    def _draft(self, targets: Mapping[str, Target], *, gamma: float) -> Treatment:
        return self._builder._apply(targets, "decode", gamma)

    def _correct(self, search: StrengthSearch, targets: Mapping[str, Target], *, gamma: float) -> Treatment:
        info = MaskInfo(persona="draft", score="draft")
        mask = ResidentMask("/".join(map(str, _sizes(targets))), info, search.correct(targets))
        return Treatment(AppliedMask(mask, gamma), "decode")

    def _measure_at_cost(self, name: str, draft: Callable[..., Treatment]) -> Iterator[Figure]:
        """The figures where neutral text costs `NEUTRAL_RATIO`, or at gamma 0 if it costs less there."""
        measure = cache(partial(self._measure, draft))
        # the cost rises as gamma falls, so two or three of the gammas say where it meets the ratio
        at = bisect(GAMMAS, math.log(NEUTRAL_RATIO), lo=1, hi=len(GAMMAS) - 1, key=lambda gamma: measure(gamma)[0])
        low, high = ((*measure(gamma), gamma) for gamma in GAMMAS[at - 1 : at + 1])
        part = min(1.0, (math.log(NEUTRAL_RATIO) - low[0]) / max(high[0] - low[0], 1e-9))
        neutral, own, shift, gamma = (a + part * (b - a) for a, b in zip(low, high, strict=True))
        known = finish(check_facts(self._base, self._facts, draft(gamma=gamma)))
        yield Figure(f"{name}: gamma", gamma, "gamma")
        yield Figure(f"{name}: neutral", math.exp(neutral), "x")
        yield Figure(f"{name}: shift", shift, "nats a token")
        yield Figure(f"{name}: own", math.exp(own), "x")
        yield Figure(f"{name}: facts kept", share_kept(self._known, known) or 0.0, "share")

    def _measure(self, draft: Callable[..., Treatment], gamma: float) -> tuple[float, float, float]:
        """Nats that neutral text and own text cost, and the median shift; all are 0 at gamma 1, which is the base."""
        if gamma == 1:
            return 0.0, 0.0, 0.0
        masked = finish(self._test_set.measure(draft(gamma=gamma)))
        found = self._test_set.figures(1, finish(self._test_set.measure_base()), masked)
        neutral, own = (math.log(found[key] or math.inf) for key in ("neutral_ratio", "own_ratio"))
        return neutral, own, found["margin_shift_median"]


if __name__ == "__main__":
    main()
