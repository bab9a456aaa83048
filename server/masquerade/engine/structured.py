"""Structured output: grammars for answers that are JSON, or contain JSON of a schema, by llguidance."""

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
from masquerade.model import THOUGHTS_BEGIN, THOUGHTS_END, ThoughtStart

# White space is bounded, since a weak model would write spaces up to its token limit; in calls it is that of templates.
_FLEXIBLE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,16}"}
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# By how thoughts start: what thoughts begin with in each alternative; None is an alternative without thoughts.
_OPENINGS: dict[ThoughtStart | None, list[str | None]] = {
    None: [None],
    "begun": [""],
    "optional": [None, THOUGHTS_BEGIN],
}
_LOCATION = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")  # in the grammar, which no client sees
_EXCERPT = re.compile(r"\s*\d+ \| |<state>")  # of the grammar, below what is wrong with it
# Keywords of JSON Schema whose value is a map of schemas, a list of them, or one; and those that compose schemas.
_MAPS, _LISTS = frozenset({"properties", "$defs", "definitions"}), frozenset({"anyOf", "oneOf", "prefixItems"})
_SINGLE, _CHOICES = frozenset({"items", "additionalProperties"}), frozenset({"anyOf", "oneOf", "$ref"})
_COMPOSERS = frozenset(
    {"allOf", "if", "not", "dependentSchemas", "dependentRequired", "patternProperties", "unevaluatedProperties"}
)


@dataclass(frozen=True)
class JsonFormat:
    """JSON of a schema between a fixed prefix and suffix. With a prefix, the JSON has no extra white space.

    `param` is the request field of the schema, for error messages.
    """

    schema: Mapping[str, Any]
    param: str = "response_format"
    prefix: str = ""
    suffix: str = ""


@dataclass(frozen=True)
class AnswerFormat:
    """The form of an answer: one of `choices`, or up to `max_count` of them with `separator` between, or `alternative`.

    With `free_text` the answer is free text that may contain choices: each begins with `trigger`, and must be complete
    once that is there. Without a trigger, an answer that begins with a brace must be a choice as a whole.
    """

    choices: Sequence[JsonFormat]  # at least one
    max_count: int = 1
    separator: str = ""
    alternative: JsonFormat | None = None
    free_text: bool = False
    trigger: str = ""


