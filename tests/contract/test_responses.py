"""`/v1/responses` by the stock SDK: what it answers, streams, stores and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import responses as types
from pydantic import BaseModel, TypeAdapter

from masquerade.http.limits import Policy
from masquerade.jobs import ResponseTable
from masquerade.openai.responses.answers import ResponseAnswer
from masquerade.openai.responses.objects import InputItemObject, ResponseObject
from tests import world
from tests.contract.asking import PARTY, Api, Json, body, error_of
from tests.contract.here import forbid_ends, serve_here, slow_down
from tests.keys.making import bearer, make_key

RESPONSES = "/v1/responses"
LOGPROBS = "message.output_text.logprobs"
WEATHER: Json = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Bonn", "Aachen"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
EVENT: TypeAdapter[Any] = TypeAdapter(types.ResponseStreamEvent)


class Person(BaseModel):
    """What the model is to fill in."""

    mood: Literal["calm", "wild"]
    adult: bool


def ask(sdk: OpenAI, said: Any = PARTY, **fields: Any) -> Any:
    return sdk.responses.create(**{"model": "demo", "input": said, "temperature": 0, **fields})


def post(api: Api, said: Any = PARTY, **fields: Any) -> httpx.Response:
    return api.http.post(RESPONSES, json={"model": "demo", "input": said, "temperature": 0, **fields})


def events_of(response: httpx.Response) -> list[Json]:
    """The events: each has its type as its name, and they are counted."""
    events = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == len(events)
        events.append(event)
    return events


def stream(api: Api, said: Any = PARTY, **fields: Any) -> list[Json]:
    response = post(api, said, stream=True, **fields)
    assert response.status_code == 200, response.text
    return events_of(response)


def check(response: Json) -> None:
    """Valid for the model that describes it and for the SDK's, with no field that the former lacks."""
    assert ResponseObject.model_validate_json(json.dumps(response), strict=True).model_dump() == response
    types.Response.model_validate(response)


