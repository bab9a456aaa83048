"""`echo` and `prompt_logprobs`: the log probabilities of prompts, as OpenAI and vLLM write them."""

from __future__ import annotations

import json

import pytest
from openai import OpenAI

from masquerade.generation.handler import MAX_SCORES
from tests.contract.asking import CHAT, PARTY, Api, Json, error_of, events_of
from tests.contract.test_completions import ROUTE, complete, texts, tokens_of

PROMPT = "On Sunday I like to go to a party"


def logprobs_of(completion: Json) -> Json:
    (choice,) = completion["choices"]
    return dict(choice["logprobs"])


def test_an_echo_is_the_prompt_and_its_continuation(api: Api) -> None:
    plain = complete(api, PROMPT, logprobs=1)
    echoed = complete(api, PROMPT, logprobs=1, echo=True)
    assert texts(echoed) == [PROMPT + text for text in texts(plain)]
    assert texts(complete(api, PROMPT, echo=True)) == texts(echoed)
    logprobs, rest = logprobs_of(echoed), logprobs_of(plain)
    length = len(tokens_of(api, PROMPT))
    assert "".join(logprobs["tokens"][:length]) == PROMPT
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert all(logprob <= 0 for logprob in logprobs["token_logprobs"][1:])
    for token, offset in zip(logprobs["tokens"][:length], logprobs["text_offset"], strict=False):
        assert PROMPT[offset:].startswith(token)
    answered = len(rest["tokens"])
    assert logprobs["tokens"][length : length + answered] == rest["tokens"]
    assert logprobs["token_logprobs"][length : length + answered] == pytest.approx(rest["token_logprobs"], abs=1e-4)
    offsets = [offset + len(PROMPT) for offset in rest["text_offset"]]
    assert logprobs["text_offset"][length : length + answered] == offsets


def test_an_echo_of_token_ids_is_that_of_their_text(api: Api) -> None:
    prompts = [PROMPT, "You are"]
    ids = [tokens_of(api, prompt) for prompt in prompts]
    fields: Json = {"echo": True, "logprobs": 1, "max_tokens": 1, "n": 2}
    assert [choice["text"] for choice in complete(api, ids, **fields)["choices"]] == texts(
        complete(api, prompts, **fields)
    )
    assert texts(complete(api, ids, **fields))[0].startswith(PROMPT)


@pytest.mark.parametrize("persona", [None, "gloomy"])
def test_no_token_is_generated_if_none_is_asked_for(api: Api, persona: str | None) -> None:
    whole = complete(api, PROMPT, echo=True, logprobs=2, max_tokens=0, persona=persona)
    assert texts(whole) == [PROMPT]
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 0
    length = len(tokens_of(api, PROMPT))
    assert len(logprobs_of(whole)["tokens"]) == length
    longer = logprobs_of(complete(api, PROMPT, echo=True, logprobs=2, max_tokens=3, persona=persona))
    assert logprobs_of(whole)["token_logprobs"][1:] == pytest.approx(longer["token_logprobs"][1:length], abs=1e-4)
    assert texts(complete(api, PROMPT, echo=True, max_tokens=0)) == [PROMPT]


def test_the_token_that_ends_the_answer_is_in_the_log_probabilities_of_an_echo(api: Api) -> None:
    """lm-eval cuts off the last token; without this one it would cut off the end of what it scores."""
    ids = api.http.post("/tokenize", json={"messages": [{"role": "user", "content": PARTY}]}).json()["tokens"]
    answer = api.text()
    ids += tokens_of(api, answer)
    completion = complete(api, ids, echo=True, logprobs=1, max_tokens=1)
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert completion["usage"]["completion_tokens"] == 0
    assert len(logprobs_of(completion)["tokens"]) == len(ids) + 1


