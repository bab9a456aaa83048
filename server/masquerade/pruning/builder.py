"""Builds personas: dataset -> statistics -> scores -> selection -> tuning -> certificate -> masks.

Knows the order of the work and cuts it into small items, so that a server can do other things between them. Refuses to
know who runs it and where the masks go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from torch import nn

from maskstore import BaseRef as MaskBase
from maskstore import Mask, MaskInfo, Target, check_name
from masquerade.errors import BuildFailed, MaskRefused, MasqueradeError
from masquerade.evaluate import splits
from masquerade.evaluate.dataset import BATCH_TOKENS, Encoded, Example, NoRoom, batches, encode_fitting
from masquerade.evaluate.panel import Panel
from masquerade.evaluate.treatment import PHASES, Phase, Treatment
from masquerade.model import AppliedMask, Base, MaskManager, find_targets
from masquerade.pruning import certificate, neutral
from masquerade.pruning.evidence import Evidence, Kind
from masquerade.pruning.ladder import Ladder
from masquerade.pruning.recipe import Recipe
from masquerade.pruning.scores import SCORES
from masquerade.pruning.scratch import Scratch
from masquerade.pruning.tuning import Tuner, TuningChoice
from masquerade.pruning.walk import CalibrationText, Role, Visit, Walk, layer_number

T = TypeVar("T")
ENCODED = 16  # examples that are tokenised in one work item


@dataclass(frozen=True)
class Speaker:
    """A persona to build and how it talks. Without validation examples, some of the examples are held out."""

    persona: str  # empty for a contrast that gets no mask of its own
    examples: Sequence[Example]
    validation: Sequence[Example] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)  # where the examples come from, for the mask's metadata


@dataclass(frozen=True)
class Progress:
    """`done` of `total` parts of a stage are finished; `total` is None where it cannot be known beforehand.

    `model_next` is whether the work item after this one uses the model. If not, it may be done on any thread while the
    model is used by others.
    """

    stage: str
    done: int
    total: int | None
    model_next: bool = True


Work = Generator[Progress, None, T]


@dataclass(frozen=True)
class _Data:
    """Everything that is read, split into what must not meet. Sides are 1 (the speaker) and -1 (the opposite)."""

    sides: Mapping[int, splits.Split]
    remarks: Mapping[int, splits.Remarks]
    neutral: splits.Split


@dataclass(frozen=True)
class _Decision:
    """What was chosen on the tune split."""

    choice: TuningChoice
    phase: Phase
    why_phase: str


class Builder:
    """Builds the mask of a speaker, and of its opposite in the same run.

    `run` is a generator of work items. The first uses no model, and each `Progress` says whether the next one does;
    what grows with the examples (reading them, tokenising, splitting, padding, writing) never does. Those that do are
    small: at most a micro-batch, in one layer or for its likelihoods, or a ranking of a Linear's weights. The masks are
    the result, the speaker's first. Peak memory: `walk` states it; beside that there are the pruned sets that are
    tried. The base must have its masks attached by `manager`. With a `scratch` that has a folder, a build that was
    killed goes on where it was; the folder must be of these examples and this recipe.
    """

    def __init__(
        self,
        base: Base,
        manager: MaskManager,
        recipe: Recipe,
        own: Speaker,
        contrast: Speaker | None = None,
        neutral: Sequence[Example] = (),
        scratch: Scratch | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self._base, self._manager, self._recipe = base, manager, recipe
        self._mask_base = MaskBase(base.fingerprint, base.name)
        self._speakers = {1: own} if contrast is None else {1: own, -1: contrast}
        self._built = [sign for sign, speaker in self._speakers.items() if speaker.persona]
        self._plans = recipe.plans(contrast is not None)
        self._scores = [SCORES[plan.score] for plan in self._plans]
        if contrast is None and any(score.contrastive for score in self._scores):
            raise BuildFailed(f"the score {recipe.score!r} compares two speakers; give the opposite's examples too")
        for sign in self._built:
            check_name(self._speakers[sign].persona)
        if contrast is not None:
            splits.check_contrast(own.examples, contrast.examples)
        self._neutral = neutral
        self._scratch = scratch or Scratch()
        self._batch_tokens = batch_tokens
        self._seconds = 0.0

    def run(self) -> Work[list[Mask]]:
        """Do the work, an item at a time. Raises what the stages raise; nothing outside has changed then.

        Raises `MaskRefused` for a mask that does nothing or costs too much, unless the recipe forces it.
        """
        with closing(self._run()) as work:
            while True:
                started = time.perf_counter()
                try:
                    step = next(work)
                except StopIteration as end:
                    masks: list[Mask] = end.value
                    return masks
                self._seconds += time.perf_counter() - started  # not what a server does in between
                yield step

    def _run(self) -> Work[list[Mask]]:
        targets = {
            name: linear for plan in self._plans for name, linear in find_targets(self._base.model, plan.scope).items()
        }
        try:
            weights = len(list(self._base.model.parameters()))
            yield from count("check", _check(self._base.model), weights, model=False, model_after=False)
            data = yield from self._gather()
            ladder = yield from self._observe(targets, data)
            decision = yield from self._decide(data, ladder)
            masks = yield from self._certify(data, ladder, decision)
        except MasqueradeError:  # there is nothing to go on with; a build that is killed leaves its scratch
            self._scratch.close()
            raise
        else:
            self._scratch.close()
        finally:
            self._scratch.release()
        return masks

    @property
    def _sides(self) -> tuple[int, ...]:
        """The sides whose masks are made: the opposite's too where it can be, for flips are counted with both."""
        opposed = -1 in self._speakers and (-1 in self._built or all(score.contrastive for score in self._scores))
        return (1, -1) if opposed else (1,)

    def _gather(self) -> Work[_Data]:
        calibrates, chooses = bool(self._needs("neutral")), sum(len(plan.rhos) for plan in self._plans) > 1
        parts = 1 + calibrates + chooses
        texts: dict[str, Sequence[Example]] = {"neutral": self._neutral[: parts * self._recipe.judged]}
        for sign, speaker in self._speakers.items():
            texts[f"{sign}"] = splits.sample(speaker.examples, self._recipe.samples, self._recipe.seed)
            texts[f"{sign} held out"] = speaker.validation
        items = sum(-(-len(of) // ENCODED) for of in texts.values())
        encoded = yield from count("encode", self._encode(texts), items, model=False, model_after=False)
        examples, validation, too_long = {}, {}, {}
        for sign in self._speakers:
            examples[sign], validation[sign] = encoded[f"{sign}"], encoded[f"{sign} held out"]
            given = len(texts[f"{sign}"]) + len(texts[f"{sign} held out"])
            too_long[sign] = given - len(examples[sign]) - len(validation[sign])
        sides, remarks = splits.divide(examples, validation, self._recipe.seed)
        remarks = {sign: replace(remark, too_long=too_long[sign]) for sign, remark in remarks.items()}
        calm = encoded["neutral"]
        if not calm:
            yield Progress("divide", 1, 1)
            calm = yield from count("neutral", neutral.ask_base(self._base), model_after=False)
        fit = splits.count_within(calm, parts * self._recipe.judged_tokens)
        return _Data(sides, remarks, splits.divide_neutral(calm[: max(fit, parts)], calibrates, chooses))

    def _encode(self, texts: Mapping[str, Sequence[Example]]) -> Generator[None, None, dict[str, list[Encoded]]]:
        """What leaves room for a response, of each text; all must be without room to be refused."""
        found: dict[str, list[Encoded]] = {name: [] for name in texts}
        for name, examples in texts.items():
            for start in range(0, len(examples), ENCODED):
                some = examples[start : start + ENCODED]
                try:
                    found[name] += [encoded for _, encoded in encode_fitting(self._base, some)]
                except NoRoom:
                    if not found[name] and start + ENCODED >= len(examples):
                        raise
                yield
        return found

    def _needs(self, role: Role) -> frozenset[Kind]:
        """Which statistics a role's text is read for."""
        wanted: frozenset[Kind] = frozenset().union(*(score.needs for score in self._scores))
        if role == "neutral":
            return wanted & {"fisher"}
        compared = role == "own" or -1 in self._built or any(score.contrastive for score in self._scores)
        return wanted if compared else frozenset()

    def _observe(self, targets: Mapping[str, nn.Linear], data: _Data) -> Work[Ladder]:
        """Walk over the calibration text; a layer is scored as soon as its statistics are complete."""
        everything = self._recipe.tokens == "all"
        said: dict[Role, Sequence[Encoded]] = {"own": data.sides[1].calibration, "neutral": data.neutral.calibration}
        if -1 in data.sides:
            said["contrast"] = data.sides[-1].calibration
        texts: dict[Role, CalibrationText] = {
            role: CalibrationText(
                list(batches(said[role], self._base.device, self._batch_tokens, everything)), self._needs(role)
            )
            for role in sorted(said)
            if self._needs(role)
        }
        yield Progress("pad", 1, 1)
        walk = Walk(self._base, targets, texts, self._scratch)
        ladder = Ladder(self._plans, self._sides, self._recipe.choices, self._scratch)
        layers = sorted({layer_number(name) for name in targets})

        def visit(stage: str, number: int, evidence: Mapping[str, Evidence]) -> Iterator[int]:
            linears = {name: targets[name] for name in evidence}
            return ladder.climb(f"{stage}-{number}", stage == "backward", linears, evidence)

        ways: list[tuple[str, Callable[[Visit], Iterator[int]], int]] = [("forward", walk.forward, walk.forward_items)]
        if any(score.backward for score in self._scores):
            ways.append(("backward", walk.backward, walk.backward_items))
        collected = 0
        for stage, go, total in ways:
            done = 0
            for more in go(partial(visit, stage)):
                done += more
                yield Progress(stage, done, total, model_next=done < total)
            for number in layers:
                ladder.load(f"{stage}-{number}")
                collected += 1
                yield Progress("collect", collected, len(ways) * len(layers), model_next=number == layers[-1])
        return ladder

    def _decide(self, data: _Data, ladder: Ladder) -> Work[_Decision]:
        panel = self._panel(data, "tune")
        draft = self._draft
        tuner = Tuner(panel, ladder, draft, self._built, self._recipe.limits, -1 in self._sides)
        choice = yield from count("tune", tuner.choose(self._plans))
        if self._recipe.phase != "auto":
            return _Decision(choice, self._recipe.phase, "given")
        phase, why = yield from count("phase", tuner.choose_phase(choice))
        return _Decision(choice, phase, why)

    def _certify(self, data: _Data, ladder: Ladder, decision: _Decision) -> Work[list[Mask]]:
        """Measure the masks on text that decided nothing; refuse, or give them."""
        choice = decision.choice
        targets = {side: ladder.targets((choice.score, side, choice.rho)) for side in self._sides}
        worn = {side: {phase: self._draft(targets[side], phase) for phase in PHASES} for side in self._sides}
        phases = dict.fromkeys(self._built, decision.phase)
        panel = self._panel(data, "report")
        figuring = certificate.judge(self._base, panel, worn, phases, self._recipe.seed)
        figures = yield from count("certify", figuring, model_after=False)
        masks = []
        for side in self._built:
            opposite = targets.get(-side)
            found = figures[side] | certificate.describe(targets[side])
            if not found["pruned"]:
                raise BuildFailed(f"rho {choice.rho} prunes no weight at all of Linears this small; give a larger one")
            found |= certificate.conclude(found, self._recipe.limits)
            if found["reasons"] and not self._recipe.force:
                raise MaskRefused(self._refuse(side, choice, found["reasons"]))
            found["forced"] = bool(found["reasons"])
            found["remarks"] += self._want(data, found)
            if opposite is not None:
                found["overlap"] = certificate.compare(self._as_mask(targets[side]), self._as_mask(opposite))
            found |= self._tell(data, side, decision)
            masks.append(Mask(self._mask_base, targets[side], self._inform(data, side, decision, found)))
        return masks

    def _want(self, data: _Data, found: Mapping[str, Any]) -> list[str]:
        """What more data the certificate needs, if it is too few to tell."""
        judged, read = data.sides[1].report, len(self._held_out(data, 1, "report"))
        if found["verdict"] != certificate.TOO_FEW or "pairs" not in found:
            return []
        if read < len(judged):
            most = f"{self._recipe.judged} examples and {self._recipe.judged_tokens} tokens"
            return [f"of {len(judged)} held-out examples {read} were read, at most {most}: give shorter ones"]
        more = certificate.FEWEST_PAIRS - found["pairs"]
        if self._speakers[1].validation:
            return [f"give {2 * more} more validation pairs: half of them choose, half of them judge"]
        return [
            f"give {2 * splits.HELD_OUT * more} more pairs with prompts of their own (one in {splits.HELD_OUT} is held "
            f"out, and half of those judge), or {2 * certificate.FEWEST_PAIRS} validation pairs"
        ]

    def _panel(self, data: _Data, part: str) -> Panel:
        own, contrast = (self._held_out(data, side, part) for side in (1, -1))
        return Panel(self._base, own, contrast, getattr(data.neutral, part))

    def _held_out(self, data: _Data, side: int, part: str) -> Sequence[Encoded]:
        """What is read of a side; at most as many of either, so that they stay paired."""
        texts: dict[int, Sequence[Encoded]] = {sign: getattr(split, part) for sign, split in data.sides.items()}
        fits = [splits.count_within(of_side, self._recipe.judged_tokens) for of_side in texts.values()]
        return texts.get(side, [])[: max(1, min(self._recipe.judged, *fits))]

    def _draft(self, targets: Mapping[str, Target], phase: Phase) -> Treatment:
        """Targets that are tried on before there is a mask to publish."""
        return Treatment(
            applied=AppliedMask(self._manager.fit(self._as_mask(targets)), self._recipe.gamma), phase=phase
        )

    def _as_mask(self, targets: Mapping[str, Target]) -> Mask:
        return Mask(self._mask_base, targets, MaskInfo(persona="draft", score="draft"))

    def _refuse(self, side: int, choice: TuningChoice, reasons: Sequence[str]) -> str:
        return (
            f"the mask of {self._speakers[side].persona!r} ({choice.score}, rho {choice.rho:g}) is refused: "
            f"{'; '.join(reasons)}; give more or clearer examples, another score or rho, or force it"
        )

    def _tell(self, data: _Data, side: int, decision: _Decision) -> dict[str, Any]:
        """How the certificate came about."""
        return {
            "phase": {"default": decision.phase, "why": decision.why_phase},
            "choice": {
                "why": decision.choice.reason,
                "tried": [
                    {name: _short(value) for name, value in asdict(trial).items()} for trial in decision.choice.trials
                ],
            },
            "splits": {
                "tune": len(self._held_out(data, side, "tune")),
                "report": len(self._held_out(data, side, "report")),
                "neutral": len(data.neutral.report),
                "leaks_left_out": data.remarks[side].leaks,
                "too_long_left_out": data.remarks[side].too_long,
            },
            "seed": self._recipe.seed,
            "seconds": round(self._seconds, 1),  # of all masks of this run, and none of an earlier one that was killed
            "versions": certificate.versions(),
        }

    def _inform(self, data: _Data, side: int, decision: _Decision, found: Mapping[str, Any]) -> MaskInfo:
        plan = next(plan for plan in self._plans if plan.score == decision.choice.score)
        opposite = self._speakers.get(-side)
        chosen = {"score": plan.score, "rho": decision.choice.rho, "group": plan.group, "scope": plan.scope}
        return MaskInfo(
            persona=self._speakers[side].persona,
            score=plan.score,
            parameters=asdict(self._recipe) | chosen | {"phase": decision.phase},
            gamma=self._recipe.gamma,
            phase=decision.phase,
            calibration=self._summarise(data, side) | {"contrast": self._summarise(data, -side) if opposite else None},
            certificate=found,
            opposite=(opposite.persona or None) if opposite else None,
        )

    def _summarise(self, data: _Data, side: int) -> dict[str, Any]:
        calibration = data.sides[side].calibration
        return {
            **certificate.summarise(calibration),
            "duplicates": data.remarks[side].duplicates,
            **self._speakers[side].origin,
        }


def _check(model: nn.Module) -> Generator[None, None, None]:
    """Raises `BuildFailed` for weights that are no numbers. Packed (quantised) weights always are."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise BuildFailed(f"{name} of the base has NaN or infinite weights; no mask can mend that")
        yield


def count(
    stage: str,
    items: Generator[None, None, T],
    total: int | None = None,
    *,
    model: bool = True,
    model_after: bool = True,
) -> Work[T]:
    """The progress of work items that use the model or not; a total of None is not known beforehand.

    At the end the total is known, and `model_after` says what the work after these items is.
    """
    done = 0
    while True:
        try:
            next(items)
        except StopIteration as end:
            result: T = end.value
            break
        done += 1
        yield Progress(stage, done, total, model)
    if done and (total is None or model_after != model):
        yield Progress(stage, done, done, model_after)
    return result


def _short(value: Any) -> Any:
    return (round(value, 4) if abs(value) < 1e9 else None) if isinstance(value, float) else value
