"""Reads character cards of the V2 and V3 specifications, as JSON or inside a PNG.

Only fields that describe how the character talks are used. Lore books, scripts and extensions are ignored and listed.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masquerade.errors import BadDataset
from masquerade.evaluate.dataset import Example, check_json, check_unicode

LIMIT = 32 * 2**20  # most bytes of a card, including its picture
TURNS = 256  # most turns of an example dialogue; every answer becomes an example with all turns before it
_MAGIC = b"\x89PNG\r\n\x1a\n"
_IGNORED = (
    *("scenario", "first_mes", "alternate_greetings", "group_only_greetings", "post_history_instructions"),
    *("character_book", "extensions", "assets"),
)
_SPEAKER = re.compile(r"^(\{\{user\}\}|\{\{char\}\}|<USER>|<BOT>):[ \t]*", re.MULTILINE | re.IGNORECASE)
_PLACE = re.compile(r"\{\{(?:char|user|original)\}\}|<BOT>|<USER>", re.IGNORECASE)
_START = re.compile(r"<START>", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """A character: its system prompt, examples of how it talks, and the card's fields that were ignored."""

    name: str
    system: str
    examples: tuple[Example, ...]
    ignored: tuple[str, ...]


def read_card(path: Path) -> Card:
    """Read a card. Raises `BadDataset` with the file if it is not one."""
    try:
        if path.stat().st_size > LIMIT:
            raise BadDataset(f"{path} has {path.stat().st_size} bytes; a card has at most {LIMIT}")
        content = path.read_bytes()
    except OSError as error:
        raise BadDataset(f"{path} cannot be read: {error.strerror}") from error
    text = _find_in_png(path, content) if content.startswith(_MAGIC) else content
    check_json(text, len(text), f"the text of {path}")
    try:
        card = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadDataset(f"{path} is neither a PNG nor a character card in JSON: {error}") from error
    fields = card.get("data", card) if isinstance(card, dict) else None
    if not isinstance(fields, dict) or not isinstance(fields.get("name"), str) or not fields["name"].strip():
        raise BadDataset(f"{path} is no character card: it has no `name` (of the V2 or V3 specification)")
    return _parse(path, fields)


def _parse(path: Path, fields: dict[str, Any]) -> Card:
    name = fields["name"].strip()
    check_unicode(name, f"{path}: `name` of the card")

    def text(key: str) -> str:
        value = fields.get(key) or ""
        if not isinstance(value, str):
            raise BadDataset(f"{path}: `{key}` of the card is a {type(value).__name__}; it must be text")
        check_unicode(value, f"{path}: `{key}` of the card")
        return value

    parts = [_fill(text(key), name).strip() for key in ("system_prompt", "description", "personality")]
    system = "\n".join(part for part in parts if part)
    if not system:
        raise BadDataset(f"{path}: the card of {name!r} has no system prompt, description or personality")
    examples = tuple(_example_turns(path, text("mes_example").replace("\r\n", "\n"), name))
    ignored = tuple(key for key in _IGNORED if fields.get(key))
    return Card(name, system, examples, ignored)


def _example_turns(path: Path, dialogues: str, name: str) -> Iterator[Example]:
    """Every answer of the character to the user, with all earlier turns of that dialogue."""
    for dialogue in _START.split(dialogues):
        parts = _SPEAKER.split(dialogue)
        if (turns := len(parts) // 2) > TURNS:
            raise BadDataset(f"{path}: a dialogue in `mes_example` has {turns} turns; it may have {TURNS}")
        messages: list[dict[str, str]] = []
        for speaker, text in zip(parts[1::2], parts[2::2], strict=True):
            words = _fill(text.strip(), name)
            role = "assistant" if "char" in speaker.lower() or "bot" in speaker.lower() else "user"
            if role == "assistant" and messages and messages[-1]["role"] == "user" and words:
                yield Example(tuple(messages), words)
            if words:
                messages = [*messages, {"role": role, "content": words}]


def _fill(text: str, name: str) -> str:
    """Replace the specification's placeholders; `{{original}}` becomes empty, as there is no other prompt."""
    words = {"{{char}}": name, "<bot>": name, "{{user}}": "the user", "<user>": "the user", "{{original}}": ""}
    return _PLACE.sub(lambda mark: words[mark[0].lower()], text)


def _find_in_png(path: Path, content: bytes) -> bytes:
    """The card in a `tEXt` chunk: `ccv3` if there is one, else `chara`, base64 of JSON."""
    found: dict[bytes, bytes] = {}
    for kind, data in _chunks(path, content):
        if kind == b"tEXt":
            key, _, value = data.partition(b"\0")
            found.setdefault(key.lower(), value)
    coded = found.get(b"ccv3", found.get(b"chara"))
    if coded is None:
        raise BadDataset(f"{path} is a PNG without a character card (no `ccv3` or `chara` text)")
    try:
        return base64.b64decode(coded, validate=True)
    except binascii.Error as error:
        raise BadDataset(f"{path}: the card in the PNG is not base64: {error}") from error


def _chunks(path: Path, content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(_MAGIC)
    while at < len(content):
        if at + 12 > len(content):
            raise BadDataset(f"{path} ends in the middle of a PNG chunk, at byte {len(content)}")
        (length,) = struct.unpack_from(">I", content, at)
        kind, data = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        if len(data) < length or at + 12 + length > len(content):
            raise BadDataset(f"{path} ends in the middle of a PNG chunk, at byte {len(content)}")
        if zlib.crc32(kind + data) != struct.unpack_from(">I", content, at + 8 + length)[0]:
            raise BadDataset(f"{path}: the PNG chunk at byte {at} is damaged")
        if kind == b"IEND":  # the end of the picture; some programs append to it
            return
        yield kind, data
        at += 12 + length
