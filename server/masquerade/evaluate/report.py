"""The report of `masquerade eval`: a mask beside its controls.

Knows which figures are compared and on what. Refuses to know how they are printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from maskstore import Mask
from masquerade.evaluate.baselines import BASELINES, Baseline, ControlInput, Strength
from masquerade.evaluate.dataset import Encoded, Example, encode
from masquerade.evaluate.generation import Speech, answer
from masquerade.evaluate.judge import Bigrams, Judge
from masquerade.evaluate.metrics import exponential, finish
from masquerade.evaluate.panel import Panel, Reading, rounded
from masquerade.evaluate.treatment import PHASES, Cost, Phase, Treatment
from masquerade.model import AppliedMask, Base, MaskManager

GAMMAS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)  # strengths of a mask, 1 - gamma


@dataclass(frozen=True)
class Trial:
    """What is examined: a mask and perhaps its opposite's, and how both sides talk."""

    mask: Mask
    opposite: Mask | None
    own: Sequence[Example]
    contrast: Sequence[Example]  # answers the same prompts
    neutral: Sequence[Example] = ()
    train_own: Sequence[Example] = ()  # what controls learn from; by default the first half of the above
    train_contrast: Sequence[Example] = ()
    instructions: tuple[str, str] = ("", "")  # system prompts that ask for either side


@dataclass(frozen=True)
class Options:
    """How it is examined."""

    controls: Sequence[str] = ("none", "random", "bias")
    seeds: int = 1
    speech: Speech | None = None  # answers are generated and judged, if given
    judge: Callable[[Sequence[str], Sequence[str]], Judge] = Bigrams


def examine(base: Base, manager: MaskManager, trial: Trial, options: Options) -> dict[str, Mapping[str, Any]]:
    """Figures of the mask and of each control in `BASELINES`, by name.

    `preferred`: share of prompts whose own answer is more likely (mean nats a token) than the contrast's; `margin`: by
    how much, on average; perplexities of the own answers and of neutral text and their ratios to the base's; `flip`
    where there is an opposite's mask: share of prompts that follow both sides' treatments; `hit` where answers are
    generated; 95 % intervals; `cost` (more prompt tokens, bytes, seconds to make one side's, None where unknown); and
    the same `at_equal_cost`: the strongest setting whose neutral ratio is not above the mask's. With several seeds, the
    figures are the first one's and `seeds` has the ranges.
    """
    return _Examination(base, manager, trial, options).run()


