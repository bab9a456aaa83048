"""Refusals: the status, and OpenAI's body with type, code and param."""

from __future__ import annotations

import json
import re

import openai
import pytest
from openai import OpenAI

from masquerade.generation.messages import MAX_MESSAGES
from tests.contract.asking import CHAT, PARTY, Api, Json, body, error_of

USER = {"role": "user", "content": "Hi."}


def facts(api: Api, **fields: object) -> tuple[int, str, str, str]:
    """Status, type, code and param of a refused chat."""
    response = api.post(**fields)  # type: ignore[arg-type]
    error = error_of(response)
    return response.status_code, error["type"], error["code"], error["param"]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"persona": "pirate"}, "persona_not_found", "persona"),
        ({"persona": "Introvert"}, "persona_not_found", "persona"),
        ({"persona": ""}, "persona_not_found", "persona"),
        ({"persona": "../introvert"}, "persona_not_found", "persona"),
        ({"persona": "p" * 10_000}, "persona_not_found", "persona"),
        ({"model": "demo:pirate"}, "model_not_found", "model"),
        ({"model": "demo:introvert@00000000"}, "model_not_found", "model"),
        ({"model": "gpt-4o"}, "model_not_found", "model"),
        ({"model": "gpt-4o:introvert"}, "model_not_found", "model"),
        ({"model": "demo:"}, "model_not_found", "model"),
        ({"model": "demo::introvert"}, "model_not_found", "model"),
        ({"model": ""}, "model_not_found", "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_there_is_never_replaced_by_the_base(api: Api, fields: Json, code: str, param: str) -> None:
    assert facts(api, **fields) == (404, "not_found_error", code, param)


@pytest.mark.parametrize(
    ("persona", "named"),
    [
        ("pirate", "no persona 'pirate'"),
        ("pirate@00000000", "no persona pirate"),
        ("introvert@00000000", "no generation introvert@00000000"),
        ("Introvert", "no persona 'Introvert', which is not a name"),
    ],
)
def test_an_unknown_persona_is_named_once_beside_those_that_there_are(api: Api, persona: str, named: str) -> None:
    message = error_of(api.post(persona=persona))["message"]
    assert named in message
    assert message.count("pirate") <= 1
    assert "casual, cheerful, extravert, formal, gloomy, introvert, power_averse, power_seeking;" in message
    assert "POST /v1/personas" in message


def test_an_unknown_persona_in_the_header_is_not_found_either(api: Api) -> None:
    response = api.http.post(CHAT, json=body(), headers={"X-Persona": "pirate"})
    assert response.status_code == 404
    assert error_of(response)["code"] == "persona_not_found"


def test_a_header_that_is_there_twice_is_a_conflict(api: Api) -> None:
    for names, status in ((("introvert", "extravert"), 400), (("introvert", "introvert"), 200)):
        response = api.http.post(CHAT, json=body(), headers=[("X-Persona", name) for name in names])
        assert response.status_code == status
    response = api.http.post(CHAT, json=body(), headers=[("X-Persona", "introvert"), ("X-Persona", "extravert")])
    assert error_of(response)["code"] == "persona_conflict"


def test_two_different_personas_are_a_conflict(api: Api) -> None:
    fields = {"model": "demo:introvert", "persona": "extravert"}
    assert facts(api, **fields) == (400, "invalid_request_error", "persona_conflict", "persona")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "Hi."}, "messages"),
        ({"messages": ["Hi."]}, "messages.0"),
        ({"messages": [USER] * (MAX_MESSAGES + 1)}, "messages"),
        ({"messages": [{"role": "pirate", "content": "Hi."}]}, "messages.0.role"),
        ({"messages": [USER, {"role": 7, "content": "Hi."}]}, "messages.1.role"),
        ({"messages": [{"content": "Hi."}]}, "messages.0.role"),
        ({"messages": [USER, {"role": "user"}]}, "messages.1.content"),
        ({"model": 7}, "model"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": [1]}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": "most"}, "top_p"),
        ({"top_k": "few"}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": 10**400}, "top_k"),
        ({"seed": 10**4000, "n": 2}, "seed"),
        ({"max_tokens": 10**4000}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"seed": "lucky"}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stream": "perhaps"}, "stream"),
        ({"stream": True, "stream_options": 7}, "stream_options"),
        ({"persona": 7}, "persona"),
        ({"persona": ["introvert"]}, "persona"),
        ({"persona": "introvert", "gamma": -0.01}, "gamma"),
        ({"persona": "introvert", "gamma": 1.01}, "gamma"),
        ({"persona": "introvert", "gamma": "half"}, "gamma"),
        ({"persona": "introvert", "persona_phase": "prefill"}, "persona_phase"),
        ({"persona": "introvert", "persona_phase": 1}, "persona_phase"),
        ({"gamma": 1.01}, "gamma"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 1.5}, "n"),
        ({"stop": 7}, "stop"),
        ({"stop": [7]}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 49}, "min_tokens"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
            "response_format",
        ),
    ],
    ids=lambda value: str(value)[:80],
)
def test_a_wrong_value_is_refused_by_name(api: Api, fields: Json, param: str) -> None:
    assert facts(api, **fields) == (400, "invalid_request_error", "invalid_value", param)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal"])
