"""The examples of a build: read, encoded, and split into parts to calibrate with, to choose by and to certify by."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from masquerade.errors import BuildFailed
from masquerade.evaluate import splits
from masquerade.evaluate.dataset import Encoded, Example, PromptTooLong, encode_fitting
from masquerade.evaluate.evaluation_set import EvaluationSet
from masquerade.evaluate.facts import Part
from masquerade.model import Base
from masquerade.pruning import certificate, neutral
from masquerade.pruning.progress import Progress, Work, track
from masquerade.pruning.recipe import Recipe

ENCODED = 16  # examples that are tokenised in one work item
PAIRED = 0.5  # share of the calibration examples whose prompts must have both answers
TUNED = 3  # one generated neutral text in so many, of those before the report, is for choices


@dataclass(frozen=True)
class PersonaExamples:
    """A persona to build and its examples. Without validation examples, some of the examples are held out."""

    persona: str  # empty for a contrast that gets no mask of its own
    examples: Sequence[Example]
    validation: Sequence[Example] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)  # where the examples come from, for the mask's metadata


@dataclass(frozen=True)
class BuildData:
    """The split examples of each side (1: the persona, -1: its opposite), and of neutral text."""

    recipe: Recipe
    sides: Mapping[int, splits.Split]
    notes: Mapping[int, splits.DatasetNotes]
    neutral: splits.Split

    def held_out(self, side: int, part: str) -> Sequence[Encoded]:
        """The examples of a part that are measured; as many of both sides, so that answers stay paired."""
        texts: dict[int, Sequence[Encoded]] = {key: getattr(split, part) for key, split in self.sides.items()}
        fits = [splits.count_within(of_side, self.recipe.judged_tokens) for of_side in texts.values()]
        return texts.get(side, [])[: max(1, min(self.recipe.judged, *fits))]

    def evaluation_set(
        self, base: Base, part: str, most: int | None = None, tokens: int | None = None
    ) -> EvaluationSet:
        """The held-out examples of the part `tune` or `report`.

        At most `most` of a kind are taken, and at most `tokens` tokens of each response.
        """
        texts = self.held_out(1, part), self.held_out(-1, part), getattr(self.neutral, part)
        return EvaluationSet(base, *([one.cut(tokens) for one in of_kind[:most]] for of_kind in texts))

    def calibration_pairs(self) -> list[tuple[Encoded, Encoded]]:
        """Both sides' calibration answers to each prompt; any two if too few prompts have both."""
        own, contrast = self.sides[1].calibration, self.sides[-1].calibration
        matched = [(own[i], contrast[j]) for i, j in splits.match(own, contrast)]
        return (
            matched if len(matched) >= PAIRED * min(len(own), len(contrast)) else list(zip(own, contrast, strict=False))
        )

    def describe_splits(self, side: int) -> dict[str, int]:
        """How many examples are measured and left out, for the certificate."""
        return {
            "tune": len(self.held_out(side, "tune")),
            "report": len(self.held_out(side, "report")),
            "neutral": len(self.neutral.report),
            "leaks_left_out": self.notes[side].leaks,
            "repeats_left_out": self.notes[side].repeats,
            "with_calibration_prompts": self.notes[side].known_prompts,
            "too_long_left_out": self.notes[side].too_long,
        }

    def describe_calibration(self, side: int) -> dict[str, Any]:
        """Counts and digest of the calibration examples, for the mask's metadata."""
        notes = self.notes[side]
        return {
            **certificate.summarise(self.sides[side].calibration),
            "duplicates": notes.duplicates,
            "shared": notes.shared,
        }

    def suggest_more(self, found: Mapping[str, Any], has_validation: bool) -> list[str]:
        """Which data the certificate lacks, if there are too few pairs."""
        available, measured = self.sides[1].report, len(self.held_out(1, "report"))
        if found.get("pairs", certificate.FEWEST_PAIRS) >= certificate.FEWEST_PAIRS:
            return []
        if measured < len(available):
            most = f"{self.recipe.judged} examples and {self.recipe.judged_tokens} tokens"
            return [f"of {len(available)} held-out examples {measured} were read, at most {most}: give shorter ones"]
        more = certificate.FEWEST_PAIRS - found["pairs"]
        if has_validation:
            return [f"give {2 * more} more validation pairs: half of them choose, half of them judge"]
        return [
            f"give {2 * splits.HELD_OUT * more} more pairs with prompts of their own (one in {splits.HELD_OUT} is held "
            f"out, and half of those judge), or {2 * certificate.FEWEST_PAIRS} validation pairs"
        ]


