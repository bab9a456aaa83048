"""A grammar decides what may come next, for one answer at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("llguidance")

from masquerade.engine import AnswerText, Engine, Request, SamplingParams, structured
from masquerade.engine.schemas import is_endless
from masquerade.engine.structured import AnswerFormat, Grammars, JsonFormat, MatcherGrammar, close
from masquerade.errors import InvalidValue, StepFailed
from masquerade.model import Base, ThoughtStart
from tests.engine.asking import Listener, finish

Make = Callable[..., Engine]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture
def grammars(tiny: Base) -> Grammars:
    return Grammars(tiny.tokenizer, tiny.vocabulary, tiny.ends)


def compile_schema(grammars: Grammars, schema: dict[str, Any]) -> MatcherGrammar:
    (grammar,) = grammars.compile(AnswerFormat([JsonFormat(schema)]))
    assert isinstance(grammar, MatcherGrammar)
    return grammar


def ask(base: Base, grammar: object, seed: int | None = None) -> tuple[Request, Listener]:
    sampling = SamplingParams(temperature=0 if seed is None else 1.5, seed=seed)
    text = AnswerText(base.tokenizer)
    listener = Listener()
    return Request(
        [5, 6, 7],
        120,
        listener,
        sampling=sampling,
        ends=base.ends,
        text=text,
        grammar=grammar,  # type: ignore[arg-type]
    ), listener


def test_answers_of_a_random_model_fit_the_schema(tiny: Base, make_engine: Make, grammars: Grammars) -> None:
    """Many at once, greedy and hot, beside one without a grammar, and with too little room to run undisturbed."""
    engine = make_engine(max_running=4, cache_bytes=20 * 16 * 512)
    asked = [ask(tiny, compile_schema(grammars, SCHEMA), seed) for seed in (None, 1, 2, 3, 4, 5, 6, 7)]
    free, _ = ask(tiny, None)
    alone = engine.generate([ask(tiny, None)[0]])[0]
    for request in [free, *(request for request, _ in asked)]:
        engine.submit(request)
    finish(engine)
    for _, heard in asked:
        assert heard.end.reason == "stop"
        answer = json.loads(heard.text)
        assert answer.keys() == {"a", "b"}
        assert answer["a"] in ("x", "yy")
        assert all(isinstance(item, bool) for item in answer["b"])
    assert len({heard.text for _, heard in asked}) > 2
    assert free.ids[3:] == alone


def test_only_what_may_come_next_keeps_its_logit(tiny: Base, grammars: Grammars) -> None:
    grammar = compile_schema(grammars, {"const": 12})
    for character in "12":
        row = torch.zeros(tiny.vocabulary)
        grammar.allow(row)
        (allowed,) = (row == 0).nonzero()[:, 0].tolist()
        assert tiny.tokenizer.decode([allowed]) == character
        assert not grammar.complete
        grammar.accept(allowed)
    assert grammar.complete


def test_a_special_token_is_never_part_of_a_string(tiny: Base, grammars: Grammars) -> None:
    grammar = compile_schema(grammars, {"type": "string"})
    grammar.accept(tiny.tokenizer.encode('"', add_special_tokens=False)[0])
    row = torch.zeros(tiny.vocabulary)
    grammar.allow(row)
    assert (row[:6] == float("-inf")).all()
    assert (row == 0).sum() > 90


def test_what_is_not_allowed_is_not_accepted(tiny: Base, grammars: Grammars) -> None:
    with pytest.raises(InvalidValue, match="grammar"):
        compile_schema(grammars, {"const": 1}).accept(tiny.tokenizer.encode("2", add_special_tokens=False)[0])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "#/nowhere"},
        {"type": "string", "pattern": "("},
        {"type": "integer", "minimum": 5, "maximum": 1},
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_is_refused_by_name(grammars: Grammars, schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match="schema") as refusal:
        compile_schema(grammars, schema)
    assert refusal.value.param == "response_format"


def refer(**parts: dict[str, Any]) -> dict[str, Any]:
    """The schema `a` of some that refer to each other."""
    return {"$defs": parts, "$ref": "#/$defs/a"}


TREE = {"type": "object", "properties": {"a": {"$ref": "#"}}}
PAIR = {"type": "array", "prefixItems": [{"type": "integer"}, {"$ref": "#"}], "items": False}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        refer(a={"$ref": "#/$defs/b"}, b={"$ref": "#/$defs/a"}),
        refer(a={"$ref": "#/$defs/b"}, b={"$ref": "#/$defs/c"}, c={"anyOf": [{"$ref": "#/$defs/b"}]}),
        {"anyOf": [{"$ref": "#"}, {"oneOf": [{"$ref": "#"}]}]},
        {"allOf": [{"$ref": "#"}, {"type": "object"}]},
        TREE | {"required": ["a"]},
        {"type": "array", "minItems": 1, "items": {"$ref": "#"}},
        PAIR | {"minItems": 2},
        refer(a={"type": "object", "properties": {"b": {"$ref": "#/$defs/b"}}, "required": ["b"]},
              b={"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1}),
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        {"type": "array", "minItems": 1, "items": False},
        {"enum": []},
        {"type": []},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "string", "pattern": "^a$", "minLength": 3},
        {"type": "object", "required": ["x"], "additionalProperties": False},
    ],
    ids=json.dumps,
)  # fmt: skip
@pytest.mark.parametrize("place", ["alone", "a call", "or else"])
def test_what_no_document_meets_is_refused_by_name(grammars: Grammars, schema: dict[str, Any], place: str) -> None:
    form = {
        "alone": AnswerFormat([JsonFormat(schema, "wrong")]),
        "a call": AnswerFormat(
            [CALL, JsonFormat(schema, "wrong", "<call>", "</call>")], free_text=True, trigger="<call>"
        ),
        "or else": AnswerFormat([CALL], alternative=JsonFormat(schema, "wrong")),
    }[place]
    with pytest.raises(InvalidValue) as refusal:
        grammars.compile(form)
    assert refusal.value.param == "wrong"
    assert "`wrong`" in str(refusal.value)


@pytest.mark.parametrize(
    ("schema", "document"),
    [
        (TREE, {"a": {"a": {}}}),
        (PAIR | {"minItems": 1}, [1, [2]]),
        ({"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}}]}, [None, [None]]),
        (refer(a={"type": "object", "properties": {"n": {"$ref": "#/$defs/b"}}, "required": ["n"]},
               b={"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}), {"n": {"n": None}}),
        ({"type": "object", "properties": {"a": {"$ref": "#/properties/b"}, "b": {"const": 1}}}, {"a": 1}),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"const": 1}}}, 1),
        ({"$ref": "#x", "$defs": {"y": {"$anchor": "x", "type": "string"}}}, "s"),
        ({"type": "object", "properties": {"enum": {"enum": ["$ref"]}, "$ref": {"type": "string"}}}, {"$ref": "s"}),
    ],
    ids=json.dumps,
)  # fmt: skip
def test_what_some_document_meets_is_not(tiny: Base, grammars: Grammars, schema: dict[str, Any], document: Any) -> None:
    assert fits(tiny, grammars, AnswerFormat([JsonFormat(schema)]), json.dumps(document))


@pytest.mark.parametrize(
    "link",
    [
        lambda to: to,
        lambda to: {"anyOf": [to]},
        lambda to: {"allOf": [to, to]},
        lambda to: {"type": "object", "properties": {"a": to}, "required": ["a"]},
    ],
    ids=["reference", "any", "all", "property"],
)
def test_a_long_chain_of_schemas_is_decided_soon(link: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A stall: looking at all of them again and again takes the square of the chain."""
    chain = {f"d{number}": link({"$ref": f"#/$defs/d{number + 1}"}) for number in range(1000)}
    for last, endless in ({"$ref": "#/$defs/d0"}, True), ({"type": "null"}, False):
        started = time.process_time()
        assert is_endless({"$ref": "#/$defs/d0", "$defs": chain | {"d1000": last}}) is endless
        assert time.process_time() - started < 2