class TestText:
    @pytest.mark.parametrize("persona", [None, "introvert"])
    @pytest.mark.parametrize("gamma", [None, 0.5])
    def test_it_is_what_the_chat_says(self, api: Api, sdk: OpenAI, persona: str | None, gamma: float | None) -> None:
        more = {"persona": persona} | ({"gamma": gamma} if persona and gamma else {})
        chat = api.chat(**more)
        raw = sdk.responses.with_raw_response.create(model="demo", input=PARTY, temperature=0, extra_body=more)
        response = raw.parse()
        assert response.output_text == chat["choices"][0]["message"]["content"]
        assert raw.headers.get("X-Persona-Generation") == chat["generation"]
        extra = response.model_extra or {}
        assert [
            response.model,
            *(extra[name] for name in ("persona", "generation", "gamma", "system_fingerprint")),
        ] == [chat[name] for name in ("model", "persona", "generation", "gamma", "system_fingerprint")]
        assert response.status == "completed"

    def test_items_and_instructions_are_messages(self, api: Api, sdk: OpenAI) -> None:
        said = [
            {"role": "user", "content": "Hello."},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi."}]},
            {"role": "user", "content": [{"type": "input_text", "text": text} for text in (PARTY[:5], PARTY[5:])]},
        ]
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": PARTY},
        ]
        response = ask(sdk, said, instructions="Be brief.")
        chat = api.http.post("/v1/chat/completions", json=body(messages=messages)).json()
        assert response.output_text == chat["choices"][0]["message"]["content"]
        assert response.usage.input_tokens == chat["usage"]["prompt_tokens"]
        assert response.instructions == "Be brief."

    def test_reasoning_is_kept_and_has_no_effect(self, sdk: OpenAI) -> None:
        reasoning = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
        response = ask(sdk, [reasoning, {"role": "user", "content": PARTY}])
        plain = ask(sdk)
        assert response.output_text == plain.output_text
        assert response.usage.input_tokens == plain.usage.input_tokens
        assert [item.type for item in sdk.responses.input_items.list(response.id)] == ["message", "reasoning"]
        again = ask(sdk, "Why?", previous_response_id=response.id)
        assert again.usage.input_tokens == ask(sdk, "Why?", previous_response_id=plain.id).usage.input_tokens

    def test_the_limit_makes_it_incomplete(self, api: Api, sdk: OpenAI) -> None:
        response = ask(sdk, max_output_tokens=3)
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert response.output[0].status == "incomplete"
        assert response.usage.output_tokens == 3
        assert stream(api, max_output_tokens=3)[-1]["type"] == "response.incomplete"

    def test_usage_counts_what_the_cache_had(self, sdk: OpenAI) -> None:
        said = "Would you like to come to a party with a lot of loud music and many people tonight?"
        first, second = (ask(sdk, said).usage for _ in range(2))
        assert second.input_tokens == first.input_tokens
        assert second.total_tokens == second.input_tokens + second.output_tokens
        assert 0 < second.input_tokens_details.cached_tokens < second.input_tokens

    def test_logprobs_are_those_of_the_chat(self, api: Api, sdk: OpenAI) -> None:
        fields: Json = {"top_logprobs": 2, "max_output_tokens": 4}
        part = ask(sdk, include=[LOGPROBS], **fields).output[0].content[0]
        chat = api.chat(logprobs=True, top_logprobs=2, max_tokens=4)["choices"][0]["logprobs"]["content"]
        assert [token.token for token in part.logprobs] == [token["token"] for token in chat]
        assert [token.logprob for token in part.logprobs] == pytest.approx([token["logprob"] for token in chat])
        assert all(len(token.top_logprobs) == 2 for token in part.logprobs)
        assert ask(sdk, **fields).output[0].content[0].logprobs == []
        events = stream(api, include=[LOGPROBS], **fields)
        streamed = [one for event in events if event["type"].endswith("text.delta") for one in event["logprobs"]]
        assert [one["token"] for one in streamed] == [token["token"] for token in chat]

    def test_none_is_lost_of_text_that_might_have_begun_a_call(self, api: Api) -> None:
        """The parser holds `<` back until more is there."""
        (angle,) = api.http.post("/tokenize", json={"prompt": "<", "add_special_tokens": False}).json()["tokens"]
        clock = {"type": "function", "name": "f", "strict": False}
        fields: Json = {"tools": [clock], "logit_bias": {str(angle): 100}, "max_output_tokens": 5}
        fields |= {"include": [LOGPROBS], "presence_penalty": 0}
        part = post(api, **fields).json()["output"][0]["content"][0]
        assert part["text"] == "<<<<<"
        assert [one["token"] for one in part["logprobs"]] == list(part["text"])
        events = stream(api, **fields)
        streamed = [one for event in events if event["type"].endswith("text.delta") for one in event["logprobs"]]
        assert [one["token"] for one in streamed] == list(part["text"])


class TestFormats:
    def test_text_format_is_a_schema(self, sdk: OpenAI) -> None:
        form = {"type": "json_schema", "name": "person", "schema": Person.model_json_schema(), "strict": True}
        response = ask(sdk, text={"format": form})
        Person.model_validate_json(response.output_text)
        assert response.text.format.schema_ == form["schema"]

    def test_the_sdk_parses_a_model(self, sdk: OpenAI) -> None:
        parsed = sdk.responses.parse(model="demo", input=PARTY, text_format=Person).output_parsed
        assert isinstance(parsed, Person)

    def test_any_object(self, sdk: OpenAI) -> None:
        text = ask(sdk, text={"format": {"type": "json_object"}}, max_output_tokens=20).output_text
        assert text.startswith("{")


