"""Tools: what is called is an offered function with arguments that fit, whole or streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from tests import world
from tests.contract.asking import CHAT, Api, Json, error_of, events_of
from tests.contract.conftest import NEVER
from tests.contract.here import serve_here
from tests.model import templates

ASKED = [{"role": "user", "content": "Is it dry?"}]
WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Bonn", "Köln", "Aachen"]},
                "days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 7}, "maxItems": 3},
                "unit": {"$ref": "#/$defs/unit"},
            },
            "required": ["city", "days", "unit"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["C", "F"]}},
        },
    },
}
CLOCK: Json = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module", params=["HERMES", "LLAMA", "TEMPLATE"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A random model with the chat template of a family; its answers never end by themselves."""
    folder = tmp_path_factory.mktemp("families") / "random"
    world.make_model(folder, max_position_embeddings=4096, eos_token_id=NEVER)
    template = getattr(templates, request.param, None) or world.TEMPLATE
    (folder / "chat_template.jinja").write_text(template)
    with serve_here(folder, folder.parent / "store") as (_, http):
        yield Api(http)


def ask(api: Api, **fields: Any) -> Json:
    """The one choice of an answer."""
    body = {"model": "random", "messages": ASKED, "tools": TOOLS, "seed": 1, "max_tokens": 200, **fields}
    response = api.http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return dict(choice)


def check(call: Json) -> None:
    """A call is OpenAI's, and its arguments fit."""
    assert call.keys() == {"id", "type", "function"}
    assert call["id"].startswith("call_")
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "clock":
        assert arguments == {}
        return
    assert call["function"]["name"] == "weather"
    assert arguments["city"] in ("Bonn", "Köln", "Aachen")
    assert all(1 <= day <= 7 for day in arguments["days"])
    assert arguments["unit"] in ("C", "F")


class TestForced:
    @pytest.mark.parametrize("seed", range(3))
    def test_a_named_function_is_called_once(self, family: Api, seed: int) -> None:
        choice = ask(family, tool_choice=NAMED, seed=seed)
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"
        check(call)

    @pytest.mark.parametrize("seed", range(3))
    def test_where_a_call_is_required_one_is_made(self, family: Api, seed: int) -> None:
        choice = ask(family, tool_choice="required", parallel_tool_calls=False, seed=seed)
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        check(call)

    def test_calls_in_parallel_each_fit(self, family: Api) -> None:
        choice = ask(family, tool_choice="required", max_tokens=1200)
        *whole, last = choice["message"]["tool_calls"]
        for call in whole if choice["finish_reason"] == "length" else [*whole, last]:
            check(call)
        assert len({call["id"] for call in [*whole, last]}) == len(whole) + 1

    def test_a_stream_says_what_one_piece_says(self, family: Api) -> None:
        fields: Json = {"tool_choice": "required", "parallel_tool_calls": False, "seed": 5}
        whole = ask(family, **fields)
        body = {"model": "random", "messages": ASKED, "tools": TOOLS, "max_tokens": 200, "stream": True, **fields}
        with family.http.stream("POST", CHAT, json=body) as response:
            *events, _ = events_of(response)
        choices = [json.loads(event)["choices"][0] for event in events]
        deltas = [delta for choice in choices for delta in choice["delta"].get("tool_calls", [])]
        first, *rest = deltas
        assert {delta["index"] for delta in deltas} == {0}
        assert first["id"].startswith("call_")
        assert all(delta.keys() == {"index", "function"} for delta in rest)
        assert len(rest) > 1 or first["function"]["name"] == "clock"
        (call,) = whole["message"]["tool_calls"]
        assert first["function"]["name"] == call["function"]["name"]
        assert "".join(delta["function"]["arguments"] for delta in deltas) == call["function"]["arguments"]
        assert not any(choice["delta"].get("content") for choice in choices)
        assert choices[-1]["finish_reason"] == "tool_calls"

    def test_choices_have_calls_of_their_own(self, family: Api) -> None:
        body = {"model": "random", "messages": ASKED, "tools": TOOLS, "tool_choice": NAMED, "n": 3, "seed": 0}
        choices = family.http.post(CHAT, json=body).json()["choices"]
        calls = [call for choice in choices for call in choice["message"]["tool_calls"]]
        for call in calls:
            check(call)
        assert len({call["id"] for call in calls}) == 3