class _Examination:
    def __init__(self, base: Base, manager: MaskManager, trial: Trial, options: Options) -> None:
        self._base, self._manager, self._trial, self._options = base, manager, trial, options
        if trial.train_own:
            learn, judged = (trial.train_own, trial.train_contrast), (trial.own, trial.contrast)
        else:
            half = len(trial.own) // 2
            learn = (trial.own[:half], trial.contrast[:half])
            judged = (trial.own[half:], trial.contrast[half:])
        self._learn = [list(zip(side, encode(base, side), strict=True)) for side in learn]
        own, contrast, neutral = (encode(base, side) for side in (*judged, trial.neutral))
        self._panel = Panel(base, own, contrast, neutral)
        self._asked = {
            encoded.prompt: example.messages
            for examples, side in ((judged[0], own), (judged[1], contrast), (trial.neutral, neutral))
            for example, encoded in zip(examples, side, strict=True)
        }
        self._bare = finish(self._panel.bare())
        self._judge = options.judge(*([example.response for example, _ in side] for side in self._learn))

    def run(self) -> dict[str, Mapping[str, Any]]:
        seeds = list(range(self._options.seeds))
        speech = self._options.speech
        found = {"mask": self._measure(self._baseline_of_the_mask(), seeds if speech and speech.temperature else [0])}
        found["mask"]["cost"]["seconds"] = self._trial.mask.info.certificate.get("seconds")
        found["mask"]["phases"] = {phase: self._phase(phase) for phase in PHASES}
        ceiling = found["mask"].get("neutral_ratio")
        for name in self._options.controls:
            found[name] = self._measure(BASELINES[name], seeds)
            if ceiling is not None and BASELINES[name].strengths:
                found[name]["at_equal_cost"] = self._match(BASELINES[name], ceiling)
        return {name: rounded(figures) for name, figures in found.items()}

    def _question(self, own: bool, seed: int) -> ControlInput:
        """What a control may learn from to speak as one side."""
        mask = self._trial.mask if own else self._trial.opposite or self._trial.mask
        sides, instructions = self._learn, self._trial.instructions
        if not own:
            sides, instructions = sides[::-1], instructions[::-1]
        return ControlInput(self._base, self._manager, mask, sides[0], sides[1], self._asked, instructions[0], seed)

    def _baseline_of_the_mask(self) -> Baseline:
        def make(question: ControlInput) -> Strength:
            worn, cost = self._manager.fit(question.mask), Cost(nbytes=question.mask.nbytes)
            phase = question.mask.info.phase
            return lambda strength: Treatment(applied=AppliedMask(worn, 1 - strength), phase=phase, cost=cost)

        return Baseline(make, usual=1 - self._trial.mask.info.gamma, strengths=GAMMAS)

    @property
    def _opposed(self) -> bool:
        """Whether there is an opposite to flip to: its mask, and what it says."""
        return self._trial.opposite is not None

    def _measure(self, baseline: Baseline, seeds: Sequence[int]) -> dict[str, Any]:
        runs = []
        for seed in seeds:
            started = time.perf_counter()
            own = baseline.make(self._question(True, seed))(baseline.usual)
            seconds = time.perf_counter() - started
            other = baseline.make(self._question(False, seed))(baseline.usual) if self._opposed else None
            runs.append(self._figures(own, other, seed) | {"cost": _tell(own.cost, seconds)})
        figures = runs[0]
        if len(runs) > 1:
            numbers = [name for name, value in figures.items() if isinstance(value, float)]
            figures["seeds"] = {name: [min(r[name] for r in runs), max(r[name] for r in runs)] for name in numbers}
        return figures

    def _figures(self, own: Treatment, other: Treatment | None, seed: int) -> dict[str, Any]:
        worn = finish(self._panel.read(own))
        against = finish(self._panel.read(other)) if other else None
        found = self._summarise(worn, against)
        found["intervals"] = {
            name: list(ends) for name, ends in self._panel.intervals(1, self._bare, worn, against).items()
        }
        if self._options.speech:
            found["hit"] = self._hit(own, replace(self._options.speech, seed=self._options.speech.seed + seed))
        return found

    def _summarise(self, worn: Reading, against: Reading | None) -> dict[str, Any]:
        found = self._panel.figures(1, self._bare, worn, against)
        found["preferred"] = found.get("preferred", {}).get("masked")
        margins = worn.margins(self._panel.pairs, 1)
        found["margin"] = float(margins.mean()) if len(margins) else None
        for name, sign in (("own", 1), ("neutral", 0)):
            if self._panel.texts[sign]:
                logs = worn.logs[sign]
                found[f"{name}_perplexity"] = exponential(-float(logs.nats.sum() / logs.tokens.sum()))
        return found

    def _phase(self, phase: Phase) -> dict[str, Any]:
        masks = [self._trial.mask, *([self._trial.opposite] if self._trial.opposite else [])]
        worn = [Treatment(applied=AppliedMask(self._manager.fit(mask), mask.info.gamma), phase=phase) for mask in masks]
        readings = [finish(self._panel.read(treatment)) for treatment in worn]
        return self._panel.figures(1, self._bare, readings[0], readings[1] if len(readings) > 1 else None)

    def _match(self, baseline: Baseline, ceiling: float) -> dict[str, Any]:
        """The strongest setting that costs neutral text no more than the mask does."""
        own = baseline.make(self._question(True, 0))
        other = baseline.make(self._question(False, 0)) if self._opposed else None
        best: dict[str, Any] = {"strength": 0.0, "margin_shift": 0.0}
        for strength in sorted(baseline.strengths):
            worn = finish(self._panel.read(own(strength)))
            figures = self._panel.figures(1, self._bare, worn)
            if figures["neutral_ratio"] is None or figures["neutral_ratio"] > ceiling:
                break
            against = finish(self._panel.read(other(strength))) if other else None
            best = {"strength": strength} | self._panel.figures(1, self._bare, worn, against)
        return best

    def _hit(self, treatment: Treatment, speech: Speech) -> float:
        """Share of generated answers to the held-out prompts that the judge gives to the persona."""
        own = dict.fromkeys(example.prompt for example in self._panel.texts[1])
        prompts = [Encoded(prompt, ()) for prompt in own if self._asked[prompt]]
        texts = [text for texts in answer(self._base, prompts, treatment, speech) for text in texts]
        questions = [self._asked[prompt.prompt][-1]["content"] for prompt in prompts]
        hits = [self._judge.is_own(question, text) for question, text in zip(questions, texts, strict=True)]
        return sum(hits) / len(hits)


def _tell(cost: Cost, seconds: float) -> dict[str, Any]:
    return {"prompt_tokens": cost.prompt_tokens, "bytes": cost.nbytes, "seconds": seconds}
