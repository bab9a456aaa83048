"""Chat completions piece by piece."""

from __future__ import annotations

import json

import pytest
from openai import OpenAI

from tests.contract.asking import (
    CHAT,
    PARTY,
    PERSONAS,
    QUESTIONS,
    Api,
    Json,
    body,
    counts,
    error_of,
    events_of,
    text_of,
)


def test_a_stream_is_labelled_as_one_and_not_buffered(api: Api) -> None:
    with api.http.stream("POST", CHAT, json=body(stream=True)) as response:
        response.read()
    assert response.headers["content-type"].split(";")[0] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"]


def test_events_end_where_clients_expect_it(api: Api) -> None:
    """Some clients split text at more characters than line feeds."""
    prompt = "I\x85like\u2028you\u2029"
    asked = {"model": "demo", "prompt": prompt, "echo": True, "max_tokens": 1, "stream": True}
    with api.http.stream("POST", "/v1/completions", json=asked) as response:
        *chunks, end = events_of(response)
    assert end == "[DONE]"
    assert json.loads(chunks[0])["choices"][0]["text"].startswith(prompt)


def test_every_chunk_belongs_to_the_same_answer(api: Api) -> None:
    chunks = api.chunks()
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["id"].startswith("chatcmpl-")


def test_every_chunk_has_the_one_choice(api: Api) -> None:
    assert [[choice["index"] for choice in chunk["choices"]] for chunk in api.chunks()] == [[0]] * len(api.chunks())


def test_the_role_comes_first_and_once(api: Api) -> None:
    roles = [chunk["choices"][0]["delta"].get("role") for chunk in api.chunks()]
    assert roles == ["assistant"] + [None] * (len(roles) - 1)


def test_the_last_delta_is_empty_and_says_why(api: Api) -> None:
    *before, last = (chunk["choices"][0] for chunk in api.chunks(max_tokens=200))
    assert last["delta"] == {}
    assert last["finish_reason"] == "stop"
    assert {choice["finish_reason"] for choice in before} == {None}


def test_a_stream_that_is_cut_says_so(api: Api) -> None:
    assert api.chunks(max_tokens=3)[-1]["choices"][0]["finish_reason"] == "length"


def test_text_comes_in_more_than_one_piece(api: Api) -> None:
    assert sum(bool(chunk["choices"][0]["delta"].get("content")) for chunk in api.chunks()) > 3


def test_usage_is_the_last_chunk_when_asked_for(api: Api) -> None:
    *before, last = api.chunks(stream_options={"include_usage": True})
    assert last["choices"] == []
    assert counts(last["usage"]) == counts(api.chat()["usage"])
    assert last["id"] == before[0]["id"]
    assert {chunk["usage"] for chunk in before} == {None}


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}], ids=str)
def test_usage_is_absent_when_not_asked_for(api: Api, options: Json | None) -> None:
    assert not any(chunk.get("usage") for chunk in api.chunks(stream_options=options))


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("persona", [None, "introvert"])
def test_a_stream_says_what_one_piece_says(api: Api, question: str, persona: str | None) -> None:
    assert api.streamed(question, persona=persona) == api.text(question, persona=persona)


def test_the_first_chunk_names_the_persona(api: Api) -> None:
    with api.http.stream("POST", CHAT, json=body(stream=True, persona="introvert")) as response:
        response.read()
    first = api.chunks(persona="introvert")[0]
    assert (first["model"], first["persona"]) == ("demo:introvert", "introvert")
    assert first["generation"] == api.chat(persona="introvert")["generation"]
    assert response.headers["X-Persona-Generation"] == first["generation"]


def test_the_base_streams_without_persona(api: Api) -> None:
    first = api.chunks()[0]
    assert (first["model"], first["persona"], first["generation"]) == ("demo", None, None)


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"persona": "nobody"}, 404, "persona_not_found"),
        ({"model": "nothing"}, 404, "model_not_found"),
        ({"messages": []}, 400, "invalid_value"),
        ({"max_tokens": 1_000_000}, 400, "context_length_exceeded"),
    ],
)
def test_a_refusal_comes_before_the_stream(api: Api, fields: Json, status: int, code: str) -> None:
    response = api.post(stream=True, **fields)
    assert response.status_code == status
    assert error_of(response)["code"] == code


def test_all_personas_stream_at_once(api: Api) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(PERSONAS)) as pool:
        streamed = list(pool.map(lambda persona: api.streamed(persona=persona), PERSONAS))
    assert streamed == [api.text(persona=persona) for persona in PERSONAS]


def test_the_sdk_reads_a_stream(sdk: OpenAI, api: Api) -> None:
    with sdk.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": PARTY}],
        temperature=0,
        max_tokens=48,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"persona": "introvert"},
    ) as stream:
        chunks = list(stream)
    assert text_of([chunk.model_dump() for chunk in chunks]) == api.text(persona="introvert")
    assert chunks[0].model_extra is not None
    assert chunks[0].model_extra["persona"] == "introvert"
    assert chunks[-1].usage is not None
    whole = api.chat(persona="introvert")["usage"]
    assert counts(chunks[-1].usage.model_dump(exclude_none=True)) == counts(whole)
