"""llama-index's OpenAILike."""

from __future__ import annotations

from typing import Any, Literal

import openai
from checks import MAX_TOKENS, QUESTION, Checks, refused
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

checks = Checks()
world = checks.world
MODEL = world["model"]
ASKED = [ChatMessage(**QUESTION[0])]


class Person(BaseModel):
    """Somebody."""

    mood: Literal["calm", "wild"]
    age: int = Field(ge=1, le=99)


def connect(key: str = world["admin"], **options: Any) -> OpenAILike:
    plain = {"model": MODEL, "is_chat_model": True, "context_window": 512, "temperature": 0, "max_retries": 0}
    plain["max_tokens"] = MAX_TOKENS
    return OpenAILike(api_base=f"{world['url']}/v1", api_key=key, **(plain | options))


@checks.check("chat")
def ask() -> None:
    assert connect().chat(ASKED).message.content


@checks.check("persona")
def ask_persona() -> None:
    persona = connect(model=f"{MODEL}:introvert").chat(ASKED).message.content
    assert persona != connect().chat(ASKED).message.content


@checks.check("stream")
def stream() -> None:
    *_, last = connect(model=f"{MODEL}:introvert").stream_chat(ASKED)
    assert last.message.content == connect(model=f"{MODEL}:introvert").chat(ASKED).message.content


@checks.check("tools")
def call_tools() -> None:
    person = connect(is_function_calling_model=True).as_structured_llm(Person).chat(ASKED).raw
    assert isinstance(person, Person)


@checks.check("json_schema")
def fit_schema() -> None:
    llm = connect(is_function_calling_model=False, should_use_structured_outputs=True)
    person = llm.as_structured_llm(Person).chat(ASKED).raw
    assert isinstance(person, Person)


@checks.check("401")
def show_no_key() -> None:
    error = refused(lambda: connect("sk-wrong").chat(ASKED), openai.AuthenticationError)
    assert error.code == "invalid_api_key"


@checks.check("404")
def ask_nobody() -> None:
    error = refused(lambda: connect(model=f"{MODEL}:pirate").chat(ASKED), openai.NotFoundError)
    assert error.code == "model_not_found"


checks.run()
