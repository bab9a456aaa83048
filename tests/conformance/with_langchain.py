"""langchain-openai's ChatOpenAI."""

from __future__ import annotations

from typing import Any

import openai
from checks import MAX_TOKENS, OVERSIZE, QUESTION, TOO_LONG, WEATHER, Checks, refused
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

checks = Checks()
world = checks.world
MODEL = world["model"]
ASKED = QUESTION[0]["content"]


def connect(key: str = world["admin"], **options: Any) -> ChatOpenAI:
    plain = {"model": MODEL, "base_url": f"{world['url']}/v1", "temperature": 0, "max_retries": 0, "timeout": 120}
    plain["max_tokens"] = MAX_TOKENS
    return ChatOpenAI(api_key=key, **(plain | options))


class Person(BaseModel):
    """Somebody."""

    mood: str = Field(pattern="^(calm|wild)$")
    age: int = Field(ge=1, le=99)


@checks.check("chat")
def ask() -> None:
    answer = connect().invoke([SystemMessage("Be brief."), HumanMessage(ASKED)])
    assert answer.content
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.usage_metadata["output_tokens"] > 0
    assert len(connect().batch([ASKED, "Do you enjoy a concert?"])) == 2
    completion = OpenAI(model=MODEL, base_url=f"{world['url']}/v1", api_key=world["admin"], max_tokens=8)
    assert completion.invoke("On Sunday I like")


@checks.check("persona")
def ask_persona() -> None:
    by_model = connect(model=f"{MODEL}:introvert").invoke(ASKED)
    by_field = connect(extra_body={"persona": "introvert"}).invoke(ASKED)
    assert by_model.content == by_field.content != connect().invoke(ASKED).content
    assert by_model.response_metadata["model_name"] == f"{MODEL}:introvert"


@checks.check("stream")
def stream() -> None:
    chunks = list(connect(model=f"{MODEL}:introvert").stream(ASKED))
    assert "".join(chunk.content for chunk in chunks) == connect(model=f"{MODEL}:introvert").invoke(ASKED).content
    assert len(chunks) > 2


@checks.check("usage")
def count() -> None:
    whole = connect().invoke(ASKED).usage_metadata
    streamed = None
    for chunk in connect(stream_usage=True).stream(ASKED):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert streamed.usage_metadata["output_tokens"] == whole["output_tokens"]


@checks.check("tools")
def call_tools() -> None:
    bound = connect().bind_tools([WEATHER], tool_choice="weather")
    said = bound.invoke(ASKED)
    (call,) = said.tool_calls
    assert call["name"] == "weather"
    assert call["args"]["city"] in ("Bonn", "Aachen")
    streamed = None
    for chunk in bound.stream(ASKED):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert streamed.tool_calls[0]["args"]["city"] in ("Bonn", "Aachen")
    history = [HumanMessage(ASKED), said, ToolMessage("dry", tool_call_id=call["id"])]
    assert connect().invoke(history).content


@checks.check("json_schema")
def fit_schema() -> None:
    for method in ("json_schema", "function_calling"):
        person = connect().with_structured_output(Person, method=method).invoke(ASKED)
        assert isinstance(person, Person)
        assert person.mood in ("calm", "wild")


@checks.check("logprobs")
def report_logprobs() -> None:
    answer = connect(logprobs=True, top_logprobs=2, max_tokens=4).invoke(ASKED)
    tokens = answer.response_metadata["logprobs"]["content"]
    assert 0 < len(tokens) <= 4
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)


@checks.check("responses")
def use_responses() -> None:
    by = connect(use_responses_api=True)
    answer = by.invoke([SystemMessage("Be brief."), HumanMessage(ASKED)])
    assert answer.text == connect().invoke([SystemMessage("Be brief."), HumanMessage(ASKED)]).text
    assert answer.response_metadata["id"].startswith("resp_")
    assert answer.usage_metadata["input_token_details"]["cache_read"] >= 0
    streamed = None
    for chunk in by.stream(ASKED):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert streamed.text == by.invoke(ASKED).text
    bound = by.bind_tools([WEATHER], tool_choice="weather")
    said = bound.invoke(ASKED)
    (call,) = said.tool_calls
    assert call["args"]["city"] in ("Bonn", "Aachen")
    assert by.invoke([HumanMessage(ASKED), said, ToolMessage("dry", tool_call_id=call["id"])]).text
    person = by.with_structured_output(Person, method="json_schema").invoke(ASKED)
    assert isinstance(person, Person)
    chained = connect(use_responses_api=True, use_previous_response_id=True)
    first = chained.invoke(ASKED)
    assert chained.invoke([HumanMessage(ASKED), first, HumanMessage("Why?")]).text


def status(error: Any) -> int:
    """langchain wraps some of the SDK's errors, as classes that are both."""
    return int(error.status_code)


@checks.check("400")
def ask_nonsense() -> None:
    error = refused(lambda: connect(extra_body={"chat_template": "x"}).invoke(ASKED), openai.BadRequestError)
    assert error.code == "unsupported_parameter"
    error = refused(lambda: connect().invoke(TOO_LONG), openai.BadRequestError)
    assert (status(error), error.code) == (400, "context_length_exceeded")


@checks.check("401")
def show_no_key() -> None:
    error = refused(lambda: connect("sk-wrong").invoke(ASKED), openai.AuthenticationError)
    assert error.code == "invalid_api_key"


@checks.check("403")
def ask_too_much() -> None:
    limited = connect(world["limited"], model=f"{MODEL}:formal")
    assert refused(lambda: limited.invoke(ASKED), openai.PermissionDeniedError).code == "persona_forbidden"


@checks.check("404")
def ask_nobody() -> None:
    assert (
        refused(lambda: connect(model=f"{MODEL}:pirate").invoke(ASKED), openai.NotFoundError).code == "model_not_found"
    )


@checks.check("413")
def send_too_much() -> None:
    error = refused(lambda: connect().invoke(OVERSIZE), openai.APIStatusError)
    assert (status(error), error.code) == (413, "body_too_large")


@checks.check("422 as 400")
def send_wrong_type() -> None:
    error = refused(lambda: connect(temperature=3).invoke(ASKED), openai.BadRequestError)
    assert (error.code, error.param) == ("invalid_value", "temperature")


@checks.check("429")
def ask_too_often() -> None:
    hasty = connect(world["hasty"], max_tokens=1)
    hasty.invoke(ASKED)
    assert refused(lambda: hasty.invoke(ASKED), openai.RateLimitError).code == "rate_limited"


checks.run()
