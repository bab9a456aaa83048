"""What is far too much is refused at once, whichever field it is in, and nobody else notices."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from masquerade.engine import EngineConfig
from masquerade.generation.handler import DEFAULT_MAX_TOKENS
from tests import world
from tests.contract.asking import CHAT, PARTY, Api, Json, body, error_of
from tests.contract.conftest import NEVER
from tests.contract.here import serve_here
from tests.serving import Server

HUGE = PARTY * (7_900_000 // len(PARTY))
COMPLETIONS = "/v1/completions"
DEEP = 100_000
JSON = {"Content-Type": "application/json"}


def say(role: str, content: str) -> Json:
    return {"role": role, "content": content}


def called(arguments: str) -> list[Json]:
    function = {"name": "f", "arguments": arguments}
    return [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    ]


def tool(**fields: Any) -> list[Json]:
    return [{"type": "function", "function": {"name": "f", **fields}}]


TOO_LONG: dict[str, tuple[str, Json, str]] = {
    "a message": (CHAT, {"messages": [say("user", HUGE)]}, "messages"),
    "a system prompt": (CHAT, {"messages": [say("system", HUGE), say("user", "Hi.")]}, "messages"),
    "many messages": (CHAT, {"messages": [say("user", PARTY)] * 2000}, "messages"),
    "parts": (CHAT, {"messages": [say("user", [{"type": "text", "text": PARTY}] * 8000)]}, "messages"),  # type: ignore[arg-type]
    "arguments": (CHAT, {"messages": called(json.dumps({"a": HUGE}))}, "messages"),
    "a tool": (CHAT, {"messages": [say("user", "Hi.")], "tools": tool(description=HUGE)}, "tools"),
    "parameters": (CHAT, {"messages": [say("user", "Hi.")], "tools": tool(parameters={"enum": [HUGE]})}, "tools"),
    "a prompt": (COMPLETIONS, {"prompt": HUGE}, "prompt"),
    "one of several prompts": (COMPLETIONS, {"prompt": ["Hi.", HUGE]}, "prompt"),
    "token ids": (COMPLETIONS, {"prompt": [5] * 200_000}, "prompt"),
    "a text to embed": ("/v1/embeddings", {"input": ["Hi.", HUGE]}, "input"),
    "token ids to embed": ("/v1/embeddings", {"input": [5] * 200_000}, "input"),
    "text to count": ("/tokenize", {"prompt": HUGE}, "prompt"),
    "a chat to count": ("/tokenize", {"messages": [say("user", HUGE)]}, "messages"),
}


@pytest.mark.parametrize("case", TOO_LONG)
def test_what_cannot_fit_is_refused_by_name(api: Api, case: str) -> None:
    path, fields, param = TOO_LONG[case]
    response = api.http.post(path, json={"model": "demo", "max_tokens": 4, **fields})
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert len(response.content) < 1000


def test_to_refuse_costs_about_as_much_as_to_receive(server: Server) -> None:
    """A stall: tokenising the prompt took 13 s and more."""
    received, refused = (
        min(seconds_for(server, content) for _ in range(3))
        for content in (
            json.dumps({"model": 7, "messages": [say("user", HUGE)]}),
            json.dumps(body(HUGE)),
        )
    )
    assert refused < 5 * received + 0.2


def seconds_for(server: Server, content: str) -> float:
    started = time.monotonic()
    response = httpx.post(f"{server.base_url}{CHAT}", content=content, headers=JSON, timeout=60)
    assert response.status_code == 400
    return time.monotonic() - started


def test_six_at_once_cost_no_memory_and_no_time_of_others(server: Server) -> None:
    content = json.dumps(body(HUGE)).encode()
    before = resident(server.process.pid)
    with watched(server.process.pid) as peaks, streaming(server) as times, ThreadPoolExecutor(6) as pool:
        while len(times) < 50:  # so much for how it is when all is quiet
            time.sleep(0.01)
        quiet = len(times)
        refused = [
            pool.submit(httpx.post, f"{server.base_url}{CHAT}", content=content, headers=JSON, timeout=120)
            for _ in range(6)
        ]
        assert [one.result().status_code for one in refused] == [400] * 6
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(gaps) > quiet
    assert max(gaps[quiet:]) < 1 + 20 * max(gaps[:quiet])  # it was a matter of ten seconds
    assert max(peaks) - before < 400 * 2**20  # it was 5.8 GB
    assert resident(server.process.pid) - before < 300 * 2**20


def resident(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


@contextmanager
def watched(process: int) -> Iterator[list[int]]:
    """Resident bytes of a process, over and over."""
    seen, over = [resident(process)], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            seen.append(resident(process))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@contextmanager
def streaming(server: Server) -> Iterator[list[float]]:
    """When the pieces of a long answer came; at the end of the block it is waited for."""
    times: list[float] = []

    def hear() -> None:
        asked = body(min_tokens=450, max_tokens=450, temperature=1, seed=1, stream=True)
        with httpx.stream("POST", f"{server.base_url}{CHAT}", json=asked, timeout=120) as response:
            times.extend(time.monotonic() for line in response.iter_lines() if line.startswith("data: {"))

    thread = threading.Thread(target=hear)
    thread.start()
    try:
        yield times
    finally:
        thread.join()


class TestTokenize:
    def test_the_answer_is_bounded(self, api: Api) -> None:
        """It was 14 MB for a body of 7.9 MB."""
        response = api.http.post("/tokenize", json={"prompt": "?" * 70_000, "return_token_strs": True})
        assert error_of(response)["code"] == "context_length_exceeded"
        assert "65536 tokens" in error_of(response)["message"]

    def test_more_than_the_context_can_be_counted(self, api: Api) -> None:
        answer = api.http.post("/tokenize", json={"prompt": PARTY * 400, "return_token_strs": True}).json()
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) > answer["max_model_len"]

    def test_so_can_be_turned_back(self, api: Api) -> None:
        tokens = api.http.post("/tokenize", json={"prompt": PARTY * 400}).json()["tokens"]
        assert api.http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": PARTY * 400}
        response = api.http.post("/detokenize", json={"tokens": [5] * 65_537})
        assert (response.status_code, error_of(response)["param"]) == (400, "tokens")
        assert "65537" in error_of(response)["message"]


def nested_schema(depth: int) -> Json:
    schema: Json = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def wanting(schema: Json) -> Json:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


ARGUMENTS = "messages.0.tool_calls.0.function.arguments"


class TestDepth:
    """None of these is a RecursionError, and each names its field."""

    @pytest.mark.parametrize("depth", [200, 5_000, DEEP])
    @pytest.mark.parametrize("path", [CHAT, "/tokenize"])
    def test_arguments_of_a_call(self, api: Api, path: str, depth: int) -> None:
        messages = called("[" * depth + "]" * depth)
        response = api.http.post(path, json={"model": "demo", "messages": messages})
        assert (response.status_code, error_of(response)["param"]) == (400, ARGUMENTS)

    @pytest.mark.parametrize("depth", [70, 400])
    def test_a_schema_of_an_answer(self, api: Api, depth: int) -> None:
        response = api.post(**wanting(nested_schema(depth)))
        assert response.status_code == 400
        assert error_of(response)["param"].startswith("response_format")
        assert "128" in error_of(response)["message"]

    @pytest.mark.parametrize("path", [CHAT, "/tokenize"])
    def test_a_schema_of_a_tool(self, api: Api, path: str) -> None:
        content = body(tools=tool(parameters=nested_schema(400)), tool_choice="required")
        if path != CHAT:
            del content["tool_choice"]
        response = api.http.post(path, json=content)
        assert (response.status_code, error_of(response)["param"]) == (400, "tools.0.function.parameters")

    @pytest.mark.parametrize(
        ("path", "fields"),
        [
            ("/v1/fine_tuning/jobs", {"training_file": "f", "suffix": "x"}),
            (COMPLETIONS, {"model": "demo", "prompt": "x"}),
            ("/v1/personas/compose", {"name": "x", "expression": "introvert"}),
        ],
    )
    def test_metadata_of_anything(self, api: Api, path: str, fields: Json) -> None:
        content = json.dumps(fields)[:-1] + ', "metadata": {"a": ' + "[" * DEEP + "]" * DEEP + "}}"
        response = api.http.post(path, content=content, headers=JSON)
        assert (response.status_code, error_of(response)["type"]) == (400, "invalid_request_error")
        shallow = json.dumps(fields)[:-1] + ', "metadata": {"a": ' + "[" * 400 + "]" * 400 + "}}"
        response = api.http.post(path, content=shallow, headers=JSON)
        assert (response.status_code, error_of(response)["param"]) == (400, "metadata.a.0.0")

    def test_what_is_deep_enough_for_anybody(self, api: Api) -> None:
        assert api.post(messages=[*called("[" * 100 + "]" * 100), say("user", "Hi.")], max_tokens=2).status_code == 200
        assert api.post(**wanting(nested_schema(50)), max_tokens=2).status_code == 200


LONG = "p" * 1_000_000


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"stop": list("abcde")}, ["stop", "5", "limit is 4"]),
        ({"temperature": float("nan")}, ["temperature", "finite number", "nan"]),
        ({"top_p": float("inf")}, ["top_p", "finite number", "inf"]),
        ({"gamma": float("-inf"), "persona": "introvert"}, ["gamma", "finite number"]),
        ({"logit_bias": {str(number): 1 for number in range(5000)}}, ["logit_bias", "5000", "limit is 4096"]),
        ({"temperature": 2.5}, ["temperature", "less than or equal to 2", "2.5"]),
        ({"stream": LONG}, ["stream", "ppp..."]),
        ({"n": LONG}, ["n:", "ppp..."]),
        ({"messages": [{"role": LONG, "content": "x"}]}, ["messages.0.role", "ppp..."]),
        ({"messages": [say("user", [{"type": LONG}])]}, ["ppp"]),  # type: ignore[arg-type]
        ({"persona": LONG}, ["ppp..."]),
        ({"model": LONG}, ["ppp..."]),
        ({"model": f"demo:{LONG}"}, ["ppp..."]),
        ({"model": f"demo:{LONG}", "persona": f"x{LONG}"}, ["ppp..."]),
        ({"logit_bias": {LONG: 1}}, ["logit_bias"]),
        ({"tools": tool(), "tool_choice": {"type": "function", "function": {"name": LONG}}}, ["tool_choice"]),
        (wanting({"type": "string", "pattern": "(?=a)b"}), ["response_format", "(?=a)b", "look-ahead"]),
        (wanting({"type": LONG}), ["response_format"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_refusal_says_the_limit_and_little_of_what_was_given(api: Api, fields: Json, words: list[str]) -> None:
    content = json.dumps(body(**fields), allow_nan=True)
    response = api.http.post(CHAT, content=content, headers=JSON)
    error = error_of(response)
    assert 400 <= response.status_code < 500
    assert len(response.content) < 1000
    assert all(word in error["message"] for word in words), error["message"]
    assert "p" * 81 not in response.text


def test_too_many_prompts_are_counted(api: Api) -> None:
    error = error_of(api.http.post(COMPLETIONS, json={"model": "demo", "prompt": ["a"] * 1000}))
    assert error["message"] == "prompt: it has 1000 items; the limit is 64"


def test_a_body_in_another_alphabet_and_one_that_is_deep_are_told_apart(api: Api) -> None:
    latin, deep = (
        error_of(api.http.post(CHAT, content=content, headers=JSON))["message"]
        for content in ('{"model": "ü"}'.encode("latin-1"), b'{"model": ' + b"[" * 1000)
    )
    assert "UTF-8" in latin
    assert "byte 11" in latin
    assert "128 levels" in deep


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    ],
    ids=["itself", "each other", "itself within itself"],
)
@pytest.mark.parametrize("place", ["response_format", "tools"])
def test_a_schema_that_no_document_meets_is_refused(api: Api, place: str, schema: Json) -> None:
    fields = wanting(schema) if place == "response_format" else {"tools": tool(parameters=schema)}
    response = api.post(**fields, **({"tool_choice": "required"} if place == "tools" else {}))
    assert response.status_code == 400
    assert error_of(response)["param"].startswith(place)
    assert "no finite document meets it" in error_of(response)["message"]


def test_an_answer_without_a_limit_does_not_take_the_whole_context(narrow: httpx.Client) -> None:
    asked = {"model": "rambler", "messages": [{"role": "user", "content": "Hi."}]}
    answer = narrow.post(CHAT, json=asked, timeout=300).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == DEFAULT_MAX_TOKENS


def test_a_cache_that_is_smaller_than_the_context_ends_answers_as_the_context_does(tmp_path: Path) -> None:
    folder = world.make_model(tmp_path / "small", eos_token_id=NEVER)
    ask = {"model": "small", "messages": [{"role": "user", "content": "Hi."}]}
    with serve_here(folder, tmp_path / "store", EngineConfig(cache_bytes=64 * 512)) as (serving, http):
        assert http.get("/v1/models").json()["data"][0]["max_model_len"] == serving.engine.max_length == 64
        chat = http.post(CHAT, json=ask)
        message = http.post("/v1/messages", json=ask | {"max_tokens": 4000})
        refused = http.post(CHAT, json=ask | {"messages": [{"role": "user", "content": "Hi. " * 40}]})
    assert chat.json()["usage"]["total_tokens"] == 64, chat.text
    assert message.json()["stop_reason"] == "model_context_window_exceeded"
    assert refused.status_code == 400
    assert "maximum context length is 64 tokens with the cache it was given" in refused.text


HOT: Json = {"temperature": 2.0, "seed": 3, "max_tokens": 24}


class TestOthersWords:
    """Values with which other servers say that something is off."""

    def test_top_k_is_off(self, api: Api) -> None:
        assert api.text(**HOT, top_k=-1) == api.text(**HOT, top_k=0) == api.text(**HOT)
        assert api.post(top_k=-2).status_code == 400

    def test_top_p_is_greedy(self, api: Api) -> None:
        greedy = api.text(temperature=0, max_tokens=24)
        assert api.text(**HOT, top_p=0) == api.text(top_p=0.0, temperature=None, max_tokens=24) == greedy
        assert api.text(**HOT) != greedy
        completion = {"model": "demo", "prompt": "On Sunday", "max_tokens": 8}
        asked = [completion | {"top_p": 0, "temperature": 2.0}, completion | {"temperature": 0}]
        one, other = (api.http.post(COMPLETIONS, json=one).json()["choices"][0]["text"] for one in asked)
        assert one == other