def test_a_content_part_that_is_not_text_is_refused_by_its_place(api: Api, kind: str) -> None:
    part = {"type": kind, kind: {}}
    response = api.post(messages=[{"role": "user", "content": [{"type": "text", "text": "Hi."}, part]}])
    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "unsupported_parameter")
    assert error["param"] == "messages.0.content.1.type"
    assert kind in error["message"]


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_missing_field_is_refused_by_name(api: Api, missing: str) -> None:
    fields = body()
    del fields[missing]
    response = api.http.post(CHAT, json=fields)
    error = error_of(response)
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", missing)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "gamma"])
def test_a_number_that_is_none_is_refused(api: Api, field: str, number: str) -> None:
    content = f'{{"model": "demo", "messages": [{{"role": "user", "content": "Hi."}}], "{field}": {number}}}'
    response = api.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'"Hi."', b"[]", b"null", b'{"model": "demo",}'], ids=repr)
def test_a_body_that_is_no_json_object_is_refused(api: Api, content: bytes) -> None:
    response = api.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_text_that_is_no_unicode_is_refused_by_its_place(api: Api) -> None:
    content = '{"model": "demo", "messages": [{"role": "user", "content": "Hi \\ud800"}]}'
    response = api.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, "messages.0.content")


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        (CHAT, {"user": "\ud83d"}, "user"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"\ud83d": 1}}}]}, "tools.0."),
        ("/v1/messages", {"tools": [{"name": "f", "input_schema": {"title": "\ud83d"}}]}, "tools.0.input_schema."),
        ("/v1/responses", {"tools": [{"type": "function", "name": "f", "parameters": {"maximum": 1e999}}]}, "tools.0."),
    ],
)
def test_so_is_what_no_schema_describes(api: Api, route: str, fields: Json, param: str) -> None:
    """Half of a surrogate pair, or a number beyond all, could be neither rendered nor sent back."""
    response = api.http.post(route, content=json.dumps(fields), headers={"Content-Type": "application/json"})
    error = error_of(response) if route != "/v1/messages" else response.json()["error"]["details"]
    assert response.status_code == 400
    assert error["param"].startswith(param)


