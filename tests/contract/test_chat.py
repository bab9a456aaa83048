"""Chat completions in one piece: what OpenAI's clients expect, and what personas add."""

from __future__ import annotations

import time

import pytest
from openai import OpenAI

from tests.contract.asking import PARTY, QUESTIONS, Api, Json

USER: list[Json] = [{"role": "user", "content": PARTY}]


def test_a_completion_has_the_shape_of_openais(api: Api) -> None:
    completion = api.chat()
    (choice,) = completion["choices"]
    assert completion["object"] == "chat.completion"
    assert completion["id"].startswith("chatcmpl-")
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert choice["logprobs"] is None


def test_every_completion_has_an_id_of_its_own(api: Api) -> None:
    assert api.chat()["id"] != api.chat()["id"]


def test_created_is_now(api: Api) -> None:
    assert api.chat()["created"] == pytest.approx(time.time(), abs=60)


def test_usage_adds_up(api: Api) -> None:
    usage = api.chat()["usage"]
    assert usage["prompt_tokens"] > 0
    assert usage["completion_tokens"] > 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_longer_prompt_has_more_tokens(api: Api) -> None:
    short, long = api.chat("Hi."), api.chat("Hi. " + PARTY)
    assert short["usage"]["prompt_tokens"] < long["usage"]["prompt_tokens"]


def test_an_answer_that_ends_by_itself_stops(api: Api) -> None:
    completion = api.chat(max_tokens=200)
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert completion["usage"]["completion_tokens"] < 200


def test_an_answer_that_is_cut_has_all_its_tokens(api: Api) -> None:
    completion = api.chat(max_tokens=3)
    assert completion["choices"][0]["finish_reason"] == "length"
    assert completion["usage"]["completion_tokens"] == 3


def test_an_answer_needs_no_limit(api: Api) -> None:
    assert api.chat(max_tokens=None)["choices"][0]["finish_reason"] == "stop"


def test_max_completion_tokens_wins_over_max_tokens(api: Api) -> None:
    assert api.chat(max_tokens=20, max_completion_tokens=2)["usage"]["completion_tokens"] == 2


def test_special_tokens_are_not_shown(api: Api) -> None:
    text = api.text(max_tokens=200)
    assert "<" not in text
    assert text == text.strip()


def test_greedy_answers_repeat(api: Api) -> None:
    assert api.text() == api.text()


def test_developer_is_another_word_for_system(api: Api) -> None:
    def told(role: str) -> str:
        return api.text(messages=[{"role": role, "content": "You are an extravert."}, *USER])

    assert told("developer") == told("system")


def test_a_system_message_is_read(api: Api) -> None:
    def told(system: str) -> str:
        return api.text(messages=[{"role": "system", "content": system}, *USER])

    assert told("You are an extravert.") != told("You are an introvert.")


def test_content_may_be_a_list_of_text_parts(api: Api) -> None:
    parts = [{"type": "text", "text": PARTY}]
    assert api.text(messages=[{"role": "user", "content": parts}]) == api.text(PARTY)


def test_a_chat_may_have_a_history(api: Api) -> None:
    history = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I keep to myself."}]
    assert api.chat(messages=[*history, *USER])["usage"]["prompt_tokens"] > api.chat()["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u"},
        {"store": True},
        {"metadata": {"a": "b"}},
        {"service_tier": "auto"},
        {"prompt_cache_key": "k"},
        {"safety_identifier": "s"},
        {"verbosity": "low"},
        {"reasoning_effort": "low"},
        {"reasoning": {"effort": "low"}},
        {"never_heard_of": [1, {"a": None}]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_harmless_fields_are_ignored(api: Api, fields: Json) -> None:
    assert api.text(**fields) == api.text()


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"stop": None},
        {"logprobs": False},
        {"logit_bias": None},
        {"tools": None},
        {"tool_choice": None},
        {"response_format": {"type": "text"}},
        {"presence_penalty": 0},
        {"frequency_penalty": 0.0},
        {"stream": False},
        {"stream": None},
        {"temperature": None, "top_k": 1},
        {"top_p": 1},
        {"seed": None},
        {"persona": None},
        {"gamma": None},
        {"persona_phase": None},
    ],
    ids=str,
)
def test_saying_nothing_in_many_words_changes_nothing(api: Api, fields: Json) -> None:
    assert api.text(**fields) == api.text()


def test_temperature_zero_takes_the_likeliest_token_as_top_k_one_does(api: Api) -> None:
    assert api.text(temperature=1.5, top_k=1, seed=3) == api.text(temperature=0)


def test_every_answer_has_a_request_id(api: Api) -> None:
    first, second = api.post(), api.post(persona="nobody")
    assert first.headers["x-request-id"]
    assert second.headers["x-request-id"]
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


def test_a_sane_request_id_comes_back(api: Api) -> None:
    response = api.http.get("/v1/models", headers={"X-Request-Id": "trace-12.a_b"})
    assert response.headers["x-request-id"] == "trace-12.a_b"


def test_an_insane_request_id_does_not_come_back(api: Api) -> None:
    response = api.http.get("/v1/models", headers={"X-Request-Id": "x" * 5000})
    assert 0 < len(response.headers["x-request-id"]) < 200