class TestTools:
    def test_a_call_goes_round(self, sdk: OpenAI) -> None:
        tools: Any = [WEATHER]
        response = ask(sdk, tools=tools, tool_choice="required", parallel_tool_calls=False)
        (call,) = response.output
        assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
        assert json.loads(call.arguments)["city"] in ("Bonn", "Aachen")
        assert response.tools[0].name == "weather"
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "dry"}
        whole = ask(sdk, [{"role": "user", "content": PARTY}, call, output], tools=tools, tool_choice="none")
        chained = ask(sdk, [output], previous_response_id=response.id, tools=tools, tool_choice="none")
        assert whole.output_text == chained.output_text
        assert whole.usage.input_tokens == chained.usage.input_tokens

    def test_it_is_the_chat_of_the_same_calls(self, api: Api, sdk: OpenAI) -> None:
        call = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city":"Bonn"}'}
        output = {"type": "function_call_output", "call_id": "call_1", "output": "dry"}
        said = {"role": "user", "content": PARTY}
        second = call | {"call_id": "call_2"}
        answered = [output, output | {"call_id": "call_2"}]
        response = ask(sdk, [said, {"role": "assistant", "content": "Well."}, call, second, *answered])
        function = {"name": "weather", "arguments": '{"city":"Bonn"}'}
        calls = [{"id": f"call_{number}", "type": "function", "function": function} for number in (1, 2)]
        told = [{"role": "tool", "tool_call_id": f"call_{number}", "content": "dry"} for number in (1, 2)]
        messages = [said, {"role": "assistant", "content": "Well.", "tool_calls": calls}, *told]
        chat = api.http.post("/v1/chat/completions", json=body(messages=messages)).json()
        assert response.output_text == chat["choices"][0]["message"]["content"]
        assert response.usage.input_tokens == chat["usage"]["prompt_tokens"]

    def test_a_named_function_is_called(self, sdk: OpenAI) -> None:
        tools: Any = [WEATHER | {"name": "other"}, WEATHER]
        (call,) = ask(sdk, tools=tools, tool_choice={"type": "function", "name": "weather"}).output
        assert call.name == "weather"

    def test_a_stream_of_calls_is_collected(self, sdk: OpenAI) -> None:
        fields: Any = {"model": "demo", "input": PARTY, "temperature": 0, "tools": [WEATHER]}
        with sdk.responses.stream(**fields, tool_choice="required", parallel_tool_calls=False) as streamed:
            events = list(streamed)
            (call,) = streamed.get_final_response().output
        done = [event for event in events if event.type == "response.function_call_arguments.done"]
        deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
        assert call.type == "function_call"
        assert "".join(event.delta for event in deltas) == call.arguments == done[0].arguments
        assert json.loads(call.arguments)["city"] in ("Bonn", "Aachen")

    def test_a_cut_call_is_incomplete(self, sdk: OpenAI) -> None:
        response = ask(sdk, tools=[WEATHER], tool_choice="required", max_output_tokens=40)
        assert response.status == "incomplete"
        assert response.output[-1].status == "incomplete"


