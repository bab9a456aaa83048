"""Models whose template thinks: thoughts are `reasoning_content`, and what follows is the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types import responses as types
from pydantic import TypeAdapter

from masquerade.anthropic.objects import GeneratedMessage
from masquerade.generation import handler
from masquerade.model import thoughts
from masquerade.openai.responses.objects import ResponseObject
from tests import world
from tests.contract.asking import CHAT, Api, Json, error_of
from tests.contract.conftest import NEVER
from tests.contract.here import serve_here
from tests.model.templates import QWEN3, R1

ASKED = [{"role": "user", "content": "Is it dry?"}]
LIMIT = 60
EVENT: TypeAdapter[Any] = TypeAdapter(types.ResponseStreamEvent)


def start(folder: Path, template: str) -> Iterator[Api]:
    world.make_model(folder, max_position_embeddings=2048, eos_token_id=NEVER)
    (folder / "chat_template.jinja").write_text(template)
    with serve_here(folder, folder.parent / "store") as (_, http):
        yield Api(http)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A random model that may think."""
    yield from start(tmp_path_factory.mktemp("qwen") / "random", QWEN3)


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A random model that always thinks."""
    yield from start(tmp_path_factory.mktemp("r1") / "random", R1)


def body(**fields: Any) -> Json:
    return {"model": "random", "messages": ASKED, "temperature": 0, "max_tokens": LIMIT, **fields}


def message_of(api: Api, **fields: Any) -> Json:
    response = api.http.post(CHAT, json=body(**fields))
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0]["message"])


def streamed(api: Api, **fields: Any) -> Json:
    """The message that the deltas of a stream make."""
    message: Json = {"content": "", "reasoning_content": ""}
    for chunk in api.chunks(**body(**fields)):
        for choice in chunk["choices"]:
            for name in message:
                message[name] += choice["delta"].get(name) or ""
    return message


def events_of(api: Api, route: str, asked: Json) -> list[tuple[str, Json]]:
    """The events of a stream: names and data."""
    text = api.http.post(route, json=asked | {"stream": True}).text
    blocks = [block.split("\n") for block in text.removesuffix("\n\n").split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def count(api: Api, **fields: Any) -> int:
    response = api.http.post("/tokenize", json={"messages": ASKED, **fields})
    assert response.status_code == 200, response.text
    return int(response.json()["count"])


def test_an_answer_that_never_stops_thinking_is_all_thoughts(r1: Api) -> None:
    message = message_of(r1)
    assert message["content"] is None
    assert message["reasoning_content"]
    assert streamed(r1) == {"content": "", "reasoning_content": message["reasoning_content"]}


@pytest.mark.parametrize("n", [1, 2])
def test_what_follows_the_end_of_the_thoughts_is_the_answer(r1: Api, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """A random model never writes `</think>`; what it writes is taken for that."""
    raw = message_of(r1)["reasoning_content"]
    end = raw[20:23]
    monkeypatch.setattr(thoughts, "THOUGHTS_END", end)
    monkeypatch.setattr(handler, "find_thought_start", lambda *_: "begun")
    before, _, after = raw.partition(end)
    for message in (message_of(r1, n=n), streamed(r1)):
        assert message["reasoning_content"] == before.strip()
        assert message["content"].strip() == after.strip()


def test_an_answer_without_thoughts_is_content(qwen: Api) -> None:
    message = message_of(qwen)
    assert "reasoning_content" not in message
    assert message["content"]
    assert streamed(qwen) == {"content": message["content"], "reasoning_content": ""}


def test_the_template_gets_its_variables(qwen: Api) -> None:
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert count(qwen, **off) == count(qwen) + len("<think>\n\n</think>\n\n")
    assert message_of(qwen, **off) != message_of(qwen)
    assert message_of(qwen, chat_template_kwargs={"enable_thinking": True}) == message_of(qwen)
    assert message_of(qwen, chat_template_kwargs={"other": {"a": [1, None]}}) == message_of(qwen)


def test_structured_output_may_follow_thoughts(r1: Api, qwen: Api) -> None:
    """While it thinks, the form binds nothing; a model that may not think answers at once."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [5]}}}
    free = message_of(r1, response_format=form)
    assert free["content"] is None
    assert free["reasoning_content"]
    assert message_of(qwen, response_format=form, chat_template_kwargs={"enable_thinking": False})["content"] == "5"


def test_a_prompt_may_go_on_with_the_last_message(qwen: Api) -> None:
    begun = [*ASKED, {"role": "assistant", "content": "It is "}]
    continued = {"messages": begun, "continue_final_message": True}
    assert count(qwen, **continued) == count(qwen) + len("It is ")
    assert count(qwen, add_generation_prompt=False) == count(qwen) - 1
    assert count(qwen, messages=begun) > count(qwen, messages=begun, add_generation_prompt=False)
    first = message_of(qwen, max_tokens=5)["content"]
    rest = message_of(qwen, messages=[*ASKED, {"role": "assistant", "content": first}], continue_final_message=True)
    if "\ufffd" not in first:
        assert (first + rest["content"]).startswith(message_of(qwen)["content"])


