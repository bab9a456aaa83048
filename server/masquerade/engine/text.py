"""From tokens to text, as an answer grows.

Knows tokenizers and stop strings. Refuses to know about requests and scheduling.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how sentencepiece writes a byte of a character it has no piece for


class Detokenizer:
    """Text of a growing answer, given out as soon as it can no longer change.

    A token may end inside a multi-byte character, and some tokenizers join words differently at the start of a text;
    so a window from a little before the last safe point is decoded again, and only what is new is given out. While the
    window ends in a replacement character, or in a byte of sentencepiece, the next token may still change its end.
    """

    def __init__(self, tokenizer: Any) -> None:
        # Around it, transformers' own `decode` takes five times as long.
        self._backend = tokenizer.backend_tokenizer
        self._ids: list[int] = []  # the window
        self._whole = 0  # ids of the window that were all given out before the last piece
        self._given = 0  # characters given out of the window's text

    def push(self, token: int) -> str:
        """Add a token; returns the text that became certain, perhaps none."""
        self._ids.append(token)
        if _BYTE.fullmatch(self._backend.id_to_token(token) or ""):
            return ""
        text: str = self._backend.decode(self._ids)
        if text.endswith(UNKNOWN):
            return ""
        piece = text[self._given :]
        if piece:  # an empty one may be a special token, which is no context for what follows
            del self._ids[: self._whole]
            self._whole = len(self._ids)
            self._given = len(self._backend.decode(self._ids))
        return piece

    def flush(self) -> str:
        """The rest, with replacement characters for what is unfinished."""
        text: str = self._backend.decode(self._ids)
        piece, self._given = text[self._given :], len(text)
        return piece


class AnswerText:
    """An answer's text, cut before the first stop string. Nothing that may begin one is given out."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def push(self, token: int, *, stoppable: bool = True) -> str:
        """Add a token; returns the text that is certain to be part of the answer. Stops count only if `stoppable`."""
        return self._sift(self._detokenizer.push(token), stoppable)

    def flush(self) -> str:
        """The rest of an answer that ended for another reason, or none if it was stopped."""
        if self.stopped:
            return ""
        rest = self._sift(self._detokenizer.flush(), True)
        held, self._held = self._held, ""
        return rest + held

    def _sift(self, piece: str, stoppable: bool) -> str:
        if not self._stops:
            return piece
        text = self._held + piece
        if stoppable:
            # What is held back holds no stop that counts, but perhaps one from when none counted.
            starts = [(stop, max(0, len(self._held) + 1 - len(stop))) for stop in self._stops]
            found = [(at + len(stop), at) for stop, start in starts if (at := text.find(stop, start)) >= 0]
            if found:
                self.stopped, self._held = True, ""
                return text[: min(found)[1]]
        self._held = text[len(text) - max(_overlap(text, stop) for stop in self._stops) :]
        return text[: len(text) - len(self._held)]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop` without being all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)


def spell(tokenizer: Any, token: int) -> bytes:
    """The bytes that a token stands for; of a special token those of its name."""
    name = str(tokenizer.convert_ids_to_tokens(token) or "")
    if match := _BYTE.fullmatch(name):
        return bytes([int(match[1], 16)])
    if token in tokenizer.all_special_ids:
        return name.encode()
    alphabet = _alphabet()
    if _is_bytewise(tokenizer) and all(character in alphabet for character in name):
        return bytes(alphabet[character] for character in name)
    return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _is_bytewise(tokenizer: Any) -> bool:
    return "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)


@cache
def _alphabet() -> dict[str, int]:
    """The printable character by which byte-level tokenizers write each byte (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
