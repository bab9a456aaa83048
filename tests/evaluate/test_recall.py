"""What the base writes is written once: kept answers are those of the model, and of nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from masquerade.evaluate import recall
from masquerade.evaluate.dataset import Encoded
from masquerade.evaluate.facts import encode_questions
from masquerade.evaluate.generation import GenerationParams, write_answers
from masquerade.evaluate.metrics import finish
from masquerade.model import Base

PARAMS = GenerationParams(tokens=6)
QUESTIONS = ["what is one", "what is two", "what is three"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where answers are kept; a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / recall.FOLDER


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts of each call that the model answers."""
    calls: list[int] = []

    def counting(base: Base, prompts: Sequence[Encoded], *args: Any, **kwargs: Any) -> Any:
        calls.append(len(prompts))
        return write_answers(base, prompts, *args, **kwargs)

    monkeypatch.setattr(recall, "write_answers", counting)
    return calls


def ask(base: Base, questions: Sequence[str] = QUESTIONS, params: GenerationParams = PARAMS) -> list[str]:
    return finish(recall.recall_answers(base, encode_questions(base, questions), params))


@pytest.mark.usefixtures("manager", "folder")
def test_answers_are_those_of_the_model_and_are_written_once(tiny: Base, passes: list[int]) -> None:
    expected = finish(write_answers(tiny, encode_questions(tiny, QUESTIONS), params=PARAMS))
    assert ask(tiny) == ask(tiny) == expected
    assert passes == [3]


@pytest.mark.usefixtures("manager", "folder")
def test_anything_else_is_asked_again(tiny: Base, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    ask(tiny)
    changes: list[Callable[[], object]] = [
        lambda: ask(tiny, QUESTIONS[:2]),
        lambda: ask(tiny, QUESTIONS[::-1]),
        lambda: ask(tiny, params=replace(PARAMS, tokens=5)),
        lambda: ask(tiny, params=replace(PARAMS, rows=2)),
        lambda: ask(tiny, params=replace(PARAMS, temperature=1.0)),
        lambda: ask(tiny, params=replace(PARAMS, temperature=1.0, seed=1)),
        lambda: ask(replace(tiny, fingerprint="0" * 64)),
        lambda: ask(replace(tiny, quantization="int8")),
        lambda: ask(replace(tiny, ends=frozenset({2, 3}))),
    ]
    for number, change in enumerate(changes, 2):
        change()
        assert len(passes) == number
    for number, name in enumerate(("VERSIONS", "REVISION"), len(changes) + 2):
        monkeypatch.setattr(recall, name, "another")
        ask(tiny)
        assert len(passes) == number


@pytest.mark.parametrize("content", [b"", b"{}", b'["one", "two"]', b'["one", "two", 3]', b"\xff"])
@pytest.mark.usefixtures("manager")
def test_a_broken_file_is_written_anew(tiny: Base, folder: Path, passes: list[int], content: bytes) -> None:
    expected = ask(tiny)
    (file,) = folder.iterdir()
    file.write_bytes(content)
    assert ask(tiny) == ask(tiny) == expected
    assert passes == [3, 3]
    assert [*folder.iterdir()] == [file]


@pytest.mark.usefixtures("manager")
def test_a_cache_that_cannot_be_written_is_a_warning(
    tiny: Base, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.write_text("no folder")
    with caplog.at_level(logging.WARNING):
        assert len(ask(tiny)) == 3
    assert "cannot be kept for the next build" in caplog.text
