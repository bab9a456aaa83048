"""Texts that go on, and what texts are in tokens."""

from __future__ import annotations

import json

import pytest
from openai import OpenAI

from tests.contract.asking import PARTY, Api, Json, error_of, events_of

ROUTE = "/v1/completions"
PROMPT = "I like"


def complete(api: Api, prompt: object = PROMPT, **fields: object) -> Json:
    """The completion."""
    body = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 12, **fields}
    response = api.http.post(ROUTE, json=body)
    assert response.status_code == 200, response.text
    completion: Json = response.json()
    return completion


def texts(completion: Json) -> list[str]:
    return [choice["text"] for choice in completion["choices"]]


def tokens_of(api: Api, text: str) -> list[int]:
    tokens: list[int] = api.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    return tokens


class TestCompletions:
    def test_a_completion_has_the_shape_of_openais(self, api: Api) -> None:
        completion = complete(api)
        (choice,) = completion["choices"]
        assert completion["object"] == "text_completion"
        assert completion["id"].startswith("cmpl-")
        assert choice.keys() == {"index", "text", "logprobs", "finish_reason"}
        assert (choice["index"], choice["logprobs"]) == (0, None)
        assert completion["usage"]["prompt_tokens"] == len(tokens_of(api, PROMPT))

    def test_it_is_short_unless_told_otherwise(self, api: Api) -> None:
        assert complete(api, max_tokens=None)["usage"]["completion_tokens"] <= 16

    def test_several_prompts_are_answered_in_order(self, api: Api) -> None:
        prompts = ["I like", "You are", "The capital"]
        both = complete(api, prompts, n=2)
        assert [choice["index"] for choice in both["choices"]] == list(range(6))
        assert texts(both) == [text for prompt in prompts for text in texts(complete(api, prompt)) * 2]
        assert both["usage"]["prompt_tokens"] == sum(len(tokens_of(api, prompt)) for prompt in prompts)

    def test_token_ids_are_prompts_too(self, api: Api) -> None:
        ids = [tokens_of(api, prompt) for prompt in ("I like", "You are")]
        assert texts(complete(api, ids)) == texts(complete(api, ["I like", "You are"]))
        assert texts(complete(api, ids[0])) == texts(complete(api, "I like"))

    def test_a_persona_completes_in_its_way(self, api: Api) -> None:
        gloomy, cheerful = (complete(api, "Today I feel", persona=name) for name in ("gloomy", "cheerful"))
        assert texts(gloomy) != texts(cheerful)
        assert (gloomy["model"], gloomy["persona"]) == ("demo:gloomy", "gloomy")

    def test_a_chat_is_the_completion_of_its_tokens(self, api: Api) -> None:
        asked = {"messages": [{"role": "user", "content": PARTY}]}
        ids = api.http.post("/tokenize", json=asked).json()["tokens"]
        assert texts(complete(api, ids, max_tokens=48)) == [api.text()]

    def test_a_stream_says_what_one_piece_says(self, api: Api) -> None:
        body = {"model": "demo", "prompt": ["I like", "You are"], "temperature": 0, "max_tokens": 12, "stream": True}
        with api.http.stream("POST", ROUTE, json={**body, "stream_options": {"include_usage": True}}) as response:
            *events, end = events_of(response)
        *chunks, last = (json.loads(event) for event in events)
        said = ["", ""]
        for chunk in chunks:
            assert chunk["object"] == "text_completion"
            assert chunk["usage"] is None
            (choice,) = chunk["choices"]
            said[choice["index"]] += choice["text"]
        assert said == texts(complete(api, ["I like", "You are"]))
        assert (end, last["choices"]) == ("[DONE]", [])
        assert last["usage"]["completion_tokens"] == complete(api, ["I like", "You are"])["usage"]["completion_tokens"]

    def test_log_probabilities_are_those_of_a_chat_in_the_older_form(self, api: Api) -> None:
        logprobs = complete(api, logprobs=2)["choices"][0]["logprobs"]
        text = texts(complete(api))[0]
        assert "".join(logprobs["tokens"]) == text
        assert logprobs["text_offset"] == [text.index(token, at) for token, at in _places(logprobs["tokens"])]
        for token, logprob, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        ):
            assert top[token] == logprob == max(top.values())
            assert len(top) == 2

    @pytest.mark.parametrize(
        ("fields", "code", "param"),
        [
            ({"echo": "yes"}, "invalid_value", "echo"),
            ({"max_tokens": 0}, "invalid_value", "max_tokens"),
            ({"suffix": " end"}, "unsupported_parameter", "suffix"),
            ({"best_of": 2}, "unsupported_parameter", "best_of"),
            ({"prompt": ""}, "invalid_value", "prompt"),
            ({"prompt": []}, "invalid_value", "prompt"),
            ({"prompt": ["a"] * 65}, "invalid_value", "prompt"),
            ({"prompt": [1, 10**6]}, "invalid_value", "prompt"),
            ({"prompt": [-1]}, "invalid_value", "prompt"),
            ({"prompt": "a " * 2000}, "context_length_exceeded", "prompt"),
            ({"logprobs": True}, "invalid_value", "logprobs"),
            ({"n": True}, "invalid_value", "n"),
        ],
        ids=str,
    )
    def test_what_it_cannot_do_is_refused_by_name(self, api: Api, fields: Json, code: str, param: str) -> None:
        response = api.http.post(ROUTE, json={"model": "demo", "prompt": "I like", **fields})
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (400, code, param)

    @pytest.mark.parametrize("fields", [{"echo": False}, {"suffix": None}, {"suffix": ""}, {"best_of": 1}], ids=str)
    def test_what_asks_for_nothing_is_no_fault(self, api: Api, fields: Json) -> None:
        assert texts(complete(api, **fields)) == texts(complete(api))

    def test_the_sdk_reads_it(self, sdk: OpenAI) -> None:
        completion = sdk.completions.create(model="demo", prompt=PROMPT, max_tokens=4, temperature=0)
        assert completion.choices[0].text
        stream = sdk.completions.create(model="demo", prompt=PROMPT, max_tokens=4, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == completion.choices[0].text


class TestTokens:
    def test_a_text_is_its_tokens_and_they_are_the_text(self, api: Api) -> None:
        answer = api.http.post("/tokenize", json={"prompt": PARTY, "return_token_strs": True}).json()
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        assert answer["max_model_len"] == 512
        assert api.http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": PARTY}

    def test_a_chat_has_as_many_as_its_usage_says(self, api: Api) -> None:
        asked = {"model": "demo", "messages": [{"role": "user", "content": PARTY}]}
        answer = api.http.post("/tokenize", json=asked).json()
        assert answer["token_strs"] is None
        assert answer["count"] == api.chat()["usage"]["prompt_tokens"]

    @pytest.mark.parametrize(
        ("route", "body", "status"),
        [
            ("/tokenize", {}, 400),
            ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400),
            ("/tokenize", {"prompt": 7}, 400),
            ("/tokenize", {"prompt": "a", "model": "gpt-4o"}, 404),
            ("/detokenize", {"tokens": [10**6]}, 400),
            ("/detokenize", {"tokens": [-1]}, 400),
            ("/detokenize", {}, 400),
        ],
        ids=str,
    )
    def test_what_is_wrong_is_refused(self, api: Api, route: str, body: Json, status: int) -> None:
        response = api.http.post(route, json=body)
        assert response.status_code == status
        assert error_of(response)


def _places(tokens: list[str]) -> list[tuple[str, int]]:
    places = [sum(map(len, tokens[:number])) for number in range(len(tokens))]
    return list(zip(tokens, places, strict=True))
