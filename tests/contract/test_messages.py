"""Anthropic's stock SDK: messages are the chats that they stand for, whole and streamed, and errors are its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic
from anthropic.types import Message
from pydantic import BaseModel

from masquerade.anthropic.answers import INVALID, read_arguments
from masquerade.anthropic.objects import GeneratedMessage
from masquerade.anthropic.schemas import REFUSED
from masquerade.http.limits import Policy
from tests import world
from tests.contract.asking import PARTY, QUESTIONS, Api, Json
from tests.contract.conftest import NEVER, TIMEOUT
from tests.contract.here import serve_here
from tests.keys.making import make_key
from tests.serving import Server

ROUTE, COUNT = "/v1/messages", "/v1/messages/count_tokens"
ASKED: list[Any] = [{"role": "user", "content": PARTY}]
WEATHER: Json = {
    "name": "weather",
    "description": "Of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Bonn", "Aachen"]}, "day": {"type": "integer", "minimum": 1, "maximum": 7}},
        "required": ["city", "day"],
        "additionalProperties": False,
    },
}
CLOCK: Json = {"name": "clock", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}
CALLED: list[Any] = [
    {"role": "user", "content": "Is it dry?"},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "toolu_1", "name": "clock", "input": {"in": ["Köln", 2]}},
            {"type": "tool_use", "id": "toolu_2", "name": "clock", "input": {}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "Dry."}]},
            {"type": "tool_result", "tool_use_id": "toolu_2", "content": "Noon."},
            {"type": "text", "text": "So?"},
        ],
    },
]


def as_chat(tool: Json) -> Json:
    """A tool as chats have it."""
    names = {"name": "name", "description": "description", "input_schema": "parameters"}
    return {"type": "function", "function": {names[name]: value for name, value in tool.items()}}


def called(arguments: str, number: int) -> Json:
    return {"id": f"toolu_{number}", "type": "function", "function": {"name": "clock", "arguments": arguments}}


CALLED_CHAT: list[Json] = [
    CALLED[0],
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [called('{"in":["Köln",2]}', 1), called("{}", 2)],
    },
    {"role": "tool", "tool_call_id": "toolu_1", "content": "Dry."},
    {"role": "tool", "tool_call_id": "toolu_2", "content": "Noon."},
    {"role": "user", "content": "So?"},
]
# Requests, and the chats that they stand for.
PAIRS: dict[str, tuple[Json, Json]] = {
    "a question": ({"messages": ASKED}, {"messages": ASKED}),
    "blocks": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]}]},
        {"messages": [{"role": "user", "content": "Hi!"}]},
    ),
    "a system": (
        {"system": "Be brief.", "messages": ASKED},
        {"messages": [{"role": "system", "content": "Be brief."}, *ASKED]},
    ),
    "blocks of a system": (
        {"system": [{"type": "text", "text": "Be ", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": "brief."}], "messages": ASKED},
        {"messages": [{"role": "system", "content": "Be brief."}, *ASKED]},
    ),
    "one turn in two messages": (
        {"messages": [{"role": "user", "content": "Hi."}, *ASKED]},
        {"messages": [{"role": "user", "content": f"Hi.\n{PARTY}"}]},
    ),
    "tools": ({"messages": ASKED, "tools": [WEATHER, CLOCK]},
              {"messages": ASKED, "tools": [as_chat(WEATHER), as_chat(CLOCK)]}),
    "tools not to be called": ({"messages": ASKED, "tools": [WEATHER], "tool_choice": {"type": "none"}},
                               {"messages": ASKED}),
    "calls and results": ({"messages": CALLED, "tools": [CLOCK]},
                          {"messages": CALLED_CHAT, "tools": [as_chat(CLOCK)]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Anthropic]:
    """The stock SDK, without its retries."""
    with Anthropic(base_url=server.base_url, api_key="none", max_retries=0, timeout=TIMEOUT) as client:
        yield client


def ask(client: Anthropic, **fields: Any) -> Message:
    """A greedy answer to one question, unless told otherwise; what the SDK does not name goes into the body too."""
    named = {"model": "demo", "messages": ASKED, "max_tokens": 48, **fields}
    extra = {"temperature": 0, **named.pop("extra", {})}
    message = client.messages.create(**named, extra_body=extra)
    assert isinstance(message, Message)
    return message


def stream(client: Anthropic, **fields: Any) -> tuple[list[Any], Message]:
    """The raw events of a streamed answer, and the message that the SDK makes of them."""
    named = {"model": "demo", "messages": ASKED, "max_tokens": 48, **fields}
    extra = {"temperature": 0, **named.pop("extra", {})}
    events = list(client.messages.create(**named, stream=True, extra_body=extra))
    with client.messages.stream(**named, extra_body=extra) as streaming:
        return events, streaming.get_final_message()


def text_of(message: Message) -> str:
    assert all(block.type == "text" for block in message.content)
    return "".join(block.text for block in message.content if block.type == "text")


def contents(message: Message) -> list[Json]:
    """The blocks without the ids of calls."""
    return [block.model_dump(exclude={"id"}, exclude_none=True) for block in message.content]


def prompt_tokens(message: Message) -> int:
    cached = message.usage.cache_read_input_tokens
    assert cached is not None
    assert message.usage.cache_creation_input_tokens == 0
    return message.usage.input_tokens + cached


class TestAnswers:
    @pytest.mark.parametrize("question", QUESTIONS)
    @pytest.mark.parametrize("model", ["demo", "demo:introvert"])
    def test_a_greedy_answer_is_the_chats(self, client: Anthropic, api: Api, model: str, question: str) -> None:
        message = ask(client, model=model, messages=[{"role": "user", "content": question}])
        assert text_of(message) == api.text(question, model=model)
        assert (message.type, message.role, message.model, message.stop_reason) == (
            *("message", "assistant", model, "end_turn"),
        )
        assert message.id.startswith("msg_")

    @pytest.mark.parametrize(("request_", "chat"), PAIRS.values(), ids=PAIRS)
    def test_it_is_that_of_the_chat_that_it_stands_for(
        self, client: Anthropic, api: Api, request_: Json, chat: Json
    ) -> None:
        content = api.chat(**chat, temperature=0)["choices"][0]["message"]["content"]
        assert text_of(ask(client, **request_)) == content

    def test_a_persona_is_named_as_in_chats(self, client: Anthropic, api: Api, server: Server) -> None:
        by_model = ask(client, model="demo:introvert")
        by_field = ask(client, extra={"persona": "introvert"})
        by_header = ask(client, extra_headers={"X-Persona": "introvert"})
        chat = api.chat(persona="introvert")
        for message in (by_model, by_field, by_header):
            assert text_of(message) == chat["choices"][0]["message"]["content"] != text_of(ask(client))
            extra = message.model_extra
            assert extra is not None
            for name in ("persona", "generation", "gamma", "system_fingerprint"):
                assert extra[name] == chat[name]

    def test_gamma_and_phase_apply(self, client: Anthropic, api: Api) -> None:
        assert text_of(ask(client, model="demo:introvert", extra={"gamma": 1.0})) == text_of(ask(client))
        half = ask(client, model="demo:introvert", extra={"gamma": 0.5, "persona_phase": "decode"})
        assert half.model_extra is not None
        assert half.model_extra["gamma"] == 0.5
        assert text_of(half) == api.text(persona="introvert", gamma=0.5, persona_phase="decode")

    def test_a_seed_and_sampling_apply(self, client: Anthropic, api: Api) -> None:
        sampling: Json = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 7}
        assert text_of(ask(client, extra=sampling)) == api.text(**sampling)
        assert text_of(ask(client, extra={"temperature": 1.0, "top_k": 1})) == text_of(ask(client))

    def test_max_tokens_ends_an_answer(self, client: Anthropic) -> None:
        message = ask(client, max_tokens=3)
        assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 3)

    def test_a_limit_beyond_the_context_is_no_error(self, client: Anthropic) -> None:
        assert ask(client, max_tokens=32_000).stop_reason == "end_turn"

    def test_the_context_ends_an_answer(self, narrow: httpx.Client, rambler: Path) -> None:
        model = {"model": rambler.name, "messages": [{"role": "user", "content": "a" * 8150}], "temperature": 0}
        message = narrow.post(ROUTE, json=model | {"max_tokens": 1000}).json()
        assert message["stop_reason"] == "model_context_window_exceeded"
        assert sum(message["usage"].values()) == 8192
        refused = narrow.post(
            ROUTE, json=model | {"messages": [{"role": "user", "content": "a" * 8192}], "max_tokens": 1}
        )
        assert refused.json()["error"]["details"]["error_code"] == "context_length_exceeded"


class TestStopSequences:
    def test_one_ends_the_answer_and_is_told(self, client: Anthropic) -> None:
        whole = text_of(ask(client))
        stop = whole[7:12]
        message = ask(client, stop_sequences=["never", stop])
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
        assert text_of(message) == whole[: whole.index(stop)]
        _, streamed = stream(client, stop_sequences=["never", stop])
        assert (streamed.stop_reason, streamed.stop_sequence) == ("stop_sequence", stop)
        assert text_of(streamed) == text_of(message)

    def test_one_that_does_not_occur_changes_nothing(self, client: Anthropic) -> None:
        message = ask(client, stop_sequences=["never"] * 10)
        assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
        assert text_of(message) == text_of(ask(client))

    def test_an_answer_that_it_empties_has_no_blocks(self, client: Anthropic) -> None:
        stop = text_of(ask(client))[:3]
        _, streamed = stream(client, stop_sequences=[stop])
        assert ask(client, stop_sequences=[stop]).content == streamed.content == []


class TestStreams:
    @pytest.mark.parametrize("model", ["demo", "demo:introvert"])
    def test_a_stream_is_the_whole_answer(self, client: Anthropic, model: str) -> None:
        whole, (events, streamed) = ask(client, model=model), stream(client, model=model)
        assert contents(streamed) == contents(whole)
        assert (streamed.model, streamed.stop_reason) == (model, whole.stop_reason)
        assert streamed.usage.output_tokens == whole.usage.output_tokens
        assert prompt_tokens(streamed) == prompt_tokens(whole)
        assert streamed.model_extra == whole.model_extra
        kinds = [event.type for event in events]
        deltas = kinds.count("content_block_delta")
        assert deltas > 3
        assert kinds == [
            *("message_start", "content_block_start"),
            *["content_block_delta"] * deltas,
            *("content_block_stop", "message_delta", "message_stop"),
        ]

    def test_every_event_is_named_by_its_type(self, api: Api) -> None:
        body = {"model": "demo", "messages": ASKED, "max_tokens": 5, "stream": True}
        response = api.http.post(ROUTE, json=body)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "[DONE]" not in response.text
        for event in response.text.strip().split("\n\n"):
            name, data = event.split("\n")
            assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]

    def test_the_usage_at_the_start_has_the_prompt(self, client: Anthropic) -> None:
        (start, *_, delta, _), streamed = stream(client)
        assert prompt_tokens(start.message) == prompt_tokens(streamed)
        assert delta.usage.output_tokens == streamed.usage.output_tokens


class TestTools:
    def test_a_call_that_must_be_made_fits(self, client: Anthropic) -> None:
        message = ask(client, tools=[WEATHER, CLOCK], tool_choice={"type": "tool", "name": "weather"}, max_tokens=100)
        assert message.stop_reason == "tool_use"
        (block,) = message.content
        assert block.type == "tool_use"
        assert (block.name, block.id[:6]) == ("weather", "toolu_")
        assert block.input["city"] in ("Bonn", "Aachen")
        assert 1 <= int(str(block.input["day"])) <= 7

    def test_any_of_them_once(self, client: Anthropic) -> None:
        choice = {"type": "any", "disable_parallel_tool_use": True}
        message = ask(client, tools=[WEATHER, CLOCK], tool_choice=choice, max_tokens=100)
        assert [block.type for block in message.content] == ["tool_use"]

    @pytest.mark.parametrize("choice", [{"type": "tool", "name": "weather"}, {"type": "any"}, {"type": "auto"}])
    @pytest.mark.parametrize("max_tokens", [25, 400])
    def test_a_stream_says_what_one_piece_says(self, client: Anthropic, choice: Json, max_tokens: int) -> None:
        """Also if the arguments are truncated."""
        asked: Json = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "max_tokens": max_tokens}
        whole, (events, streamed) = ask(client, **asked), stream(client, **asked)
        assert contents(streamed) == contents(whole)
        assert streamed.stop_reason == whole.stop_reason
        starts = [event.index for event in events if event.type == "content_block_start"]
        assert starts == [event.index for event in events if event.type == "content_block_stop"]
        assert starts == list(range(len(whole.content)))

    def test_a_call_can_be_answered(self, client: Anthropic) -> None:
        asked: Json = {"tools": [WEATHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
        call = ask(client, **asked, max_tokens=100)
        (block,) = call.content
        result = {"type": "tool_result", "tool_use_id": getattr(block, "id", ""), "content": "Dry.", "is_error": False}
        turns = [*ASKED, {"role": "assistant", "content": call.content}, {"role": "user", "content": [result]}]
        message = ask(client, messages=turns, tools=[WEATHER], tool_choice={"type": "none"})
        assert message.stop_reason in ("end_turn", "max_tokens")
        assert prompt_tokens(message) > prompt_tokens(ask(client))

    def test_a_form_of_the_answer_holds(self, client: Anthropic) -> None:
        class Mood(BaseModel):
            mood: bool
            age: int

        schema = {**Mood.model_json_schema(), "additionalProperties": False}
        schema["properties"]["age"] |= {"minimum": 1, "maximum": 99}
        message = ask(client, output_config={"format": {"type": "json_schema", "schema": schema}}, max_tokens=100)
        assert 1 <= Mood.model_validate_json(text_of(message)).age <= 99


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", {}),
        ('{"a": 1, "b": [1, 2', {"a": 1, "b": [1, 2]}),
        ('{"city": "Bo', {}),
        ("[1]", {INVALID: "[1]"}),
        ("{a: 1}", {INVALID: "{a: 1}"}),
        ('{"a": 1e999}', {INVALID: '{"a": 1e999}'}),
        ('{"a": NaN}', {INVALID: '{"a": NaN}'}),
        ('{"a": "\\ud800"}', {INVALID: '{"a": "\\ud800"}'}),
    ],
)
def test_arguments_are_an_object_whatever_the_model_writes(text: str, value: Json) -> None:
    assert read_arguments(text) == value
    json.dumps(read_arguments(text), allow_nan=False)


class TestCount:
    @pytest.mark.parametrize(("request_", "chat"), PAIRS.values(), ids=PAIRS)
    def test_it_is_what_an_answer_uses(self, client: Anthropic, api: Api, request_: Json, chat: Json) -> None:
        count = client.messages.count_tokens(model="demo", **request_).input_tokens
        assert prompt_tokens(ask(client, **request_, max_tokens=1)) == count
        assert api.http.post("/tokenize", json=chat).json()["count"] == count

    def test_more_than_the_context_is_counted(self, client: Anthropic) -> None:
        long = [{"role": "user", "content": PARTY * 400}]
        assert client.messages.count_tokens(model="demo", messages=long).input_tokens > 512  # type: ignore[arg-type]

    def test_what_cannot_be_asked_is_not_counted(self, client: Anthropic) -> None:
        with pytest.raises(anthropic.NotFoundError):
            client.messages.count_tokens(model="ghost", messages=ASKED)
        with pytest.raises(anthropic.BadRequestError):
            client.messages.count_tokens(model="demo", messages=[])


def check(api: Api, request: Json) -> None:
    """The object is as described, with each required field and no other, and is the SDK's."""
    response = api.http.post(ROUTE, json={"model": "demo", "messages": ASKED, "max_tokens": 60, **request})
    content = response.json()
    described = GeneratedMessage.model_validate_json(response.text, strict=True)
    assert described.model_dump(exclude_unset=True) == content
    Message.model_validate(content)


