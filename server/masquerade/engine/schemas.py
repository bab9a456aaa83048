"""Whether a JSON schema has any document that meets it, as far as its structure tells."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

_TYPES = ("null", "boolean", "object", "array", "number", "string")


MOST_PARTS = 8192  # values in a schema


def count_parts(schema: Any) -> int:
    """Values in a schema, itself included."""
    return sum(1 for _ in _walk(schema))


def is_endless(schema: Any) -> bool:
    """Whether no finite document meets a schema: whatever it asks for asks for more of the same, or for nothing.

    Every part is taken to be impossible until a document is found for it; what is found only through itself is never
    found. Only what must hold is looked at, so a schema of which this is true is impossible; of others the compiler may
    say so. The time grows with the square of the parts at worst.
    """
    waiting = deque(_collect(schema))
    possible: set[int] = set()
    asking: dict[int, list[Mapping[str, Any]]] = {}  # parts that could not be decided yet, by what they wait for
    known: dict[str, Any] = {}

    while waiting:
        part = waiting.popleft()

        def holds(other: Any, part: Mapping[str, Any] = part) -> bool:
            if isinstance(other, str):  # a reference
                if other not in known:
                    known[other] = _resolve(schema, other)
                other = known[other]
            if not isinstance(other, Mapping):
                return other is not False
            if id(other) not in possible:
                asking.setdefault(id(other), []).append(part)
            return id(other) in possible

        if id(part) not in possible and _may_hold(part, holds):
            possible.add(id(part))
            waiting += asking.pop(id(part), ())
    return isinstance(schema, Mapping) and id(schema) not in possible


def _may_hold(node: Mapping[str, Any], holds: Callable[[Any], bool]) -> bool:
    """Whether there may be a document for a part, as far as is known of other parts and references."""
    reference = node.get("$ref")
    return (
        (not isinstance(reference, str) or holds(reference))
        and all(map(holds, _list(node, "allOf")))
        and all(any(map(holds, _list(node, word))) for word in ("anyOf", "oneOf") if _list(node, word))
        and any(_has(node, kind, holds) for kind in _types(node))
    )


def _has(node: Mapping[str, Any], kind: str, holds: Callable[[Any], bool]) -> bool:
    """Whether there may be a document of one type."""
    if kind == "object":
        properties = node.get("properties")
        required = [name for name in _list(node, "required") if isinstance(name, str)]
        return not isinstance(properties, Mapping) or all(
            holds(properties[name]) for name in required if name in properties
        )
    if kind == "array":
        first = _list(node, "prefixItems")
        least = node.get("minItems")
        least = least if isinstance(least, int) else 0
        return all(map(holds, first[:least])) and (least <= len(first) or holds(node.get("items", True)))
    return True


def _types(node: Mapping[str, Any]) -> Iterable[str]:
    """The types that a document may have; what is no type is left to the compiler."""
    declared = node.get("type", _TYPES)
    return [declared] if isinstance(declared, str) else declared if isinstance(declared, list | tuple) else _TYPES


def _list(node: Mapping[str, Any], word: str) -> list[Any]:
    value = node.get(word)
    return value if isinstance(value, list) else []


def _collect(schema: Any) -> list[Mapping[str, Any]]:
    """All objects in a document, the inner ones first."""
    return [part for part in _walk(schema) if isinstance(part, Mapping)][::-1]


def _walk(schema: Any) -> Iterator[Any]:
    """All values in a document, the outer ones first."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        yield part
        if isinstance(part, Mapping):
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _resolve(schema: Any, reference: str) -> Any:
    """What a reference within the document means; True, which everything meets, if that is not known here."""
    if not reference.startswith("#") or (reference != "#" and not reference.startswith("#/")):
        return True
    part = schema
    for step in reference.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(part, Mapping) and name in part:
            part = part[name]
        elif isinstance(part, list) and name.isdecimal() and int(name) < len(part):
            part = part[int(name)]
        else:
            return True
    return part
