"""Splits examples into calibration, tune and report parts, and pairs opposites' answers to the same prompt.

The parts are disjoint. The examples and a seed decide everything, so the same files give the same split.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

from masquerade.errors import BadDataset
from masquerade.evaluate.dataset import Encoded, Example

T = TypeVar("T")
Sides = dict[int, list[Encoded]]
HELD_OUT = 5  # one prompt in so many is held out if there are no validation examples
LEAST = 4  # fewest calibration examples of a side
SHARED = 0.5  # more examples than this share that are the same on both sides make no contrast


@dataclass(frozen=True)
class Split:
    """One side's examples: to find the mask in, to choose hyperparameters by, and to certify by."""

    calibration: Sequence[Encoded]
    tune: Sequence[Encoded]
    report: Sequence[Encoded]


@dataclass(frozen=True)
class DatasetNotes:
    """Peculiarities of one side's data that are no errors."""

    duplicates: int  # calibration examples that repeat an earlier one, word for word
    leaks: int  # validation examples that are also calibration examples, and were left out
    shared: int = 0  # calibration examples that the other side has too, word for word
    repeats: int = 0  # validation examples that repeat an earlier one, and were left out
    known_prompts: int = 0  # validation examples that answer a prompt of the calibration, otherwise than there
    too_long: int = 0  # examples left out because their prompts leave no room for a response in the base's context


def sample(examples: Sequence[Example], most: int | None, seed: int) -> list[Example]:
    """At most `most` examples, drawn by seed, in their order.

    Prompts are drawn, not lines: opposites that answer the same prompts keep them in common.
    """
    if most is None or len(examples) <= most:
        return list(examples)
    chosen: list[int] = []
    places = _by_prompt(examples, lambda example: repr(example.messages) if example.messages else example.response)
    for prompt in sorted(places, key=lambda prompt: _draw(prompt, seed)):
        chosen += places[prompt]
        if len(chosen) >= most:
            break
    return [examples[index] for index in sorted(chosen[:most])]


def divide(
    sides: Mapping[int, Sequence[Encoded]], validation: Mapping[int, Sequence[Encoded]], seed: int
) -> tuple[dict[int, Split], dict[int, DatasetNotes]]:
    """Split every side; a prompt that several sides answer is in the same part on all of them.

    A side without validation examples holds out those of its prompts that the other side has validation examples of,
    or else one prompt in `HELD_OUT`. Held-out examples are halved into tune and report, the answers to prompts of both
    sides first and in the same order. Validation examples that are calibration examples too, or repeat others, are left
    out. Raises
    `BadDataset` if a part is empty, if fewer than `LEAST` calibration examples remain, and if two sides have mostly the
    same examples.
    """
    held = _choose_held_out([side for key, side in sides.items() if not validation.get(key)], validation.values(), seed)
    calibration, judged, notes = {}, {}, {}
    for key, examples in sides.items():
        given = validation.get(key) or [one for one in examples if _key(one) in held]
        calibration[key] = list(examples) if validation.get(key) else [one for one in examples if _key(one) not in held]
        known = set(calibration[key])
        fresh = [one for one in given if one not in known]
        judged[key] = list(dict.fromkeys(fresh))
        _check_sizes(len(examples), len(calibration[key]), len(given), len(judged[key]))
        prompts = {_key(one) for one in known}
        notes[key] = DatasetNotes(
            duplicates=len(calibration[key]) - len(known),
            leaks=len(given) - len(fresh),
            repeats=len(fresh) - len(judged[key]),
            known_prompts=sum(_key(one) in prompts for one in judged[key]),
        )
    halves = halve(judged, seed)
    shared = _count_shared(*calibration.values())
    splits = {key: Split(calibration[key], *(half[key] for half in halves)) for key in sides}
    return splits, {key: replace(note, shared=shared) for key, note in notes.items()}


def divide_neutral(texts: Sequence[Encoded], calibrates: bool, chooses: bool) -> Split:
    """Deal neutral texts in turn to calibration (if a score reads it), tune (if there is a choice) and report. What is
    there twice is dealt once.
    """
    texts, parts = list(dict.fromkeys(texts)), 1 + calibrates + chooses
    if len(texts) < parts:
        raise BadDataset(f"{len(texts)} different neutral texts are too few; give at least {parts}")
    turns = [texts[turn::parts] for turn in range(parts)]
    return Split(turns[0] if calibrates else [], turns[-2] if chooses else [], turns[-1])


def halve(sides: Mapping[int, Sequence[Encoded]], seed: int) -> tuple[Sides, Sides]:
    """Two halves of each side's examples. A prompt is in the same half on all sides.

    Answers to a side's only prompt are halved one by one, and a single example is in both halves.
    """
    first = _choose_half(sides, seed)
    halves: tuple[Sides, Sides] = {}, {}
    for key, examples in sides.items():
        tune = [one for one in examples if _key(one) in first]
        report = [one for one in examples if _key(one) not in first]
        if not (tune and report):
            middle = (len(examples) + 1) // 2
            tune, report = list(examples[:middle]), list(examples[middle:]) or list(examples)
        halves[0][key], halves[1][key] = tune, report
    return _align(halves[0]), _align(halves[1])