def test_a_schema_is_not_larger_than_can_be_looked_at(grammars: Grammars) -> None:
    with pytest.raises(InvalidValue, match="9003 values; the limit is 8192") as refusal:
        compile_schema(grammars, {"type": "integer", "enum": list(range(9000))})
    assert refusal.value.param == "response_format"


def test_the_reason_of_a_pattern_is_told_in_full(grammars: Grammars) -> None:
    with pytest.raises(InvalidValue, match=r"\(\?=a\)b.*look-ahead.*not supported"):
        compile_schema(grammars, {"type": "string", "pattern": "(?=a)b"})


def test_an_answer_that_can_neither_go_on_nor_end_is_an_error(
    tiny: Base, make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an answer that was cut: whatever the check before it overlooks."""
    monkeypatch.setattr(structured, "is_endless", lambda _: False)
    schema = {"type": "array", "prefixItems": [{"const": 1}, {"$ref": "#/$defs/x"}], "minItems": 2, "items": False}
    grammars = Grammars(tiny.tokenizer, tiny.vocabulary, tiny.ends)
    request, heard = ask(tiny, compile_schema(grammars, schema | {"$defs": {"x": {"$ref": "#/$defs/x"}}}))
    engine = make_engine()
    engine.submit(request)
    finish(engine)
    assert heard.end.reason == "error"
    assert isinstance(heard.end.error, StepFailed)


PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/colour"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"colour": {"enum": ["red", "blue"]}},
}
CALL = JsonFormat(PARAMETERS, "tools.0", '<call>{"name": "f", "arguments": ', "}</call>")
GOOD, BAD = CALL.prefix + '{"a": 1, "b": "red"}' + CALL.suffix, CALL.prefix + '{"a": "x"}' + CALL.suffix


def fits(tiny: Base, grammars: Grammars, form: AnswerFormat, text: str) -> bool:
    """Whether a text may be the whole answer."""
    (grammar,) = grammars.compile(form)
    assert isinstance(grammar, MatcherGrammar)
    ids = tiny.tokenizer.encode(text, add_special_tokens=False)
    (matcher,) = grammar._matchers
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (AnswerFormat([CALL]), [GOOD], [BAD, "hello", f"hi {GOOD}", f"{GOOD}\n{GOOD}", ""]),
        (
            AnswerFormat([CALL], max_count=2, separator="\n"),
            [GOOD, f"{GOOD}\n{GOOD}"],
            [BAD, "", "\n".join([GOOD] * 3)],
        ),
        (AnswerFormat([CALL], alternative=JsonFormat({"type": "array"})), [GOOD, "[1]"], [BAD, "{}", "hello"]),
        (
            AnswerFormat([CALL], free_text=True, trigger="<call>"),
            ["", "hi", f"hi {GOOD} bye {GOOD}"],
            [BAD, f"hi {BAD}"],
        ),
        (AnswerFormat([JsonFormat(PARAMETERS)], free_text=True), ["", "hi {", '{"a": 1}'], ['{"a": "x"}', ' {"b": 1}']),
    ],
    ids=["once", "twice", "or else", "in talk", "or talk"],
)
def test_a_form_holds_what_it_must_and_nothing_else(
    tiny: Base, grammars: Grammars, form: AnswerFormat, good: list[str], bad: list[str]
) -> None:
    assert all(fits(tiny, grammars, form, text) for text in good)
    assert not any(fits(tiny, grammars, form, text) for text in bad)


def test_of_several_schemas_the_wrong_one_is_named(grammars: Grammars) -> None:
    form = AnswerFormat([CALL, JsonFormat({"type": "nonsense"}, "tools.1")], alternative=JsonFormat({"type": "object"}))
    with pytest.raises(InvalidValue, match="nonsense") as refusal:
        grammars.compile(form)
    assert refusal.value.param == "tools.1"


def test_each_answer_has_a_grammar_of_its_own(tiny: Base, grammars: Grammars) -> None:
    one, other = grammars.compile(AnswerFormat([JsonFormat({"const": 12})]), 2)
    one.accept(tiny.tokenizer.encode("1", add_special_tokens=False)[0])
    other.accept(tiny.tokenizer.encode("1", add_special_tokens=False)[0])
    one.accept(tiny.tokenizer.encode("2", add_special_tokens=False)[0])
    assert one.complete
    assert not other.complete


OPEN: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CLOSED = OPEN | {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        (OPEN, CLOSED),
        (CLOSED, CLOSED),
        (OPEN | {"additionalProperties": True}, OPEN | {"additionalProperties": True}),
        ({"type": "array", "items": OPEN}, {"type": "array", "items": CLOSED}),
        ({"anyOf": [OPEN, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"$ref": "#/$defs/x", "$defs": {"x": OPEN}}, {"$ref": "#/$defs/x", "$defs": {"x": CLOSED}}),
        ({"type": "object"}, {"type": "object"}),
        ({"enum": [OPEN]}, {"enum": [OPEN]}),
    ],
)
def test_an_object_that_names_its_properties_has_no_others(schema: dict[str, Any], closed: dict[str, Any]) -> None:
    assert close(schema) == closed


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [OPEN, {"properties": {"b": {}}}]},
        {"$ref": "#/$defs/x", "$defs": {"x": OPEN}, "properties": {"b": {}}},
        OPEN | {"required": ["a", "b"]},
        OPEN | {"minProperties": 2},
        {"properties": 7},
        {"properties": {"a": {}}, "required": 7},
        {"anyOf": 7},
    ],
)
def test_a_schema_that_closing_could_make_impossible_is_left_as_it_is(schema: dict[str, Any]) -> None:
    assert close(schema) == schema


def allowed(grammar: MatcherGrammar, base: Base, text: str) -> bool:
    """Feed a grammar the bytes of a text; whether all were allowed."""
    for token in base.tokenizer.encode(text, add_special_tokens=False):
        row = torch.zeros(base.vocabulary)
        grammar.allow(row)
        if not row[token].isfinite():
            return False
        grammar.accept(token)
    return True


@pytest.mark.parametrize(
    ("start", "text", "fits"),
    [
        ("begun", 'a { b</thin"k> c</think>\n\n{"a": "x", "b": []}', True),
        ("begun", '{"a": "x", "b": []}', True),  # a thought that goes on
        ("begun", "a</think>b", False),
        ("optional", '<think>\na{"c":</think>{"a": "x", "b": []}', True),
        ("optional", '{"a": "x", "b": []}', True),
        ("optional", "a", False),
        ("optional", "<think>a</think>\n<", False),
        (None, "<think>", False),
    ],
)
def test_the_form_is_that_of_what_follows_the_thoughts(
    tiny: Base, grammars: Grammars, start: ThoughtStart | None, text: str, fits: bool
) -> None:
    (grammar,) = grammars.compile(AnswerFormat([JsonFormat(SCHEMA)]), 1, start)
    assert isinstance(grammar, MatcherGrammar)
    assert allowed(grammar, tiny, text) == fits


def test_calls_may_follow_thoughts(tiny: Base, grammars: Grammars) -> None:
    """Free text with calls that must fit, and calls that are required."""
    call = JsonFormat(SCHEMA, prefix="<tool_call>", suffix="</tool_call>")
    said = '<think>I say <tool_call>no</tool_call></think>\n\n%s<tool_call>{"a": "x", "b": []}</tool_call>'
    free = AnswerFormat([call], free_text=True, trigger="<tool_call>")
    for form, text in ((free, said % "Well: "), (AnswerFormat([call]), said % "")):
        (grammar,) = grammars.compile(form, 1, "optional")
        assert isinstance(grammar, MatcherGrammar)
        assert allowed(grammar, tiny, text)
    (grammar,) = grammars.compile(free, 1, "optional")
    assert isinstance(grammar, MatcherGrammar)
    assert not allowed(grammar, tiny, "<think>a</think><tool_call>no")
