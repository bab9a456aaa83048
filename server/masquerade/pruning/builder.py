"""Builds masks: examples -> statistics -> scores -> selection -> tuning -> certificate."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import nn

from maskstore import BaseRef as MaskBase
from maskstore import Mask, MaskInfo, Target, check_name
from masquerade.errors import BuildFailed, BuildUnsaved, MasqueradeError
from masquerade.evaluate.dataset import BATCH_TOKENS, Encoded, Example, batches
from masquerade.evaluate.evaluation_set import EvaluationSet
from masquerade.evaluate.splits import check_contrast
from masquerade.evaluate.treatment import Phase, Treatment
from masquerade.kernels import QuantisedWeight
from masquerade.model import MASKABLE, AppliedMask, Base, MaskManager, find_targets, layer_number, trim_heap
from masquerade.pruning import certificate
from masquerade.pruning.candidates import CandidateMasks, pack, unpack
from masquerade.pruning.certificate import CertifiedMask
from masquerade.pruning.collector import CalibrationText, Collector, LayerCallback, StatisticsCollector
from masquerade.pruning.data import BuildData, PersonaExamples, gather
from masquerade.pruning.executor import Executor, SequentialExecutor
from masquerade.pruning.progress import Progress, Work, count, track
from masquerade.pruning.prompts import WRITTEN
from masquerade.pruning.recipe import Recipe
from masquerade.pruning.scores import SCORES
from masquerade.pruning.scratch import Scratch
from masquerade.pruning.search import MaskSearch
from masquerade.pruning.sharding import ShardedCollector, Sharding, divide
from masquerade.pruning.statistics import LinearStatistics, Role, Statistic
from masquerade.pruning.strength import GammaChoice, StrengthTuner
from masquerade.pruning.tuning import Tuner, TuningChoice, TuningTrial

ADVICE = "check that every answer is on its own side; give more or clearer examples, another strength, score or rho"
JUDGED = 32  # most examples of a kind that a search's states are judged by, of the tune split
JUDGED_TOKENS = 64  # most tokens of their responses
FOUND = "found"  # name of the searched masks in the scratch
WEAKENED = 0.5  # the first gamma that is tried of masks that are beyond the budgets at 0
TRACED = 64  # most pairs, and neutral texts, whose statistics a search starts from


@dataclass(frozen=True)
class RefusedMask:
    """A mask that must not be published, and why."""

    persona: str
    score: str
    rho: float
    reason: str

    def __str__(self) -> str:
        return f"the mask of {self.persona!r} ({self.score}, rho {self.rho:g}) is refused: {self.reason}"


@dataclass(frozen=True)
class BuildResult:
    """The masks that may be published, and those that are refused; the persona's first."""

    masks: Sequence[Mask]
    refused: Sequence[RefusedMask]

    def explain(self) -> str:
        """Which masks are refused and why, which is published all the same, and what to do."""
        published = [f"{mask.info.persona!r} is published" for mask in self.masks]
        return "; ".join((*map(str, self.refused), *published, ADVICE))


@dataclass(frozen=True)
class _ChosenMask:
    """A side's mask, as it was chosen on the tune split."""

    targets: Mapping[str, Target]
    rho: float
    gamma: float
    phase: Phase
    reason: str
    phase_reason: str
    trials: Sequence[TuningTrial]
    refusal: Sequence[str]  # why it must not be published, where that is known