def test_thoughts_may_be_continued(qwen: Api) -> None:
    said = [*ASKED, {"role": "assistant", "content": "<think>\nLet me"}]
    message = message_of(qwen, messages=said, continue_final_message=True)
    assert message["content"] is None
    assert message["reasoning_content"]


def test_past_thoughts_are_accepted(qwen: Api) -> None:
    said = [*ASKED, {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}, *ASKED]
    assert message_of(qwen, messages=said)["content"]


def test_an_answer_of_thoughts_alone_may_be_sent_back(r1: Api) -> None:
    """As clients do: without a text, if the limit cut the thoughts."""
    assert message_of(r1, messages=[*ASKED, message_of(r1), *ASKED])["reasoning_content"]


USER_LAST: Json = {"continue_final_message": True}
ASSISTANT_LAST: Json = {"messages": [*ASKED, {"role": "assistant", "content": "I"}]}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize("route", [CHAT, "/tokenize"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (USER_LAST, "continue_final_message"),
        ({**ASSISTANT_LAST, "continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        (
            {
                "messages": [*ASKED, {"role": "assistant", "content": "a", "tool_calls": [CALL]}],
                "continue_final_message": True,
            },
            "continue_final_message",
        ),
        *(
            ({"chat_template_kwargs": {name: "x"}}, "chat_template_kwargs")
            for name in ("messages", "conversation", "tools", "chat_template", "bos_token", "tokenize", "documents")
        ),
        ({"chat_template_kwargs": {str(number): 1 for number in range(33)}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": "a " * 900_000}}, "chat_template_kwargs"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_a_template_cannot_be_given_is_refused(qwen: Api, route: str, fields: Json, param: str) -> None:
    response = qwen.http.post(route, json=body(**fields))
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    assert len(response.content) < 1000


def test_a_variable_cannot_spell_special_tokens(tmp_path: Path) -> None:
    template = world.TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ x }}")
    for api in start(tmp_path / "random", template):
        plain = count(api)
        assert count(api, chat_template_kwargs={"x": "<|end|>"}) == plain + len("<|end|>")


def test_responses_have_thoughts_as_reasoning(r1: Api) -> None:
    asked = {"model": "random", "input": ASKED, "temperature": 0, "max_output_tokens": LIMIT}
    whole = r1.http.post("/v1/responses", json=asked).json()
    (item,) = whole["output"]
    assert (item["type"], item["status"], item["summary"]) == ("reasoning", "incomplete", [])
    assert item["content"] == [{"type": "reasoning_text", "text": message_of(r1)["reasoning_content"]}]
    types.Response.model_validate(whole)
    assert ResponseObject.model_validate(whole, strict=True).model_dump() == whole
    events = [data for _, data in events_of(r1, "/v1/responses", asked)]
    for event in events:
        EVENT.validate_python(event)
    pieces = [event["delta"] for event in events if event["type"] == "response.reasoning_text.delta"]
    assert "".join(pieces) == item["content"][0]["text"]
    assert events[-1]["response"]["output"][0]["content"] == item["content"]
    later = asked | {"input": "And now?", "previous_response_id": whole["id"]}
    assert r1.http.post("/v1/responses", json=later).status_code == 200


def test_messages_have_thoughts_as_thinking(r1: Api) -> None:
    asked = {"model": "random", "messages": ASKED, "temperature": 0, "max_tokens": LIMIT}
    whole = r1.http.post("/v1/messages", json=asked).json()
    thinking = {"type": "thinking", "thinking": message_of(r1)["reasoning_content"], "signature": ""}
    assert (whole["content"], whole["stop_reason"]) == ([thinking], "max_tokens")
    assert GeneratedMessage.model_validate(whole, strict=True).model_dump() == whole
    events = events_of(r1, "/v1/messages", asked)
    pieces = [data["delta"]["thinking"] for name, data in events if name == "content_block_delta"]
    assert "".join(pieces) == thinking["thinking"]
    later = [*ASKED, {"role": "assistant", "content": whole["content"]}, *ASKED]
    assert r1.http.post("/v1/messages", json=asked | {"messages": later}).status_code == 200


def test_what_follows_thoughts_is_another_item_or_block(r1: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = message_of(r1)["reasoning_content"]
    monkeypatch.setattr(thoughts, "THOUGHTS_END", raw[20:23])
    monkeypatch.setattr(handler, "find_thought_start", lambda *_: "begun")
    message = message_of(r1)
    asked = {"model": "random", "temperature": 0}
    given = asked | {"input": ASKED, "max_output_tokens": LIMIT}
    reasoning, said = r1.http.post("/v1/responses", json=given).json()["output"]
    assert reasoning["content"][0]["text"] == message["reasoning_content"]
    assert (reasoning["status"], said["content"][0]["text"]) == ("completed", message["content"])
    *_, (_, end) = events_of(r1, "/v1/responses", given)
    assert [item["content"] for item in end["response"]["output"]] == [reasoning["content"], said["content"]]
    given = asked | {"messages": ASKED, "max_tokens": LIMIT}
    thinking, text = r1.http.post("/v1/messages", json=given).json()["content"]
    assert (thinking["thinking"], text["text"]) == (message["reasoning_content"], message["content"])
    events = events_of(r1, "/v1/messages", given)
    starts = [data["content_block"]["type"] for name, data in events if name == "content_block_start"]
    assert starts == ["thinking", "text"]
