"""openai-agents with its default model class, which talks to `/v1/responses`."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
from agents import (
    Agent,
    ModelBehaviorError,
    ModelSettings,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from agents.models.multi_provider import MultiProvider
from checks import QUESTION, TOO_LONG, Checks, refused
from openai import AsyncOpenAI
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel, Field

checks = Checks()
world = checks.world
MODEL = world["model"]
ASKED = QUESTION[0]["content"]
set_tracing_disabled(True)


class Person(BaseModel):
    """What the model is to fill in."""

    mood: str = Field(pattern="^(calm|wild)$")
    age: int = Field(ge=1, le=99)


@function_tool
def weather(city: Literal["Bonn", "Aachen"]) -> str:
    """The weather of a city."""
    asked_of.append(city)
    return "dry"


asked_of: list[str] = []


def connect(key: str = world["admin"], url: str = world["url"]) -> None:
    """Let agents talk to a server."""
    set_default_openai_client(AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120))


def agent(model: str = MODEL, settings: dict[str, Any] | None = None, **fields: Any) -> Agent[None]:
    """A greedy agent; the name of its model is found by the library's own provider.

    Its answers end with their first sentence: the library takes an answer that is cut off for an error.
    """
    given = settings or {}
    body = {"stop": ["."], **given.pop("extra_body", {})}
    return Agent(name="tester", model=model, model_settings=ModelSettings(0, extra_body=body, **given), **fields)


def ask(said: Any = ASKED, by: Agent[None] | None = None, **fields: Any) -> Any:
    return Runner.run_sync(by or agent(), said, **fields)


connect()


@checks.check("responses")
def use_responses() -> None:
    assert isinstance(MultiProvider().get_model(MODEL), OpenAIResponsesModel)
    answer = ask()
    assert answer.final_output
    assert answer.last_response_id.startswith("resp_")
    assert ask(by=agent(instructions="Be brief.")).final_output
    cut = agent(settings={"max_tokens": 4})
    assert "max_output_tokens" in str(refused(lambda: ask(by=cut), ModelBehaviorError))  # the library's own rule


@checks.check("persona")
def ask_persona() -> None:
    by_model = ask(by=agent(f"{MODEL}:introvert")).final_output
    by_field = ask(by=agent(settings={"extra_body": {"persona": "introvert"}})).final_output
    assert by_model == by_field != ask().final_output


@checks.check("stream")
def stream() -> None:
    async def collect() -> tuple[str, str]:
        run = Runner.run_streamed(agent(f"{MODEL}:introvert"), ASKED)
        deltas = [
            event.data.delta
            async for event in run.stream_events()
            if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent)
        ]
        return "".join(deltas), run.final_output

    connect()  # connections belong to an event loop
    text, final = asyncio.run(collect())
    connect()
    assert text == final == ask(by=agent(f"{MODEL}:introvert")).final_output


@checks.check("usage")
def count() -> None:
    usage = ask().context_wrapper.usage
    assert usage.requests == 1
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert ask().context_wrapper.usage.input_tokens_details.cached_tokens <= usage.input_tokens


@checks.check("tools")
def call_tools() -> None:
    asked_of.clear()
    settings = {"tool_choice": "required", "parallel_tool_calls": False}
    answer = ask(by=agent(tools=[weather], settings=settings))  # after the call, the choice is reset to auto
    assert asked_of, answer
    assert answer.final_output
    kinds = [item.type for item in answer.new_items]
    assert kinds[:2] == ["tool_call_item", "tool_call_output_item"], kinds
    assert json.loads(answer.new_items[0].raw_item.arguments)["city"] == asked_of[0]


@checks.check("json_schema")
def fit_schema() -> None:
    person = ask(by=agent(output_type=Person)).final_output
    assert isinstance(person, Person)
    assert person.mood in ("calm", "wild")


@checks.check("logprobs")
def report_logprobs() -> None:
    answer = ask(by=agent(settings={"top_logprobs": 2}))
    (message,) = answer.raw_responses[0].output
    tokens = message.content[0].logprobs
    assert tokens
    assert all(len(token.top_logprobs) == 2 for token in tokens)


@checks.check("previous response")
def go_on() -> None:
    first = ask()
    by_id = ask("Why?", previous_response_id=first.last_response_id)
    by_list = ask([*first.to_input_list(), {"role": "user", "content": "Why?"}])
    assert by_id.final_output == by_list.final_output
    assert by_id.context_wrapper.usage.input_tokens == by_list.context_wrapper.usage.input_tokens


@checks.check("400")
def ask_nonsense() -> None:
    from agents import WebSearchTool

    error = refused(lambda: ask(by=agent(tools=[WebSearchTool()])), openai.BadRequestError)
    assert (error.code, error.param) == ("unsupported_parameter", "tools.0.type")
    error = refused(lambda: ask(TOO_LONG), openai.BadRequestError)
    assert error.code == "context_length_exceeded"


@checks.check("404")
def ask_nobody() -> None:
    assert refused(lambda: ask(by=agent(f"{MODEL}:pirate")), openai.NotFoundError).code == "model_not_found"
    error = refused(lambda: ask(previous_response_id="resp_0"), openai.NotFoundError)
    assert error.code == "response_not_found"


@checks.check("401")
def show_no_key() -> None:
    connect("sk-wrong")
    assert refused(ask, openai.AuthenticationError).code == "invalid_api_key"
    connect()


@checks.check("403")
def ask_too_much() -> None:
    connect(world["limited"])
    error = refused(lambda: ask(by=agent(f"{MODEL}:formal")), openai.PermissionDeniedError)
    assert error.code == "persona_forbidden"
    connect()


checks.run()
