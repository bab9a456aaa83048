"""Text to token ids, where a text that cannot fit is refused before it is tokenised as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from masquerade.errors import ContextTooLong

PIECE = 2**16  # characters that are counted at a time
ORDINARY = 8  # bytes that a token of a text has at most on average, where the text is tokenised without being counted
CHARGED = 4  # times the room: what a refused text is charged at most

# Most bytes of a text that a normalizer makes one byte of, by its type; of those not named, any number. Those of
# Unicode were counted over all characters: 3.5 for NFC, 3 for NFD and for lower case, 4 for NFKD; NFKC is one after the
# other.
_SHRINKAGE = {"ByteLevel": 1, "Prepend": 1, "NFC": 4, "NFD": 4, "NFKC": 16, "NFKD": 4, "Lowercase": 3}
_KEEPERS = frozenset({"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength"})  # lose nothing of a text
_SPLITTERS = frozenset({"Split", "Punctuation"})  # lose what they split at if that is their behavior
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class Room:
    """How many tokens there is room for, and the words with which a refusal begins."""

    tokens: int
    words: str


def check_bytes(tokenizer: Any, texts: Iterable[str], room: Room, param: str) -> int:
    """Bytes of texts that together may fit. Raises `ContextTooLong` if they cannot, whatever they say.

    A token stands for so many bytes at most; more than all of the room's tokens can stand for are not tokenised.
    """
    size = sum(map(count_bytes, texts))
    longest = longest_token(tokenizer)
    if longest is not None and size > room.tokens * longest:
        least = -(-size // longest)
        raise too_long(room, f"there are {size} bytes of text, which are at least {least} tokens", param, least)
    return size


def check_tokens(tokenizer: Any, texts: Sequence[str], room: Room, param: str) -> None:
    """Raises `ContextTooLong` for texts that cannot fit, as `check_bytes` does, or are found not to fit at a cost that
    depends on the room only.

    Texts with more than `ORDINARY` bytes for each of the room's tokens are counted in pieces, until there are far too
    many tokens. What passes may be too long still, by a factor that does not grow with the texts.
    """
    if check_bytes(tokenizer, texts, room, param) <= room.tokens * ORDINARY:
        return
    tokens = 0
    for pieces, piece in enumerate(_cut(texts), 1):
        tokens += len(tokenizer.encode(piece, add_special_tokens=False))
        if tokens > 2 * room.tokens + pieces:  # what a cut adds is less than half of a piece's tokens
            raise too_long(room, f"the text has more than {tokens // 2} tokens", param, tokens)


def encode(tokenizer: Any, text: str, room: Room, param: str, *, special: bool = False) -> list[int]:
    """Token ids of a text, `special` with what the tokenizer puts before every text; raises as `check_tokens` does."""
    check_tokens(tokenizer, [text], room, param)
    return list(tokenizer.encode(text, add_special_tokens=special))


def too_long(room: Room, given: str, param: str, tokens: int) -> ContextTooLong:
    """The refusal; `tokens` is what was tried, of which no more is charged than the room `CHARGED` times."""
    return ContextTooLong(f"{room.words} However, {given}.", param=param, tokens=min(tokens, CHARGED * room.tokens))


def count_bytes(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


@lru_cache(maxsize=8)
def longest_token(tokenizer: Any) -> int | None:
    """Most bytes of a text that one token stands for; None if the tokenizer may drop parts of a text.

    Parts are dropped by normalizers and pre-tokenizers that strip, by special tokens that take the white space around
    them, and by vocabularies that know one token for all that is unknown.
    """
    plan: Mapping[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    shrinkage = _shrink(plan["normalizer"])
    bytewise = any(step["type"] == "ByteLevel" for step in _steps(plan["normalizer"], plan["pre_tokenizer"]))
    added = plan["added_tokens"]
    if (
        shrinkage is None
        or not all(map(_keeps, _steps(plan["pre_tokenizer"])))
        or any(token["lstrip"] or token["rstrip"] for token in added)
        or not _spells_all(plan["model"], bytewise)
    ):
        return None
    names = {token["content"] for token in added}
    known = (name for name in tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False) if name not in names)
    words = (len(name) if bytewise else count_bytes(name) for name in known)  # of byte-wise ones a letter is a byte
    return shrinkage * max([1, *words, *map(count_bytes, names)])


def _steps(*parts: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Normalizers or pre-tokenizers, those of a sequence one by one."""
    for part in parts:
        if part is not None and part["type"] == "Sequence":
            yield from _steps(*(part.get("normalizers") or part.get("pretokenizers") or ()))
        elif part is not None:
            yield part


def _shrink(normalizer: Mapping[str, Any] | None) -> int | None:
    shrinkage = 1
    for step in _steps(normalizer):
        found = _SHRINKAGE.get(step["type"])
        if step["type"] == "Replace" and "String" in step["pattern"]:
            found = 1 if count_bytes(step["content"]) >= count_bytes(step["pattern"]["String"]) else None
        if found is None:
            return None
        shrinkage *= found
    return shrinkage


def _keeps(step: Mapping[str, Any]) -> bool:
    return step["type"] in _KEEPERS or (step["type"] in _SPLITTERS and step["behavior"] != "Removed")


def _spells_all(model: Mapping[str, Any], bytewise: bool) -> bool:
    """Whether every byte of a text becomes a token, or a part of one."""
    if model["type"] not in ("BPE", "Unigram"):
        return False
    vocabulary = model["vocab"]
    names = set(vocabulary) if isinstance(vocabulary, Mapping) else {name for name, _ in vocabulary}
    if model.get("byte_fallback"):
        return names.issuperset(_BYTES)
    return bytewise and sum(len(name) == 1 for name in names) >= len(_BYTES)


def _cut(texts: Sequence[str]) -> Iterator[str]:
    """Pieces of texts, a long one in several, short ones together."""
    gathered: list[str] = []
    length = 0
    for text in texts:
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            gathered.append(piece)
            length += len(piece)
            if length >= PIECE:
                yield "\n".join(gathered)
                gathered, length = [], 0
    if gathered:
        yield "\n".join(gathered)
