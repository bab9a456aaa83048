"""Answers that must have a form: JSON, or JSON of a schema, alone or between fixed words.

Knows llguidance (the extra `structured`), which says token by token what may come next. Refuses to know HTTP and where
a schema comes from.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masquerade.engine.request import Grammar
from masquerade.engine.schemas import MOST_PARTS, count_parts, is_endless
from masquerade.errors import InvalidValue, UnsupportedParameter

_FREE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,16}"}  # a weak model would write spaces until it is cut
_PLAIN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as chat templates write calls
_PLACE = re.compile(
    r"^at \d+\(\d+\): (failed to compile JSON schema: )?"
)  # a place in the grammar that is written here
_EXCERPT = re.compile(r"\s*\d+ \| |<state>")  # of the grammar, below what is wrong with it
# Where JSON Schema has schemas: under names, in lists, alone; and words with which an object is said in several places.
_NAMED, _LISTS = frozenset({"properties", "$defs", "definitions"}), frozenset({"anyOf", "oneOf", "prefixItems"})
_SINGLE, _CHOICES = frozenset({"items", "additionalProperties"}), frozenset({"anyOf", "oneOf", "$ref"})
_MIXERS = frozenset(
    {"allOf", "if", "not", "dependentSchemas", "dependentRequired", "patternProperties", "unevaluatedProperties"}
)


@dataclass(frozen=True)
class JsonFormat:
    """JSON that fits a schema; between fixed words, it has no more white space than it needs.

    `param` is the request field that the schema came in.
    """

    schema: Mapping[str, Any]
    param: str = "response_format"
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class AnswerFormat:
    """What an answer may be: one of `frames` (at least one), or up to `most` of them after each other.

    With `talk` the answer is free text, in which a frame must be right only where the text begins one: at the words
    `trigger`, or, without such words, at an answer that begins with a brace. Else the answer may also be `instead`.
    """

    frames: Sequence[JsonFormat]
    most: int = 1
    between: str = ""
    instead: JsonFormat | None = None
    talk: bool = False
    trigger: str = ""


class Grammars:
    """Makes grammars for one tokenizer. Safe for several threads; the first grammar takes about a second more."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._ends = sorted(end for end in ends if end < vocabulary)
        self._prepared: Any = None
        self._lock = threading.Lock()

    def compile(self, form: AnswerFormat, count: int = 1) -> list[Grammar]:
        """The grammar of a form, for each of `count` answers.

        Raises `InvalidValue` with what is wrong with a schema, or if no finite answer fits it, and
        `UnsupportedParameter` without the extra.
        """
        frames = [*form.frames, *([form.instead] if form.instead else [])]
        for frame in frames:
            if (parts := count_parts(frame.schema)) > MOST_PARTS:
                raise _refuse(frame, f"it has {parts} values; the limit is {MOST_PARTS}")
            if is_endless(frame.schema):
                raise _refuse(frame, "no finite document meets it")
        matcher = self._match(form)
        if _explain(matcher) is None:
            return [Matched(matcher.deep_copy(), self._vocabulary) for _ in range(count)]
        reasons = ((frame, _explain(self._match(AnswerFormat([frame])))) for frame in frames)
        wrong, reason = next(((frame, reason) for frame, reason in reasons if reason), (frames[0], _explain(matcher)))
        raise _refuse(wrong, reason or "it cannot be understood")

    def _match(self, form: AnswerFormat) -> Any:
        try:
            from llguidance import LLMatcher
        except ImportError:
            param = form.frames[0].param
            raise UnsupportedParameter(
                f"`{param}` needs the package llguidance: pip install 'masquerade[structured]'", param=param
            ) from None
        try:
            return LLMatcher(self._prepare(), LLMatcher.grammar_from_lark(_write(form)), log_level=0)
        except RecursionError:
            frame = form.frames[0]
            raise _refuse(frame, "it is nested too deeply") from None

    def _prepare(self) -> Any:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._prepared is None:
                self._prepared = from_tokenizer(self._tokenizer, self._vocabulary, self._ends or None)
            return self._prepared


