"""The calibration text of SmolLM2's personas: repeatable, paired, and without shared held-out sentences."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from masquerade import smollm2
from masquerade.smollm2 import calibration


def read(name: str) -> list[tuple[str, str]]:
    """The prompts and answers of a file."""
    lines = (smollm2.DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(prompt["content"], answer["content"]) for prompt, answer in (json.loads(one)["messages"] for one in lines)]


def test_the_generator_writes_the_files_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["calibration", str(tmp_path)])
    calibration.main()
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert written == {file.name: file.read_bytes() for file in smollm2.DATA.iterdir()}
    assert written


def test_both_sides_answer_the_same_prompts_in_different_words() -> None:
    for persona, opposite in calibration.read_pairs().items():
        for split, count in calibration.LINES.items():
            own, other = read(f"{persona}.{split}"), read(f"{opposite}.{split}")
            assert len(own) == len(other) == count
            assert [prompt for prompt, _ in own] == [prompt for prompt, _ in other]
            assert all(ours != theirs for (_, ours), (_, theirs) in zip(own, other, strict=True))


def test_held_out_answers_are_to_other_prompts() -> None:
    for pair in calibration.read_pairs().items():
        for persona in pair:
            assert not {prompt for prompt, _ in read(f"{persona}.train")} & {p for p, _ in read(f"{persona}.heldout")}


def test_held_out_answers_have_no_sentence_of_the_others() -> None:
    for pair in calibration.read_pairs().items():
        for persona in pair:
            own, held_out = (calibration.read_voice(persona, split) for split in ("train", "heldout"))
            assert own.keys() == held_out.keys()
            assert all(own[kind] and held_out[kind] and not {*own[kind]} & {*held_out[kind]} for kind in own)


def test_every_slot_is_filled() -> None:
    for file in smollm2.DATA.iterdir():
        assert not re.search(r"[{}]", "".join(prompt + answer for prompt, answer in read(file.stem)))
