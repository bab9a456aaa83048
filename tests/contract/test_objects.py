"""Answers and chunks, whose JSON is written by hand, match the models that describe them, and the SDK's types."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types import chat as sdk
from pydantic import BaseModel, ValidationError

from masquerade.openai.objects import (
    CHAT_CHUNK,
    TEXT_CHUNK,
    ChatCompletion,
    ChatCompletionChunk,
    TextCompletion,
    TextCompletionChunk,
)
from tests.contract.asking import CHAT, Api, Json, body, events_of

COMPLETIONS = "/v1/completions"
CLOCK: Json = {"type": "function", "function": {"name": "clock"}}
CHATS: dict[str, Json] = {
    "the base": {},
    "a persona": {"persona": "introvert"},
    "choices with logprobs": {"n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 5},
    "a truncated answer": {"max_tokens": 1},
    "a call": {"tools": [CLOCK], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 100},
    "JSON": {"response_format": {"type": "json_object"}, "max_tokens": 20},
}
SCORED: Json = {"prompt_logprobs": 2, "logprobs": 1, "echo": True, "max_tokens": 0}
TEXTS: dict[str, Json] = {
    "the base": {},
    "prompts with logprobs": {"prompt": ["I like", "You are"], "n": 2, "logprobs": 2, "persona": "gloomy"},
}


def check(model: type[BaseModel], content: Json) -> None:
    """Valid, and with each field that the model requires and no other."""
    assert model.model_validate_json(json.dumps(content), strict=True).model_dump(exclude_unset=True) == content


def ask(api: Api, route: str, request: Json) -> Json:
    response = api.http.post(route, json=request)
    assert response.status_code == 200, response.text
    completion: Json = response.json()
    return completion


def stream(api: Api, route: str, request: Json) -> list[Json]:
    streamed = request | {"stream": True, "stream_options": {"include_usage": True}}
    with api.http.stream("POST", route, json=streamed) as response:
        *events, _ = events_of(response)
    return [json.loads(event) for event in events]


def text_request(fields: Json) -> Json:
    return {"model": "demo", "prompt": "I like", "max_tokens": 5, **fields}


@pytest.mark.parametrize("fields", CHATS.values(), ids=CHATS)
def test_a_chat_completion_matches_its_model(api: Api, fields: Json) -> None:
    completion = ask(api, CHAT, body(**fields))
    check(ChatCompletion, completion)
    assert bool(completion["choices"][0]["message"].get("tool_calls")) == ("tools" in fields)
    sdk.ChatCompletion.model_validate(completion)


@pytest.mark.parametrize("fields", CHATS.values(), ids=CHATS)
def test_every_chunk_of_a_chat_matches_its_model(api: Api, fields: Json) -> None:
    chunks = stream(api, CHAT, body(**fields))
    assert len(chunks) > 2
    for chunk in chunks:
        check(ChatCompletionChunk, chunk)
        sdk.ChatCompletionChunk.model_validate(chunk)
    assert chunks[-1]["usage"]


@pytest.mark.parametrize("fields", TEXTS.values(), ids=TEXTS)
def test_a_text_completion_matches_its_model(api: Api, fields: Json) -> None:
    completion = ask(api, COMPLETIONS, text_request(fields))
    check(TextCompletion, completion)
    Completion.model_validate(completion)


def test_log_probabilities_of_prompts_match_their_models(api: Api) -> None:
    chat = ask(api, CHAT, body(prompt_logprobs=1))
    check(ChatCompletion, chat)
    sdk.ChatCompletion.model_validate(chat)
    text = ask(api, COMPLETIONS, text_request(SCORED))
    check(TextCompletion, text)
    assert chat["prompt_logprobs"][0] is None is text["choices"][0]["prompt_logprobs"][0]
    for chunk in stream(api, COMPLETIONS, text_request({"echo": True, "logprobs": 1})):
        check(TextCompletionChunk, chunk)


@pytest.mark.parametrize("fields", TEXTS.values(), ids=TEXTS)
def test_every_chunk_of_a_text_matches_its_model(api: Api, fields: Json) -> None:
    chunks = stream(api, COMPLETIONS, text_request(fields))
    assert len(chunks) > 2
    for chunk in chunks:
        check(TextCompletionChunk, chunk)
    assert chunks[-1]["usage"]


@pytest.mark.parametrize(
    "change", [{"surprise": 1}, {"created": "now"}, {"choices": None}, {"object": "text_completion"}], ids=str
)
def test_a_chunk_of_another_form_is_noticed(api: Api, change: dict[str, Any]) -> None:
    chunk = api.chunks()[0]
    with pytest.raises(ValidationError):
        check(ChatCompletionChunk, chunk | change)


def test_the_examples_of_chunks_in_the_description_are_chunks(api: Api) -> None:
    check(ChatCompletionChunk, api.chunks()[1] | CHAT_CHUNK)
    check(TextCompletionChunk, ask(api, COMPLETIONS, text_request({})) | TEXT_CHUNK)
