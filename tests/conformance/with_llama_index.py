"""llama-index's OpenAILike."""

from __future__ import annotations

from typing import Any, Literal

import openai
from checks import Checks, refused
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

checks = Checks()
world = checks.world
QUESTION = [ChatMessage(role="user", content="Would you like to come to a party?")]


class Person(BaseModel):
    """Somebody."""

    mood: Literal["calm", "wild"]
    age: int = Field(ge=1, le=99)


def connect(key: str = world["admin"], **options: Any) -> OpenAILike:
    plain = {"model": "demo", "is_chat_model": True, "context_window": 512, "temperature": 0, "max_retries": 0}
    return OpenAILike(api_base=f"{world['url']}/v1", api_key=key, **(plain | options))


@checks.check("chat")
def ask() -> None:
    assert connect().chat(QUESTION).message.content


@checks.check("persona")
def ask_persona() -> None:
    persona = connect(model="demo:introvert").chat(QUESTION).message.content
    assert persona != connect().chat(QUESTION).message.content


@checks.check("stream")
def stream() -> None:
    *_, last = connect(model="demo:introvert").stream_chat(QUESTION)
    assert last.message.content == connect(model="demo:introvert").chat(QUESTION).message.content


@checks.check("tools")
def call_tools() -> None:
    person = connect(is_function_calling_model=True).as_structured_llm(Person).chat(QUESTION).raw
    assert isinstance(person, Person)


@checks.check("json_schema")
def fit_schema() -> None:
    llm = connect(is_function_calling_model=False, should_use_structured_outputs=True)
    person = llm.as_structured_llm(Person).chat(QUESTION).raw
    assert isinstance(person, Person)


@checks.check("401")
def show_no_key() -> None:
    error = refused(lambda: connect("sk-wrong").chat(QUESTION), openai.AuthenticationError)
    assert error.code == "invalid_api_key"


@checks.check("404")
def ask_nobody() -> None:
    error = refused(lambda: connect(model="demo:pirate").chat(QUESTION), openai.NotFoundError)
    assert error.code == "model_not_found"


checks.run()
