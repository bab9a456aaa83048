"""litellm's proxy in front of the server, and the stock openai SDK in front of the proxy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
from checks import MAX_TOKENS, OVERSIZE, PERSON, QUESTION, TOO_LONG, WEATHER, Checks, refused
from openai import OpenAI

checks = Checks()
world = checks.world
MODEL = world["model"]
PERSONA = f"{MODEL}:introvert"
MASTER_KEY = "sk-proxy"
DEPLOYMENTS = ("one", "two")  # of the group `both`: litellm takes a deployment away only if the group has another
START_SECONDS = 120


def deploy(name: str, model: str, provider: str = "openai", **more: str) -> dict[str, Any]:
    """A deployment under a name. For Anthropic's API, litellm adds `/v1/messages` to the base itself."""
    base = world["url"] if provider == "anthropic" else f"{world['url']}/v1"
    place = {"model": f"{provider}/{model}", "api_base": base, "api_key": world["admin"], **more}
    return {"model_name": name, "litellm_params": place}


def configure() -> dict[str, Any]:
    models = [
        deploy(MODEL, MODEL),
        deploy(PERSONA, PERSONA),
        deploy("messages", PERSONA, "anthropic"),
        deploy("nobody", f"{MODEL}:pirate"),
        deploy("formal", f"{MODEL}:formal", api_key=world["limited"]),
        deploy("stranger", MODEL, api_key="sk-wrong"),
        *(deploy("both", MODEL) | {"model_info": {"id": name}} for name in DEPLOYMENTS),
    ]
    router = {"num_retries": 0, "cooldown_time": 600}
    return {"model_list": models, "router_settings": router, "general_settings": {"master_key": MASTER_KEY}}