class Matched:
    """A grammar, and how far one answer has got in it."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    @property
    def complete(self) -> bool:
        """Whether nothing but an end may follow."""
        return bool(self._matcher.is_stopped())

    def allow(self, row: Tensor) -> None:
        """Set the logits [vocabulary] of what may not come next to minus infinity, in place: all of them if the answer
        can neither go on nor end here.
        """
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(allowed, bitorder="little", count=self._vocabulary)
        row.masked_fill_(torch.from_numpy(bits == 0).to(row.device), float("-inf"))
        if _is_stuck(self._matcher):
            row.fill_(float("-inf"))

    def accept(self, token: int) -> None:
        """Advance by a token."""
        if not self._matcher.consume_token(token):
            raise InvalidValue(f"the grammar cannot go on: {self._matcher.get_error()}")


def _is_stuck(matcher: Any) -> bool:
    """Whether nothing may follow although what is there is not all; known after a mask was computed."""
    return bool(matcher.is_stopped()) and not matcher.is_accepting()


def _explain(matcher: Any) -> str | None:
    """Why a new grammar cannot be used; None if it can."""
    if not matcher.is_error():
        trial = matcher.deep_copy()
        trial.compute_bitmask()
        return "no document meets it" if _is_stuck(trial) else None
    place, *more = (matcher.get_error() or "it cannot be understood").splitlines()
    told = [_PLACE.sub("", place)]
    for line in more:  # a fault in a pattern is told in several lines, below it a mark and the reason
        if _EXCERPT.match(line):
            break
        told.append(line.strip())
    return " ".join(line for line in told if line.strip("^ "))[:300]


def _refuse(frame: JsonFormat, reason: str) -> InvalidValue:
    return InvalidValue(f"the schema in `{frame.param}` cannot be used: {reason}", param=frame.param)


def _write(form: AnswerFormat) -> str:
    """A form in llguidance's kind of Lark. Every schema is a document of its own, so that its `$ref`s hold."""
    lazy = form.talk and form.trigger
    rules = ["%llguidance {}", *_define("other", form.instead)] if form.instead else ["%llguidance {}"]
    names = [f"frame_{number}" for number in range(len(form.frames))]
    for name, frame in zip(names, form.frames, strict=True):
        rules += _define(name, replace(frame, before=frame.before.removeprefix(form.trigger)) if lazy else frame)
    rules.append(f"frame: {' | '.join(names)}")
    if lazy:
        rules += ["start: (begin frame)* TALK", r"TALK: /(.|\n)*/", f"begin[lazy]: TALK {_quote(form.trigger)}"]
    elif form.talk:
        rules += ["start: frame | TALK", r"TALK: /\s*([^{\s](.|\n)*)?/"]
    else:
        more = f"({_quote(form.between)} frame){{0,{form.most - 1}}}" if form.most > 1 else ""
        rules.append(f"start: frame {more} {'| other' if form.instead else ''}")
    return "\n".join(rules)


def _define(name: str, frame: JsonFormat) -> list[str]:
    schema = json.dumps({**close(frame.schema), "x-guidance": _PLAIN if frame.before else _FREE})
    return [
        f"{name}: {_quote(frame.before)} {name}_json {_quote(frame.after)}",
        f"{name}_json: %json {schema}",
    ]


def close(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema, in which an object has no properties but those that are named, unless it is said which others.

    What fits it fits the original: a weak model would invent properties until it is cut. A schema whose objects are put
    together of several parts is left as it is, since a part does not know what the others allow.
    """
    try:
        return schema if _mixes(schema) else dict(_close(schema))
    except (AttributeError, TypeError):  # it is no schema, and who compiles it says why
        return schema


def _mixes(part: Any) -> bool:
    """Whether an object's properties may be said in several places."""
    if isinstance(part, list):
        return any(map(_mixes, part))
    if not isinstance(part, Mapping):
        return False
    mixed = _MIXERS & part.keys() or ("properties" in part and _CHOICES & part.keys())
    return bool(mixed) or any(map(_mixes, part.values()))


def _close(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    for word in _NAMED & schema.keys():
        closed[word] = {name: _close(one) for name, one in schema[word].items()}
    for word in _LISTS & schema.keys():
        closed[word] = [_close(one) for one in schema[word]]
    for word in _SINGLE & schema.keys():
        closed[word] = _close(schema[word])
    names = schema.get("properties", {}).keys()
    if names >= set(schema.get("required", ())) and 0 < len(names) >= schema.get("minProperties", 0):
        closed.setdefault("additionalProperties", False)
    return closed


def _quote(words: str) -> str:
    return json.dumps(words) if words else ""