class Builder:
    """Builds the mask of a persona, and that of its opposite in the same run.

    `run` generates work items, and each `Progress` says whether the next item uses the model; the first does not. Items
    whose cost grows with the number of examples (reading, tokenising, splitting, padding, writing) never use it. Those
    that use it are small: at most a micro-batch in one layer, a micro-batch's likelihoods, or a ranking of a Linear's
    weights. Peak memory is that of `StatisticsCollector`, and the pruned sets of the candidates. The base must have its
    masks attached by `manager`. With a `scratch` that has a folder, an interrupted build resumes; the folder must be of
    these examples and this recipe. The `executor` runs what a side's mask needs beside the other's: by default one side
    after the other. With a `sharding`, statistics are collected elsewhere; to wait for them is a work item.
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
        executor: Executor | None = None,
        sharding: Sharding | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self._base, self._manager, self._recipe = base, manager, recipe
        self._executor = executor or SequentialExecutor()
        self._sharding = sharding
        self._mask_base = MaskBase(base.fingerprint, base.name)
        self._personas = {1: own} if contrast is None else {1: own, -1: contrast}
        self._built = [side for side, persona in self._personas.items() if persona.persona]
        self._plan = recipe.plan(contrast is not None)
        self._score = SCORES[self._plan.score]
        if contrast is None and self._score.contrastive:
            raise BuildFailed(f"the score {recipe.score!r} compares two personas; give the opposite's examples too")
        if not find_targets(base.model, self._plan.scope):
            raise BuildFailed(f"{base.name!r} has no Linears in the scope {self._plan.scope!r}: {MASKABLE}")
        for side in self._built:
            check_name(self._personas[side].persona)
        if contrast is not None:
            check_contrast(own.examples, contrast.examples)
        self._neutral = neutral
        self._scratch = scratch or Scratch()
        self._batch_tokens = batch_tokens
        self._seconds = 0.0

    def run(self) -> Work[BuildResult]:
        """Do the work, an item at a time.

        A mask that has no effect or is past a budget is refused, unless the recipe forces it. The scratch is then kept
        for a build that does, whose other mask is the same again. If nothing is refused, the scratch is the caller's to
        close, once the masks are safe: until then the same build finds them again without a search. Nothing but the
        scratch changes outside.
        """
        with closing(self._run()) as work:
            while True:
                started = time.perf_counter()
                try:
                    step = next(work)
                except StopIteration as end:
                    result: BuildResult = end.value
                    return result
                self._seconds += time.perf_counter() - started  # without the time between items
                yield step

    def _run(self) -> Work[BuildResult]:
        targets = find_targets(self._base.model, self._plan.scope)
        calibrates = bool(self._needs("neutral"))
        chooses = self._score.searched or len(self._plan.rhos) > 1
        try:
            weights = len(list(self._base.model.parameters()))
            yield from track("check", _check(self._base.model), weights, model=False, model_after=False)
            data = yield from gather(
                self._base, self._recipe, self._personas, self._neutral, calibrates, chooses, self._score.searched
            )
            choose = self._search if self._score.searched else self._compare
            chosen = yield from choose(targets, data)
            result = yield from self._certify(data, chosen)
        except BaseException as error:
            if isinstance(error, MasqueradeError) and not isinstance(error, BuildUnsaved):
                self._scratch.close()  # there is nothing to resume
            self._scratch.release()
            raise
        if result.refused:  # a build that forces the mask goes on from here
            self._scratch.release()
        return result

    @property
    def _sides(self) -> tuple[int, ...]:
        """The sides that candidates are found for: the opposite's too if possible, as flips need both masks."""
        opposed = -1 in self._personas and (-1 in self._built or self._score.contrastive)
        return (1, -1) if opposed else (1,)

    def _needs(self, role: Role) -> frozenset[Statistic]:
        """The statistics that are needed of a role's text."""
        needs = self._score.needs
        if role == "neutral":
            return needs & {"squared_gradient"}
        compared = role == "own" or -1 in self._built or self._score.contrastive
        return needs if compared else frozenset()

    def _search(self, targets: Mapping[str, nn.Linear], data: BuildData) -> Work[dict[int, _ChosenMask]]:
        """Search for the mask of each side that is built, and choose its gamma."""
        settings = self._recipe.search_settings
        eval_set = data.evaluation_set(self._base, "tune", JUDGED, JUDGED_TOKENS)
        phase: Phase = "decode" if self._recipe.phase == "auto" else self._recipe.phase
        tuners = self._make_tuners(eval_set, phase, self._built)
        if FOUND not in self._scratch:
            masks = yield from self._find(targets, data, eval_set, tuners)
            self._scratch.put(
                FOUND, pack({f"{side}|{name}": one for side in masks for name, one in masks[side].items()})
            )
        self._scratch.retain(FOUND, WRITTEN)  # the rest is large, and a refused build is kept for days
        found: dict[int, dict[str, Target]] = {side: {} for side in tuners}
        for label, target in unpack(self._scratch.get(FOUND)).items():
            side, name = label.split("|")
            found[int(side)][name] = target
        choices = {side: GammaChoice(self._recipe.gamma or 0.0, "given", ()) for side in tuners}
        if self._recipe.gamma is None:
            choices = yield from track("tune", self._choose_gammas(tuners, found, settings.gamma))
        why = "given" if self._recipe.phase != "auto" else "the mask is searched for in phase decode"
        return {
            side: _ChosenMask(found[side], settings.rho, one.gamma, phase, one.reason, why, one.trials, one.refusal)
            for side, one in choices.items()
        }

    def _find(
        self,
        targets: Mapping[str, nn.Linear],
        data: BuildData,
        eval_set: EvaluationSet,
        tuners: Mapping[int, StrengthTuner],
    ) -> Work[dict[int, dict[str, Target]]]:
        """The targets of each side's search."""
        settings = self._recipe.search_settings
        search = MaskSearch(self._base, targets, self._built, settings, self._scratch)

        def add(stage: str, _: int, statistics: Mapping[str, LinearStatistics]) -> Iterator[int]:
            if stage == "forward":
                return iter((len(statistics),))
            return search.add_layer({name: targets[name] for name in statistics}, statistics)

        yield from self._collect(targets, self._pad(data, TRACED, settings.tokens), add)
        trim_heap()  # the statistics took as much as the search will

        def prepare() -> Generator[None, None, None]:
            yield from search.prepare(data.calibration_pairs(), data.neutral.calibration)
            yield from eval_set.measure_base()

        yield from track("prepare", prepare())
        runs = {side: search.run(side, partial(tuner.judge, gamma=settings.gamma)) for side, tuner in tuners.items()}
        items = len(runs) * search.items
        found = yield from count("search", self._executor.run(runs), items)
        yield Progress("search", items, items)
        return found

    def _compare(self, targets: Mapping[str, nn.Linear], data: BuildData) -> Work[dict[int, _ChosenMask]]:
        """Rank the weights by the score, and choose one rho for all sides."""
        candidates = CandidateMasks(self._plan, self._sides, self._recipe.score_settings, self._scratch)

        def score(stage: str, layer: int, statistics: Mapping[str, LinearStatistics]) -> Iterator[int]:
            linears = {name: targets[name] for name in statistics}
            return candidates.score_layer(f"{stage}-{layer}", stage == "backward", linears, statistics)

        yield from self._collect(targets, self._pad(data), score, candidates.load)
        gamma = self._recipe.gamma or 0.0
        eval_set = data.evaluation_set(self._base, "tune")

        def draft(found: Mapping[str, Target], phase: Phase) -> Treatment:
            return self._apply(found, phase, gamma)

        tuner = Tuner(eval_set, candidates, draft, self._built, self._recipe.limits, -1 in self._sides)
        choice = yield from track("tune", tuner.choose(self._plan))
        targets_of = {side: candidates.targets((choice.score, side, choice.rho)) for side in self._sides}
        if choice.refusal and self._recipe.gamma is None:
            return (yield from track("tune", self._weaken(choice, targets_of, eval_set)))
        phase, why = self._recipe.phase, "given"
        if phase == "auto":
            phase, why = yield from track("phase", tuner.choose_phase(choice))
        return {
            side: _ChosenMask(found, choice.rho, gamma, phase, choice.reason, why, choice.trials, choice.refusal)
            for side, found in targets_of.items()
        }

    def _weaken(
        self, choice: TuningChoice, targets: Mapping[int, Mapping[str, Target]], eval_set: EvaluationSet
    ) -> Generator[None, None, dict[int, _ChosenMask]]:
        """The masks of a rho that is beyond the budgets, each at the strongest gamma within them."""
        phase, why = self._recipe.phase, "given"
        if phase == "auto":
            phase, why = "all", "gamma is chosen in phase all"
        tuners = self._make_tuners(eval_set, phase, targets)
        masks = {}
        for side, one in (yield from self._choose_gammas(tuners, targets, WEAKENED)).items():
            trials = (*choice.trials, *one.trials)
            refusal = (*choice.refusal, *one.refusal) if one.refusal else ()
            masks[side] = _ChosenMask(targets[side], choice.rho, one.gamma, phase, one.reason, why, trials, refusal)
        return masks

    def _make_tuners(self, eval_set: EvaluationSet, phase: Phase, sides: Iterable[int]) -> dict[int, StrengthTuner]:
        """What chooses the gamma of each side's mask in a phase."""
        draft = partial(self._apply, phase=phase)
        return {side: StrengthTuner(eval_set, draft, side, self._recipe.limits, self._plan.score) for side in sides}

    def _choose_gammas(
        self, tuners: Mapping[int, StrengthTuner], targets: Mapping[int, Mapping[str, Target]], start: float
    ) -> Generator[None, None, dict[int, GammaChoice]]:
        """The gamma of each side."""
        for tuner in tuners.values():
            yield from tuner.measure_base()
        choosing = {side: tuner.choose_gamma(targets[side], start) for side, tuner in tuners.items()}
        return (yield from self._executor.run(choosing))

    def _collect(
        self,
        targets: Mapping[str, nn.Linear],
        texts: Mapping[Role, CalibrationText],
        add: Callable[[str, int, Mapping[str, LinearStatistics]], Iterator[int]],
        finish: Callable[[str], None] = lambda _: None,
    ) -> Work[None]:
        """Collect statistics. `add` gets those of a layer as soon as they are complete, `finish` a layer's key."""
        yield Progress("pad", 1, 1)
        layers = sorted({layer_number(name) for name in targets})
        with ExitStack() as stack:
            collector = yield from self._open_collector(targets, texts, stack)
            passes: list[tuple[str, Callable[[LayerCallback], Iterator[int]], int]] = [
                ("forward", collector.forward, collector.forward_items)
            ]
            if self._score.backward:
                passes.append(("backward", collector.backward, collector.backward_items))
            collected = 0
            for stage, run_pass, total in passes:
                done = 0
                for more in run_pass(partial(add, stage)):
                    done += more
                    yield Progress(stage, done, total, model_next=done < total)
                for layer in layers:
                    finish(f"{stage}-{layer}")
                    collected += 1
                    yield Progress("collect", collected, len(passes) * len(layers), model_next=layer == layers[-1])

    def _open_collector(
        self, targets: Mapping[str, nn.Linear], texts: Mapping[Role, CalibrationText], stack: ExitStack
    ) -> Work[Collector]:
        """What collects statistics: this process, or others until the end of the stack."""
        if self._sharding is None:
            return StatisticsCollector(self._base, targets, texts, self._scratch)
        count = self._sharding.shards
        yield Progress("shards", 0, count)
        shards = divide(self._base, self._plan.scope, texts, self._score.backward, count)
        reports = stack.enter_context(self._sharding.run(shards))
        yield Progress("shards", count, count)
        return ShardedCollector(self._base, targets, reports, self._scratch)

    def _pad(self, data: BuildData, most: int | None = None, tokens: int | None = None) -> dict[Role, CalibrationText]:
        """The calibration text of the roles that are needed, in micro-batches.

        At most `most` texts of a role are taken, and at most `tokens` tokens of each response.
        """
        examples: dict[Role, Sequence[Encoded]] = {
            "own": data.sides[1].calibration,
            "neutral": data.neutral.calibration,
        }
        if -1 in data.sides:
            examples["contrast"] = data.sides[-1].calibration
        everything = self._recipe.tokens == "all"
        found = {}
        for role in sorted(examples):
            if self._needs(role):
                texts = [one.cut(tokens) for one in examples[role][:most]]
                padded = list(batches(texts, self._base.device, self._batch_tokens, everything))
                found[role] = CalibrationText(padded, self._needs(role))
        return found

    def _certify(self, data: BuildData, chosen: Mapping[int, _ChosenMask]) -> Work[BuildResult]:
        """Measure the masks on the report split, but for those that are refused already; refuse or return them."""
        forced = self._recipe.force
        judged = [side for side in self._built if forced or not chosen[side].refusal]
        figures: Mapping[int, dict[str, Any]] = {}
        if judged:
            certified = {
                side: CertifiedMask(partial(self._apply, mask.targets), mask.phase, mask.gamma)
                for side, mask in chosen.items()  # a refused one too, for the flips of the other
            }
            eval_set = data.evaluation_set(self._base, "report")
            measuring = certificate.measure_figures(
                self._base, eval_set, certified, judged, self._recipe.seed, self._executor
            )
            figures = yield from track("certify", measuring, model_after=False)
        else:
            yield Progress("certify", 1, 1, model_next=False)
        masks, refused = [], []
        for side in self._built:
            mask = chosen[side]
            found = self._complete(figures[side], side, chosen, data) if side in figures else {"reasons": mask.refusal}
            if found["reasons"] and not forced:
                more = data.suggest_more(found, bool(self._personas[1].validation))
                reason = "; ".join((*found["reasons"], *more))
                refused.append(RefusedMask(self._personas[side].persona, self._plan.score, mask.rho, reason))
            else:
                masks.append(Mask(self._mask_base, mask.targets, self._mask_info(data, side, mask, found)))
        return BuildResult(masks, refused)

    def _complete(
        self, figures: dict[str, Any], side: int, chosen: Mapping[int, _ChosenMask], data: BuildData
    ) -> dict[str, Any]:
        """The certificate of a side's mask."""
        mask, opposite = chosen[side], chosen.get(-side)
        found = figures | certificate.describe(mask.targets)
        if not found["pruned"]:
            raise BuildFailed(f"rho {mask.rho} prunes no weight at all of Linears this small; give a larger one")
        found |= certificate.conclude(found, self._recipe.limits, mask.refusal)
        found["forced"] = bool(found["reasons"])
        found["remarks"] += data.suggest_more(found, bool(self._personas[1].validation))
        if opposite is not None:
            found["overlap"] = certificate.compare(self._as_mask(mask.targets), self._as_mask(opposite.targets))
        trials = [{name: _short(value) for name, value in asdict(trial).items()} for trial in mask.trials]
        return found | {
            "phase": {"default": mask.phase, "why": mask.phase_reason},
            "choice": {"why": mask.reason, "tried": trials},
            "splits": data.describe_splits(side),
            "seed": self._recipe.seed,
            "seconds": round(self._seconds, 1),  # of this run, for all its masks; without an interrupted earlier run
            "versions": certificate.versions(),
        }

    def _apply(self, targets: Mapping[str, Target], phase: Phase, gamma: float) -> Treatment:
        """The treatment with targets that are not published."""
        return Treatment(applied=AppliedMask(self._manager.fit(self._as_mask(targets)), gamma), phase=phase)

    def _as_mask(self, targets: Mapping[str, Target]) -> Mask:
        return Mask(self._mask_base, targets, MaskInfo(persona="draft", score="draft"))

    def _mask_info(self, data: BuildData, side: int, mask: _ChosenMask, found: Mapping[str, Any]) -> MaskInfo:
        calibration = {
            key: data.describe_calibration(key) | dict(persona.origin) for key, persona in self._personas.items()
        }
        opposite, plan = self._personas.get(-side), self._plan
        chosen = {"score": plan.score, "rho": mask.rho, "group": plan.group, "scope": plan.scope, "gamma": mask.gamma}
        return MaskInfo(
            persona=self._personas[side].persona,
            score=plan.score,
            parameters=asdict(self._recipe) | chosen | {"phase": mask.phase},
            gamma=mask.gamma,
            phase=mask.phase,
            calibration=calibration[side] | {"contrast": calibration.get(-side)},
            certificate=found,
            opposite=(opposite.persona or None) if opposite else None,
        )


def _check(model: nn.Module) -> Generator[None, None, None]:
    """Raises `BuildFailed` for NaN or infinite weights. Those that bitsandbytes packed are always finite."""
    for name, weight in model.named_parameters():
        values = weight.read() if isinstance(weight, QuantisedWeight) else weight
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise BuildFailed(f"{name} of the base has NaN or infinite weights; no mask can mend that")
        yield


def _short(value: Any) -> Any:
    return (round(value, 4) if abs(value) < 1e9 else None) if isinstance(value, float) else value
