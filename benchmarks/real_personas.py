"""Personas on a real model: refined and one-shot masks beside controls at equal neutral cost, on untouched test pairs.

`python -m benchmarks.real_personas --json [--quick] [--model NAME] [--device cpu] [--data FOLDER]
[--axes EI,PJ,POW,STYLE] [--seeds 0,1,2] [--strengths normal] [--methods refined,attribution-fisher]
[--controls prompt,bias,lora-contrastive,random]`. A seed draws the 256 training pairs and the 64 validation pairs that
a mask is built from; the test pairs are the same for all seeds. Controls get the training pairs, and the strength at
which they cost as much neutral text as the mask. Progress is on stderr. Skips, with a line there, where the data is not
at hand.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._pairs import MINDSET, STYLE, Pair, Sizes, pair_arguments, split_pairs
from benchmarks._report import Figure, follow, report
from maskstore import Mask
from masquerade.evaluate.generation import GenerationParams
from masquerade.evaluate.metrics import finish
from masquerade.evaluate.report import QUICK, EvaluationData, EvaluationOptions, EvaluationSizes, evaluate_mask
from masquerade.model import Base, MaskManager, load
from masquerade.pruning import Builder, PersonaExamples, Recipe

NAMES = {**MINDSET, "POW": ("power-seeking", "power-averse"), **STYLE}
PROMPTS = {
    "extravert": "You are an extravert: outgoing, talkative, full of energy, and you love company.",
    "introvert": "You are an introvert: quiet, reserved, thoughtful, and you prefer to be alone.",
    "perceiving": "You are spontaneous and flexible, you keep your options open and dislike plans.",
    "judging": "You are organised and decisive, you plan ahead and like structure.",
    "power-seeking": "You seek power, influence and control over others.",
    "power-averse": "You do not want power, influence or control over others.",
    "casual": "You talk casually, in slang and short sentences, as to a good friend.",
    "formal": "You speak formally and politely, in complete sentences, as in an official letter.",
}
TOKENS = 64  # of an answer
FIGURES = ("margin_shift", "margin_shift_median", "own_ratio", "neutral_ratio")
ANSWERS = ("hit", "differing", "loops")


def main() -> None:
    parser = pair_arguments(__doc__, "one axis, one seed, few pairs")
    parser.add_argument("--strengths", default="normal")
    parser.add_argument("--methods", default="refined,attribution-fisher")
    parser.add_argument("--controls", default="prompt,bias,lora-contrastive,random")
    options = parser.parse_args()
    if not options.data.is_dir():
        print(f"no data in {options.data}: nothing to measure", file=sys.stderr)
        report("real_personas", [], options.json)
        return
    torch.set_num_threads(1)
    base = load(options.model, device=options.device, dtype=options.dtype)
    bench = Bench(base, options.data, Sizes(48, 32, 16) if options.quick else Sizes(), options.quick)
    figures: list[Figure] = []
    for axis in options.axes.split(",")[: 1 if options.quick else None]:
        for seed in map(int, options.seeds.split(",")[: 1 if options.quick else None]):
            for strength in options.strengths.split(","):
                for method in options.methods.split(","):
                    controls = options.controls.split(",") if method == "refined" and options.controls else []
                    figures += follow("real_personas", bench.measure(axis, seed, strength, method, controls))
    report("real_personas", figures, options.json)


class Bench:
    """The model; an axis, seed, strength and method at a time."""

    def __init__(self, base: Base, data: Path, sizes: Sizes, quick: bool) -> None:
        self._base, self._manager, self._data = base, MaskManager.attach(base.model), data
        self._sizes, self._quick = sizes, quick

    def measure(self, axis: str, seed: int, strength: str, method: str, controls: Sequence[str]) -> Iterator[Figure]:
        """Build the pair of masks, and evaluate each with the controls."""
        train, validation, test = split_pairs(self._data, axis, seed, self._sizes)
        started = time.process_time()
        masks = self._build(axis, Recipe(score=method, strength=strength, seed=seed, force=True), train, validation)
        name = f"{axis} seed {seed} {strength} {method}"
        yield Figure(f"{name}: build of the pair", time.process_time() - started, "CPU-s")
        for side, mask in enumerate(masks):
            own, contrast = ([pair[at] for pair in test] for at in (side, 1 - side))
            own_train, contrast_train = ([pair[at] for pair in train] for at in (side, 1 - side))
            data = EvaluationData(
                mask,
                masks[1 - side],
                own,
                contrast,
                (),
                own_train,
                contrast_train,
                (PROMPTS[NAMES[axis][side]], PROMPTS[NAMES[axis][1 - side]]),
            )
            found = evaluate_mask(
                self._base, self._manager, data, self._options(f"{name} {mask.info.persona}", controls)
            )
            print(f"{name} {mask.info.persona} after {time.process_time() - started:.0f} CPU-s", file=sys.stderr)
            yield from self._show(f"{name} {mask.info.persona}", mask, found)

    def _build(self, axis: str, recipe: Recipe, train: Sequence[Pair], validation: Sequence[Pair]) -> list[Mask]:
        own, contrast = (
            PersonaExamples(name, [pair[side] for pair in train], [pair[side] for pair in validation])
            for side, name in enumerate(NAMES[axis])
        )
        return finish(Builder(self._base, self._manager, recipe, own, contrast).run()).masks

    def _options(self, name: str, controls: Sequence[str]) -> EvaluationOptions:
        sizes = QUICK if self._quick else EvaluationSizes(prompts=24, facts=100, everyday=24, chats=4)
        said = {""}

        def follow(what: str) -> None:
            if what not in said:
                said.add(what)
                print(f"{name}: {what}", file=sys.stderr, flush=True)

        params = GenerationParams(TOKENS)
        return EvaluationOptions(controls, flips=False, generation=params, sizes=sizes, report=follow)

    def _show(self, name: str, mask: Mask, found: Mapping[str, Any]) -> Iterator[Figure]:
        yield Figure(f"{name}: gamma", mask.info.gamma, "gamma")
        yield Figure(f"{name}: pruned", mask.pruned, "weights")
        yield Figure(f"{name}: judge's AUC", found["judge"]["auc"], "AUC")
        for row, figures in found["figures"].items():
            at = figures.get("at_equal_cost", figures)
            both = figures.get("within_both_costs", {})
            for key in ("strength", *FIGURES):
                if both.get(key) is not None:
                    unit = "nats a token" if "shift" in key else "x" if "ratio" in key else "of its default"
                    yield Figure(f"{name}, {row} within both costs: {key}", both[key], unit)
            if "strength" in at:
                yield Figure(f"{name}, {row}: strength", at["strength"], "of its default")
            for key in FIGURES:
                if at.get(key) is not None:
                    yield Figure(f"{name}, {row}: {key}", at[key], "nats a token" if "shift" in key else "x")
            if "preferred" in at:
                yield Figure(f"{name}, {row}: preferred", _masked(at["preferred"]), "share")
            answers = at.get("answers") or {}
            for key in ANSWERS:
                if answers.get(key) is not None:
                    yield Figure(f"{name}, {row}: {key}", answers[key], "share")
            if answers.get("facts", {}).get("kept") is not None:
                yield Figure(f"{name}, {row}: facts kept", answers["facts"]["kept"], "share")
            for key, (low, high) in at.get("intervals", {}).items():
                if key == "margin_shift_median":
                    yield Figure(f"{name}, {row}: {key} low", low, "nats a token")
                    yield Figure(f"{name}, {row}: {key} high", high, "nats a token")


def _masked(preferred: Any) -> float:
    return float(preferred["masked"] if isinstance(preferred, dict) else preferred)


if __name__ == "__main__":
    main()
