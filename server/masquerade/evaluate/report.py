"""The report of `masquerade eval`: the figures of a mask and of its controls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from maskstore import Mask
from masquerade.evaluate.baselines import BASELINES, Baseline, ControlInput, TreatmentFactory
from masquerade.evaluate.dataset import Encoded, Example, encode
from masquerade.evaluate.evaluation_set import EvaluationSet, SetLikelihoods, rounded
from masquerade.evaluate.generation import GenerationParams, generate
from masquerade.evaluate.judge import Bigrams, Judge
from masquerade.evaluate.metrics import exponential, finish
from masquerade.evaluate.treatment import PHASES, Cost, Phase, Treatment
from masquerade.model import AppliedMask, Base, MaskManager

GAMMAS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)  # strengths of a mask, 1 - gamma


@dataclass(frozen=True)
class EvaluationData:
    """The mask to evaluate, its opposite's mask if there is one, and both sides' examples."""

    mask: Mask
    opposite: Mask | None
    own: Sequence[Example]
    contrast: Sequence[Example]  # answers to the same prompts
    neutral: Sequence[Example] = ()
    train_own: Sequence[Example] = ()  # to make the controls from; by default the first half of `own` is taken
    train_contrast: Sequence[Example] = ()
    instructions: tuple[str, str] = ("", "")  # system prompts that describe either side


@dataclass(frozen=True)
class EvaluationOptions:
    """How to evaluate it."""

    controls: Sequence[str] = ("none", "random", "bias")
    seeds: int = 1
    generation: GenerationParams | None = None  # if given, answers are generated and judged
    judge: Callable[[Sequence[str], Sequence[str]], Judge] = Bigrams


def evaluate_mask(
    base: Base, manager: MaskManager, data: EvaluationData, options: EvaluationOptions
) -> dict[str, Mapping[str, Any]]:
    """Figures of the mask and of each control in `BASELINES`, by name.

    * `preferred`: share of prompts whose own answer is more likely (mean nats a token) than the contrast's; `margin`:
      by how much, on average.
    * `own_perplexity`, `neutral_perplexity`, and their ratios to the base's.
    * `flip`, with an opposite's mask: share of prompts that follow both sides' treatments.
    * `hit`, with generated answers: share that the judge gives to the persona.
    * `intervals`: 95 % intervals.
    * `cost`: added prompt tokens, bytes, and seconds to make one side's treatment (None if unknown).
    * `at_equal_cost`: the figures of the largest strength whose neutral ratio is not above the mask's.

    With several seeds, the figures are the first one's and `seeds` has the ranges.
    """
    return _Evaluation(base, manager, data, options).run()


class _Evaluation:
    def __init__(self, base: Base, manager: MaskManager, data: EvaluationData, options: EvaluationOptions) -> None:
        self._base, self._manager, self._data, self._options = base, manager, data, options
        if data.train_own:
            train, test = (data.train_own, data.train_contrast), (data.own, data.contrast)
        else:
            half = len(data.own) // 2
            train = (data.own[:half], data.contrast[:half])
            test = (data.own[half:], data.contrast[half:])
        self._train = [list(zip(side, encode(base, side), strict=True)) for side in train]
        own, contrast, neutral = (encode(base, side) for side in (*test, data.neutral))
        self._eval_set = EvaluationSet(base, own, contrast, neutral)
        self._messages = {
            encoded.prompt: example.messages
            for examples, side in ((test[0], own), (test[1], contrast), (data.neutral, neutral))
            for example, encoded in zip(examples, side, strict=True)
        }
        self._base_likelihoods = finish(self._eval_set.measure_base())
        self._judge = options.judge(*([example.response for example, _ in side] for side in self._train))

    def run(self) -> dict[str, Mapping[str, Any]]:
        seeds = list(range(self._options.seeds))
        generation = self._options.generation
        found = {
            "mask": self._measure(self._mask_as_baseline(), seeds if generation and generation.temperature else [0])
        }
        found["mask"]["cost"]["seconds"] = self._data.mask.info.certificate.get("seconds")
        found["mask"]["phases"] = {phase: self._phase(phase) for phase in PHASES}
        ceiling = found["mask"].get("neutral_ratio")
        for name in self._options.controls:
            found[name] = self._measure(BASELINES[name], seeds)
            if ceiling is not None and BASELINES[name].strengths:
                found[name]["at_equal_cost"] = self._match(BASELINES[name], ceiling)
        return {name: rounded(figures) for name, figures in found.items()}

    def _inputs(self, own: bool, seed: int) -> ControlInput:
        """What a control of one side is made from."""
        mask = self._data.mask if own else self._data.opposite or self._data.mask
        sides, instructions = self._train, self._data.instructions
        if not own:
            sides, instructions = sides[::-1], instructions[::-1]
        return ControlInput(self._base, self._manager, mask, sides[0], sides[1], self._messages, instructions[0], seed)

    def _mask_as_baseline(self) -> Baseline:
        def make(inputs: ControlInput) -> TreatmentFactory:
            resident, cost = self._manager.fit(inputs.mask), Cost(nbytes=inputs.mask.nbytes)
            phase = inputs.mask.info.phase
            return lambda strength: Treatment(applied=AppliedMask(resident, 1 - strength), phase=phase, cost=cost)

        return Baseline(make, default=1 - self._data.mask.info.gamma, strengths=GAMMAS)

    @property
    def _opposed(self) -> bool:
        """Whether there is an opposite's mask, as flips need it."""
        return self._data.opposite is not None

    def _measure(self, baseline: Baseline, seeds: Sequence[int]) -> dict[str, Any]:
        runs = []
        for seed in seeds:
            started = time.perf_counter()
            own = baseline.make(self._inputs(True, seed))(baseline.default)
            seconds = time.perf_counter() - started
            other = baseline.make(self._inputs(False, seed))(baseline.default) if self._opposed else None
            runs.append(self._figures(own, other, seed) | {"cost": _cost_figures(own.cost, seconds)})
        figures = runs[0]
        if len(runs) > 1:
            numbers = [name for name, value in figures.items() if isinstance(value, float)]
            figures["seeds"] = {name: [min(r[name] for r in runs), max(r[name] for r in runs)] for name in numbers}
        return figures

    def _figures(self, own: Treatment, other: Treatment | None, seed: int) -> dict[str, Any]:
        masked = finish(self._eval_set.measure(own))
        opposite = finish(self._eval_set.measure(other)) if other else None
        found = self._summarise(masked, opposite)
        found["intervals"] = {
            name: list(ends)
            for name, ends in self._eval_set.intervals(1, self._base_likelihoods, masked, opposite).items()
        }
        if self._options.generation:
            found["hit"] = self._hit(own, replace(self._options.generation, seed=self._options.generation.seed + seed))
        return found

    def _summarise(self, masked: SetLikelihoods, opposite: SetLikelihoods | None) -> dict[str, Any]:
        found = self._eval_set.figures(1, self._base_likelihoods, masked, opposite)
        found["preferred"] = found.get("preferred", {}).get("masked")
        margins = masked.margins(self._eval_set.pairs, 1)
        found["margin"] = float(margins.mean()) if len(margins) else None
        for name, side in (("own", 1), ("neutral", 0)):
            if self._eval_set.texts[side]:
                logs = masked.sides[side]
                found[f"{name}_perplexity"] = exponential(-float(logs.nats.sum() / logs.tokens.sum()))
        return found

    def _phase(self, phase: Phase) -> dict[str, Any]:
        masks = [self._data.mask, *([self._data.opposite] if self._data.opposite else [])]
        treatments = [
            Treatment(applied=AppliedMask(self._manager.fit(mask), mask.info.gamma), phase=phase) for mask in masks
        ]
        likelihoods = [finish(self._eval_set.measure(treatment)) for treatment in treatments]
        return self._eval_set.figures(
            1, self._base_likelihoods, likelihoods[0], likelihoods[1] if len(likelihoods) > 1 else None
        )

    def _match(self, baseline: Baseline, ceiling: float) -> dict[str, Any]:
        """The figures at the largest strength whose neutral ratio is at most `ceiling`."""
        own = baseline.make(self._inputs(True, 0))
        other = baseline.make(self._inputs(False, 0)) if self._opposed else None
        best: dict[str, Any] = {"strength": 0.0, "margin_shift": 0.0}
        for strength in sorted(baseline.strengths):
            masked = finish(self._eval_set.measure(own(strength)))
            figures = self._eval_set.figures(1, self._base_likelihoods, masked)
            if figures["neutral_ratio"] is None or figures["neutral_ratio"] > ceiling:
                break
            opposite = finish(self._eval_set.measure(other(strength))) if other else None
            best = {"strength": strength} | self._eval_set.figures(1, self._base_likelihoods, masked, opposite)
        return best

    def _hit(self, treatment: Treatment, generation: GenerationParams) -> float:
        """Share of generated answers to the held-out prompts that the judge gives to the persona."""
        own = dict.fromkeys(example.prompt for example in self._eval_set.texts[1])
        prompts = [Encoded(prompt, ()) for prompt in own if self._messages[prompt]]
        texts = [text for texts in generate(self._base, prompts, treatment, generation) for text in texts]
        questions = [self._messages[prompt.prompt][-1]["content"] for prompt in prompts]
        hits = [self._judge.is_own(question, text) for question, text in zip(questions, texts, strict=True)]
        return sum(hits) / len(hits)


def _cost_figures(cost: Cost, seconds: float) -> dict[str, Any]:
    return {"prompt_tokens": cost.prompt_tokens, "bytes": cost.nbytes, "seconds": seconds}
