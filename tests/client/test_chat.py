"""What is asked, and what becomes of the answer."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from masquerade_client import AsyncClient, Client, MasqueradeError, Model, NotAllowed, Reply, UnexpectedAnswer, Usage
from tests.client.conftest import Async, Driver, Sync
from tests.client.scripted import COMPLETION, Script, say


def test_a_string_is_one_user_message_to_the_base_and_nothing_else_is_sent(client: Driver, script: Script) -> None:
    script.answer = say(COMPLETION)
    client.chat("Hello")
    assert script.path == "/v1/chat/completions"
    assert script.body == {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}


def test_the_base_is_asked_for_once(script: Script) -> None:
    script.answer = say(COMPLETION)
    with Client(script.base_url) as client:
        client.chat("Hello")
        script.models = {"object": "list", "data": []}
        client.chat("Hello again")
    assert script.body["model"] == "demo"


def test_the_base_is_not_asked_for_when_the_model_is_named(client: Driver, script: Script) -> None:
    script.models = {"object": "list", "data": []}
    script.answer = say(COMPLETION)
    client.chat("Hello", model="demo:introvert")
    assert script.body["model"] == "demo:introvert"


@pytest.mark.parametrize("bases", [[], [{"id": "a"}, {"id": "b"}]])
def test_without_one_base_the_model_must_be_named(client: Driver, script: Script, bases: list[object]) -> None:
    script.models = {"object": "list", "data": bases}
    with pytest.raises(UnexpectedAnswer, match="say which"):
        client.chat("Hello")


def test_a_refused_question_for_the_base_is_raised(client: Driver, script: Script) -> None:
    script.models = None
    script.answer = say({}, 401)
    with pytest.raises(NotAllowed):
        client.chat("Hello")


def test_messages_are_sent_as_they_are(client: Driver, script: Script) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    script.answer = say(COMPLETION)
    client.chat(messages)
    assert script.body["messages"] == messages


def test_options_are_sent_under_their_names_on_the_wire(client: Driver, script: Script) -> None:
    plain = {"model": "demo", "persona": "gloomy", "gamma": 0.0, "temperature": 0, "top_p": 0.9, "top_k": 40}
    script.answer = say(COMPLETION)
    client.chat("Hello", **plain, seed=0, max_tokens=9, phase="decode")
    assert {key: value for key, value in script.body.items() if key != "messages"} == {
        **plain,
        "seed": 0,
        "max_tokens": 9,
        "persona_phase": "decode",
    }


def test_an_option_that_is_none_is_not_sent(client: Driver, script: Script) -> None:
    script.answer = say(COMPLETION)
    client.chat("Hello", persona=None, gamma=None)
    assert script.body.keys() == {"model", "messages"}


def test_a_misspelt_option_is_an_error_before_anything_is_sent(client: Driver, script: Script) -> None:
    with pytest.raises(TypeError, match="'personna'"):
        client.chat("Hello", personna="gloomy")
    assert script.path == ""


def test_a_reply_holds_what_was_answered(client: Driver, script: Script) -> None:
    script.answer = say(COMPLETION)
    assert client.chat("Hello") == Reply(
        text="No crowds for me.",
        persona="introvert",
        generation="c0ffee",
        finish_reason="stop",
        usage=Usage(3, 5, 8),
        model="demo:introvert",
        id="chatcmpl-1",
    )


def test_a_reply_prints_as_its_text(client: Driver, script: Script) -> None:
    script.answer = say(COMPLETION)
    assert str(client.chat("Hello")) == "No crowds for me."


def test_the_base_replies_without_persona(client: Driver, script: Script) -> None:
    script.answer = say({**COMPLETION, "model": "demo", "persona": None, "generation": None})
    reply = client.chat("Hello")
    assert (reply.persona, reply.generation) == (None, None)


def test_models_know_their_base_and_their_persona(client: Driver, script: Script) -> None:
    script.models = {"object": "list", "data": [{"id": "a:b"}, {"id": "a:b:shy", "parent": "a:b"}]}
    models = client.models()
    assert models == [Model("a:b", None), Model("a:b:shy", "a:b")]
    assert [model.persona for model in models] == [None, "shy"]


@pytest.mark.parametrize(("status", "ready"), [(200, True), (503, False)])
def test_readiness_is_what_readyz_says(client: Driver, script: Script, status: int, ready: bool) -> None:
    script.answer = say({}, status)
    assert client.ready() is ready
    assert script.path == "/readyz"


def test_a_server_that_is_not_there_is_not_ready(kind: type[Sync] | type[Async], nowhere: str) -> None:
    assert kind(base_url=nowhere).ready() is False


@pytest.mark.parametrize("key", ["sesame", " sesame\n"])
def test_a_key_is_sent_as_bearer(kind: type[Sync] | type[Async], script: Script, key: str) -> None:
    script.answer = say(COMPLETION)
    kind(base_url=script.base_url, api_key=key).chat("Hello")
    assert script.headers["authorization"] == "Bearer sesame"


@pytest.mark.parametrize("key", ["open\nsesame", "open\x7fsesame", "open\u0161sesame"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(kind: type[Sync] | type[Async], key: str) -> None:
    with pytest.raises(MasqueradeError, match="characters that no key has") as refused:
        kind(api_key=key).models()
    assert "sesame" not in str(refused.value)


def test_without_a_key_none_is_sent(client: Driver, script: Script) -> None:
    script.answer = say(COMPLETION)
    client.chat("Hello")
    assert "authorization" not in script.headers


@pytest.mark.parametrize("suffix", ["/", "/v1", "/v1/"])
def test_a_base_url_may_be_the_one_that_other_clients_want(
    kind: type[Sync] | type[Async], script: Script, suffix: str
) -> None:
    script.answer = say(COMPLETION)
    kind(base_url=script.base_url + suffix).chat("Hello")
    assert script.path == "/v1/chat/completions"


def test_both_clients_have_the_same_surface() -> None:
    def surface(client: type[Any]) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in vars(client).items()
            if not name.startswith("_") and not name.endswith("close")
        }

    assert surface(Client) == surface(AsyncClient)
    assert inspect.signature(Client) == inspect.signature(AsyncClient)
