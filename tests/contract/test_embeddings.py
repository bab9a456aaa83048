"""Texts as vectors, over HTTP and through the SDK. The numbers are checked by tests/engine/test_embedding.py."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from openai import NotFoundError, OpenAI

from masquerade.openai.objects import EmbeddingList
from tests.contract.asking import PARTY, PERSONAS, Api, Json, error_of

ROUTE = "/v1/embeddings"
TEXTS = [PARTY, "A party tonight would be fun.", "The capital of France is Paris."]
CLOSE = 1e-5


def embed(api: Api, given: object = PARTY, **fields: object) -> Json:
    """The list of embeddings."""
    response = api.http.post(ROUTE, json={"model": "demo", "input": given, **fields})
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def vectors(answer: Json) -> np.ndarray:
    return np.array([one["embedding"] for one in answer["data"]])


def tokens_of(api: Api, text: str) -> list[int]:
    tokens: list[int] = api.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    return tokens


def test_the_answer_has_the_form_of_openais_and_vectors_of_length_1(api: Api) -> None:
    answer = embed(api, TEXTS)
    assert EmbeddingList.model_validate_json(json.dumps(answer), strict=True).model_dump() == answer
    assert [one["index"] for one in answer["data"]] == [0, 1, 2]
    tokens = sum(len(tokens_of(api, text)) for text in TEXTS)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert answer["pooling"] == "mean"
    assert np.allclose(np.linalg.norm(vectors(answer), axis=1), 1, atol=CLOSE)


def test_the_sdk_reads_it_in_base64_and_as_numbers(sdk: OpenAI, api: Api) -> None:
    in_base64 = sdk.embeddings.create(model="demo", input=TEXTS)  # its default is base64, which it decodes
    as_numbers = sdk.embeddings.create(model="demo", input=TEXTS, encoding_format="float")
    for one, other in zip(in_base64.data, as_numbers.data, strict=True):
        assert np.allclose(one.embedding, other.embedding, atol=CLOSE)
    raw = embed(api, PARTY, encoding_format="base64")["data"][0]["embedding"]
    assert np.allclose(np.frombuffer(base64.b64decode(raw), "<f4"), in_base64.data[0].embedding, atol=CLOSE)


def test_every_form_of_an_input_has_the_same_vector(api: Api) -> None:
    ids = tokens_of(api, PARTY)
    answers = [embed(api, given) for given in (PARTY, [PARTY], ids, [ids])]
    for answer in answers[1:]:
        assert np.allclose(vectors(answer), vectors(answers[0]), atol=CLOSE)


def test_poolings_differ_and_for_one_token_agree(api: Api) -> None:
    mean, last = (vectors(embed(api, pooling=pooling)) for pooling in ("mean", "last"))
    assert np.abs(mean - last).max() > 0.01
    ids = tokens_of(api, PARTY)[:1]
    mean, last = (vectors(embed(api, ids, pooling=pooling)) for pooling in ("mean", "last"))
    assert np.allclose(mean, last, atol=CLOSE)


def test_a_persona_sees_a_text_differently_and_gamma_1_is_the_base(api: Api) -> None:
    base = vectors(embed(api))
    by_name = embed(api, persona="gloomy", gamma=0.0)
    assert np.abs(vectors(by_name) - base).max() > 1e-3
    by_model = embed(api, model="demo:gloomy", gamma=0.0)
    assert np.allclose(vectors(by_model), vectors(by_name), atol=CLOSE)
    assert (by_name["model"], by_name["persona"], by_name["gamma"]) == ("demo:gloomy", "gloomy", 0.0)
    assert by_name["generation"]
    assert np.allclose(vectors(embed(api, persona="gloomy", gamma=1.0)), base, atol=CLOSE)
    response = api.http.post(ROUTE, json={"model": "demo", "input": PARTY}, headers={"X-Persona": "gloomy"})
    assert response.json()["persona"] == "gloomy"
    assert response.headers["X-Persona-Generation"] == by_name["generation"]


def test_many_inputs_are_in_order_beside_chats_and_other_personas(api: Api) -> None:
    texts = [f"{PARTY} {number}" for number in range(70)]  # more than are in the engine at a time
    whole = vectors(embed(api, texts))

    def one(persona: str) -> np.ndarray:
        return vectors(embed(api, texts[:9], persona=persona))

    alone = [one(persona) for persona in PERSONAS]
    with ThreadPoolExecutor(len(PERSONAS) + 2) as pool:
        chats = [pool.submit(api.text) for _ in range(2)]
        together = list(pool.map(one, PERSONAS))
    assert len({chat.result() for chat in chats}) == 1
    for single, crowded in zip(alone, together, strict=True):
        assert np.allclose(single, crowded, atol=CLOSE)
    for index in (0, 31, 32, 69):
        assert np.allclose(vectors(embed(api, texts[index])), whole[index], atol=CLOSE)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": ""}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": ["a", ""]}, "invalid_value", "input"),
        ({"input": ["a"] * 2049}, "invalid_value", "input"),
        ({"input": [1, 10**6]}, "invalid_value", "input"),
        ({"input": [-1]}, "invalid_value", "input"),
        ({"input": 7}, "invalid_value", "input"),
        ({"input": [[1], "a"]}, "invalid_value", "input"),
        ({"input": "a " * 2000}, "context_length_exceeded", "input"),
        ({"dimensions": 3}, "unsupported_parameter", "dimensions"),
        ({"dimensions": 0}, "invalid_value", "dimensions"),
        ({"encoding_format": "int8"}, "invalid_value", "encoding_format"),
        ({"pooling": "max"}, "invalid_value", "pooling"),
        ({"persona": "gloomy", "persona_phase": "decode"}, "invalid_value", "persona_phase"),
        ({"gamma": 0.5}, "invalid_value", "gamma"),
        ({"normalize": False}, "unsupported_parameter", "normalize"),
        ({"model": "demo:gloomy", "persona": "formal"}, "persona_conflict", "persona"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_it_cannot_do_is_refused_by_name(api: Api, fields: Json, code: str, param: str) -> None:
    response = api.http.post(ROUTE, json={"model": "demo", "input": PARTY, **fields})
    error = error_of(response)
    assert response.status_code == 400
    assert error["code"] == code
    assert str(error["param"]).startswith(param)


def test_names_that_do_not_exist_are_404(api: Api, sdk: OpenAI) -> None:
    with pytest.raises(NotFoundError):
        sdk.embeddings.create(model="gpt-4o", input=PARTY)
    response = api.http.post(ROUTE, json={"model": "demo", "input": PARTY, "persona": "nobody"})
    assert (response.status_code, error_of(response)["code"]) == (404, "persona_not_found")


def test_the_hidden_size_is_a_dimension(api: Api) -> None:
    size = vectors(embed(api)).shape[1]
    assert vectors(embed(api, dimensions=size)).shape[1] == size


def test_a_server_with_one_place_embeds_many_and_answers_after_a_client_that_left(narrow: httpx.Client) -> None:
    body = {"model": "rambler", "input": [f"text {number}" for number in range(80)]}
    assert len(narrow.post(ROUTE, json=body).json()["data"]) == 80
    with pytest.raises(httpx.ReadTimeout):
        narrow.post(ROUTE, json=body | {"input": ["long " * 1500] * 2}, timeout=0.2)
    assert narrow.post(ROUTE, json=body | {"input": "short"}).status_code in (200, 429)
