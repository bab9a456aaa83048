"""Untrusted JSON, with limits on depth and size; rejects duplicate keys and NaN."""

import json
import re
from typing import Any

from maskstore.errors import HeaderCorrupt

DEPTH_LIMIT = 16
TOKEN_LIMIT = 200_000
_TOKENS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)  # linear, also for a string that never ends


def parse(text: str, what: str) -> Any:
    """The value of a JSON text; HeaderCorrupt beyond depth 16 or 200,000 tokens, for a repeated key or NaN."""
    _bound(text, what)
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except HeaderCorrupt as error:
        raise HeaderCorrupt(f"{what}: {error.message}") from None
    except (ValueError, RecursionError) as error:
        raise HeaderCorrupt(f"{what} is not JSON: {error}") from None


def dump(value: Any) -> str:
    """The canonical text of a value: sorted keys, no spaces, ASCII; ValueError for NaN, TypeError for other types."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _bound(text: str, what: str) -> None:
    """Bound the work and the memory of the parser before it starts."""
    tokens = sum(map(text.count, ",[{"))
    if tokens > TOKEN_LIMIT:
        raise HeaderCorrupt(f"{what} has {tokens} JSON tokens, the limit is {TOKEN_LIMIT}")
    depth = 0
    for match in _TOKENS.finditer(text):
        depth += _STEP.get(match[0], 0)
        if depth > DEPTH_LIMIT:
            raise HeaderCorrupt(f"{what} is nested deeper than {DEPTH_LIMIT}")


_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise HeaderCorrupt(f"key {key!r:.80} appears twice")
        found[key] = value
    return found


def _refuse(constant: str) -> None:
    raise HeaderCorrupt(f"{constant} is not a JSON number")
