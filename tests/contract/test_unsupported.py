"""What would change an answer and is not implemented is refused by name; asking for nothing is no fault."""

from __future__ import annotations

from typing import Any

import pytest

from masquerade.generation.unsupported import CHAT as CHAT_TABLE
from masquerade.generation.unsupported import MESSAGE, Table
from masquerade.openai import unsupported
from tests.contract.asking import CHAT, Api, Json, error_of

SAID = [{"role": "user", "content": "Hi."}]
ROUTES: dict[str, tuple[Table, Json]] = {
    CHAT: (CHAT_TABLE, {"messages": SAID}),
    "/v1/completions": (unsupported.COMPLETIONS, {"prompt": "Hi."}),
    "/v1/responses": (unsupported.RESPONSES, {"input": "Hi."}),
    "/v1/embeddings": (unsupported.EMBEDDINGS, {"input": "Hi."}),
    "/tokenize": (unsupported.TOKENIZE, {"messages": SAID}),
    "/detokenize": (unsupported.DETOKENIZE, {"tokens": [5]}),
}
FIELDS = [(route, name) for route, (table, _) in ROUTES.items() for name in table]
SOMETHING = ("x", ["x"], {"x": 1}, 7.5)


def ask(api: Api, route: str, field: str, value: Any) -> Json:
    """The refusal; the model is none, so that what is well formed costs nothing."""
    response = api.http.post(route, json={"model": "ghost", **ROUTES[route][1], field: value})
    assert response.status_code in (400, 404), response.text
    return error_of(response)


@pytest.mark.parametrize(("route", "field"), FIELDS)
def test_a_field_that_would_change_the_answer_is_refused_by_its_name(api: Api, route: str, field: str) -> None:
    for value in SOMETHING:
        error = ask(api, route, field, value)
        assert (error["code"], error["param"]) == ("unsupported_parameter", field), value


@pytest.mark.parametrize(("route", "field"), FIELDS)
def test_a_value_that_asks_for_nothing_is_ignored(api: Api, route: str, field: str) -> None:
    for value in (None, *ROUTES[route][0][field]):
        assert ask(api, route, field, value)["code"] == "model_not_found", value


@pytest.mark.parametrize("field", list(MESSAGE))
def test_so_is_a_message_that_asks_for_it(api: Api, field: str) -> None:
    said = [*SAID, {"role": "assistant", "content": "I", field: "x"}]
    for route in (CHAT, "/tokenize"):
        error = error_of(api.http.post(route, json={"model": "ghost", "messages": said}))
        assert (error["code"], error["param"]) == ("unsupported_parameter", f"messages.1.{field}")


HARMLESS: Json = {
    "user": "u",
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "safety_identifier": "s",
    "verbosity": "low",
    "reasoning_effort": "low",
    "reasoning": {"effort": "low"},
    "never_heard_of": [1],
}


@pytest.mark.parametrize("field", list(HARMLESS))
def test_what_is_harmless_changes_nothing(api: Api, field: str) -> None:
    assert api.text(**{field: HARMLESS[field]}) == api.text()


def test_tools_are_no_part_of_a_text(api: Api) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    response = api.http.post("/tokenize", json={"prompt": "Hi.", "tools": tools})
    assert (response.status_code, error_of(response)["param"]) == (400, "tools")
