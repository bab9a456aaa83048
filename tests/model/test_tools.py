"""Calls are found in answers, wherever the text is cut while it grows."""

from __future__ import annotations

import random

import pytest

from masquerade.model import ArgumentsDelta, CallStart, ToolCallParser, find_dialect
from masquerade.model.tools import GENERIC, HERMES, LLAMA, Dialect
from tests import world
from tests.model import templates

NAMES = ("f", "g")
TURNED = '<tool_call>{"arguments": {"a": "?"}, "name": "f"}</tool_call>'
DEEP = '<tool_call>{"x":' + "[" * 1100 + "]" * 1100 + "}</tool_call>"
ONE = '<tool_call>\n{"name": "f", "arguments": {"a": "}\\"{"}}\n</tool_call>'
TWO = ONE.replace('"f"', '"g"')
BARE = '{"name": "f", "parameters": {"a": 1}}'
F, G = ("f", '{"a": "}\\"{"}'), ("g", '{"a": "}\\"{"}')


def read(
    dialect: Dialect, pieces: list[str], max_calls: int = 8, *, triggered: bool = False
) -> list[str | tuple[str, str]]:
    """Content, and each call with its arguments."""
    parser = ToolCallParser(dialect, NAMES, max_calls)
    parts = [
        part for place, piece in enumerate(pieces) for part in parser.push(piece, triggered=triggered and not place)
    ]
    found: list[str | tuple[str, str]] = []
    for part in [*parts, *parser.flush()]:
        last = found[-1] if found else None
        match part:
            case CallStart(name):
                found.append((name, ""))
            case ArgumentsDelta(text):
                assert isinstance(last, tuple)
                found[-1] = (last[0], last[1] + text)
            case _:
                assert part
                found[-1:] = [last + part] if isinstance(last, str) else [*([last] if last else []), part]
    return found


@pytest.mark.parametrize(
    ("dialect", "text", "found"),
    [
        (HERMES, "", []),
        (HERMES, "Hello.\n", ["Hello.\n"]),
        (HERMES, "a < b, <tool", ["a < b, <tool"]),
        (HERMES, ONE, [F]),
        (HERMES, f"Let me see.\n{ONE}\n{TWO}\n", ["Let me see.", F, G]),
        (HERMES, f"{ONE}{TWO} Done.", [F, G, " Done."]),
        (HERMES, ONE.replace("\n", ""), [F]),
        (HERMES, ONE.replace('"f"', '"unknown"'), [ONE.replace('"f"', '"unknown"')]),
        (HERMES, '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call> Done.', [("f", '{"x": 1}'), " Done."]),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', [("f", '{"x": 1}')]),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', [("f", "{}")]),
        (HERMES, '<tool_call>{"name": 7}</tool_call>', ['<tool_call>{"name": 7}</tool_call>']),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1', [("f", '{"a": 1')]),
        (HERMES, '<tool_call>{"name": "f"', ['<tool_call>{"name": "f"']),
        (HERMES, "<tool_call> What?", ["<tool_call> What?"]),
        (HERMES, TURNED.replace("?", "\\ud83d"), [("f", '{"a": "\\ud83d"}')]),
        (HERMES, TURNED.replace("?", "\\ud83d\\ude00"), [("f", '{"a": "\U0001f600"}')]),
        (HERMES, DEEP, [DEEP]),
        (LLAMA, BARE, [("f", '{"a": 1}')]),
        (LLAMA, f"\n{BARE}; {BARE}", [("f", '{"a": 1}'), ("f", '{"a": 1}')]),
        (LLAMA, f"<|python_tag|>{BARE}", [("f", '{"a": 1}')]),
        (LLAMA, '{"type": "function", "name": "g", "parameters": {}}', [("g", "{}")]),
        (LLAMA, BARE.replace('"f"', '"unknown"'), [BARE.replace('"f"', '"unknown"')]),
        (LLAMA, '{"a": 1} is JSON.', ['{"a": 1} is JSON.']),
        (LLAMA, f"Say {BARE}", [f"Say {BARE}"]),
        (GENERIC, ONE, [F]),
    ],
)
def test_calls_are_separated_from_content(dialect: Dialect, text: str, found: list[str | tuple[str, str]]) -> None:
    assert read(dialect, [text]) == found
    for seed in range(40):
        chance, pieces, rest = random.Random(seed), [], text
        while rest:
            size = chance.choice([1, 1, 2, 3, 5, 8, 20])
            pieces.append(rest[:size])
            rest = rest[size:]
        assert read(dialect, pieces) == found, pieces


def test_no_more_calls_are_read_than_may_be_made() -> None:
    assert read(HERMES, [f"{ONE}\n{TWO} Done."], max_calls=1) == [F]


def test_a_special_token_announces_a_call_without_its_text() -> None:
    assert read(LLAMA, [BARE], triggered=True) == [("f", '{"a": 1}')]
    assert read(HERMES, ['{"name": "f", "arguments": {"a": 1}}'], triggered=True) == [("f", '{"a": 1}')]


@pytest.mark.parametrize("dialect", [HERMES, LLAMA, GENERIC], ids=lambda dialect: str(dialect.name))
def test_the_parser_reads_what_its_dialect_writes(dialect: Dialect) -> None:
    before, after = dialect.frame("g")
    assert read(dialect, [f'{before}{{"x": [1, 2]}}{after}']) == [("g", '{"x": [1, 2]}')]


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        (templates.HERMES, HERMES),
        (templates.LLAMA, LLAMA),
        (templates.XML_CALLS, GENERIC),
        (templates.UNREADABLE, GENERIC),
        (world.TEMPLATE, GENERIC),
        (None, GENERIC),
        ({"default": world.TEMPLATE, "tool_use": templates.HERMES}, HERMES),
    ],
    ids=["hermes", "llama", "xml calls", "unreadable", "no tools", "none", "named"],
)
def test_the_template_determines_the_dialect(template: object, dialect: Dialect) -> None:
    tokenizer = world.make_tokenizer()
    tokenizer.chat_template = template
    assert find_dialect(tokenizer) == dialect
