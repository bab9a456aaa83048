"""The report of `masquerade eval`: the figures of a mask and of its controls."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, TypeVar

from maskstore import Mask
from masquerade.evaluate.answers import Answers, Questions, answer_questions, compare_answers
from masquerade.evaluate.baselines import (
    BASELINES,
    SHARES,
    Baseline,
    ControlInput,
    TreatmentFactory,
    apply_mask,
    instruct,
)
from masquerade.evaluate.dataset import Encoded, Example, encode
from masquerade.evaluate.evaluation_set import EvaluationSet, SetLikelihoods, find_whole, rounded
from masquerade.evaluate.facts import (
    read_everyday_questions,
    read_facts,
    read_search_questions,
    write_neutral_text,
)
from masquerade.evaluate.generation import GenerationParams
from masquerade.evaluate.judge import Judge, JudgeQuality, PersonaClassifier, examine
from masquerade.evaluate.metrics import exponential, finish
from masquerade.evaluate.paged import find_native_stack
from masquerade.evaluate.treatment import HOOKED, PHASES, UNTREATED, Phase, Treatment
from masquerade.model import Base, MaskManager

T = TypeVar("T")
NO_EFFECT: dict[str, Any] = {"strength": 0.0, "margin_shift": 0.0, "margin_shift_median": 0.0}
HALVINGS = 4  # of the step between two strengths, to find the one of equal cost


@dataclass(frozen=True)
class EvaluationData:
    """The mask to evaluate, its opposite's mask if there is one, and both sides' examples."""

    mask: Mask
    opposite: Mask | None
    own: Sequence[Example]
    contrast: Sequence[Example]  # answers to the same prompts
    neutral: Sequence[Example] = ()  # by default the base's own answers to everyday questions
    train_own: Sequence[Example] = ()  # for controls and judge; by default the first half of `own` is taken
    train_contrast: Sequence[Example] = ()
    instructions: tuple[str, str] = ("", "")  # system prompts that describe either side
    others: Mapping[str, Mask] = field(default_factory=dict)  # more masks to compare with, by name


@dataclass(frozen=True)
class EvaluationSizes:
    """How many of everything, at most. The defaults are all that there is."""

    pairs: int | None = None  # held-out pairs whose likelihoods are read; all of them examine the judge
    training: int | None = None  # pairs for controls and judge
    prompts: int | None = None  # held-out prompts that are answered
    facts: int | None = None
    everyday: int | None = None  # everyday questions that are answered; the base's answers are the neutral text
    chats: int = 12
    learned: int | None = None  # neutral questions whose answers a LoRA is held to
    controls_answer: bool = True  # at equal cost; those without a strength always answer


QUICK = EvaluationSizes(
    pairs=12, training=200, prompts=12, facts=36, everyday=12, chats=4, learned=24, controls_answer=False
)


@dataclass(frozen=True)
class EvaluationOptions:
    """How to evaluate it."""

    controls: Sequence[str] = ("none", "random", "bias")
    seeds: int = 1
    generation: GenerationParams | None = None  # if given, answers are generated, compared and judged
    judge: Callable[[Sequence[str], Sequence[str]], Judge] = PersonaClassifier
    sizes: EvaluationSizes = EvaluationSizes()
    gammas: Sequence[float] = ()  # more gammas to measure the mask at
    report: Callable[[str], None] = lambda _: None  # called after each work item, with what is going on
    flips: bool = True  # controls are made for the opposite too, for their flips


def evaluate_mask(base: Base, manager: MaskManager, data: EvaluationData, options: EvaluationOptions) -> dict[str, Any]:
    """`figures` of the mask, of its opposite, of the base (`none`) and of each control; the quality of the `judge`.

    * `preferred`: share of prompts whose own answer is more likely (mean nats a token) than the contrast's; `margin`:
      by how much, on average; `margin_shift` and `margin_shift_median`: by how much more than under the base.
    * `own_perplexity`, `neutral_perplexity`, and their ratios to the base's. A control that changes prompts changes
      those of neutral questions too.
    * `flip`, with an opposite's mask (of controls with `flips`): share of prompts that follow both sides' treatments.
    * `answers`, with generation: `compare_answers`.
    * `intervals`: 95 % intervals.
    * `cost`: added prompt tokens, bytes, and seconds to make one side's treatment (None if unknown).
    * `at_equal_cost`, of controls with a strength: figures and answers at the strength whose neutral ratio is the
      mask's, or 1 where the mask's is smaller, and just below it; `strength` 0 if there is none. Their `answers` are
      there only.
    * `within_both_costs`, of them: figures at the largest strength whose own ratio is not above the mask's, or 1,
      either.
    * `gammas`, of the mask: figures by gamma.

    The judge (`auc`, `interval`, `pairs`, `sufficient`) gives no hits if it is not sufficient. With several seeds, the
    figures are the first one's and `seeds` has the ranges.
    """
    return _Evaluation(base, manager, data, options).run()


class _Evaluation:
    def __init__(self, base: Base, manager: MaskManager, data: EvaluationData, options: EvaluationOptions) -> None:
        self._base, self._manager, self._data, self._options = base, manager, data, options
        self._row = "base"
        sizes, half = options.sizes, len(data.own) // 2
        if data.train_own:
            train, test = (data.train_own, data.train_contrast), (data.own, data.contrast)
        else:
            train = (data.own[:half], data.contrast[:half])
            test = (data.own[half:], data.contrast[half:])
        train = (train[0][: sizes.training], train[1][: sizes.training])
        self._train = [list(zip(side, encode(base, side), strict=True)) for side in train]
        own, contrast = (encode(base, side[: sizes.pairs]) for side in test)
        everyday = read_everyday_questions("report")[: sizes.everyday]
        neutral = encode(base, data.neutral) or self._do(write_neutral_text(base, everyday), "neutral text")
        self._eval_set = EvaluationSet(base, own, contrast, neutral)
        self._base_likelihoods = self._do(self._eval_set.measure_base(), "likelihoods")
        masks = [data.mask, *([data.opposite] if data.opposite else [])]
        self._makers = [apply_mask(manager, mask) for mask in masks]
        self._applied = [make(1 - mask.info.gamma) for make, mask in zip(self._makers, masks, strict=True)]
        self._known = {UNTREATED: self._base_likelihoods}
        self._questions = Questions(
            _distinct(own)[: sizes.prompts], everyday, read_facts("report")[: sizes.facts], sizes.chats
        )
        self._judge: Judge | None = None
        self._quality: JudgeQuality | None = None
        if options.generation:
            self._judge, self._quality = self._make_judge(test)
        self._base_answers = {UNTREATED: self._answer(UNTREATED)} if options.generation else {}
        self._neutral_training: list[Encoded] = []
        if "lora-contrastive" in options.controls:
            written = write_neutral_text(base, read_search_questions()[: sizes.learned])
            self._neutral_training = self._do(written, "neutral text for training")

    def run(self) -> dict[str, Any]:
        data = self._data
        found: dict[str, dict[str, Any]] = {"mask": self._measure_mask()}
        if data.opposite:
            self._row = "opposite"
            treatment = self._applied[1]
            found["opposite"] = self._figures(treatment, None) | self._compare(treatment)
            found["opposite"]["cost"] = self._cost(treatment, data.opposite.info.certificate.get("seconds"))
        controls = {name: BASELINES[name] for name in ("none", *self._options.controls)}
        controls |= {name: _as_control(mask) for name, mask in data.others.items()}
        for name, control in controls.items():
            self._row = name
            opposed = bool(data.opposite) and self._options.flips and name not in data.others
            opposed = opposed and (control.make is not instruct or bool(data.instructions[1]))
            found[name] = self._measure(control, found["mask"], opposed)
        quality = self._quality
        judge = quality and {
            "auc": quality.auc,
            "interval": list(quality.interval),
            "pairs": quality.pairs,
            "sufficient": quality.sufficient,
        }
        return {
            "judge": rounded(judge) if judge else None,
            "figures": {name: rounded(row) for name, row in found.items()},
        }

    def _do(self, work: Generator[Any, None, T], what: str) -> T:
        """Run all work items of a row, and report after each what is going on."""
        return finish(work, partial(self._options.report, f"{self._row}: {what}"))

    def _make_judge(self, test: tuple[Sequence[Example], Sequence[Example]]) -> tuple[Judge | None, JudgeQuality]:
        """A judge, or None if it fails on the held-out pairs, and how good it is on them."""
        judge = self._options.judge(*([example.response for example, _ in side] for side in self._train))
        pairs = [
            (own.messages[-1]["content"] if own.messages else "", own.response, contrast.response)
            for own, contrast in zip(*test, strict=True)
        ]
        quality = examine(judge, pairs)
        return (judge if quality.sufficient else None), quality

    def _inputs(self, own: bool, seed: int) -> ControlInput:
        """What a control of one side is made from."""
        mask = self._data.mask if own else self._data.opposite or self._data.mask
        sides, instructions = self._train, self._data.instructions
        if not own:
            sides, instructions = sides[::-1], instructions[::-1]
        return ControlInput(
            self._base,
            self._manager,
            mask,
            sides[0],
            sides[1],
            self._neutral_training,
            instructions[0],
            seed,
            partial(self._options.report, f"{self._row}: training"),
        )

    def _measure_mask(self) -> dict[str, Any]:
        self._row = "mask"
        own, *other = self._applied
        found = self._figures(own, other[0] if other else None) | self._compare(own)
        found["cost"] = self._cost(own, self._data.mask.info.certificate.get("seconds"))
        found["phases"] = {phase: self._phase([own, *other], phase) for phase in PHASES}
        found["gammas"] = {}
        for gamma in self._options.gammas:
            masked = self._likelihoods(self._makers[0](1 - gamma), f"gamma {gamma:g}")
            found["gammas"][f"{gamma:g}"] = self._eval_set.figures(1, self._base_likelihoods, masked)
        return found

    def _measure(self, control: Baseline, mask: Mapping[str, Any], opposed: bool) -> dict[str, Any]:
        runs, made, ceiling = [], [], mask.get("neutral_ratio")
        for seed in range(self._options.seeds):
            started = time.perf_counter()
            own = control.make(self._inputs(True, seed))
            seconds = time.perf_counter() - started
            other = control.make(self._inputs(False, seed)) if opposed else None
            made.append((own, other))
            treatment = own(control.default)
            figures = self._figures(treatment, other(control.default) if other else None)
            runs.append(figures | {"cost": self._cost(treatment, seconds)})
        found = runs[0]
        if len(runs) > 1:
            numbers = [name for name, value in found.items() if isinstance(value, float)]
            found["seeds"] = {name: [min(r[name] for r in runs), max(r[name] for r in runs)] for name in numbers}
        if control.strengths and ceiling is not None:
            measure = cache(partial(self._measure_ratio, made[0][0]))
            at = self._find_strength(control, measure, {0: ceiling})
            both = self._find_strength(control, measure, {0: ceiling, 1: mask["own_ratio"] or 1.0})
            return found | {
                "at_equal_cost": self._measure_at(at, made[0], answers=self._options.sizes.controls_answer),
                "within_both_costs": self._measure_at(both, made[0][:1], answers=False),
            }
        return found | self._compare(made[0][0](control.default))

    def _figures(self, own: Treatment, other: Treatment | None) -> dict[str, Any]:
        masked = self._likelihoods(own, "likelihoods")
        opposite = self._likelihoods(other, "likelihoods of the opposite") if other else None
        found = self._summarise(masked, opposite)
        found["intervals"] = {
            name: list(ends)
            for name, ends in self._eval_set.intervals(1, self._base_likelihoods, masked, opposite).items()
        }
        return found

    def _likelihoods(self, treatment: Treatment, what: str) -> SetLikelihoods:
        """The likelihoods of all texts; of the base and of a mask that has been measured, the ones that are known."""
        if treatment not in self._known:
            found = self._do(self._eval_set.measure(treatment), what)
            if treatment.applied is None:
                return found
            self._known[treatment] = found
        return self._known[treatment]

    def _summarise(self, masked: SetLikelihoods, opposite: SetLikelihoods | None) -> dict[str, Any]:
        found = self._eval_set.figures(1, self._base_likelihoods, masked, opposite)
        found["preferred"] = found.get("preferred", {}).get("masked")
        margins = masked.margins(self._eval_set.find_whole_pairs(self._base_likelihoods, masked, opposite), 1)
        found["margin"] = float(margins.mean()) if len(margins) else None
        for name, side in (("own", 1), ("neutral", 0)):
            if self._eval_set.texts[side]:
                logs = masked.sides[side]
                whole = find_whole(self._base_likelihoods.sides[side], logs)
                tokens = float(logs.tokens[whole].sum())
                found[f"{name}_perplexity"] = exponential(-float(logs.nats[whole].sum()) / tokens) if tokens else None
        return found

    def _phase(self, treatments: Sequence[Treatment], phase: Phase) -> dict[str, Any]:
        likelihoods = [self._likelihoods(replace(one, phase=phase), f"phase {phase}") for one in treatments]
        return self._eval_set.figures(1, self._base_likelihoods, *likelihoods)

    def _measure_at(
        self, strength: float, makers: Sequence[TreatmentFactory | None], *, answers: bool
    ) -> dict[str, Any]:
        """Figures at a strength, with the answers if they are wanted."""
        if not strength:
            return NO_EFFECT
        pair = [one(strength) for one in makers if one]
        likelihoods = [self._likelihoods(one, "likelihoods at equal cost") for one in pair]
        found = {"strength": strength} | self._eval_set.figures(1, self._base_likelihoods, *likelihoods)
        return found | (self._compare(pair[0]) if answers else {})

    def _measure_ratio(self, make: TreatmentFactory, strength: float, side: int) -> float:
        return self._do(self._eval_set.measure_ratio(make(strength), side), f"strength {strength:g}")

    def _find_strength(
        self, control: Baseline, measure: Callable[[float, int], float], ceilings: Mapping[int, float]
    ) -> float:
        """The largest strength before the first whose ratio on some side is above its ceiling, or 1 if that is more,
        within `HALVINGS` of a step of the grid; 0 if there is none.
        """

        def fits(strength: float) -> bool:
            return all(measure(strength, side) <= max(1.0, ceiling) for side, ceiling in ceilings.items())

        low = 0.0
        for high in control.strengths:
            if not fits(high):
                break
            low = high
        else:
            return low
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _answer(self, treatment: Treatment) -> Answers:
        return self._do(answer_questions(self._base, self._questions, treatment, self._options.generation), "answers")

    def _compare(self, treatment: Treatment) -> dict[str, Any]:
        """The answers beside the base's, if answers are generated.

        Those are computed as the treatment's are, so that rounding does not count as a difference.
        """
        if not self._base_answers:
            return {}
        hooked = find_native_stack(self._base) is not None and find_native_stack(self._base, treatment) is None
        before = HOOKED if hooked else UNTREATED
        if before not in self._base_answers:
            self._base_answers[before] = self._answer(before)
        answers = self._base_answers[UNTREATED] if treatment is UNTREATED else self._answer(treatment)
        return {"answers": compare_answers(self._questions, self._base_answers[before], answers, self._judge)}

    def _cost(self, treatment: Treatment, seconds: float | None) -> dict[str, Any]:
        added = treatment.count_added(self._questions.held_out)
        return {"prompt_tokens": added, "bytes": treatment.nbytes, "seconds": seconds}


def _as_control(mask: Mask) -> Baseline:
    return Baseline(lambda inputs: apply_mask(inputs.manager, mask), default=1 - mask.info.gamma, strengths=SHARES)


def _distinct(texts: Sequence[Encoded]) -> list[Encoded]:
    """One text of each prompt; plain text has none."""
    return list({one.prompt: one for one in texts if one.messages}.values())