class TestPersona:
    def test_the_answer_names_the_model_that_was_asked(self, api: Api) -> None:
        assert api.chat()["model"] == "demo"

    @pytest.mark.parametrize("fields", [{"persona": "introvert"}, {"model": "demo:introvert"}], ids=["field", "model"])
    def test_the_answer_names_model_and_persona(self, api: Api, fields: Json) -> None:
        completion = api.chat(**fields)
        assert (completion["model"], completion["persona"]) == ("demo:introvert", "introvert")

    def test_the_generation_is_a_digest(self, api: Api) -> None:
        generation = api.chat(persona="introvert")["generation"]
        assert len(bytes.fromhex(generation)) == 32

    def test_the_header_holds_the_generation(self, api: Api) -> None:
        response = api.post(persona="introvert")
        assert response.headers["X-Persona-Generation"] == response.json()["generation"]

    def test_two_personas_are_two_generations(self, api: Api) -> None:
        assert api.chat(persona="introvert")["generation"] != api.chat(persona="extravert")["generation"]

    def test_the_base_has_no_persona(self, api: Api) -> None:
        response = api.post()
        assert (response.json()["persona"], response.json()["generation"]) == (None, None)
        assert "X-Persona-Generation" not in response.headers

    def test_field_and_model_apply_the_same_mask(self, api: Api) -> None:
        assert api.text(persona="introvert") == api.text(model="demo:introvert")

    def test_field_and_model_may_agree(self, api: Api) -> None:
        assert api.text(model="demo:introvert", persona="introvert") == api.text(persona="introvert")

    def test_opposite_personas_answer_differently(self, api: Api) -> None:
        for question in QUESTIONS:
            assert api.text(question, persona="introvert") != api.text(question, persona="extravert")

    @pytest.mark.parametrize("persona", ["introvert", "extravert"])
    def test_a_persona_answers_differently_from_the_base_somewhere(self, api: Api, persona: str) -> None:
        assert any(api.text(question, persona=persona) != api.text(question) for question in QUESTIONS)

    def test_a_header_is_the_weakest_way_to_name_a_persona(self, api: Api) -> None:
        def named(**fields: str) -> object:
            response = api.http.post(
                "/v1/chat/completions",
                json={"model": "demo", "messages": USER, "max_tokens": 1, **fields},
                headers={"X-Persona": "introvert"},
            )
            return response.json()["persona"]

        assert named() == "introvert"
        assert named(persona="extravert") == "extravert"
        assert named(model="demo:extravert") == "extravert"

    def test_a_version_can_be_asked_for(self, api: Api) -> None:
        plain = api.chat(persona="introvert")
        pinned = api.chat(model=f"demo:introvert@{plain['generation'][:8]}")
        assert (pinned["persona"], pinned["generation"]) == ("introvert", plain["generation"])
        assert pinned["choices"] == plain["choices"]

    def test_the_fingerprint_names_base_and_mask(self, api: Api) -> None:
        prints = [api.chat(**fields)["system_fingerprint"] for fields in ({}, {}, {"persona": "introvert"})]
        assert prints[0]
        assert prints[0] == prints[1] != prints[2]

    def test_all_personas_at_once_answer_as_each_alone(self, api: Api) -> None:
        personas = [None, "introvert", "extravert", "formal", "casual", "gloomy", "cheerful", None]
        requests: list[Json] = [{"persona": persona} for persona in personas]
        assert api.texts(requests) == [api.text(**fields) for fields in requests]


class TestGamma:
    def test_one_is_the_base(self, api: Api) -> None:
        for question in QUESTIONS:
            assert api.text(question, persona="extravert", gamma=1) == api.text(question)

    def test_zero_is_the_whole_mask(self, api: Api) -> None:
        assert api.text(persona="introvert", gamma=0) != api.text(persona="extravert", gamma=0)

    def test_a_gamma_between_is_accepted(self, api: Api) -> None:
        assert api.text(persona="introvert", gamma=0.3)


class TestPhase:
    @pytest.mark.parametrize("phase", ["all", "decode"])
    def test_a_mask_works_in_either_phase(self, api: Api, phase: str) -> None:
        sides = [api.text(persona=side, persona_phase=phase) for side in ("introvert", "extravert")]
        assert sides[0] != sides[1]


class TestSdk:
    def test_a_persona_in_extra_body(self, sdk: OpenAI, api: Api) -> None:
        completion = sdk.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": PARTY}],
            temperature=0,
            max_tokens=48,
            extra_body={"persona": "introvert"},
        )
        assert completion.choices[0].message.content == api.text(persona="introvert")
        assert completion.model == "demo:introvert"
        assert completion.model_extra is not None
        assert completion.model_extra["persona"] == "introvert"
        assert len(completion.model_extra["generation"]) == 64

    def test_a_persona_in_the_model(self, sdk: OpenAI, api: Api) -> None:
        completion = sdk.chat.completions.create(
            model="demo:introvert",
            messages=[{"role": "user", "content": PARTY}],
            temperature=0,
            max_tokens=48,
        )
        assert completion.choices[0].message.content == api.text(persona="introvert")
        assert completion.choices[0].finish_reason in ("stop", "length")
        assert completion.usage is not None
        assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