class TestStream:
    def test_the_order_of_events(self, api: Api) -> None:
        events = stream(api)
        kinds = [event["type"].removeprefix("response.") for event in events]
        deltas = [kind for kind in kinds if kind == "output_text.delta"]
        assert len(deltas) > 3
        assert kinds == [
            *("created", "in_progress", "output_item.added", "content_part.added", *deltas),
            *("output_text.done", "content_part.done", "output_item.done", "completed"),
        ]

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"persona": "gloomy", "include": [LOGPROBS], "top_logprobs": 1},
            {"tools": [WEATHER], "tool_choice": "required", "max_output_tokens": 120},
            {"max_output_tokens": 1, "metadata": {"a": "b"}, "store": False},
        ],
        ids=str,
    )
    def test_every_event_is_the_sdks_and_the_last_has_what_one_piece_has(self, api: Api, fields: Json) -> None:
        events = stream(api, **fields)
        for event in events:
            EVENT.validate_python(event)
        whole, last = post(api, **fields).json(), events[-1]["response"]
        check(whole)
        check(last)
        check(events[0]["response"])

        def told(response: Json) -> Json:
            drawn = dict.fromkeys(("id", "created_at", "completed_at", "usage", "output"))
            items = json.dumps([{**item, "id": None, "call_id": None} for item in response["output"]])
            rounded = json.loads(items, parse_float=lambda digits: round(float(digits), 3))
            return {**response, **drawn, "items": rounded}

        assert told(whole) == told(last)

    def test_the_sdk_collects_it(self, sdk: OpenAI) -> None:
        with sdk.responses.stream(model="demo:introvert", input=PARTY, temperature=0) as streamed:
            text = "".join(event.delta for event in streamed if event.type == "response.output_text.delta")
            final = streamed.get_final_response()
        assert text == final.output_text == ask(sdk, model="demo:introvert").output_text
        assert final.usage is not None
        events = list(ask(sdk, stream=True))
        assert events[-1].type == "response.completed"

    def test_an_error_within_it(self, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The model is slow and the limit is short: the end does not depend on the machine."""
        with serve_here(tiny_folder, tmp_path / "store", policy=Policy(answer_seconds=0.3)) as (serving, http):
            slow_down(monkeypatch)
            limits = {"logit_bias": forbid_ends(serving), "max_output_tokens": 200}
            fields = {"model": serving.base.name, "input": "hi", **limits}
            *_, error, failed = events_of(http.post(RESPONSES, json=fields | {"stream": True}))
            EVENT.validate_python(error)
            EVENT.validate_python(failed)
            assert (error["type"], error["code"]) == ("error", "answer_timeout")
            assert failed["response"]["status"] == "failed"
            assert failed["response"]["error"]["message"] == error["message"]
            check(failed["response"])
            assert http.get(f"{RESPONSES}/{failed['response']['id']}").status_code == 404
            assert http.post(RESPONSES, json=fields).status_code == 504

    def test_a_fault_within_it(self, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with serve_here(tiny_folder, tmp_path / "store") as (serving, http):
            monkeypatch.setattr(ResponseAnswer, "chunks", lambda *_: 1 / 0)
            body = {"model": serving.base.name, "input": "hi", "stream": True}
            *_, error, failed = events_of(http.post(RESPONSES, json=body))
            assert (error["code"], failed["type"]) == ("internal_error", "response.failed")
            assert "division" not in json.dumps(failed)


class TestStored:
    def test_it_can_be_read_and_deleted(self, api: Api, sdk: OpenAI) -> None:
        response = ask(sdk, metadata={"a": "b"})
        assert sdk.responses.retrieve(response.id).to_dict() == response.to_dict()
        check(api.http.get(f"{RESPONSES}/{response.id}").json())
        assert api.http.delete(f"{RESPONSES}/{response.id}").json() == {
            "id": response.id,
            "object": "response",
            "deleted": True,
        }
        for ask_again in (sdk.responses.retrieve, sdk.responses.delete, sdk.responses.cancel):
            with pytest.raises(openai.NotFoundError) as refused:
                ask_again(response.id)
            assert refused.value.code == "response_not_found"
        with pytest.raises(openai.NotFoundError) as refused:
            ask(sdk, previous_response_id=response.id)
        assert (refused.value.code, refused.value.param) == ("response_not_found", "previous_response_id")

    def test_a_streamed_one_is_there_when_its_end_is_heard(self, sdk: OpenAI) -> None:
        *_, last = ask(sdk, stream=True)
        assert sdk.responses.retrieve(last.response.id).to_dict() == last.response.to_dict()

    def test_a_later_turn_has_the_earlier_ones(self, api: Api, sdk: OpenAI) -> None:
        first = ask(sdk, instructions="Be brief.")
        second = ask(sdk, "Why?", previous_response_id=first.id)
        third = ask(sdk, "Really?", previous_response_id=second.id)
        messages = [
            {"role": "user", "content": PARTY},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": second.output_text},
            {"role": "user", "content": "Really?"},
        ]
        chat = api.http.post("/v1/chat/completions", json=body(messages=messages)).json()
        assert third.output_text == chat["choices"][0]["message"]["content"]
        assert third.usage.input_tokens == chat["usage"]["prompt_tokens"]
        assert third.previous_response_id == second.id
        sdk.responses.delete(first.id)
        assert ask(sdk, "Really?", previous_response_id=second.id).output_text == third.output_text

    def test_an_item_of_an_output_is_given_by_its_id(self, api: Api, sdk: OpenAI) -> None:
        """As Vercel's AI SDK sends earlier turns; with calls, which are items of their own."""
        first = ask(sdk)
        call = ask(sdk, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False).output[0]
        told = {"type": "function_call_output", "call_id": call.call_id, "output": "dry"}
        why = {"role": "user", "content": "Why?"}
        for whole in (
            [{"role": "user", "content": PARTY}, first.output[0].to_dict(), why],
            [{"role": "user", "content": PARTY}, call.to_dict(), told],
        ):
            referring = [{"type": "item_reference", "id": item["id"]} if item.get("id") else item for item in whole]
            by_id, by_value = ask(sdk, referring), ask(sdk, whole)
            assert by_id.output_text == by_value.output_text
            assert by_id.usage.input_tokens == by_value.usage.input_tokens
            shown = [list(sdk.responses.input_items.list(response.id)) for response in (by_id, by_value)]
            assert [item.type for item in shown[0]] == [item.type for item in shown[1]]
            assert shown[0][1].id == whole[1]["id"]

    def test_an_item_that_is_nowhere_or_referred_to_twice_is_a_404(self, api: Api, sdk: OpenAI) -> None:
        kept, unkept = (ask(sdk, store=store).output[0].id for store in (True, False))
        for ids in (["msg_1"], [""], [unkept], [kept, kept], [kept + "0"]):
            said = [{"role": "user", "content": PARTY}, *({"type": "item_reference", "id": one} for one in ids)]
            response = post(api, said)
            assert response.status_code == 404, response.text
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("response_not_found", f"input.{len(ids)}.id")

    def test_items_that_are_sent_twice_have_ids_of_their_own(self, api: Api) -> None:
        first = post(api).json()
        later = post(api, [first["output"][0], {"role": "user", "content": "Why?"}], previous_response_id=first["id"])
        items, after = [], {}
        for _ in range(5):
            page = api.http.get(
                f"{RESPONSES}/{later.json()['id']}/input_items", params={"limit": 1, "order": "asc"} | after
            )
            items += page.json()["data"]
            after = {"after": page.json()["last_id"]}
            if not page.json()["has_more"]:
                break
        assert [item["role"] for item in items] == ["user", "assistant", "assistant", "user"]
        assert len({item["id"] for item in items}) == 4

    def test_input_items_come_in_pages(self, api: Api, sdk: OpenAI) -> None:
        first = ask(sdk, [{"role": "user", "content": "Hello."}, {"role": "user", "content": PARTY}])
        second = ask(sdk, "Why?", previous_response_id=first.id)
        items = list(sdk.responses.input_items.list(second.id, limit=1, order="asc"))
        texts = [item.content[0].text for item in items]  # type: ignore[union-attr]
        assert texts == ["Hello.", PARTY, first.output_text, "Why?"]
        assert [item.id for item in sdk.responses.input_items.list(second.id)] == [item.id for item in items[::-1]]
        page = api.http.get(f"{RESPONSES}/{second.id}/input_items", params={"limit": 2, "after": items[-1].id}).json()
        assert (page["first_id"], page["last_id"], page["has_more"]) == (items[-2].id, items[-3].id, True)
        for item in page["data"]:
            InputItemObject.model_validate(item)
        for fields in ({"limit": 0}, {"limit": 101}, {"order": "up"}):
            assert api.http.get(f"{RESPONSES}/{second.id}/input_items", params=fields).status_code == 400
        nowhere = api.http.get(f"{RESPONSES}/{second.id}/input_items", params={"after": "msg_0"})
        assert (nowhere.status_code, error_of(nowhere)["param"]) == (404, "after")

    def test_what_is_not_to_be_stored_is_not(self, sdk: OpenAI) -> None:
        response = ask(sdk, store=False)
        assert response.to_dict()["store"] is False
        with pytest.raises(openai.NotFoundError):
            sdk.responses.retrieve(response.id)

    def test_there_is_nothing_to_cancel(self, sdk: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="background"):
            sdk.responses.cancel(ask(sdk, max_output_tokens=1).id)

    def test_it_is_not_streamed_again(self, api: Api, sdk: OpenAI) -> None:
        response = api.http.get(f"{RESPONSES}/{ask(sdk, max_output_tokens=1).id}", params={"stream": True})
        assert (response.status_code, error_of(response)["param"]) == (400, "stream")


@pytest.fixture
def tenants(tiny_folder: Path, tmp_path: Path) -> Iterator[Callable[..., httpx.Response]]:
    """A server with two keys, which may be asked as `a` and `b`."""
    tokens = {who: make_key(tmp_path / "store", "chat")[0] for who in ("a", "b")}
    with serve_here(tiny_folder, tmp_path / "store") as (serving, http):

        def request(who: str, method: str, path: str = "", **fields: Any) -> httpx.Response:
            sent = {"model": serving.base.name, "input": "hi", "max_output_tokens": 2, **fields}
            return http.request(
                method, RESPONSES + path, headers=bearer(tokens[who]), json=sent if method == "POST" else None
            )

        yield request


def test_another_keys_item_is_as_good_as_none(tenants: Callable[..., httpx.Response]) -> None:
    item_id = tenants("a", "POST").json()["output"][0]["id"]
    said = [{"role": "user", "content": "hi"}, {"type": "item_reference", "id": item_id}]
    statuses = [tenants(who, "POST", input=said).status_code for who in ("a", "b")]
    assert statuses == [200, 404]


def test_another_keys_response_is_as_good_as_none(tenants: Callable[..., httpx.Response]) -> None:
    response_id = tenants("a", "POST").json()["id"]

    def ways(who: str, named: str) -> list[tuple[int, str]]:
        answers = [
            tenants(who, "GET", f"/{named}"),
            tenants(who, "GET", f"/{named}/input_items"),
            tenants(who, "POST", f"/{named}/cancel"),
            tenants(who, "POST", previous_response_id=named),
            tenants(who, "DELETE", f"/{named}"),
        ]
        return [(answer.status_code, answer.text.replace(named, "")) for answer in answers]

    told = ways("b", response_id)
    assert told == ways("b", "resp_0")
    assert {status for status, _ in told} == {404}
    assert [status for status, _ in ways("a", response_id)] == [200, 200, 400, 200, 200]


def test_a_server_that_does_not_run_the_jobs_has_the_same_responses(tiny_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with serve_here(tiny_folder, store) as (serving, first), serve_here(tiny_folder, store) as (_, second):
        assert second.get("/v1/files").status_code == 503
        sent = {"model": serving.base.name, "input": "hi", "max_output_tokens": 2}
        response = second.post(RESPONSES, json=sent).json()
        assert first.get(f"{RESPONSES}/{response['id']}").json() == response
        assert second.post(RESPONSES, json=sent | {"previous_response_id": response["id"]}).status_code == 200


def test_a_server_may_store_none(tiny_folder: Path, tmp_path: Path) -> None:
    with serve_here(tiny_folder, tmp_path / "store", policy=Policy(response_days=0)) as (serving, http):
        sent = {"model": serving.base.name, "input": "hi", "max_output_tokens": 2, "store": True}
        response = http.post(RESPONSES, json=sent).json()
        assert response["store"] is False
        assert http.get(f"{RESPONSES}/{response['id']}").status_code == 404


def test_one_that_cannot_be_stored_is_answered(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serve_here(tiny_folder, tmp_path / "store") as (serving, http):
        monkeypatch.setattr(ResponseTable, "add", lambda *_: 1 / 0)
        response = http.post(RESPONSES, json={"model": serving.base.name, "input": "hi", "max_output_tokens": 2})
        assert response.status_code == 200
        assert response.json()["store"] is False
        assert any("storing a response" in record.getMessage() for record in caplog.records)


class TestRefused:
    @pytest.mark.parametrize(
        ("fields", "code", "param"),
        [
            ({"background": True}, "unsupported_parameter", "background"),
            ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
            ({"prompt": {"id": "pmpt_1"}}, "unsupported_parameter", "prompt"),
            ({"truncation": "auto"}, "unsupported_parameter", "truncation"),
            ({"n": 2}, "unsupported_parameter", "n"),
            ({"max_tokens": 5}, "unsupported_parameter", "max_tokens"),
            ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools.0.type"),
            ({"tools": [WEATHER, {"type": "computer_use_preview"}]}, "unsupported_parameter", "tools.1.type"),
            ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "unsupported_parameter", "tool_choice.type"),
            ({"input": [{"type": "computer_call_output"}]}, "unsupported_parameter", "input.0.type"),
            (
                {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
                "unsupported_parameter",
                "input.0.content.0.type",
            ),
            ({"tools": [WEATHER, WEATHER]}, "invalid_value", "tools"),
            ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}, "invalid_value", "tool_choice"),
            ({"input": []}, "invalid_value", "input"),
            ({"input": [{"type": "reasoning", "summary": []}]}, "invalid_value", "input"),
            ({"input": [{"role": "user"}]}, "invalid_value", "input.0.content"),
            ({"input": [{"type": "function_call", "name": "f"}]}, "invalid_value", "input.0.call_id"),
            ({"input": 7}, "invalid_value", "input"),
            ({"input": ["hi"]}, "invalid_value", "input.0"),
            ({"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "invalid_value", "text.format"),
            ({"tools": [WEATHER | {"parameters": {"type": "x"}}]}, "invalid_value", "tools.0.parameters"),
            ({"input": "party " * 3000}, "context_length_exceeded", "input"),
            ({"temperature": 3}, "invalid_value", "temperature"),
        ],
        ids=str,
    )  # fmt: skip
    def test_by_name(self, api: Api, fields: Json, code: str, param: str) -> None:
        response = post(api, **fields)
        assert response.status_code == 400
        error = error_of(response)
        assert (error["code"], error["param"]) == (code, param)
        assert "response_format" not in error["message"]

    @pytest.mark.parametrize(
        "fields",
        [
            {"reasoning": {"effort": "low"}, "user": "u", "service_tier": "auto", "prompt_cache_key": "k"},
            {"truncation": "disabled", "background": False, "include": ["reasoning.encrypted_content"]},
            {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "text": {"verbosity": "low"}},
            {"stream_options": {"include_obfuscation": False}, "max_tool_calls": 3, "never_heard_of": 1},
        ],
        ids=str,
    )
    def test_what_is_harmless_changes_nothing(self, api: Api, sdk: OpenAI, fields: Json) -> None:
        text = post(api, **fields).json()["output"][0]["content"][0]["text"]
        assert text == ask(sdk).output_text

    def test_an_unknown_persona_is_a_404(self, api: Api) -> None:
        response = post(api, persona="pirate")
        assert (response.status_code, error_of(response)["code"]) == (404, "persona_not_found")


def test_a_random_model_streams_what_it_answers_in_one_piece(tmp_path: Path) -> None:
    """Also calls in the midst of text that no grammar forces."""
    folder = world.make_model(tmp_path / "random", max_position_embeddings=4096)
    with serve_here(folder, tmp_path / "store") as (serving, http):
        for seed in range(4):
            sent = {"model": serving.base.name, "input": "hi", "tools": [WEATHER | {"strict": False}], "seed": seed}
            whole = http.post(RESPONSES, json=sent).json()
            last = events_of(http.post(RESPONSES, json=sent | {"stream": True}))[-1]["response"]
            check(whole)
            texts = [[item.get("content") or item["arguments"] for item in one["output"]] for one in (whole, last)]
            assert texts[0] == texts[1]
