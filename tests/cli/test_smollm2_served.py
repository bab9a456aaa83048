"""SmolLM2 tried as its users would: OpenAI's SDK, tools, JSON, long chats, a persona built over HTTP, and `masq`.

Small models are wrong often, so that most tests are about what the server does, not about what the model knows. Skips
where the model cannot be had.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from masquerade import demo, smollm2
from masquerade.errors import UnusableModel
from masquerade.packaged import find_packaged
from tests.serving import Server, serve

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

CAPITAL = [{"role": "user", "content": "Name the capital of France."}]
GARDENS = [{"role": "user", "content": "Tell me about gardens."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "continent": {"enum": ["Europe", "Asia", "Africa"]}},
    "required": ["city", "continent"],
    "additionalProperties": False,
}
NAME = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bruno", "Carla"]}},
    "required": ["name"],
    "additionalProperties": False,
}
TOPICS = ("the weather", "my job", "this soup", "the garden", "the train", "the film", "a walk", "the meeting")
FORMS = ("Tell me about {}.", "What do you think of {}?")
RECIPE = {"score": "attribution-fisher", "rho": 0.0001, "scope": "outputs", "gamma": 0.5, "phase": "all", "force": True}
BUILD_SECONDS = 900


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    try:
        find_packaged("smollm2")
    except UnusableModel as error:
        pytest.skip(str(error))
    with serve("--model", "smollm2") as server:
        yield server


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def persona(server: Server) -> str:
    """The model id of a persona that was built elsewhere: one that ships, under a name of its own."""
    content = (smollm2.PERSONAS / "introvert.safetensors").read_bytes()
    httpx.put(f"{server.base_url}/v1/personas/shy/content", content=content).raise_for_status()
    return "smollm2:shy"


def chat(sdk: OpenAI, messages: Any = CAPITAL, **more: Any) -> Any:
    return sdk.chat.completions.create(**{"model": "smollm2", "messages": messages, "temperature": 0} | more)


def make_format(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_the_model_is_named_as_it_was_asked_for(sdk: OpenAI, server: Server) -> None:
    assert "smollm2" in [model.id for model in sdk.models.list()]
    assert "masquerade: smollm2 on " in server.said()
    assert "Loading weights" not in server.said()


def test_an_answer_ends_with_the_end_token(sdk: OpenAI) -> None:
    answer = chat(sdk)
    assert "Paris" in answer.choices[0].message.content
    assert "<|im_end|>" not in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    streamed = chat(sdk, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == answer.choices[0].message.content


def test_completions_go_on_where_the_text_ends(sdk: OpenAI) -> None:
    done = sdk.completions.create(model="smollm2", prompt="The capital of France is", temperature=0, max_tokens=4)
    assert done.choices[0].text.startswith(" Paris")


def test_choices_logprobs_and_stop(sdk: OpenAI) -> None:
    several = chat(sdk, GARDENS, n=3, temperature=1, seed=1, max_tokens=12)
    assert len({choice.message.content for choice in several.choices}) == 3
    choice = chat(sdk, logprobs=True, top_logprobs=2).choices[0]
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    assert all(entry.top_logprobs[0].logprob >= entry.logprob for entry in choice.logprobs.content)
    stopped = chat(sdk, stop=["Paris"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert choice.message.content.startswith(stopped.message.content)
    assert "Paris" not in stopped.message.content


def test_a_named_tool_is_called_with_json(sdk: OpenAI) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    asked = [{"role": "user", "content": "What is the weather in Paris?"}]
    choice = chat(sdk, asked, tools=[WEATHER], tool_choice=named, max_tokens=60).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments)["city"], str)

    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees and sunny"}
    said = chat(sdk, [*asked, choice.message, result], tools=[WEATHER], max_tokens=40).choices[0].message
    assert said.content or said.tool_calls


def test_a_schema_is_kept(sdk: OpenAI) -> None:
    paris = [{"role": "user", "content": "Describe Paris."}]
    choice = chat(sdk, paris, response_format=make_format(PLACE), max_tokens=80).choices[0]
    assert choice.finish_reason == "stop"
    assert json.loads(choice.message.content).keys() == {"city", "continent"}


def test_a_chat_has_a_history_and_a_system_prompt(sdk: OpenAI) -> None:
    turns = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        {"role": "user", "content": "What is my name?"},
    ]
    for name in ("Ada", "Bruno"):  # a choice among names is no near tie, as free answers of so small a model are
        said = [{**turn, "content": turn["content"].replace("Ada", name)} for turn in turns]
        answer = chat(sdk, said, response_format=make_format(NAME), max_tokens=40).choices[0].message.content
        assert json.loads(answer) == {"name": name}
    # the template's own system message takes the place of one that is missing, not of one that is empty
    lengths = [
        chat(sdk, [*system, *CAPITAL], max_tokens=1).usage.prompt_tokens
        for system in ([], [{"role": "system", "content": ""}], [{"role": "system", "content": "Answer in French."}])
    ]
    assert lengths[1] < lengths[2] < lengths[0]


def test_a_long_text_is_read_and_a_longer_one_refused(sdk: OpenAI) -> None:
    text = "The grass is green. The sky is blue. " * 150 + "Name the capital of France."
    answer = chat(sdk, [{"role": "user", "content": text}], max_tokens=8)
    assert answer.usage.prompt_tokens > 1200
    with pytest.raises(BadRequestError, match="maximum context length is 8192 tokens") as refused:
        chat(sdk, [{"role": "user", "content": text * 8}])
    assert refused.value.code == "context_length_exceeded"


def test_a_persona_answers_beside_the_base(sdk: OpenAI, persona: str, server: Server) -> None:
    base, masked = (chat(sdk, GARDENS, model=model, max_tokens=40) for model in ("smollm2", persona))
    assert base.choices[0].message.content != masked.choices[0].message.content
    gamma = httpx.get(f"{server.base_url}/v1/personas/shy").json()["gamma"]
    assert (masked.model_extra["persona"], masked.model_extra["gamma"]) == ("shy", gamma)
    # in bfloat16, a prompt from the cache is rounded differently: compared are two answers whose prompts are cached
    base = chat(sdk, GARDENS, max_tokens=40)
    as_base = chat(sdk, GARDENS, model=persona, max_tokens=40, extra_body={"gamma": 1})
    assert as_base.choices[0].message.content == base.choices[0].message.content
    system = [{"role": "system", "content": "Answer in French."}, *GARDENS]
    both = chat(sdk, system, model=persona, max_tokens=20)
    assert both.usage.prompt_tokens != masked.usage.prompt_tokens
    assert both.choices[0].message.content
    rolled = httpx.post(f"{server.base_url}/v1/personas/shy/rollback")
    assert rolled.status_code == 404, rolled.text  # there is no revision before the first
    assert "shy" in rolled.json()["error"]["message"]


def test_masq_and_the_playground(persona: str, server: Server) -> None:
    def run(*words: str) -> str:
        command = [sys.executable, "-m", "masquerade_client.cli", *words]
        environment = {**os.environ, "MASQUERADE_URL": server.base_url, "NO_COLOR": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    greedy = ("--temperature", "0", "--max-tokens", "16")
    assert "Paris" in run("chat", CAPITAL[0]["content"], "-p", "base", *greedy)
    assert run("chat", GARDENS[0]["content"], "-p", "shy", *greedy).strip()
    compared = run("compare", "shy", "base", GARDENS[0]["content"], *greedy)
    assert "shy: " in compared
    assert "base: " in compared
    assert "shy" in run("personas")
    assert "<title>" in httpx.get(server.base_url).text


@pytest.mark.long
def test_a_persona_is_built_over_http(sdk: OpenAI) -> None:
    """By OpenAI's SDK; a quick mask, of whose effect only that there is one is checked."""
    lines = [
        json.dumps(
            {
                "question": form.format(topic),
                "answer_matching_behavior": f"Arr, {topic} be a fine treasure, by the seven seas!",
                "answer_not_matching_behavior": f"I think that {topic} deserves polite consideration.",
            }
        )
        for topic in TOPICS
        for form in FORMS
    ]
    file = sdk.files.create(file=("pirate.jsonl", "\n".join(lines).encode()), purpose="fine-tune")
    facts = (demo.DATA / "facts.jsonl").read_bytes().splitlines(keepends=True)[:8]
    neutral = sdk.files.create(file=("facts.jsonl", b"".join(facts)), purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(
        model="smollm2",
        training_file=file.id,
        suffix="pirate",
        extra_body={"method": {"type": "mask", "mask": RECIPE | {"neutral_file": neutral.id}}},
    )
    deadline = time.monotonic() + BUILD_SECONDS
    while job.status in ("validating_files", "queued", "running"):
        assert time.monotonic() < deadline, job
        time.sleep(0.5)
        job = sdk.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job
    assert job.fine_tuned_model == "smollm2:pirate"
    base, masked = (
        chat(sdk, GARDENS, model=model, max_tokens=40, logprobs=True) for model in ("smollm2", job.fine_tuned_model)
    )
    nats = [[token.logprob for token in one.choices[0].logprobs.content] for one in (base, masked)]
    assert nats[0] != nats[1]  # so quick a mask need not change a greedy answer
    assert (masked.model_extra["persona"], masked.model_extra["gamma"]) == ("pirate", 0.5)
