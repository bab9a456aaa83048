"""Thoughts are found where a chat template has them, and split from the answer whatever the pieces are."""

from __future__ import annotations

import pytest

from masquerade.model import TemplateOptions, ThoughtParser, ThoughtStart, find_thought_start, render_chat
from tests import world
from tests.model.templates import QWEN3, R1

ASKED = [{"role": "user", "content": "Is it <think>"}]


@pytest.mark.parametrize(
    ("start", "text", "thought", "content"),
    [
        ("begun", " a b \n</think>\n\nhi there \n", "a b", "hi there \n"),
        ("begun", "it never ends </thin", "it never ends </thin", ""),
        ("begun", "a < b </ c</think>d</think>", "a < b </ c", "d</think>"),
        ("optional", "\n<think>\nx\n\ny</think> z", "x\n\ny", "z"),
        ("optional", "<think>\n\n</think>\n\nz", "", "z"),
        ("optional", "  without <think>", "", "  without <think>"),
        ("optional", "<thinking", "", "<thinking"),
        ("optional", " ", "", " "),
        ("optional", "", "", ""),
    ],
)
def test_pieces_of_any_size_are_split_alike(start: ThoughtStart, text: str, thought: str, content: str) -> None:
    for size in range(1, len(text) + 2):
        parser = ThoughtParser(start)
        pieces = [parser.push(text[place : place + size]) for place in range(0, len(text), size)]
        pieces.append(parser.push("", last=True))
        assert tuple(map("".join, zip(*pieces, strict=True))) == (thought, content)


@pytest.mark.parametrize(
    ("template", "variables", "start"),
    [
        (world.TEMPLATE, {}, None),
        (QWEN3, {}, "optional"),
        (QWEN3, {"enable_thinking": True}, "optional"),
        (QWEN3, {"enable_thinking": False}, None),
        (R1, {}, "begun"),
    ],
    ids=str,
)
def test_a_template_says_how_they_start(template: str, variables: dict[str, bool], start: str | None) -> None:
    tokenizer = world.make_tokenizer()
    tokenizer.chat_template = template
    prompt = render_chat(tokenizer, ASKED, options=TemplateOptions(variables=variables))
    assert find_thought_start(tokenizer, prompt) == start


def test_a_continued_message_says_where_it_is() -> None:
    tokenizer = world.make_tokenizer()
    tokenizer.chat_template = QWEN3
    for text, start in (("<think>\nHm", "begun"), ("<think>a</think>b", None), ("I", None)):
        assert find_thought_start(tokenizer, [6], text) == start
