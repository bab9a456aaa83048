"""pydantic-ai with both of its models for OpenAI: of chats and of responses."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from checks import MAX_TOKENS, OVERSIZE, QUESTION, TOO_LONG, WEATHER, Checks, refused
from openai import AsyncOpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.direct import model_request_sync
from pydantic_ai.exceptions import (
    ModelAuthenticationError,
    ModelContextWindowExceededError,
    ModelHTTPError,
    ModelNotFoundError,
    ModelRateLimitError,
)
from pydantic_ai.messages import ModelRequest, ToolReturnPart
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition

checks = Checks()
world = checks.world
MODEL = world["model"]
ASKED = QUESTION[0]["content"]
Model = type[OpenAIChatModel] | type[OpenAIResponsesModel]
MODELS: tuple[Model, ...] = (OpenAIChatModel, OpenAIResponsesModel)
FUNCTION: dict[str, Any] = WEATHER["function"]
WEATHER_TOOL = ToolDefinition(
    name=FUNCTION["name"], description=FUNCTION["description"], parameters_json_schema=FUNCTION["parameters"]
)


class Person(BaseModel):
    """What the model is to fill in."""

    mood: Literal["calm", "wild"]
    age: int = Field(ge=1, le=99)


def agent(
    model: Model = OpenAIChatModel, name: str = f"{MODEL}:introvert", key: str = world["admin"], **options: Any
) -> Agent[None, Any]:
    """A greedy agent, which asks once."""
    client = AsyncOpenAI(base_url=f"{options.pop('url', world['url'])}/v1", api_key=key, max_retries=0, timeout=120)
    settings = {"temperature": 0, "max_tokens": MAX_TOKENS} | options.pop("settings", {})
    provider = OpenAIProvider(openai_client=client)
    return Agent(model(name, provider=provider), model_settings=settings, retries=0, **options)


def ask(model: Model = OpenAIChatModel, name: str = f"{MODEL}:introvert", said: str = ASKED, **options: Any) -> Any:
    return agent(model, name, **options).run_sync(said)


@checks.check("chat")
def chat() -> None:
    answer = ask(instructions="Be brief.", settings={"max_tokens": 40, "seed": 1, "stop_sequences": ["\n"]})
    assert answer.output
    assert answer.response.finish_reason in ("stop", "length")
    again = agent().run_sync("Why?", message_history=answer.all_messages())
    assert again.output
    assert again.usage.input_tokens > answer.usage.input_tokens


@checks.check("persona")
def ask_persona() -> None:
    for model in MODELS:
        by_model = ask(model).output
        by_field = ask(model, MODEL, settings={"extra_body": {"persona": "introvert"}}).output
        assert by_model == by_field != ask(model, MODEL).output


@checks.check("stream")
def stream() -> None:
    async def collect(model: Model) -> tuple[str, int]:
        async with agent(model).run_stream(ASKED) as run:
            deltas = [delta async for delta in run.stream_text(delta=True, debounce_by=None)]
        return "".join(deltas), run.usage.output_tokens

    for model in MODELS:
        whole = ask(model)
        assert asyncio.run(collect(model)) == (whole.output, whole.usage.output_tokens)


@checks.check("usage")
def count() -> None:
    chat, response = (ask(model).usage for model in MODELS)
    assert (chat.requests, response.requests) == (1, 1)
    assert (chat.input_tokens, chat.output_tokens) == (response.input_tokens, response.output_tokens)
    assert chat.output_tokens > 0


@checks.check("tools")
def call_tools() -> None:
    choices = ModelRequestParameters(function_tools=[WEATHER_TOOL], allow_text_output=False)
    settings: Any = {"temperature": 0, "max_tokens": MAX_TOKENS, "parallel_tool_calls": False}
    for model in MODELS:
        assert 1 <= ask(model, output_type=ToolOutput(Person)).output.age <= 99
        assert asyncio.run(last_part(model)).mood in ("calm", "wild")
        there, question = agent(model).model, ModelRequest.user_text_prompt(ASKED)
        answer = model_request_sync(there, [question], model_settings=settings, model_request_parameters=choices)
        (call,) = answer.tool_calls
        assert call.args_as_dict()["city"] in ("Bonn", "Aachen")
        told = ModelRequest(parts=[ToolReturnPart("weather", "dry", call.tool_call_id)])
        assert model_request_sync(there, [question, answer, told], model_settings=settings).text


async def last_part(model: Model) -> Any:
    """What a stream of the parts of an output ends with."""
    async with agent(model, output_type=ToolOutput(Person)).run_stream(ASKED) as run:
        parts = [part async for part in run.stream_output(debounce_by=None)]
    return parts[-1]


@checks.check("json_schema")
def fit_schema() -> None:
    for model in MODELS:
        assert ask(model, output_type=NativeOutput(Person)).output.mood in ("calm", "wild")


@checks.check("logprobs")
def report_logprobs() -> None:
    settings = {"openai_logprobs": True, "openai_top_logprobs": 2, "max_tokens": 4}
    tokens = ask(settings=settings).response.provider_details["logprobs"]
    assert 0 < len(tokens) <= 4
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)


@checks.check("previous response")
def go_on() -> None:
    first = ask(OpenAIResponsesModel)
    by_list = agent(OpenAIResponsesModel).run_sync("Why?", message_history=first.all_messages())
    settings = {"openai_previous_response_id": first.response.provider_response_id}
    by_id = ask(OpenAIResponsesModel, said="Why?", settings=settings)
    assert by_id.output == by_list.output
    assert by_id.usage.input_tokens == by_list.usage.input_tokens


@checks.check("400")
def ask_nonsense() -> None:
    for model in MODELS:
        error = refused(lambda: ask(model, settings={"extra_body": {"chat_template": "x"}}), ModelHTTPError)  # noqa: B023
        assert (error.status_code, error.body["code"]) == (400, "unsupported_parameter")
        refused(lambda: ask(model, said=TOO_LONG), ModelContextWindowExceededError)  # noqa: B023


@checks.check("401")
def show_no_key() -> None:
    for model in MODELS:
        error = refused(lambda: ask(model, key="sk-wrong"), ModelAuthenticationError)  # noqa: B023
        assert error.status_code == 401


@checks.check("403")
def ask_too_much() -> None:
    for model in MODELS:
        error = refused(lambda: ask(model, f"{MODEL}:formal", key=world["limited"]), ModelHTTPError)  # noqa: B023
        assert (error.status_code, error.body["code"]) == (403, "persona_forbidden")


@checks.check("404")
def ask_nobody() -> None:
    for model in MODELS:
        error = refused(lambda: ask(model, f"{MODEL}:pirate"), ModelNotFoundError)  # noqa: B023
        assert error.body["code"] == "model_not_found"


@checks.check("413")
def send_too_much() -> None:
    error = refused(lambda: ask(said=OVERSIZE), ModelHTTPError)
    assert (error.status_code, error.body["code"]) == (413, "body_too_large")


@checks.check("422 as 400")
def send_wrong_type() -> None:
    error = refused(lambda: ask(settings={"top_p": 7}), ModelHTTPError)
    assert (error.status_code, error.body["code"], error.body["param"]) == (400, "invalid_value", "top_p")


@checks.check("429")
def ask_too_often() -> None:
    once = {"key": world["hasty"], "settings": {"max_tokens": 1}}
    ask(**once)
    assert refused(lambda: ask(**once), ModelRateLimitError).status_code == 429


checks.run()