class TestFree:
    def test_a_model_that_calls_nothing_talks(self, family: Api) -> None:
        choice = ask(family, tool_choice="auto", max_tokens=30)
        assert choice["message"]["content"]
        assert "tool_calls" not in choice["message"]
        assert choice["finish_reason"] == "length"

    def test_without_a_choice_tools_are_not_even_mentioned(self, family: Api) -> None:
        asked: Json = {"temperature": 0, "max_tokens": 20}
        plain = ask(family, tools=None, **asked)
        assert ask(family, tool_choice="none", **asked)["message"] == plain["message"]

    def test_an_answer_with_a_form_is_a_call_or_fits_it(self, family: Api) -> None:
        format_ = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1, 2]}}}
        kinds = set()
        for seed in range(8):
            message = ask(family, response_format=format_, seed=seed, parallel_tool_calls=False)["message"]
            for call in message.get("tool_calls", []):
                check(call)
            kinds.add(message["content"] is None)
            assert message["content"] is None or json.loads(message["content"]) in (1, 2)
        assert len(kinds) == 2

    def test_a_history_of_calls_is_heard(self, family: Api) -> None:
        (call,) = ask(family, tool_choice=NAMED)["message"]["tool_calls"]
        again = {**call, "id": "call_2"}
        history = [
            *ASKED,
            {"role": "assistant", "content": None, "tool_calls": [call, again]},
            {"role": "tool", "tool_call_id": call["id"], "content": "sun"},
            {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "rain"}]},
        ]
        tokens = [family.http.post("/tokenize", json={"messages": said, "tools": TOOLS}) for said in (ASKED, history)]
        assert tokens[0].json()["count"] < tokens[1].json()["count"]
        assert ask(family, messages=history, max_tokens=5)["finish_reason"] == "length"


@pytest.mark.parametrize("choice", ["required", "auto", "none"])
def test_a_choice_among_no_tools_changes_nothing(api: Api, choice: str) -> None:
    """llama-index sends `required` with its structured output."""
    assert api.text(tool_choice=choice) == api.text(tool_choice=choice, tools=[]) == api.text()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "web"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0.function.name"),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
        (
            {
                "tools": [CLOCK, {"type": "function", "function": {"name": "g", "parameters": {"type": "nonsense"}}}],
                "tool_choice": "required",
            },
            "tools.1.function.parameters",
        ),
        ({"messages": [{"role": "tool", "content": "sun"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "Hi.", "tool_calls": []}, {"role": "user"}]}, "messages.1.content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls.0.function"),
    ],
    ids=str,
)
def test_what_is_wrong_with_tools_is_refused_by_its_place(api: Api, fields: Json, param: str) -> None:
    response = api.post(**fields)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", param)


class TestSdk:
    def test_it_reads_calls_and_sends_results(self, sdk: OpenAI) -> None:
        tools: Any = [CLOCK]
        messages: Any = [{"role": "user", "content": "Hi."}]
        first = sdk.chat.completions.create(
            model="demo", messages=messages, tools=tools, tool_choice="required", parallel_tool_calls=False, seed=1
        )
        message = first.choices[0].message
        assert message.tool_calls is not None
        (call,) = message.tool_calls
        assert call.type == "function"
        assert (call.function.name, call.function.arguments) == ("clock", "{}")
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "noon"}
        second = sdk.chat.completions.create(model="demo", messages=[*messages, message, result], max_tokens=5)  # type: ignore[list-item]
        assert second.choices[0].message.content

    def test_it_collects_a_stream_of_calls(self, sdk: OpenAI) -> None:
        tools: Any = [CLOCK]
        with sdk.chat.completions.stream(
            model="demo",
            messages=[{"role": "user", "content": "Hi."}],
            tools=tools,
            tool_choice="required",
            parallel_tool_calls=False,
            seed=1,
        ) as stream:
            message = stream.get_final_completion().choices[0].message
        assert message.tool_calls is not None
        assert [call.function.name for call in message.tool_calls] == ["clock"]