class Grammars:
    """Compiles grammars for one tokenizer. Thread-safe. The first call takes about a second more."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._ends = sorted(end for end in ends if end < vocabulary)
        self._prepared: Any = None
        self._lock = threading.Lock()

    def compile(self, answer: AnswerFormat, count: int = 1, thoughts: ThoughtStart | None = None) -> list[Grammar]:
        """The grammars of `count` answers of this form, after thoughts if the model has any.

        Raises `InvalidValue` if a schema cannot be compiled or if no finite document meets it, and
        `UnsupportedParameter` if llguidance is not installed.
        """
        formats = [*answer.choices, *([answer.alternative] if answer.alternative else [])]
        for one in formats:
            if (parts := count_parts(one.schema)) > MOST_PARTS:
                raise _refuse(one, f"it has {parts} values; the limit is {MOST_PARTS}")
            if is_endless(one.schema):
                raise _refuse(one, "no finite document meets it")
        matchers = [self._match(answer, opening) for opening in _OPENINGS[thoughts]]
        matcher = matchers[0]
        if _explain(matcher) is None:
            copies = ([matcher.deep_copy() for matcher in matchers] for _ in range(count))
            return [MatcherGrammar(own, self._vocabulary) for own in copies]
        reasons = ((one, _explain(self._match(AnswerFormat([one])))) for one in formats)
        wrong, reason = next(((one, reason) for one, reason in reasons if reason), (formats[0], _explain(matcher)))
        raise _refuse(wrong, reason or "it cannot be compiled")

    def _match(self, answer: AnswerFormat, opening: str | None = None) -> Any:
        try:
            from llguidance import LLMatcher
        except ImportError:
            param = answer.choices[0].param
            raise UnsupportedParameter(
                f"`{param}` needs the package llguidance: pip install 'masquerade[structured]'", param=param
            ) from None
        try:
            return LLMatcher(self._prepare(), LLMatcher.grammar_from_lark(_write_lark(answer, opening)), log_level=0)
        except RecursionError:
            raise _refuse(answer.choices[0], "it is nested too deeply") from None

    def _prepare(self) -> Any:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._prepared is None:
                self._prepared = from_tokenizer(self._tokenizer, self._vocabulary, self._ends or None)
            return self._prepared


class MatcherGrammar:
    """A `Grammar` that keeps the state of one answer in matchers of llguidance, any of which the answer has to match.

    One grammar with both alternatives would not do: llguidance's lexer takes the longest match, so free text hides
    the start of thoughts.
    """

    def __init__(self, matchers: list[Any], vocabulary: int) -> None:
        self._matchers = matchers
        self._vocabulary = vocabulary

    @property
    def complete(self) -> bool:
        """See `Grammar`."""
        return all(matcher.is_stopped() for matcher in self._matchers)

    def allow(self, row: Tensor) -> None:
        """See `Grammar`. If the answer can neither go on nor end here, every logit becomes minus infinity."""
        masks = [np.frombuffer(matcher.compute_bitmask(), np.uint8) for matcher in self._matchers]
        bits = np.unpackbits(np.bitwise_or.reduce(masks), bitorder="little", count=self._vocabulary)
        row.masked_fill_(torch.from_numpy(bits == 0).to(row.device), float("-inf"))
        if all(map(_is_stuck, self._matchers)):
            row.fill_(float("-inf"))

    def accept(self, token: int) -> None:
        """See `Grammar`. Raises `InvalidValue` for a token that was not allowed."""
        matching = [matcher for matcher in self._matchers if matcher.consume_token(token)]
        if not matching:
            raise InvalidValue(f"the grammar does not allow token {token}: {self._matchers[0].get_error()}")
        self._matchers = matching


def _is_stuck(matcher: Any) -> bool:
    """Whether nothing may follow although what is there is not all; known after a mask was computed."""
    return bool(matcher.is_stopped()) and not matcher.is_accepting()


def _explain(matcher: Any) -> str | None:
    """Why a new grammar cannot be used; None if it can."""
    if not matcher.is_error():
        trial = matcher.deep_copy()
        trial.compute_bitmask()
        return "no document meets it" if _is_stuck(trial) else None
    first, *more = (matcher.get_error() or "it cannot be compiled").splitlines()
    lines = [_LOCATION.sub("", first)]
    for line in more:  # a fault in a pattern is lines in several lines, below it a mark and the reason
        if _EXCERPT.match(line):
            break
        lines.append(line.strip())
    return " ".join(line for line in lines if line.strip("^ "))[:300]


def _refuse(fmt: JsonFormat, reason: str) -> InvalidValue:
    return InvalidValue(f"the schema in `{fmt.param}` cannot be used: {reason}", param=fmt.param)


def _write_lark(answer: AnswerFormat, opening: str | None) -> str:
    """A form in llguidance's dialect of Lark. Every schema is a separate document, so that its `$ref`s resolve.

    With an `opening`, thoughts that begin with it come before the form.
    """
    triggered = answer.free_text and answer.trigger
    rules = ["%llguidance {}", *(_define("other", answer.alternative) if answer.alternative else ())]
    names = [f"choice_{number}" for number in range(len(answer.choices))]
    for name, one in zip(names, answer.choices, strict=True):
        rules += _define(name, replace(one, prefix=one.prefix.removeprefix(answer.trigger)) if triggered else one)
    rules.append(f"choice: {' | '.join(names)}")
    if opening is None:
        rules.append("start: answer")
    else:
        rules += [f"start: {_quote(opening)} thought SPACE answer", r"SPACE: /\s{0,8}/", r"THOUGHT: /(.|\n)*/"]
        rules.append(f"thought[lazy]: THOUGHT {_quote(THOUGHTS_END)}")
    if triggered:
        rules += ["answer: (begin choice)* TEXT", r"TEXT: /(.|\n)*/", f"begin[lazy]: TEXT {_quote(answer.trigger)}"]
    elif answer.free_text:
        rules += ["answer: choice | TEXT", r"TEXT: /\s*([^{\s](.|\n)*)?/"]
    else:
        most = answer.max_count
        more = f"({_quote(answer.separator)} choice){{0,{most - 1}}}" if most > 1 else ""
        rules.append(f"answer: choice {more} {'| other' if answer.alternative else ''}")
    return "\n".join(rules)


def _define(name: str, one: JsonFormat) -> list[str]:
    schema = json.dumps({**close(one.schema), "x-guidance": _COMPACT if one.prefix else _FLEXIBLE})
    return [
        f"{name}: {_quote(one.prefix)} {name}_json {_quote(one.suffix)}",
        f"{name}_json: %json {schema}",
    ]


# llguidance's options for JSON schemas set white space, separators and escapes, but not `additionalProperties`.
def close(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with `additionalProperties: false` for objects that list properties and do not set it.

    Whatever fits the result fits the original. Without it, a weak model invents properties up to its token limit. A
    schema that composes objects of several schemas is returned unchanged: one part does not know the properties of the
    others.
    """
    try:
        return schema if _composes(schema) else dict(_close(schema))
    except (AttributeError, TypeError):  # not a schema; compiling it reports the error
        return schema


def _composes(part: Any) -> bool:
    """Whether several schemas may apply to one object."""
    if isinstance(part, list):
        return any(map(_composes, part))
    if not isinstance(part, Mapping):
        return False
    composed = _COMPOSERS & part.keys() or ("properties" in part and _CHOICES & part.keys())
    return bool(composed) or any(map(_composes, part.values()))


def _close(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    for keyword in _MAPS & schema.keys():
        closed[keyword] = {name: _close(one) for name, one in schema[keyword].items()}
    for keyword in _LISTS & schema.keys():
        closed[keyword] = [_close(one) for one in schema[keyword]]
    for keyword in _SINGLE & schema.keys():
        closed[keyword] = _close(schema[keyword])
    names = schema.get("properties", {}).keys()
    if names >= set(schema.get("required", ())) and 0 < len(names) >= schema.get("minProperties", 0):
        closed.setdefault("additionalProperties", False)
    return closed


def _quote(text: str) -> str:
    return json.dumps(text) if text else ""