def test_arguments_with_half_a_pair_stay_in_the_history(api: Api) -> None:
    """A model that is cut off in the middle of a character writes such."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"mood": "\\ud83d"}'}}
    assert api.post(messages=[USER, {"role": "assistant", "tool_calls": [call]}, USER]).status_code == 200


def test_a_name_that_looks_like_a_number_is_none(api: Api) -> None:
    response = api.http.post("/v1/responses", json={"model": "demo", "input": "Hi.", "metadata": {"²": 1}})
    assert response.status_code == 400


def test_a_deeply_nested_body_is_refused(api: Api) -> None:
    content = b'{"messages": ' + b"[" * 100_000
    response = api.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_a_body_of_another_type_is_refused(api: Api) -> None:
    response = api.http.post(CHAT, content=b"model=demo", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/v1/nothing", "/nothing", "/v1/chat", "/v1/chat/completions/x"])
def test_an_unknown_route_is_not_found(api: Api, path: str) -> None:
    response = api.http.post(path, json=body())
    assert response.status_code == 404
    assert error_of(response)["type"] == "not_found_error"


def test_a_wrong_method_is_refused_with_the_right_ones(api: Api) -> None:
    response = api.http.get(CHAT)
    assert response.status_code == 405
    assert error_of(response)["type"] == "invalid_request_error"
    assert response.headers["allow"] == "POST"
    allowed = {
        "/v1/files": "GET, POST",
        "/v1/personas/introvert": "DELETE, GET, PATCH",
        "/v1/personas/a/pin": "DELETE, PUT",
    }
    assert {path: api.http.options(path).headers["allow"] for path in allowed} == allowed


class TestContext:
    OPENING = "This model's maximum context length is"

    def numbers(self, message: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", message)]

    def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(self, api: Api) -> None:
        response = api.post(PARTY * 400)
        error = error_of(response)
        limit, *others = self.numbers(error["message"])
        assert (response.status_code, error["type"]) == (400, "invalid_request_error")
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith(self.OPENING)
        assert any(other > limit for other in others), error["message"]

    def test_an_answer_that_is_too_long_is_refused_with_the_numbers(self, api: Api) -> None:
        prompt_tokens = api.chat()["usage"]["prompt_tokens"]
        response = api.post(max_tokens=1_000_000)
        error = error_of(response)
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["message"].startswith(self.OPENING)
        assert {prompt_tokens, 1_000_000} <= set(self.numbers(error["message"]))

    def test_an_answer_may_fill_the_context_to_the_last_token(self, api: Api) -> None:
        limit = self.numbers(error_of(api.post(PARTY * 400))["message"])[0]
        room = limit - api.chat()["usage"]["prompt_tokens"]
        assert api.post(max_tokens=room).status_code == 200
        assert api.post(max_tokens=room + 1).status_code == 400

    def test_without_a_limit_the_answer_ends_with_the_context(self, api: Api) -> None:
        limit = self.numbers(error_of(api.post(PARTY * 400))["message"])[0]
        completion = api.chat(temperature=2.0, seed=1, max_tokens=None)
        assert completion["usage"]["total_tokens"] <= limit


@pytest.mark.parametrize("field", ["persona", "gamma", "persona_phase"])
def test_a_message_cannot_have_a_persona_and_says_so(api: Api, field: str) -> None:
    message = {"role": "user", "content": "Hi.", field: "introvert"}
    status, _, code, param = facts(api, messages=[USER, message])
    assert (status, code, param) == (400, "unsupported_parameter", f"messages.1.{field}")


class TestFramework:
    """What the framework refuses is refused like everything else."""

    @pytest.mark.parametrize("route", ["/v1/files", "/v1/personas"])
    @pytest.mark.parametrize("boundary", ["", "; boundary=x", "; boundary=x; boundary=y"])
    def test_a_multipart_body_that_is_none(self, api: Api, route: str, boundary: str) -> None:
        headers = {"Content-Type": f"multipart/form-data{boundary}"}
        response = api.http.post(route, content=b"--y\r\nnonsense", headers=headers)
        assert response.status_code == 400
        assert error_of(response)["type"] == "invalid_request_error"

    @pytest.mark.parametrize("chunked", [False, True])
    def test_a_body_that_is_too_large(self, api: Api, chunked: bool) -> None:
        content = b'{"model": "' + b"x" * 2**24 + b'"}'
        body = (content[start : start + 2**20] for start in range(0, len(content), 2**20)) if chunked else content
        response = api.http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        assert error_of(response)["code"] == "body_too_large"

    @pytest.mark.parametrize("path", ["/v1/models/../../etc/passwd", "/v1/models/%00", "/%2e%2e/", "/v1//models"])
    def test_a_strange_path(self, api: Api, path: str) -> None:
        response = api.http.get(path)
        assert response.status_code == 404
        assert error_of(response)["type"] == "not_found_error"

    def test_a_query_that_does_not_fit(self, api: Api) -> None:
        response = api.http.get("/v1/fine_tuning/jobs", params={"limit": "many"})
        assert (response.status_code, error_of(response)["param"]) == (400, "query.limit")

    @pytest.mark.parametrize("path", ["/healthz", "/readyz", "/health", "/ping"])
    def test_a_probe_may_ask_for_the_head_alone(self, api: Api, path: str) -> None:
        head, whole = api.http.head(path), api.http.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == whole.headers["content-length"]

    @pytest.mark.parametrize("path", ["/healthz", "/nothing", "/v1/models", CHAT])
    def test_every_answer_has_an_id_and_its_time(self, api: Api, path: str) -> None:
        response = api.http.get(path, headers={"x-request-id": "mine"})
        assert response.headers["x-request-id"] == "mine"
        assert int(response.headers["openai-processing-ms"]) >= 0


SAID: Json = {"messages": [USER], "max_tokens": 1}
CALL: Json = {"type": "tool_use", "id": "x", "name": "f", "input": "{}"}
FORMAT: Json = {"type": "json_schema", "name": "x"}


@pytest.mark.parametrize(
    ("route", "fields", "message"),
    [
        ("/v1/responses", {"input": 7}, "input: Input should be a valid string or a valid list; given: 7"),
        ("/v1/responses", {"input": None}, "input: Input should be a valid string or a valid list; given: null"),
        ("/v1/responses", {"input": []}, "input: it has 0 items; it needs at least 1"),
        ("/v1/responses", {"input": "x", "text": {"format": FORMAT}}, "text.format.schema: Field required"),
        ("/v1/responses", {"input": "x", "text": {"format": FORMAT | {"schema": 7}}}, "text.format.schema: Input"),
        ("/v1/responses", {"input": "x", "text": {"format": {"type": "xml"}}}, "its type is 'xml'; it must be one of"),
        ("/v1/responses", {"input": "x", "metadata": {"a": "x" * 513}}, "metadata.a: it has 513 characters"),
        ("/v1/embeddings", {"input": [7, "x"]}, "input.1: Input should be a valid integer; given: 'x'"),
        ("/v1/embeddings", {"input": ["x", 7]}, "input.1: Input should be a valid string; given: 7"),
        ("/v1/embeddings", {"input": [[1], ["x"]]}, "input.1.0: Input should be a valid integer; given: 'x'"),
        ("/v1/completions", {"prompt": True}, "prompt: Input should be a valid string or a valid list; given: true"),
        (CHAT, SAID | {"response_format": {"type": "json_schema"}}, "response_format.json_schema: Field required"),
        (CHAT, SAID | {"response_format": {}}, "response_format: it needs `type`"),
        (CHAT, SAID | {"response_format": 7}, "response_format: Input should be an object"),
    ],
    ids=str,
)
def test_the_message_leads_to_the_place_of_the_fault(api: Api, route: str, fields: Json, message: str) -> None:
    response = api.http.post(route, json={"model": "demo"} | fields)
    assert response.status_code == 400
    assert message in error_of(response)["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text: Field required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]},
            "messages.0.content.0.text: Input",
        ),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages.0.content.0: it needs `type`"),
        (
            {"messages": [{"role": "assistant", "content": [CALL]}, USER]},
            "messages.0.content.0.input: Input should be an",
        ),
        ({"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "tool"}}, "needs `name`"),
    ],
    ids=str,
)
def test_so_does_that_of_messages_in_anthropics_form(api: Api, fields: Json, message: str) -> None:
    response = api.http.post("/v1/messages", json={"model": "demo"} | SAID | fields)
    body = response.json()
    assert (response.status_code, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert message in body["error"]["message"]


def test_tokens_of_a_persona_that_does_not_exist_are_not_counted(api: Api) -> None:
    for model, fields in (("demo:pirate", {}), ("demo", {"persona": "pirate"})):
        response = api.http.post("/v1/messages/count_tokens", json={"model": model, "messages": [USER]} | fields)
        assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")
    for route, fields in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
        response = api.http.post(route, json={"model": "demo:pirate"} | fields)
        assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


def test_a_number_of_too_many_digits_and_a_file_without_a_purpose(api: Api) -> None:
    number = api.http.post(CHAT, content=b'{"seed":' + b"9" * 5000 + b"}", headers={"content-type": "application/json"})
    assert error_of(number)["message"] == "the body has a number of more than 4300 digits"
    assert "has no `purpose`" in error_of(api.http.post("/v1/files", files={"file": b"x"}))["message"]


class TestSdk:
    def test_an_unknown_persona_is_not_found(self, sdk: OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            sdk.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": "Hi."}], extra_body={"persona": "pirate"}
            )
        assert (caught.value.code, caught.value.param, caught.value.type) == (
            "persona_not_found",
            "persona",
            "not_found_error",
        )
        assert caught.value.request_id

    def test_a_prompt_that_is_too_long_is_a_bad_request(self, sdk: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.chat.completions.create(model="demo", messages=[{"role": "user", "content": PARTY * 400}])
        assert caught.value.code == "context_length_exceeded"
