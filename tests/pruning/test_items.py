"""Work items are small: what a build asks of the model's thread at once is bounded, whatever its data is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from masquerade.evaluate.dataset import BATCH_TOKENS, Example
from masquerade.model import Base, MaskManager, find_layers, find_targets
from masquerade.pruning import SCORES, Builder, PersonaExamples, Progress, Recipe, candidates
from masquerade.pruning.prompts import CalibrationPrompts, generate_examples

LONG = " ".join(["word"] * 3000)  # far beyond any context


class Recorder:
    """What was done since the last look: positions in decoder layers, texts tokenised, rankings, prunings."""

    def __init__(self, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
        self.positions = self.texts = self.rankings = self.prunings = 0
        for name, linear in find_targets(base.model).items():
            if name.endswith("q_proj"):  # a layer that is only passed by calls none
                linear.register_forward_pre_hook(self._pass)
        encode, rank, prune = base.tokenizer.encode, candidates.rank, candidates.prune
        monkeypatch.setattr(base.tokenizer, "encode", self._counting("texts", encode))
        monkeypatch.setattr(candidates, "rank", self._counting("rankings", rank))
        monkeypatch.setattr(candidates, "prune", self._counting("prunings", prune))
        self._layers = len(find_layers(base.model))

    def look(self) -> tuple[float, int, int]:
        """Positions that went through the whole model, texts, and the larger number of rankings and prunings."""
        seen = self.positions / self._layers, self.texts, max(self.rankings, self.prunings)
        self.positions = self.texts = self.rankings = self.prunings = 0
        return seen

    def _pass(self, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        self.positions += args[0].shape[0] * args[0].shape[1]

    def _counting(self, name: str, function: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            setattr(self, name, getattr(self, name) + 1)
            return function(*args, **kwargs)

        return count


def make_examples(words: str, count: int) -> list[Example]:
    """Answers of very different lengths to as many questions, some far too long."""
    user = [({"role": "user", "content": f"q{index} {LONG if index == 7 else ''}"},) for index in range(count)]
    return [
        Example(asked, f"{words} " * (1 + index % 60) + (LONG if index == 9 else ""))
        for index, asked in enumerate(user)
    ]


def follow(work: Any) -> Iterator[tuple[bool, str]]:
    """Whether each item may use the model, as the item before it announced, and its stage."""
    uses_model = False
    while True:
        try:
            step: Progress = next(work)
        except StopIteration:
            yield uses_model, "end"
            return
        yield uses_model, step.stage
        uses_model = step.model_next


@pytest.mark.usefixtures("short_builds")
@pytest.mark.parametrize("score", SCORES)
def test_an_item_is_at_most_one_pass_or_one_ranking(
    tiny: Base, manager: MaskManager, monkeypatch: pytest.MonkeyPatch, score: str
) -> None:
    check_items(tiny, manager, monkeypatch, score)


def test_an_item_is_as_small_with_all_questions_and_whole_answers(
    tiny: Base, manager: MaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_items(tiny, manager, monkeypatch, "magnitude")  # the questions are the same for each score


def check_items(base: Base, manager: MaskManager, monkeypatch: pytest.MonkeyPatch, score: str) -> None:
    own, contrast = (
        PersonaExamples("vowels", make_examples("aei", 40)),
        PersonaExamples("consonants", make_examples("bcd", 40)),
    )
    builder = Builder(base, manager, Recipe(score=score, force=True, tokens="all"), own, contrast)
    recorder = Recorder(base, monkeypatch)
    beside, on_model = 0, 0
    for uses_model, stage in follow(builder.run()):
        positions, texts, rankings = recorder.look()
        if uses_model:
            on_model += 1
            assert positions <= BATCH_TOKENS, stage
            assert rankings <= 1, stage
            assert not texts or stage in ("neutral", "certify")  # the built-in questions, which are few
        else:
            beside += texts
            assert not positions, stage
    assert on_model
    assert beside >= 150  # prompts and answers


def test_questions_are_tokenised_beside_the_model(
    tiny: Base, manager: MaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [({"role": "user", "content": f"q{index}"},) for index in range(40)]
    recorder, tokenised = Recorder(tiny, monkeypatch), 0
    for uses_model, _ in follow(generate_examples(tiny, CalibrationPrompts("Be a cat.", questions, tokens=4))):
        positions, texts, _ = recorder.look()
        assert positions <= BATCH_TOKENS if uses_model else not positions
        assert not (uses_model and texts)
        tokenised += texts
    assert tokenised >= 80
