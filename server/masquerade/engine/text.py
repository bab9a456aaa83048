"""The text of a growing answer: incremental detokenization and stop strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # the byte fallback of sentencepiece


class Detokenizer:
    """Decodes tokens incrementally and returns text as soon as later tokens cannot change it.

    A token may end inside a multi-byte character, and some tokenizers join words differently at the start of a text.
    Each call therefore decodes a window that starts one piece before the new text, and returns what is new. While the
    window ends in a replacement character or in a byte-fallback token, the next token may still change its end.
    """

    # Not `tokenizers.DecodeStream`: it raises if a byte-fallback token invalidates a run whose text it has returned.

    def __init__(self, tokenizer: Any, *, skips_special: bool = True) -> None:
        """`skips_special` leaves out special tokens."""
        # transformers' `decode` is a wrapper around this one that takes five times as long.
        self._backend = tokenizer.backend_tokenizer
        self._skips_special = skips_special
        self._ids: list[int] = []  # the window
        self._context = 0  # ids of the window whose text was returned before the last piece
        self._returned = 0  # characters of the window's text that were returned

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes, which may be empty."""
        self._ids.append(token)
        if _BYTE.fullmatch(self._backend.id_to_token(token) or ""):
            return ""
        text = self._decode()
        if text.endswith(REPLACEMENT):
            return ""
        piece = text[self._returned :]
        if piece:  # the token of an empty piece may be a special one, which is no context for what follows
            del self._ids[: self._context]
            self._context = len(self._ids)
            self._returned = len(self._decode())
        return piece

    def peek(self) -> str:
        """The remaining text if no token followed; empty in the middle of a character."""
        text = self._decode()
        return "" if text.endswith(REPLACEMENT) else text[self._returned :]

    def flush(self) -> str:
        """The remaining text, with replacement characters for incomplete ones."""
        text = self._decode()
        piece, self._returned = text[self._returned :], len(text)
        return piece

    def _decode(self) -> str:
        """The window's text."""
        text: str = self._backend.decode(self._ids, skip_special_tokens=self._skips_special)
        return text


class AnswerText:
    """An answer's text, cut before the first stop string, or after it if that `includes_stop`. Text that may be the
    start of one is withheld.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str] = (),
        *,
        includes_stop: bool = False,
        skips_special: bool = True,
    ) -> None:
        self.includes_stop = includes_stop
        self._detokenizer = Detokenizer(tokenizer, skips_special=skips_special)
        self._stops = [stop for stop in stops if stop]
        self._withheld = ""
        self._passed = 0  # characters after it, still without a piece, that were complete when no stop counted
        self.stop: str | None = None  # the one that ended the answer

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the answer."""
        return self.stop is not None

    def push(self, token: int, *, stoppable: bool = True) -> str:
        """Add a token; returns the text that is certain to be part of the answer. Stop strings that are complete by now
        count only if `stoppable`.
        """
        piece = self._detokenizer.push(token)
        if not piece and self._stops:
            pending = self._detokenizer.peek()
            if not stoppable:
                self._passed = len(pending)
            elif self._search(pending):  # later tokens could change it, but the answer ends here
                piece = self._detokenizer.flush()
        return self._find_stop(piece, stoppable)

    def flush(self) -> str:
        """The withheld text of an answer that ended otherwise; empty if a stop string ended it."""
        if self.stopped:
            return ""
        rest = self._find_stop(self._detokenizer.flush(), True)
        withheld, self._withheld = self._withheld, ""
        return rest + withheld

    def _find_stop(self, piece: str, stoppable: bool) -> str:
        if not self._stops:
            return piece
        text = self._withheld + piece
        if stoppable and (found := self._search(piece)):
            end, start, self.stop = found
            self._withheld = ""
            return text[: end if self.includes_stop else start]
        if piece:
            self._passed = 0
        self._withheld = text[len(text) - max(_overlap(text, stop) for stop in self._stops) :]
        return text[: len(text) - len(self._withheld)]

    def _search(self, piece: str) -> tuple[int, int, str] | None:
        """The end, the start and the stop string of the first one that counts, in the withheld text and the piece."""
        text = self._withheld + piece
        # the text so far has no stop that counts, but perhaps one that was complete when none counted
        known = len(self._withheld) + self._passed
        starts = [(stop, max(0, known + 1 - len(stop))) for stop in self._stops]
        found = [(at + len(stop), at, stop) for stop, start in starts if (at := text.find(stop, start)) >= 0]
        return min(found, default=None)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes of a token's text; for a special token, of its name."""
    name = str(tokenizer.convert_ids_to_tokens(token) or "")
    if match := _BYTE.fullmatch(name):
        return bytes([int(match[1], 16)])
    if token in tokenizer.all_special_ids:
        return name.encode()
    alphabet = _alphabet()
    byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
    if byte_level and all(character in alphabet for character in name):
        return bytes(alphabet[character] for character in name)
    return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


@cache
def _alphabet() -> dict[str, int]:
    """The byte of each printable character of byte-level tokenizers (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