def gather(
    base: Base,
    recipe: Recipe,
    personas: Mapping[int, PersonaExamples],
    neutral_examples: Sequence[Example],
    calibrates: bool,
    chooses: bool,
    searches: bool,
) -> Work[BuildData]:
    """Encode and split all examples; without neutral examples the base generates some.

    `calibrates` is whether the score reads neutral text, `chooses` whether there are several candidates, and `searches`
    whether the mask is searched for, which takes more neutral text.
    """
    parts = 1 + calibrates + chooses
    texts: dict[str, Sequence[Example]] = {"neutral": neutral_examples[: parts * recipe.judged]}
    for side, persona in personas.items():
        texts[f"{side}"] = splits.sample(persona.examples, recipe.samples, recipe.seed)
        texts[f"{side} held out"] = persona.validation
    items = sum(-(-len(of) // ENCODED) for of in texts.values())
    encoded = yield from track("encode", _encode(base, texts), items, model=False, model_after=False)
    examples, validation, too_long = {}, {}, {}
    for side in personas:
        examples[side], validation[side] = encoded[f"{side}"], encoded[f"{side} held out"]
        given = len(texts[f"{side}"]) + len(texts[f"{side} held out"])
        too_long[side] = given - len(examples[side]) - len(validation[side])
    sides, notes = splits.divide(examples, validation, recipe.seed)
    notes = {side: replace(note, too_long=too_long[side]) for side, note in notes.items()}
    quiet = yield from _gather_neutral(base, recipe, encoded["neutral"], calibrates, chooses, searches)
    return BuildData(recipe, sides, notes, quiet)


def _gather_neutral(
    base: Base, recipe: Recipe, given: Sequence[Encoded], calibrates: bool, chooses: bool, searches: bool
) -> Work[splits.Split]:
    """The given neutral texts, divided; else generated ones, of other questions for the report than before it."""
    if given:
        parts = 1 + calibrates + chooses
        fit = splits.count_within(given, parts * recipe.judged_tokens)
        return splits.divide_neutral(given[: max(fit, parts)], calibrates, chooses)
    yield Progress("divide", 1, 1)
    asked: tuple[Part, ...] = ("search", "report") if calibrates or chooses else ("report",)
    seed = recipe.seed if searches else None
    generating = _generate_neutral(base, asked, seed)
    (*searched, report), more = yield from track("neutral", generating, model_after=False)
    before = [one for texts in searched for one in texts]
    tune = before[::TUNED] if chooses else []
    calibration = [one for number, one in enumerate(before) if not chooses or number % TUNED] if calibrates else []
    if calibrates and not calibration:
        raise BuildFailed(
            f"the base answers {len(before)} of the built-in questions, too few to find a mask by; give neutral text "
            "(--neutral)"
        )
    return splits.Split(
        [*calibration, *more], tune, report[: max(1, splits.count_within(report, recipe.judged_tokens))]
    )


def _generate_neutral(
    base: Base, parts: Sequence[Part], seed: int | None
) -> Generator[None, None, tuple[list[list[Encoded]], list[Encoded]]]:
    """The neutral text of each part and, with a seed, more for a search."""
    texts = yield from neutral.generate_neutral_texts(base, parts)
    more = [] if seed is None else (yield from neutral.generate_more_neutral_text(base, texts[0], seed))
    return texts, more


def _encode(base: Base, texts: Mapping[str, Sequence[Example]]) -> Generator[None, None, dict[str, list[Encoded]]]:
    """Encode each text's examples that leave room for a response. Raises `PromptTooLong` if none of a text does."""
    found: dict[str, list[Encoded]] = {name: [] for name in texts}
    for name, examples in texts.items():
        for start in range(0, len(examples), ENCODED):
            try:
                found[name] += [one for _, one in encode_fitting(base, examples[start : start + ENCODED])]
            except PromptTooLong:
                if not found[name] and start + ENCODED >= len(examples):
                    raise
            yield
    return found
