"""Builds masks: examples -> statistics -> scores -> selection -> tuning -> certificate."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import nn

from maskstore import BaseRef as MaskBase
from maskstore import Mask, MaskInfo, Target, check_name
from masquerade.errors import BuildFailed, MaskRefused, MasqueradeError
from masquerade.evaluate.dataset import BATCH_TOKENS, Encoded, Example, batches
from masquerade.evaluate.splits import check_contrast
from masquerade.evaluate.treatment import PHASES, Phase, Treatment
from masquerade.model import AppliedMask, Base, MaskManager, find_targets
from masquerade.pruning import certificate
from masquerade.pruning.candidates import CandidateMasks
from masquerade.pruning.collector import CalibrationText, LayerCallback, Role, StatisticsCollector
from masquerade.pruning.data import BuildData, PersonaExamples, gather
from masquerade.pruning.layerwise import layer_number
from masquerade.pruning.progress import Progress, Work, track
from masquerade.pruning.recipe import Recipe
from masquerade.pruning.scores import SCORES
from masquerade.pruning.scratch import Scratch
from masquerade.pruning.statistics import LinearStatistics, Statistic
from masquerade.pruning.tuning import Tuner, TuningChoice


@dataclass(frozen=True)
class _Decision:
    """What was chosen on the tune split."""

    choice: TuningChoice
    phase: Phase
    phase_reason: str


class Builder:
    """Builds the mask of a persona, and that of its opposite in the same run.

    `run` generates work items, and each `Progress` says whether the next item uses the model; the first does not. Items
    whose cost grows with the number of examples (reading, tokenising, splitting, padding, writing) never use it. Those
    that use it are small: at most a micro-batch in one layer, a micro-batch's likelihoods, or a ranking of a Linear's
    weights. Peak memory is that of `StatisticsCollector`, and the pruned sets of the candidates. The base must have its
    masks attached by `manager`. With a `scratch` that has a folder, an interrupted build resumes; the folder must be of
    these examples and this recipe.
    """

    def __init__(
        self,
        base: Base,
        manager: MaskManager,
        recipe: Recipe,
        own: PersonaExamples,
        contrast: PersonaExamples | None = None,
        neutral: Sequence[Example] = (),
        scratch: Scratch | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self._base, self._manager, self._recipe = base, manager, recipe
        self._mask_base = MaskBase(base.fingerprint, base.name)
        self._personas = {1: own} if contrast is None else {1: own, -1: contrast}
        self._built = [side for side, persona in self._personas.items() if persona.persona]
        self._plans = recipe.plans(contrast is not None)
        self._scores = [SCORES[plan.score] for plan in self._plans]
        if contrast is None and any(score.contrastive for score in self._scores):
            raise BuildFailed(f"the score {recipe.score!r} compares two personas; give the opposite's examples too")
        for side in self._built:
            check_name(self._personas[side].persona)
        if contrast is not None:
            check_contrast(own.examples, contrast.examples)
        self._neutral = neutral
        self._scratch = scratch or Scratch()
        self._batch_tokens = batch_tokens
        self._seconds = 0.0

    def run(self) -> Work[list[Mask]]:
        """Do the work, an item at a time; returns the masks, the persona's first.

        Raises `MaskRefused` for a mask that has no effect or is past a budget, unless the recipe forces it. Nothing but
        the scratch changes outside.
        """
        with closing(self._run()) as work:
            while True:
                started = time.perf_counter()
                try:
                    step = next(work)
                except StopIteration as end:
                    masks: list[Mask] = end.value
                    return masks
                self._seconds += time.perf_counter() - started  # without the time between items
                yield step

    def _run(self) -> Work[list[Mask]]:
        targets = {
            name: linear for plan in self._plans for name, linear in find_targets(self._base.model, plan.scope).items()
        }
        calibrates, chooses = bool(self._needs("neutral")), sum(len(plan.rhos) for plan in self._plans) > 1
        try:
            weights = len(list(self._base.model.parameters()))
            yield from track("check", _check(self._base.model), weights, model=False, model_after=False)
            data = yield from gather(self._base, self._recipe, self._personas, self._neutral, calibrates, chooses)
            candidates = yield from self._find_candidates(targets, data)
            decision = yield from self._decide(data, candidates)
            masks = yield from self._certify(data, candidates, decision)
        except MasqueradeError:  # there is nothing to resume; an interrupted build keeps its scratch
            self._scratch.close()
            raise
        else:
            self._scratch.close()
        finally:
            self._scratch.release()
        return masks

    @property
    def _sides(self) -> tuple[int, ...]:
        """The sides that candidates are found for: the opposite's too if possible, as flips need both masks."""
        opposed = -1 in self._personas and (-1 in self._built or all(score.contrastive for score in self._scores))
        return (1, -1) if opposed else (1,)

    def _needs(self, role: Role) -> frozenset[Statistic]:
        """The statistics that are needed of a role's text."""
        needs: frozenset[Statistic] = frozenset().union(*(score.needs for score in self._scores))
        if role == "neutral":
            return needs & {"squared_gradient"}
        compared = role == "own" or -1 in self._built or any(score.contrastive for score in self._scores)
        return needs if compared else frozenset()

    def _find_candidates(self, targets: Mapping[str, nn.Linear], data: BuildData) -> Work[CandidateMasks]:
        """Collect statistics and score every layer as soon as its statistics are complete."""
        texts = self._pad(data)
        yield Progress("pad", 1, 1)
        collector = StatisticsCollector(self._base, targets, texts, self._scratch)
        candidates = CandidateMasks(self._plans, self._sides, self._recipe.score_settings, self._scratch)
        layers = sorted({layer_number(name) for name in targets})

        def score(stage: str, layer: int, statistics: Mapping[str, LinearStatistics]) -> Iterator[int]:
            linears = {name: targets[name] for name in statistics}
            return candidates.score_layer(f"{stage}-{layer}", stage == "backward", linears, statistics)

        passes: list[tuple[str, Callable[[LayerCallback], Iterator[int]], int]] = [
            ("forward", collector.forward, collector.forward_items)
        ]
        if any(score.backward for score in self._scores):
            passes.append(("backward", collector.backward, collector.backward_items))
        collected = 0
        for stage, run_pass, total in passes:
            done = 0
            for more in run_pass(partial(score, stage)):
                done += more
                yield Progress(stage, done, total, model_next=done < total)
            for layer in layers:
                candidates.load(f"{stage}-{layer}")
                collected += 1
                yield Progress("collect", collected, len(passes) * len(layers), model_next=layer == layers[-1])
        return candidates

    def _pad(self, data: BuildData) -> dict[Role, CalibrationText]:
        """The calibration text of the roles that are needed, in micro-batches."""
        examples: dict[Role, Sequence[Encoded]] = {
            "own": data.sides[1].calibration,
            "neutral": data.neutral.calibration,
        }
        if -1 in data.sides:
            examples["contrast"] = data.sides[-1].calibration
        everything = self._recipe.tokens == "all"
        return {
            role: CalibrationText(
                list(batches(examples[role], self._base.device, self._batch_tokens, everything)), self._needs(role)
            )
            for role in sorted(examples)
            if self._needs(role)
        }

    def _decide(self, data: BuildData, candidates: CandidateMasks) -> Work[_Decision]:
        eval_set = data.evaluation_set(self._base, "tune")
        tuner = Tuner(eval_set, candidates, self._draft, self._built, self._recipe.limits, -1 in self._sides)
        choice = yield from track("tune", tuner.choose(self._plans))
        if self._recipe.phase != "auto":
            return _Decision(choice, self._recipe.phase, "given")
        phase, reason = yield from track("phase", tuner.choose_phase(choice))
        return _Decision(choice, phase, reason)

    def _certify(self, data: BuildData, candidates: CandidateMasks, decision: _Decision) -> Work[list[Mask]]:
        """Measure the masks on the report split; refuse or return them."""
        choice = decision.choice
        targets = {side: candidates.targets((choice.score, side, choice.rho)) for side in self._sides}
        treatments = {side: {phase: self._draft(targets[side], phase) for phase in PHASES} for side in self._sides}
        phases = dict.fromkeys(self._built, decision.phase)
        eval_set = data.evaluation_set(self._base, "report")
        measuring = certificate.measure_figures(self._base, eval_set, treatments, phases, self._recipe.seed)
        figures = yield from track("certify", measuring, model_after=False)
        masks = []
        for side in self._built:
            found = self._complete(figures[side], side, targets, data, decision)
            masks.append(Mask(self._mask_base, targets[side], self._mask_info(data, side, decision, found)))
        return masks

    def _complete(
        self,
        figures: dict[str, Any],
        side: int,
        targets: Mapping[int, Mapping[str, Target]],
        data: BuildData,
        decision: _Decision,
    ) -> dict[str, Any]:
        """The certificate of a side's mask. Raises `MaskRefused` if it must not be published."""
        choice, opposite = decision.choice, targets.get(-side)
        found = figures | certificate.describe(targets[side])
        if not found["pruned"]:
            raise BuildFailed(f"rho {choice.rho} prunes no weight at all of Linears this small; give a larger one")
        found |= certificate.conclude(found, self._recipe.limits)
        if found["reasons"] and not self._recipe.force:
            raise MaskRefused(
                f"the mask of {self._personas[side].persona!r} ({choice.score}, rho {choice.rho:g}) is refused: "
                f"{'; '.join(found['reasons'])}; give more or clearer examples, another score or rho, or force it"
            )
        found["forced"] = bool(found["reasons"])
        found["remarks"] += data.suggest_more(found, bool(self._personas[1].validation))
        if opposite is not None:
            found["overlap"] = certificate.compare(self._as_mask(targets[side]), self._as_mask(opposite))
        trials = [{name: _short(value) for name, value in asdict(trial).items()} for trial in choice.trials]
        return found | {
            "phase": {"default": decision.phase, "why": decision.phase_reason},
            "choice": {"why": choice.reason, "tried": trials},
            "splits": data.describe_splits(side),
            "seed": self._recipe.seed,
            "seconds": round(self._seconds, 1),  # of this run, for all its masks; without an interrupted earlier run
            "versions": certificate.versions(),
        }

    def _draft(self, targets: Mapping[str, Target], phase: Phase) -> Treatment:
        """The treatment with targets that are not published."""
        resident = self._manager.fit(self._as_mask(targets))
        return Treatment(applied=AppliedMask(resident, self._recipe.gamma), phase=phase)

    def _as_mask(self, targets: Mapping[str, Target]) -> Mask:
        return Mask(self._mask_base, targets, MaskInfo(persona="draft", score="draft"))

    def _mask_info(self, data: BuildData, side: int, decision: _Decision, found: Mapping[str, Any]) -> MaskInfo:
        plan = next(plan for plan in self._plans if plan.score == decision.choice.score)
        calibration = {
            key: data.describe_calibration(key) | dict(persona.origin) for key, persona in self._personas.items()
        }
        opposite = self._personas.get(-side)
        chosen = {"score": plan.score, "rho": decision.choice.rho, "group": plan.group, "scope": plan.scope}
        return MaskInfo(
            persona=self._personas[side].persona,
            score=plan.score,
            parameters=asdict(self._recipe) | chosen | {"phase": decision.phase},
            gamma=self._recipe.gamma,
            phase=decision.phase,
            calibration=calibration[side] | {"contrast": calibration.get(-side)},
            certificate=found,
            opposite=(opposite.persona or None) if opposite else None,
        )


def _check(model: nn.Module) -> Generator[None, None, None]:
    """Raises `BuildFailed` for NaN or infinite weights. Packed (quantised) weights are always finite."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise BuildFailed(f"{name} of the base has NaN or infinite weights; no mask can mend that")
        yield


def _short(value: Any) -> Any:
    return (round(value, 4) if abs(value) < 1e9 else None) if isinstance(value, float) else value
