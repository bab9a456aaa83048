"""instructor: answers as pydantic models, by tools and by schema."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import openai
from checks import MAX_TOKENS, QUESTION, Checks, refused
from openai import OpenAI
from pydantic import BaseModel, Field

checks = Checks()
world = checks.world
MODEL = world["model"]


class Person(BaseModel):
    """Somebody."""

    mood: Literal["calm", "wild"]
    age: int = Field(ge=1, le=99)


def connect(mode: instructor.Mode, key: str = world["admin"]) -> Any:
    plain = OpenAI(base_url=f"{world['url']}/v1", api_key=key, max_retries=0, timeout=120)
    return instructor.from_openai(plain, mode=mode)


def ask(mode: instructor.Mode, key: str = world["admin"], **fields: Any) -> Any:
    plain = {"model": f"{MODEL}:introvert", "messages": QUESTION, "response_model": Person, "temperature": 0}
    return connect(mode, key).chat.completions.create(**(plain | {"max_retries": 0, "max_tokens": MAX_TOKENS} | fields))


@checks.check("tools")
def by_tools() -> None:
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT):
        person = ask(mode)
        assert isinstance(person, Person)
        assert 1 <= person.age <= 99


@checks.check("json_schema")
def by_schema() -> None:
    assert ask(instructor.Mode.JSON_SCHEMA).mood in ("calm", "wild")


@checks.check("stream")
def stream() -> None:
    parts = list(
        connect(instructor.Mode.TOOLS).chat.completions.create_partial(
            model=MODEL, messages=QUESTION, response_model=Person, temperature=0, max_retries=0
        )
    )
    assert parts[-1].mood in ("calm", "wild")


@checks.check("usage")
def count() -> None:
    _, completion = connect(instructor.Mode.TOOLS).chat.completions.create_with_completion(
        model=MODEL, messages=QUESTION, response_model=Person, temperature=0
    )
    assert completion.usage.completion_tokens > 0


def cause(error: BaseException) -> Any:
    """The SDK's error in what instructor makes of it."""
    while not isinstance(error, openai.APIStatusError):
        deeper = error.__cause__ or error.__context__
        assert deeper is not None, error
        error = deeper
    return error


@checks.check("401")
def show_no_key() -> None:
    assert cause(refused(lambda: ask(instructor.Mode.TOOLS, "sk-wrong"), Exception)).code == "invalid_api_key"


@checks.check("404")
def ask_nobody() -> None:
    refusal = refused(lambda: ask(instructor.Mode.TOOLS, model=f"{MODEL}:pirate"), Exception)
    assert cause(refusal).code == "model_not_found"


checks.run()
