"""Builds that are short enough for tests which need a whole one."""

from __future__ import annotations

from functools import partial

import pytest

from masquerade.evaluate import facts
from masquerade.evaluate.facts import Fact, Part
from masquerade.pruning import certificate, neutral, recipe, strength
from masquerade.pruning.search import SearchSettings

FACTS = facts.ROWS + 4  # a full batch of questions and a smaller one


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches of 6 steps instead of 24, of which the scratch keeps two, and three are judged."""
    few = partial(SearchSettings, steps=6, judged_from=2, judged_every=2)
    monkeypatch.setattr(recipe, "SearchSettings", few)


@pytest.fixture
def short_builds(few_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of the same kinds of work items, but fewer: a short search, and short answers to few questions."""
    monkeypatch.setattr(certificate, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(strength, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(certificate, "CURVE", (0.5, 0.0))
    for module in (certificate, neutral):
        monkeypatch.setattr(module, "read_facts", _read_few)


def _read_few(part: Part) -> list[Fact]:
    return facts.read_facts(part)[:FACTS]