def test_a_message_is_as_described(api: Api) -> None:
    check(api, {})
    check(api, {"persona": "introvert", "stop_sequences": [" "]})
    check(api, {"tools": [WEATHER], "tool_choice": {"type": "any"}})


def refuse(api: Api, request: Json, route: str = ROUTE) -> Json:
    """The error of a request, which must be Anthropic's."""
    response = api.http.post(route, content=json.dumps(request), headers={"Content-Type": "application/json"})
    content = response.json()
    assert content.keys() == {"type", "error", "request_id"}, content
    assert content["type"] == "error"
    assert content["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    assert content["error"].keys() == {"type", "message", "details"}
    assert content["error"]["message"]
    error: Json = content["error"]
    return error


def image(kind: str) -> Json:
    return {"messages": [{"role": "user", "content": [{"type": kind, "source": {"type": "url", "url": "x"}}]}]}


WRONG: dict[str, tuple[Json, str]] = {
    "an image": (image("image"), "messages.0.content.0.type"),
    "a document": (image("document"), "messages.0.content.0.type"),
    "thinking": ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    "a prefix": ({"messages": [*ASKED, {"role": "assistant", "content": "I"}]}, "messages.1.role"),
    "a tool of Anthropic's": ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
    "examples of a tool": ({"tools": [WEATHER | {"input_examples": [{}]}]}, "tools.0.input_examples"),
    "a persona of a message": ({"messages": [ASKED[0] | {"persona": "introvert"}]}, "messages.0.persona"),
    "a stop of OpenAI's": ({"stop": ["x"]}, "stop"),
    "a document in a system": ({"system": [{"type": "document"}]}, "system.0.type"),
}
INVALID_VALUES: dict[str, tuple[Json, str]] = {
    "too hot": ({"temperature": 1.5}, "temperature"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "an unknown tool": ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name"),
    "a choice of nothing": ({"tool_choice": {"type": "any"}}, "tool_choice"),
    "a tool twice": ({"tools": [CLOCK, CLOCK]}, "tools"),
    "a user's call": ({"messages": [{"role": "user", "content": CALLED[1]["content"]}]}, "messages.0.content.1.type"),
    "no schema": ({"tools": [{"name": "x"}]}, "tools.0.input_schema"),
    "an impossible schema": (
        {"tools": [CLOCK | {"strict": True, "input_schema": {"type": "object", "required": 7}}]},
        "tools.0.input_schema",
    ),
    "an impossible form": (
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}},
        "output_config.format.schema",
    ),
    "no messages": ({"messages": []}, "messages"),
    "half a character": (
        {"messages": [{"role": "user", "content": "\ud800"}]},
        "messages.0.content",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize(("request_", "param"), WRONG.values(), ids=WRONG)
    def test_what_is_not_supported_is_refused_by_its_name(self, api: Api, request_: Json, param: str) -> None:
        error = refuse(api, {"model": "demo", "messages": ASKED, "max_tokens": 5, **request_})
        assert error["type"] == "invalid_request_error"
        assert error["details"] == {"error_code": "unsupported_parameter", "param": param}

    @pytest.mark.parametrize(("request_", "param"), INVALID_VALUES.values(), ids=INVALID_VALUES)
    def test_what_is_wrong_is_named(self, api: Api, request_: Json, param: str) -> None:
        error = refuse(api, {"model": "demo", "messages": ASKED, "max_tokens": 5, **request_})
        assert error["details"] == {"error_code": "invalid_value", "param": param}

    def test_max_tokens_is_required(self, api: Api) -> None:
        assert refuse(api, {"model": "demo", "messages": ASKED})["details"]["param"] == "max_tokens"

    @pytest.mark.parametrize("name", list(REFUSED))
    def test_a_field_that_would_change_the_answer_is_refused(self, api: Api, name: str) -> None:
        asked: Json = {"model": "ghost", "messages": ASKED, "max_tokens": 5}
        for route in (ROUTE, COUNT):
            for value in ("x", ["x"], {"x": 1}, 7.5):
                details = refuse(api, asked | {name: value}, route)["details"]
                assert details == {"error_code": "unsupported_parameter", "param": name}
            for value in (None, *REFUSED[name]):
                assert refuse(api, asked | {name: value}, route)["details"]["error_code"] == "model_not_found"

    def test_what_is_harmless_changes_nothing(self, client: Anthropic) -> None:
        harmless: Json = {
            "metadata": {"user_id": "u"},
            "service_tier": "auto",
            "cache_control": {"type": "ephemeral"},
            "thinking": {"type": "disabled"},
            "output_config": {"effort": "low"},
            "extra": {"never_heard_of": [1]},
            "extra_headers": {"anthropic-version": "1999-01-01", "anthropic-beta": "x"},
        }
        assert text_of(ask(client, **harmless)) == text_of(ask(client))

    @pytest.mark.parametrize("path", [f"{ROUTE}/nothing", f"{ROUTE}/batches", f"{COUNT}/"])
    def test_a_path_below_that_is_no_route(self, api: Api, path: str) -> None:
        assert refuse(api, {}, path)["type"] == "not_found_error"

    def test_a_wrong_method(self, api: Api) -> None:
        response = api.http.get(ROUTE)
        assert (response.status_code, response.json()["error"]["type"]) == (405, "invalid_request_error")
        assert "request-id" not in api.http.get("/v1/models").headers


Closed = tuple[httpx.Client, dict[str, str]]


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    """A server with keys, little room for bodies and no time for answers; its answers never end by themselves."""
    folder = tmp_path_factory.mktemp("closed")
    model = world.make_model(folder / "random", max_position_embeddings=8192, eos_token_id=NEVER)
    made = {
        "chat": make_key(folder / "store", "chat")[0],
        "npc": make_key(folder / "store", "chat", personas=("npc-*",))[0],
        "metrics": make_key(folder / "store", "metrics")[0],
        "hasty": make_key(folder / "store", "chat", rpm=1)[0],
    }
    policy = Policy(body_bytes=4096, answer_seconds=1.0)
    with serve_here(model, folder / "store", policy=policy) as (_, http):
        yield http, made


class TestErrors:
    def connect(self, closed: Closed, who: str, **options: Any) -> Anthropic:
        key = closed[1].get(who, who)
        return Anthropic(base_url=str(closed[0].base_url), api_key=key, max_retries=0, **options)

    @pytest.mark.parametrize(
        ("who", "fields", "error", "kind", "code"),
        [
            ("chat", {"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error", "invalid_value"),
            ("nobody", {}, anthropic.AuthenticationError, "authentication_error", "invalid_api_key"),
            ("metrics", {}, anthropic.PermissionDeniedError, "permission_error", "scope_missing"),
            ("npc", {"model": "random:royal"}, anthropic.PermissionDeniedError, "permission_error",
             "persona_forbidden"),
            ("chat", {"model": "ghost"}, anthropic.NotFoundError, "not_found_error", "model_not_found"),
            ("chat", {"model": "random:ghost"}, anthropic.NotFoundError, "not_found_error", "model_not_found"),
            ("chat", {"system": "x" * 9000}, anthropic.APIStatusError, "request_too_large", "body_too_large"),
            ("chat", {"max_tokens": 8000}, anthropic.InternalServerError, "timeout_error", "answer_timeout"),
        ],
    )  # fmt: skip
    def test_each_is_of_the_sdks_class(
        self,
        closed: Closed,
        who: str,
        fields: Json,
        error: type[anthropic.APIStatusError],
        kind: str,
        code: str,
    ) -> None:
        with self.connect(closed, who) as client, pytest.raises(error) as caught:
            ask(client, **{"model": "random", "max_tokens": 2, **fields})
        assert (caught.value.type, caught.value.error_code) == (kind, code)
        assert caught.value.request_id
        assert caught.value.status_code == {"body_too_large": 413, "answer_timeout": 504}.get(
            code, caught.value.status_code
        )

    def test_a_hasty_key_must_wait(self, closed: Closed) -> None:
        with self.connect(closed, "hasty") as client:
            ask(client, model="random", max_tokens=1)
            with pytest.raises(anthropic.RateLimitError) as caught:
                ask(client, model="random", max_tokens=1)
        assert (caught.value.type, caught.value.error_code) == ("rate_limit_error", "rate_limited")
        assert int(caught.value.response.headers["retry-after"]) >= 1

    def test_a_key_may_come_as_x_api_key(self, closed: Closed) -> None:
        http, made = closed
        body = {"model": "random", "messages": ASKED, "max_tokens": 1}
        assert http.post(ROUTE, json=body, headers={"x-api-key": made["chat"]}).status_code == 200
        refused = http.post(ROUTE, json=body, headers={"x-api-key": "sk-ant-x"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")

    def test_one_within_a_stream_ends_it(self, closed: Closed) -> None:
        with (
            self.connect(closed, "chat") as client,
            pytest.raises(anthropic.APIStatusError) as caught,
            client.messages.stream(model="random", messages=ASKED, max_tokens=8000) as streaming,
        ):
            streaming.until_done()
        assert (caught.value.type, caught.value.error_code) == ("timeout_error", "answer_timeout")

    def test_metrics_have_its_code(self, closed: Closed) -> None:
        http, made = closed
        http.post(ROUTE, json={}, headers={"x-api-key": "sk-ant-x"})
        metrics = http.get("/metrics", headers={"x-api-key": made["metrics"]}).text
        assert 'masquerade_errors_total{code="invalid_api_key",method="POST"}' in metrics
