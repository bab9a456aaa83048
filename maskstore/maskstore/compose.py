"""A new mask from an expression over persona names, such as `a | b - c`.

As in Python: `~` binds closest, then `-`, then `&`, then `|`; parentheses group. Names may contain `-`, so the longest
known name wins: write `a - b` with spaces when a persona is called `a-b`.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from maskstore.errors import InvalidMaskValue, MaskNotFound
from maskstore.mask import Mask, derived
from maskstore.names import check_name
from maskstore.records import ANY, Anything, Revision
from maskstore.registry import Registry

LENGTH_LIMIT = 1000
DEPTH_LIMIT = 50
_WORD = re.compile(r"[a-z0-9][a-z0-9._-]*")
_PREFIX = re.compile(r"@[0-9a-f]{8,64}")
_LEVELS: tuple[tuple[str, Callable[[Mask, Mask], Mask]], ...] = (
    ("|", lambda a, b: a | b),
    ("&", lambda a, b: a & b),
    ("-", lambda a, b: a - b),
)


def compose(
    expression: str, known: Collection[str], load: Callable[[str], Mask], persona: str, force: bool = False
) -> Mask:
    """The mask an expression describes, as `persona`, with the expression and its parents as ancestry.

    `known` are the names and aliases it may use, each optionally followed by `@digest-prefix`; `load` opens one. A mask
    that prunes nothing is InvalidMaskValue, unless `force`.
    """
    tokens = tokenize(expression, known)
    loaded = {token: load(token) for token in dict.fromkeys(tokens) if token not in "|&-~()"}
    if not loaded:
        raise InvalidMaskValue(f"{expression!r:.80} names no persona")
    mask = _Parser(expression, tokens, loaded).parse()
    if not mask.pruned and not force:
        raise InvalidMaskValue(
            f"{expression!r:.80} is an empty mask: it prunes nothing, which is the base; `force` keeps it"
        )
    info = derived(expression, *loaded.values())
    return replace(mask, info=replace(info, persona=check_name(persona)), signature=None)


def compose_persona(
    registry: Registry, name: str, expression: str, expected: str | Anything | None = ANY, force: bool = False
) -> Revision:
    """Compose a mask of the registry's personas and publish it as a new revision of `name`."""
    known = [*(revision.name for revision in registry.names()), *registry.aliases()]
    mask = compose(expression, known, lambda reference: open_served(registry, reference), name, force)
    return registry.publish(name, registry.store.add(mask), expected, mask.info)


def open_served(registry: Registry, reference: str) -> Mask:
    """The mask of a persona with the name, gamma and phase at which it is served, without the signature of another."""
    revision = registry.resolve(reference)
    mask = registry.store.open(revision.digest)
    info = registry.served_info(revision, mask.info)
    return mask if info == mask.info else replace(mask, info=info, signature=None)


def tokenize(expression: str, known: Collection[str]) -> list[str]:
    """Operators, parentheses and references, in order; MaskNotFound for a word that begins with no known name."""
    if len(expression) > LENGTH_LIMIT:
        raise InvalidMaskValue(f"an expression of {len(expression)} characters, the limit is {LENGTH_LIMIT}")
    tokens, at = [], 0
    while at < len(expression):
        if expression[at] in "|&-~()":
            tokens.append(expression[at])
            at += 1
        elif expression[at].isspace():
            at += 1
        else:
            tokens.append(_reference(expression, at, known))
            at += len(tokens[-1])
    return tokens


def _reference(expression: str, at: int, known: Collection[str]) -> str:
    """The longest known name at a position, with its digest prefix."""
    word = _WORD.match(expression, at)
    if not word:
        raise InvalidMaskValue(f"{expression[at]!r} at {at} of {expression!r:.80} is no name and no operator")
    name = max((name for name in known if word[0].startswith(name)), key=len, default=None)
    if name is None:
        raise MaskNotFound(f"{word[0]!r:.80} at {at} of the expression is no persona")
    prefix = _PREFIX.match(expression, at + len(name))
    return name + (prefix[0] if prefix else "")


@dataclass
class _Parser:
    """Recursive descent over tokens, combining masks as it goes."""

    expression: str
    tokens: list[str]
    loaded: dict[str, Mask]
    at: int = 0

    def parse(self) -> Mask:
        mask = self._level(0, 0)
        if self.at < len(self.tokens):
            raise self._fault("an operator")
        return mask

    def _level(self, level: int, depth: int) -> Mask:
        if level == len(_LEVELS):
            return self._operand(depth)
        sign, operation = _LEVELS[level]
        mask = self._level(level + 1, depth)
        while self._next() == sign:
            self.at += 1
            mask = operation(mask, self._level(level + 1, depth))
        return mask

    def _operand(self, depth: int) -> Mask:
        if depth > DEPTH_LIMIT:
            raise InvalidMaskValue(f"the expression is nested deeper than {DEPTH_LIMIT}")
        token = self._next()
        self.at += 1
        if token == "~":
            return ~self._operand(depth + 1)
        if token == "(":
            mask = self._level(0, depth + 1)
            if self._next() != ")":
                raise self._fault(")")
            self.at += 1
            return mask
        if token not in self.loaded:
            self.at -= 1
            raise self._fault("a persona")
        return self.loaded[token]

    def _next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _fault(self, expected: str) -> InvalidMaskValue:
        found = self._next() or "the end"
        return InvalidMaskValue(f"{self.expression!r:.80}: expected {expected}, found {found!r}")
