"""Personas of natural text in a small Llama trained on it, with intervals, at equal neutral cost.

`python -m benchmarks.natural --json [--quick] [--data FOLDER] [--cache FOLDER]`. The model is trained on first use (at
most half an hour of one core) and cached; it is small and weak, and one seed. Masks are found in pairs of the training
split; rho, and the strength of LoRA and logit bias, are the largest whose neutral perplexity stays within 1.02 on a
tune split (own within 1.05); figures are of a test split. Skips, with a line on stderr, where the data is not at hand.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks._methods import as_mask, calibrate, draft, summarise
from benchmarks._nature import AXES, Recipe, default_cache, find_model, read_neutral, read_pairs
from benchmarks._report import Figure, report
from masquerade.evaluate.baselines import BASELINES, ControlInput, TreatmentFactory
from masquerade.evaluate.dataset import Encoded, Example, encode
from masquerade.evaluate.evaluation_set import EvaluationSet
from masquerade.evaluate.metrics import finish
from masquerade.evaluate.treatment import Treatment
from masquerade.model import Base, MaskManager, load
from masquerade.pruning.candidates import ScorePlan
from masquerade.pruning.collector import Role
from masquerade.pruning.tuning import Budgets, Tuner

LIMITS = Budgets(neutral=1.02, own=1.05, effect=1.0, forced=True)
CANDIDATES = {
    "attribution-fisher": ("outputs", (0.003, 0.005, 0.01, 0.02, 0.03)),
    "attribution": ("all", (0.0005, 0.001, 0.002, 0.003)),
}
FIXED = {"contrastive-wanda": ("row", 0.1), "wanda": ("row", 0.3), "signed": ("layer", 0.05)}
CONTROLS = {"lora": (0.25, 0.5, 0.75, 1.0), "lora-contrastive": (0.25, 0.5, 0.75, 1.0), "bias": (0.25, 0.5)}
SIZES = {"calibration": 160, "tune": 60, "test": 160, "neutral": (96, 40, 60)}
QUICK = {"calibration": 24, "tune": 12, "test": 16, "neutral": (12, 8, 8)}
SHOWN = ("flip", "margin_shift", "accuracy", "own_ratio", "neutral_ratio")
UNITS = {"margin_shift": "nats a token", "own_ratio": "x", "neutral_ratio": "x"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a model of few steps, one axis, few pairs")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--cache", type=Path, default=default_cache())
    options = parser.parse_args()
    if not options.data.is_dir():
        print(f"no data in {options.data}: nothing to measure", file=sys.stderr)
        report("natural", [], options.json)
        return
    torch.set_num_threads(1)
    recipe = Recipe(tokens=20_000, hidden=64, layers=2, feed_forward=128) if options.quick else Recipe()
    base = load(str(find_model(options.data, options.cache, recipe)), device="cpu")
    bench = Bench(base, MaskManager.attach(base.model), options.data, QUICK if options.quick else SIZES)
    figures: list[Figure] = []
    for axis in AXES[: 1 if options.quick else None]:
        figures += bench.measure(axis)
    report("natural", figures, options.json)


class Bench:
    """The model and the neutral text; an axis at a time."""

    def __init__(self, base: Base, manager: MaskManager, data: Path, sizes: Mapping[str, Any]) -> None:
        self._base, self._manager, self._data, self._sizes = base, manager, data, sizes
        fits, tunes, judges = sizes["neutral"]
        self._calibration_neutral = encode(base, read_neutral(data, "train")[:fits])
        held = encode(base, read_neutral(data, "valid")[: tunes + judges])
        self._neutral = {"tune": held[:tunes], "test": held[tunes:]}

    def measure(self, axis: str) -> Iterator[Figure]:
        started = time.perf_counter()
        train, eval_sets = self._split(axis)
        sides = {side: encode(self._base, train[side]) for side in (1, -1)}
        plans = [ScorePlan(name, "layer", scope, rhos) for name, (scope, rhos) in CANDIDATES.items()]
        fixed = [ScorePlan(name, group, "all", (rho,)) for name, (group, rho) in FIXED.items()]
        examples: dict[Role, list[Encoded]] = {
            "own": sides[1],
            "contrast": sides[-1],
            "neutral": self._calibration_neutral,
        }
        candidates = calibrate(self._base, [*plans, *fixed], examples)
        fit = partial(draft, self._base, self._manager)
        shifts: dict[str, float] = {}
        for plan in plans:
            tuner = Tuner(eval_sets["tune"], candidates, fit, (1, -1), LIMITS, opposed=True)
            rho = finish(tuner.choose([plan])).rho
            masked = {side: fit(candidates.targets((plan.score, side, rho))) for side in (1, -1)}
            found = self._read(eval_sets["test"], masked)
            shifts[plan.score] = found["margin_shift"]
            yield from self._show(f"{axis} {plan.score} {rho:g}", found, within=plan.score == "attribution-fisher")
            print(f"{axis}: {plan.score} after {time.perf_counter() - started:.0f} s", file=sys.stderr)
        for plan in fixed:
            masked = {side: fit(candidates.targets((plan.score, side, plan.rhos[0]))) for side in (1, -1)}
            yield from self._show(f"{axis} {plan.score} {plan.rhos[0]:g}", self._read(eval_sets["test"], masked))
        for name, strengths in CONTROLS.items():
            made = {side: self._control(name, train, sides, side) for side in (1, -1)}
            strength = self._tune(eval_sets["tune"], made, strengths)
            found = self._read(eval_sets["test"], {side: made[side](strength) for side in (1, -1)})
            shifts[name] = found["margin_shift"]
            yield from self._show(f"{axis} {name} x{strength:g}", found)
            print(f"{axis}: {name} after {time.perf_counter() - started:.0f} s", file=sys.stderr)
        best = shifts["attribution-fisher"]
        for name, bound in (("attribution", ">= 1.5"), ("lora", ">= 1"), ("lora-contrastive", None), ("bias", None)):
            yield Figure(f"{axis} shift, attribution-fisher / {name}", best / shifts[name], "x", bound)

    def _split(self, axis: str) -> tuple[dict[int, list[Example]], dict[str, EvaluationSet]]:
        train, held = (read_pairs(self._data, axis, split) for split in ("train", "valid"))
        random.Random(5).shuffle(train)
        random.Random(5).shuffle(held)
        first, last = self._sizes["tune"], self._sizes["tune"] + self._sizes["test"]
        parts = {"tune": held[:first], "test": held[first:last]}
        eval_sets = {}
        for name, pairs in parts.items():
            own, contrast = (encode(self._base, side) for side in zip(*pairs, strict=True))
            eval_sets[name] = EvaluationSet(self._base, own, contrast, self._neutral[name])
        chosen = train[: self._sizes["calibration"]]
        return {1: [own for own, _ in chosen], -1: [contrast for _, contrast in chosen]}, eval_sets

    def _control(
        self, name: str, train: Mapping[int, list[Example]], sides: Mapping[int, list[Encoded]], side: int
    ) -> TreatmentFactory:
        both = [list(zip(train[at], sides[at], strict=True)) for at in (side, -side)]
        inputs = ControlInput(self._base, self._manager, as_mask(self._base, {}), both[0], both[1])
        return BASELINES[name].make(inputs)

    def _tune(self, eval_set: EvaluationSet, made: Mapping[int, TreatmentFactory], strengths: Sequence[float]) -> float:
        """The largest strength within the budgets, or the smallest there is."""
        chosen = strengths[0]
        for strength in strengths:
            found = self._read(eval_set, {side: make(strength) for side, make in made.items()})
            if found["neutral_ratio"] <= LIMITS.neutral and found["own_ratio"] <= LIMITS.own:
                chosen = strength
        return chosen

    def _read(self, eval_set: EvaluationSet, masked: Mapping[int, Treatment]) -> dict[str, Any]:
        return summarise(eval_set, {side: finish(eval_set.measure(treatment)) for side, treatment in masked.items()})

    def _show(self, name: str, found: Mapping[str, Any], within: bool = False) -> Iterator[Figure]:
        for key in SHOWN:
            bound = "<= 1.02" if within and key == "neutral_ratio" else None
            yield Figure(f"{name}: {key}", found[key], UNITS.get(key, "share"), bound)
            if key in found["intervals"]:
                low, high = found["intervals"][key]
                yield Figure(f"{name}: {key} low", low, UNITS.get(key, "share"))
                yield Figure(f"{name}: {key} high", high, UNITS.get(key, "share"))


if __name__ == "__main__":
    main()