@contextmanager
def start() -> Iterator[str]:
    """The address of a proxy, until the block ends."""
    with socket.socket() as probe, tempfile.TemporaryDirectory(prefix="litellm-") as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        settings, log = Path(folder, "config.yaml"), Path(folder, "log")
        settings.write_text(json.dumps(configure()))  # JSON is YAML
        command = [Path(sys.executable).with_name("litellm"), "--config", settings, "--host", "127.0.0.1"]
        environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONWARNINGS": "ignore"}
        with log.open("wb") as output:
            proxy = subprocess.Popen(
                [*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        try:
            wait(f"http://127.0.0.1:{port}", proxy, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            proxy.terminate()
            proxy.wait()


def wait(url: str, proxy: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert proxy.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        try:
            if httpx.get(f"{url}/health/liveliness", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)


def chat(**fields: Any) -> Any:
    plain = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": MAX_TOKENS}
    return client.chat.completions.create(**(plain | fields))


def text(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def send(model: str, **fields: Any) -> httpx.Response:
    """A request in Anthropic's form."""
    body = {"model": model, "messages": QUESTION, "max_tokens": MAX_TOKENS, "temperature": 0, **fields}
    key = {"x-api-key": MASTER_KEY, "anthropic-version": "2023-06-01"}
    return httpx.post(f"{url}/v1/messages", json=body, headers=key, timeout=120)


@checks.check("models")
def list_models() -> None:
    assert {MODEL, PERSONA} <= {model.id for model in client.models.list()}


@checks.check("chat")
def ask() -> None:
    assert text(chat(stop=["\n"], seed=1))
    assert client.completions.create(model=MODEL, prompt="On Sunday I like", max_tokens=8).choices[0].text


@checks.check("persona")
def ask_persona() -> None:
    by_model, by_field = chat(model=PERSONA), chat(extra_body={"persona": "introvert"})
    assert text(by_model) == text(by_field) != text(chat())


@checks.check("stream")
def stream() -> None:
    chunks = list(chat(model=PERSONA, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text(
        chat(model=PERSONA)
    )


@checks.check("usage")
def count() -> None:
    whole = chat().usage
    *_, last = chat(stream=True, stream_options={"include_usage": True})
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)


@checks.check("tools")
def call_tools() -> None:
    required: Any = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    said = chat(**required).choices[0].message
    (call,) = said.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Bonn", "Aachen")
    deltas = [chunk.choices[0].delta for chunk in chat(**required, stream=True) if chunk.choices]
    parts = [part for delta in deltas for part in delta.tool_calls or []]
    assert "".join(part.function.arguments or "" for part in parts) == call.function.arguments
    told = {"role": "tool", "tool_call_id": call.id, "content": "dry"}
    turns = [*QUESTION, said.model_dump(exclude_none=True), told]
    assert text(chat(messages=turns, tools=[WEATHER], tool_choice="none"))


@checks.check("json_schema")
def fit_schema() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    assert json.loads(text(chat(response_format=form)))["mood"] in ("calm", "wild")


@checks.check("logprobs")
def report_logprobs() -> None:
    tokens = chat(logprobs=True, top_logprobs=2, max_tokens=4).choices[0].logprobs.content
    assert 0 < len(tokens) <= 4
    assert all(len(token.top_logprobs) == 2 for token in tokens)


@checks.check("responses")
def use_responses() -> None:
    plain: Any = {"model": PERSONA, "input": QUESTION, "temperature": 0, "max_output_tokens": MAX_TOKENS}
    response = client.responses.create(**plain)
    assert response.output_text == text(chat(model=PERSONA))
    events = list(client.responses.create(**plain, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text == response.output_text
    tool = {"type": "function", **WEATHER["function"]}
    (call,) = client.responses.create(**plain, tools=[tool], tool_choice="required", parallel_tool_calls=False).output
    assert json.loads(call.arguments)["city"] in ("Bonn", "Aachen")


@checks.check("previous response")
def go_on() -> None:
    """The proxy's ids are its own, and stand for the server's."""
    plain: Any = {"model": PERSONA, "temperature": 0, "max_output_tokens": MAX_TOKENS}
    first = client.responses.create(**plain, input=QUESTION)
    second = client.responses.create(**plain, input="Why?", previous_response_id=first.id)
    assert second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(second.id).output_text == second.output_text


@checks.check("embeddings")
def embed() -> None:
    """Without a format, the SDK asks for base64 and reads it."""
    for form in ({}, {"encoding_format": "float"}):
        found: Any = client.embeddings.create(model=MODEL, input=["calm", "wild"], **form)
        assert [one.index for one in found.data] == [0, 1]
        assert abs(sum(value**2 for value in found.data[0].embedding) - 1) < 1e-3


@checks.check("messages")
def send_messages() -> None:
    """Passed on to `/v1/messages` by the provider `anthropic`, and translated by the provider `openai`."""
    expected = text(chat(model=PERSONA))
    for model in ("messages", PERSONA):
        answer = send(model).raise_for_status().json()
        assert answer["content"][0]["text"] == expected, (model, answer)
        assert answer["usage"]["output_tokens"] > 0
        events = [json.loads(line[5:]) for line in send(model, stream=True).text.splitlines() if line[:5] == "data:"]
        deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        assert "".join(delta["text"] for delta in deltas) == expected, model
        assert events[-1]["type"] == "message_stop"


@checks.check("400")
def ask_nonsense() -> None:
    error = refused(lambda: chat(extra_body={"chat_template": "x"}), openai.BadRequestError)
    assert "chat_template" in str(error)
    assert "maximum context length" in str(
        refused(lambda: chat(messages=[{"role": "user", "content": TOO_LONG}]), openai.BadRequestError)
    )


@checks.check("401")
def show_no_key() -> None:
    assert "Incorrect API key" in str(refused(lambda: chat(model="stranger"), openai.AuthenticationError))


@checks.check("403")
def ask_too_much() -> None:
    assert "formal" in str(refused(lambda: chat(model="formal"), openai.PermissionDeniedError))


@checks.check("404")
def ask_nobody() -> None:
    assert "pirate" in str(refused(lambda: chat(model="nobody"), openai.NotFoundError))


@checks.check("413")
def send_too_much() -> None:
    long = [{"role": "user", "content": OVERSIZE}]
    assert refused(lambda: chat(messages=long), openai.APIStatusError).status_code == 413


@checks.check("422 as 400")
def send_wrong_type() -> None:
    assert "top_p" in str(refused(lambda: chat(top_p=7), openai.BadRequestError))


@checks.check("no cooldown")
def stay_warm() -> None:
    """No answer and no refusal of a bad request takes a deployment away: both of a group go on being used."""
    for bad in ({"top_p": 7}, {"messages": [{"role": "user", "content": TOO_LONG}]}, {"tools": "no list"}):
        for _ in range(8):  # each deployment gets some of them
            refused(lambda: chat(model="both", **bad), openai.BadRequestError)  # noqa: B023
    used = set()
    for _ in range(24):
        raw = client.chat.completions.with_raw_response.create(model="both", messages=QUESTION, max_tokens=1)
        used.add(raw.headers["x-litellm-model-id"])
    assert used == set(DEPLOYMENTS)


with start() as url:
    client = OpenAI(base_url=f"{url}/v1", api_key=MASTER_KEY, max_retries=0, timeout=120)
    checks.run()
