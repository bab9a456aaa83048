"""A persona from a system prompt or a character card: what the base writes, and what a card holds."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from masquerade.errors import BadDataset
from masquerade.evaluate.dataset import Example, read_questions
from masquerade.model import Base, MaskManager
from masquerade.pruning.cards import read_card
from masquerade.pruning.prompts import CalibrationPrompts, GeneratedExamples, generate_examples
from masquerade.pruning.scratch import Scratch

QUESTIONS = [({"role": "user", "content": f"question {index}"},) for index in range(40)]
CARD: dict[str, Any] = {
    "spec": "chara_card_v2",
    "spec_version": "2.0",
    "data": {
        "name": "Mira",
        "description": "{{char}} is a harbour pilot who trusts {{user}}.",
        "personality": "dry, patient",
        "system_prompt": "{{original}} Write as {{Char}}.",
        "scenario": "a harbour",
        "first_mes": "Ahoy.",
        "mes_example": "<START>\r\n{{user}}: Hello, {{char}}.\n{{char}}: Mind the tide.\nAnd the rope.\n"
        "{{user}}: Will it hold?\n{{char}}: It held {{user}} before.\n<START>\n{{char}}: (looks up)\n",
        "character_book": {"entries": [{"keys": ["sea"], "content": "lore"}]},
        "extensions": {"script": "alert(1)"},
        "alternate_greetings": [],
    },
}


def finish(work: Any) -> GeneratedExamples:
    while True:
        try:
            next(work)
        except StopIteration as end:
            found: GeneratedExamples = end.value
            return found


def test_both_sides_answer_the_same_questions_and_the_prompt_is_gone(tiny: Base, manager: MaskManager) -> None:
    script = CalibrationPrompts("Be a cat.", QUESTIONS, tokens=6)
    written = finish(generate_examples(tiny, script))
    assert [example.messages for example in written.own] == [example.messages for example in written.contrast]
    assert all(message["role"] == "user" for example in written.own for message in example.messages)
    assert len(written.own) > 30
    assert any(a.response != b.response for a, b in zip(written.own, written.contrast, strict=True))
    assert written.prompt_tokens == len("Be a cat.") + 2
    assert finish(generate_examples(tiny, script)) == written
    other = finish(generate_examples(tiny, CalibrationPrompts("Be a cat.", QUESTIONS, "Be a dog.", tokens=6)))
    assert other.own == written.own
    assert other.contrast != written.contrast


def test_an_item_of_writing_is_one_pass_and_a_killed_writer_goes_on(
    tiny: Base, manager: MaskManager, tmp_path: Path
) -> None:
    questions = [({"role": "user", "content": f"question {number}"},) for number in range(80)]  # two batches
    script, passes = CalibrationPrompts("Be a cat.", questions, tokens=6), [0]
    tiny.model.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    whole = finish(generate_examples(tiny, script))
    total, passes[0] = passes[0], 0
    work = generate_examples(tiny, script, Scratch(tmp_path))
    done = 0
    for step in work:
        assert passes[0] <= 1
        done += passes[0]
        passes[0] = 0
        if step.stage == "write" and step.done > len(questions):  # the first answers of the second side
            break
    work.close()
    assert len(questions) < step.done < 2 * len(questions)
    assert finish(generate_examples(tiny, script, Scratch(tmp_path))) == whole
    assert 0 < passes[0] == total - done


def test_a_base_that_does_not_follow_the_prompt_is_said(tiny: Base, manager: MaskManager) -> None:
    with pytest.raises(BadDataset, match="answers all 40 questions alike under the prompt"):
        finish(generate_examples(tiny, CalibrationPrompts("Be a cat.", QUESTIONS, "Be a cat.", tokens=6)))


def test_questions_are_read_from_every_format(tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    lines: list[dict[str, Any]] = [
        {"prompt": "q"},
        {"prompt": "q", "completion": "a"},
        {"question": "q"},
        {"messages": [user]},
        {"messages": [user, assistant]},
        {"messages": [user, assistant, user]},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read_questions(path) == [(user,)] * 5 + [(user, assistant, user)]
    path.write_text('{"text": "t"}\n{"messages": []}')
    with pytest.raises(BadDataset, match=r"2 of 2 lines are bad.*line 1 is plain text; a question needs.*line 2"):
        read_questions(path)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(**texts: bytes) -> bytes:
    """An image with texts in it."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(chunk(b"tEXt", key.encode() + b"\0" + text) for key, text in texts.items())
        + chunk(b"IDAT", zlib.compress(b"\0\0\0\0"))
        + chunk(b"IEND", b"")
    )


def code(card: object) -> bytes:
    return base64.b64encode(json.dumps(card).encode())


@pytest.mark.parametrize(
    "content", [json.dumps(CARD).encode(), png(chara=code(CARD)), png(Chara=code({}), ccv3=code(CARD))]
)
def test_a_card_is_read_from_json_and_png(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "card").write_bytes(content)
    card = read_card(tmp_path / "card")
    assert card.name == "Mira"
    assert card.system == "Write as Mira.\nMira is a harbour pilot who trusts the user.\ndry, patient"
    hello = {"role": "user", "content": "Hello, Mira."}
    first = {"role": "assistant", "content": "Mind the tide.\nAnd the rope."}
    assert card.examples == (
        Example((hello,), first["content"]),
        Example((hello, first, {"role": "user", "content": "Will it hold?"}), "It held the user before."),
    )
    assert card.ignored == ("scenario", "first_mes", "character_book", "extensions")


def test_a_card_of_the_first_version_has_its_fields_at_the_top(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps({"name": "Bo", "personality": "glad", "description": ""}))
    assert read_card(tmp_path / "card.json").system == "glad"


GOOD = png(chara=code(CARD))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "neither a PNG nor a character card"),
        (b"\xff\xfe\x00", "neither a PNG nor a character card"),
        (b"[" * 60_000, "neither a PNG nor a character card"),
        (b"[]," * 70_000, "the text of .* has 70000 opening brackets and braces; there may be at most 65536"),
        (json.dumps({"name": "x", "description": "y" * 2**20}).encode(), "has 1048608 bytes; there may be at most"),
        (
            json.dumps({"name": "x", "description": "y", "mes_example": "{{user}}: a\n{{char}}: b\n" * 129}).encode(),
            "a dialogue in `mes_example` has 258 turns; it may have 256",
        ),
        (b"[1]", "no character card"),
        (b'{"data": {"name": 3}}', "no character card"),
        (b'{"name": "x"}', "'x' has no system prompt, description or personality"),
        (b'{"name": "x", "description": ["a"]}', "`description` of the card is a list"),
        (b'{"name": "x", "description": "\\ud83d"}', "`description` of the card has half a surrogate pair"),
        (png(), "a PNG without a character card"),
        (png(chara=b"%%%"), "is not base64"),
        (GOOD[:-20], "ends in the middle of a PNG chunk"),
        (GOOD[:100] + b"?" + GOOD[101:], "the PNG chunk at byte 33 is damaged"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff\xff\xff\xfftEXt", "ends in the middle"),
    ],
)
def test_what_is_no_card_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "card").write_bytes(content)
    with pytest.raises(BadDataset, match=words):
        read_card(tmp_path / "card")
    with pytest.raises(BadDataset, match="cannot be read"):
        read_card(tmp_path / "none")