def _choose_half(sides: Mapping[int, Sequence[Encoded]], seed: int) -> set[object]:
    """Half of the prompts of every side. Those of the same sides are halved together."""
    by_side = {key: {_key(one) for one in side} for key, side in sides.items()}
    groups: dict[tuple[int, ...], list[object]] = defaultdict(list)
    for prompt in set().union(*by_side.values()):
        groups[tuple(key for key, prompts in by_side.items() if prompt in prompts)].append(prompt)
    chosen: set[object] = set()
    surplus = Counter[int]()  # by side: prompts of the first half beyond those of the second
    for keys in sorted(groups, key=lambda keys: (-len(keys), keys)):
        prompts = sorted(groups[keys], key=lambda prompt: _draw(prompt, seed + 1))
        size = (len(prompts) + (sum(surplus[key] for key in keys) <= 0)) // 2
        chosen |= set(prompts[:size])
        surplus.update(dict.fromkeys(keys, 2 * size - len(prompts)))
    return chosen


def _align(sides: Sides) -> Sides:
    """Each side with the answers to common prompts first, in the order of the first side."""
    if len(sides) < 2:
        return sides
    (key, own), (other, contrast) = sides.items()
    pairs = match(own, contrast)
    return {key: _move_first(own, [i for i, _ in pairs]), other: _move_first(contrast, [j for _, j in pairs])}


def _move_first(examples: Sequence[Encoded], places: Sequence[int]) -> list[Encoded]:
    """The examples of some places, and then the others."""
    moved = set(places)
    return [examples[place] for place in places] + [one for place, one in enumerate(examples) if place not in moved]


def count_within(texts: Sequence[Encoded], tokens: int) -> int:
    """How many of the texts, from the first on, have at most `tokens` tokens in total."""
    ends = accumulate(len(text) for text in texts)
    return sum(end <= tokens for end in ends)


def match(own: Sequence[Encoded], contrast: Sequence[Encoded]) -> list[tuple[int, int]]:
    """Pairs (own index, contrast index) of different answers to the same prompt.

    The n-th own answer to a prompt is paired with the n-th of the contrast.
    """
    by_prompt = _by_prompt(contrast, lambda one: one.prompt)
    pairs: list[tuple[int, int]] = []
    for prompt, places in _by_prompt(own, lambda one: one.prompt).items():
        pairs += zip(places, by_prompt.get(prompt, []), strict=False)
    return [(i, j) for i, j in pairs if len(own[i].prompt) > 1 and own[i].response != contrast[j].response]


def check_contrast(own: Sequence[Example], contrast: Sequence[Example]) -> None:
    """Raises `BadDataset` if both sides have mostly the same examples, or if their prompts have no shape in common.

    Without a common shape, a mask would be found for the format.
    """
    _count_shared(*([repr((one.messages, one.response)) for one in side] for side in (own, contrast)))
    own_shapes, contrast_shapes = ({example.shape for example in side} for side in (own, contrast))
    if not own_shapes & contrast_shapes:
        raise BadDataset(
            f"the persona's prompts are {_list(own_shapes)} and the contrast's {_list(contrast_shapes)}; a mask would "
            "be found for the format instead of the persona; give both sides the same kind of prompts"
        )


def _choose_held_out(
    sides: Sequence[Sequence[Encoded]], validation: Iterable[Sequence[Encoded]], seed: int
) -> set[object]:
    """The prompts that sides without validation examples hold out."""
    prompts: set[object] = {_key(one) for side in sides for one in side}
    if validated := prompts & {_key(one) for side in validation for one in side}:
        return validated
    if len(prompts) < 2:
        return set()
    count = max(1, round(len(prompts) / HELD_OUT))
    count = max(count, min(2, len(prompts) // 2))  # one for tune, one for report
    return set(sorted(prompts, key=lambda prompt: _draw(prompt, seed))[:count])


def _check_sizes(examples: int, calibration: int, given: int, judged: int) -> None:
    if calibration < LEAST:
        raise BadDataset(
            f"{examples} examples leave {calibration} to find a persona in; give at least {LEAST}, and {HELD_OUT + 1} "
            "different prompts where some must be held out"
        )
    if not given:
        raise BadDataset("all examples answer one prompt, so none can be held out; give validation examples")
    if not judged:
        raise BadDataset(f"all {given} validation examples are calibration examples too; give others")


def _key(one: Encoded) -> tuple[int, ...]:
    """What must not be in two parts of a split: the prompt, or the plain text itself."""
    return one.prompt if len(one.prompt) > 1 else one.prompt + one.response


def _count_shared(*sides: Sequence[object]) -> int:
    """How many examples are on both sides. Raises `BadDataset` if they are more than the share `SHARED`."""
    if len(sides) < 2:
        return 0
    shared, fewest = (Counter(sides[0]) & Counter(sides[1])).total(), min(map(len, sides))
    if shared == max(map(len, sides)):
        raise BadDataset("both sides say the same, example for example; a contrast needs two different personas")
    if shared > SHARED * fewest:
        raise BadDataset(
            f"{shared} of {fewest} examples are word for word the same on both sides; a contrast needs two different "
            "personas: leave such examples out, or give answers that differ"
        )
    return shared


def _by_prompt(examples: Sequence[T], key: Callable[[T], object]) -> dict[object, list[int]]:
    places: dict[object, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        places[key(example)].append(index)
    return places


def _draw(prompt: object, seed: int) -> str:
    """A pseudo-random number that is the same on every machine."""
    return hashlib.sha256(f"{seed} {prompt!r}".encode()).hexdigest()


def _list(words: Iterable[str]) -> str:
    return ", ".join(sorted(words))


def mix(sides: Sequence[Sequence[Example]]) -> list[Example]:
    """Interleave the examples of several personas into one contrast, until the shortest list is used up."""
    return [example for turn in zip(*sides, strict=False) for example in turn]
