"""The stock anthropic SDK, whichever version is installed."""

from __future__ import annotations

from typing import Any

import anthropic
from anthropic import Anthropic
from checks import MAX_TOKENS, OVERSIZE, PERSON, QUESTION, TOO_LONG, WEATHER, Checks, refused

checks = Checks()
world = checks.world
MODEL = world["model"]
TOOL: dict[str, Any] = {
    "name": "weather",
    "description": WEATHER["function"]["description"],
    "input_schema": WEATHER["function"]["parameters"],
}


def connect(key: str = world["admin"], **options: Any) -> Anthropic:
    return Anthropic(base_url=world["url"], api_key=key, max_retries=0, timeout=120, **options)


client = connect()
HEADER = {"X-Persona": "introvert"}


def fields(**given: Any) -> dict[str, Any]:
    """A greedy request. The SDK of 2026 has no parameter for the temperature."""
    body = {"temperature": 0, **given.pop("extra_body", {})}
    return {"model": MODEL, "messages": QUESTION, "max_tokens": MAX_TOKENS, "extra_body": body, **given}


def ask(by: Anthropic = client, **given: Any) -> Any:
    return by.messages.create(**fields(**given))


def text(message: Any) -> str:
    return "".join(block.text for block in message.content)


def kind_of(error: anthropic.APIStatusError) -> tuple[str, str]:
    """The type, and the code in the details."""
    assert isinstance(error.body, dict)
    found = error.body["error"]
    return found["type"], found["details"]["error_code"]


@checks.check("models")
def list_models() -> None:
    """The list has OpenAI's form, of which the SDK reads the ids."""
    assert {MODEL, f"{MODEL}:introvert"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve(f"{MODEL}:introvert").id == f"{MODEL}:introvert"


@checks.check("chat")
def answer() -> None:
    message = ask(system="Be brief.")
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert text(message)
    assert message.stop_reason in ("end_turn", "max_tokens")
    whole = text(ask())
    stop = whole[5:8]
    stopped = ask(stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert text(stopped) == whole[: whole.index(stop)]


@checks.check("persona")
def answer_as_persona() -> None:
    by_model = ask(model=f"{MODEL}:introvert")
    assert (by_model.model, by_model.model_extra["persona"]) == (f"{MODEL}:introvert", "introvert")
    texts = {text(by_model), text(ask(extra_body={"persona": "introvert"})), text(ask(extra_headers=HEADER))}
    assert len(texts) == 1
    assert text(ask()) not in texts


@checks.check("stream")
def stream() -> None:
    whole = ask(model=f"{MODEL}:introvert")
    with client.messages.stream(**fields(model=f"{MODEL}:introvert")) as streaming:
        pieces = list(streaming.text_stream)
        final = streaming.get_final_message()
    assert "".join(pieces) == text(final) == text(whole)
    assert len(pieces) > 3
    assert (final.stop_reason, final.model) == (whole.stop_reason, whole.model)


@checks.check("usage")
def count() -> None:
    usage = ask().usage
    counted = client.messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens
    assert usage.input_tokens + usage.cache_read_input_tokens == counted
    with client.messages.stream(**fields()) as streaming:
        streamed = streaming.get_final_message().usage
    assert streamed.input_tokens + streamed.cache_read_input_tokens == counted
    assert streamed.output_tokens == usage.output_tokens


@checks.check("tools")
def call_tools() -> None:
    asked: dict[str, Any] = {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    message = ask(**asked)
    (call,) = message.content
    assert (message.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "weather")
    assert call.input["city"] in ("Bonn", "Aachen")
    with client.messages.stream(**fields(**asked)) as streaming:
        (streamed,) = streaming.get_final_message().content
    assert (streamed.name, streamed.input) == (call.name, call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "dry"}
    turns = [*QUESTION, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert text(ask(messages=turns, tools=[TOOL], tool_choice={"type": "none"}))


@checks.check("json_schema")
def fit_schema() -> None:
    form = {"format": {"type": "json_schema", "schema": PERSON}}
    assert '"mood"' in text(ask(extra_body={"output_config": form}))


@checks.check("400")
def ask_nonsense() -> None:
    error = refused(lambda: ask(extra_body={"thinking": {"type": "enabled"}}), anthropic.BadRequestError)
    assert kind_of(error) == ("invalid_request_error", "unsupported_parameter")
    image = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    error = refused(lambda: ask(messages=[{"role": "user", "content": [image]}]), anthropic.BadRequestError)
    assert kind_of(error) == ("invalid_request_error", "unsupported_parameter")
    long = [{"role": "user", "content": TOO_LONG}]
    error = refused(lambda: ask(messages=long), anthropic.BadRequestError)
    assert kind_of(error) == ("invalid_request_error", "context_length_exceeded")


@checks.check("401")
def show_no_key() -> None:
    error = refused(lambda: ask(connect("sk-wrong")), anthropic.AuthenticationError)
    assert kind_of(error) == ("authentication_error", "invalid_api_key")
    assert error.request_id
    only = {"X-Api-Key": world["admin"], "Authorization": anthropic.Omit()}
    assert text(ask(connect("unused", default_headers=only)))


@checks.check("403")
def ask_too_much() -> None:
    limited = connect(world["limited"])
    error = refused(lambda: ask(limited, model=f"{MODEL}:formal"), anthropic.PermissionDeniedError)
    assert kind_of(error) == ("permission_error", "persona_forbidden")
    assert text(ask(limited, model=f"{MODEL}:introvert"))


@checks.check("404")
def ask_nobody() -> None:
    error = refused(lambda: ask(model=f"{MODEL}:pirate"), anthropic.NotFoundError)
    assert kind_of(error) == ("not_found_error", "model_not_found")
    error = refused(lambda: ask(extra_body={"persona": "pirate"}), anthropic.NotFoundError)
    assert kind_of(error) == ("not_found_error", "persona_not_found")
    error = refused(lambda: client.messages.batches.retrieve("none"), anthropic.NotFoundError)
    assert kind_of(error) == ("not_found_error", "not_found")


@checks.check("413")
def send_too_much() -> None:
    long = [{"role": "user", "content": OVERSIZE}]
    error = refused(lambda: ask(messages=long), anthropic.APIStatusError)
    assert (error.status_code, *kind_of(error)) == (413, "request_too_large", "body_too_large")


@checks.check("422 as 400")
def send_wrong_type() -> None:
    error = refused(lambda: ask(messages=[{"role": "pirate", "content": "Hi."}]), anthropic.BadRequestError)
    assert kind_of(error) == ("invalid_request_error", "invalid_value")


@checks.check("429")
def ask_too_often() -> None:
    hasty = connect(world["hasty"])
    ask(hasty, max_tokens=1)
    error = refused(lambda: ask(hasty, max_tokens=1), anthropic.RateLimitError)
    assert kind_of(error) == ("rate_limit_error", "rate_limited")
    assert 0 < int(error.response.headers["Retry-After"]) <= 60


checks.run()