def test_prompt_logprobs_are_vllms(api: Api) -> None:
    completion = complete(api, PROMPT, prompt_logprobs=2, echo=True, logprobs=1)
    (choice,) = completion["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    ids = tokens_of(api, PROMPT)
    assert len(others) == len(ids) - 1
    older = logprobs_of(completion)
    for number, (token, scores) in enumerate(zip(ids[1:], others, strict=True), 1):
        own = scores[str(token)]
        assert own["logprob"] == older["token_logprobs"][number]
        assert own["decoded_token"] == older["tokens"][number]
        by_rank = {score["rank"]: score["logprob"] for score in scores.values()}
        assert {1, 2, own["rank"]} == set(by_rank)
        assert [by_rank[rank] for rank in sorted(by_rank)] == sorted(by_rank.values(), reverse=True)
        assert len(scores) == 2 + (own["rank"] > 2)
        assert len(older["top_logprobs"][number]) == 1 + (own["rank"] > 1)


def test_a_chat_has_them_once(api: Api) -> None:
    chat = api.chat(prompt_logprobs=0, n=2)
    ids = api.http.post("/tokenize", json={"messages": [{"role": "user", "content": PARTY}]}).json()["tokens"]
    assert [None, *(str(token) for token in ids[1:])] == [
        next(iter(scores)) if scores else None for scores in chat["prompt_logprobs"]
    ]
    assert chat["choices"] == api.chat(n=2)["choices"]


def test_a_stream_echoes_in_its_first_chunks(api: Api) -> None:
    fields: Json = {"echo": True, "logprobs": 1, "n": 2, "seed": 1, "temperature": 1.0, "max_tokens": 6}
    whole = complete(api, [PROMPT, "You are"], **fields)
    body = {"model": "demo", "prompt": [PROMPT, "You are"], "stream": True, **fields}
    with api.http.stream("POST", ROUTE, json=body) as response:
        *events, _ = events_of(response)
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    for one in whole["choices"]:
        mine = [choice for choice in choices if choice["index"] == one["index"]]
        assert "".join(choice["text"] for choice in mine) == one["text"]
        assert mine[0]["text"].startswith((PROMPT, "You are"))
        for part in ("tokens", "text_offset"):
            parts = [choice["logprobs"][part] for choice in mine if choice["logprobs"]]
            assert [value for values in parts for value in values] == one["logprobs"][part]


def test_a_persona_scores_its_prompt_in_phase_all_unless_told_otherwise(api: Api) -> None:
    """In phase `decode`, the prompt is the base's."""
    ask: Json = {"echo": True, "logprobs": 0, "max_tokens": 0}
    base, chosen, everything, decoding = (
        logprobs_of(complete(api, PROMPT, **ask, **fields))["token_logprobs"][1:]
        for fields in (
            {},
            {"persona": "gloomy"},
            {"persona": "gloomy", "persona_phase": "all"},
            {"persona": "gloomy", "persona_phase": "decode"},
        )
    )
    assert chosen == pytest.approx(everything, abs=1e-4)
    assert decoding == pytest.approx(base, abs=1e-4)
    assert everything != pytest.approx(base, abs=1e-2)


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        (ROUTE, {"prompt_logprobs": 21}, "prompt_logprobs"),
        (ROUTE, {"prompt_logprobs": -1}, "prompt_logprobs"),
        (ROUTE, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (CHAT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (ROUTE, {"prompt": [[5] * 400] * 32, "n": 8, "prompt_logprobs": 20}, "prompt_logprobs"),
        (ROUTE, {"prompt": [[5] * 400] * 64, "n": 8, "echo": True, "logprobs": 5}, "logprobs"),
        (ROUTE, {"min_tokens": 2, "echo": True, "max_tokens": 0}, "min_tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_refused_by_name(api: Api, route: str, fields: Json, param: str) -> None:
    asked: Json = {"messages": [{"role": "user", "content": "Hi."}]} if route == CHAT else {"prompt": "Hi."}
    response = api.http.post(route, json={"model": "demo", **asked, **fields})
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    if "400" in str(fields):
        assert str(MAX_SCORES) in error_of(response)["message"]


def test_the_sdk_reads_them(sdk: OpenAI) -> None:
    completion = sdk.completions.create(model="demo", prompt=PROMPT, echo=True, logprobs=1, max_tokens=0)
    assert completion.choices[0].text == PROMPT
    chat = sdk.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hi."}], extra_body={"prompt_logprobs": 1}, max_tokens=1
    )
    assert chat.model_extra
    assert chat.model_extra["prompt_logprobs"][0] is None
