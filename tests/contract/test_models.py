"""What can be asked."""

from __future__ import annotations

import time

import openai
import pytest
from openai import OpenAI

from tests.contract.asking import PERSONAS, Api, error_of

IDS = {"demo", *(f"demo:{persona}" for persona in PERSONAS)}


def test_the_base_and_its_eight_personas_are_listed(api: Api) -> None:
    listing = api.http.get("/v1/models").json()
    assert listing["object"] == "list"
    assert {model["id"] for model in listing["data"]} == IDS
    assert len(listing["data"]) == len(IDS)


def test_the_base_comes_first(api: Api) -> None:
    assert api.http.get("/v1/models").json()["data"][0]["id"] == "demo"


def test_every_model_has_the_shape_of_openais(api: Api) -> None:
    for model in api.http.get("/v1/models").json()["data"]:
        assert model["object"] == "model"
        assert isinstance(model["owned_by"], str)
        assert 0 < model["created"] <= time.time()
        assert isinstance(model["created"], int)


def test_a_persona_has_its_base_as_parent_and_root(api: Api) -> None:
    for model in api.http.get("/v1/models").json()["data"]:
        parent = None if model["id"] == "demo" else "demo"
        assert (model["parent"], model["root"]) == (parent, "demo")


def test_every_model_has_the_context_of_its_base(api: Api) -> None:
    tokens = api.http.post("/tokenize", json={"prompt": "Hi."}).json()["max_model_len"]
    assert {model["max_model_len"] for model in api.http.get("/v1/models").json()["data"]} == {tokens}


@pytest.mark.parametrize("id_", sorted(IDS))
def test_one_model_is_shown_as_it_is_listed(api: Api, id_: str) -> None:
    listed = {model["id"]: model for model in api.http.get("/v1/models").json()["data"]}
    response = api.http.get(f"/v1/models/{id_}")
    assert response.status_code == 200
    assert response.json() == listed[id_]


def test_whatever_a_request_may_name_is_shown(api: Api) -> None:
    """An alias and a version are not listed, but a request that names them is answered, and echoes the name."""
    generation = api.http.get("/v1/models/demo:introvert").json()["generation"]
    assert api.http.put("/v1/aliases/shy", json={"persona": "introvert"}).status_code == 200
    for reference in ("shy", f"introvert@{generation[:8]}"):
        shown = api.http.get(f"/v1/models/demo:{reference}").json()
        assert (shown["id"], shown["generation"], shown["parent"]) == (f"demo:{reference}", generation, "demo")
        assert api.chat(model=shown["id"])["model"] == shown["id"]
    assert api.http.delete("/v1/personas/shy").status_code == 200


@pytest.mark.parametrize("id_", ["nothing", "demo:pirate", "a/b:c", "demo:introvert/x", "demo:introvert@00000000"])
def test_a_model_that_is_not_there_is_not_found(api: Api, id_: str) -> None:
    response = api.http.get(f"/v1/models/{id_}")
    error = error_of(response)
    assert (response.status_code, error["type"]) == (404, "not_found_error")
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_the_sdk_lists_models(sdk: OpenAI) -> None:
    assert {model.id for model in sdk.models.list()} == IDS


def test_the_sdk_shows_a_persona(sdk: OpenAI) -> None:
    model = sdk.models.retrieve("demo:introvert")
    assert model.id == "demo:introvert"
    assert model.model_extra is not None
    assert model.model_extra["parent"] == "demo"


def test_the_sdk_does_not_find_a_stranger(sdk: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("demo:pirate")
