"""Every route of the application, asked by everybody. A route that is not in the table fails the test: decide."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from fastapi.routing import iter_route_contexts

from masquerade.api import create_app
from masquerade.keys import SCOPES
from tests.access.conftest import Keyed

Decision = Literal["open", "metrics", "chat", "build", "admin"]
JOBS, PERSONA = "/v1/fine_tuning/jobs", "/v1/personas/{name}"
DECISIONS: dict[tuple[str, str], Decision] = {
    ("GET", "/"): "open",
    ("GET", "/web/{name}"): "open",
    ("GET", "/docs"): "open",
    ("GET", "/openapi.json"): "open",
    ("GET", "/healthz"): "open",
    ("GET", "/readyz"): "open",
    ("GET", "/metrics"): "metrics",
    ("POST", "/v1/chat/completions"): "chat",
    ("POST", "/v1/completions"): "chat",
    ("POST", "/tokenize"): "chat",
    ("POST", "/detokenize"): "chat",
    ("GET", "/v1/models"): "chat",
    ("GET", "/v1/models/{model:path}"): "chat",
    ("GET", "/v1/personas"): "chat",
    ("GET", PERSONA): "chat",
    ("GET", PERSONA + "/diff/{other}"): "build",
    ("POST", "/v1/personas"): "build",
    ("POST", "/v1/files"): "build",
    ("GET", "/v1/files"): "build",
    ("GET", "/v1/files/{file_id}"): "build",
    ("GET", "/v1/files/{file_id}/content"): "build",
    ("DELETE", "/v1/files/{file_id}"): "build",
    ("POST", JOBS): "build",
    ("GET", JOBS): "build",
    ("GET", JOBS + "/{job_id}"): "build",
    ("POST", JOBS + "/{job_id}/cancel"): "build",
    ("GET", JOBS + "/{job_id}/events"): "build",
    ("GET", JOBS + "/{job_id}/checkpoints"): "build",
    ("POST", "/v1/personas/compose"): "admin",
    ("PATCH", PERSONA): "admin",
    ("DELETE", PERSONA): "admin",
    ("POST", PERSONA + "/rename"): "admin",
    ("POST", PERSONA + "/rollback"): "admin",
    ("PUT", PERSONA + "/pin"): "admin",
    ("DELETE", PERSONA + "/pin"): "admin",
    ("GET", PERSONA + "/content"): "admin",
    ("PUT", PERSONA + "/content"): "admin",
    ("PUT", "/v1/aliases/{alias}"): "admin",
}
NOBODY = (None, "wrong", "unknown", "expired", "revoked")
# What is asked is well formed and about what is not there, so that whoever may ask changes nothing.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "ghost", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "ghost", "prompt": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
    JOBS: {"model": "ghost", "training_file": "file-0", "suffix": "npc-x", "method": {"type": "mask"}},
    "/v1/personas/compose": {"name": "npc-x", "expression": "npc-ghost"},
    PERSONA: {"gamma": 0.5},
    PERSONA + "/rename": {"name": "npc-y"},
    PERSONA + "/rollback": {},
    "/v1/aliases/{alias}": {"persona": "npc-ghost"},
}
PLACES = {
    "{name}": "npc-ghost",
    "{other}": "npc-ghost",
    "{alias}": "npc-x",
    "{model:path}": "ghost",
    "{file_id}": "file-0",
    "{job_id}": "ftjob-0",
}


def fill(path: str) -> str:
    for place, value in PLACES.items():
        path = path.replace(place, value)
    return path


def ask(keyed: Keyed, who: str | None, method: str, path: str) -> Any:
    return keyed.ask(who, method, fill(path), json=BODIES.get(path) if method != "GET" else None)


def test_every_route_has_a_decision(keyed: Keyed) -> None:
    routes = {
        (method, route.path)
        for route in iter_route_contexts(create_app(keyed.serving).app.routes)
        for method in (route.methods or ()) - {"HEAD"}
    }
    assert routes == set(DECISIONS)


@pytest.mark.parametrize(("method", "path"), DECISIONS)
def test_who_may_ask(keyed: Keyed, method: str, path: str) -> None:
    needed = DECISIONS[method, path]
    for who in NOBODY:
        answer = ask(keyed, who, method, path)
        if needed == "open":
            assert answer.status_code < 500
            assert answer.status_code != 401
        else:
            assert answer.status_code == 401, who
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.json()["error"]["type"] == "authentication_error"
    for scope in SCOPES:
        answer = ask(keyed, scope, method, path)
        if needed == "open" or needed in SCOPES[scope]:
            assert answer.status_code not in (401, 403), (scope, answer.text)
            assert answer.status_code < 500, (scope, answer.text)
        else:
            assert answer.status_code == 403, scope
            assert answer.json()["error"]["code"] == "scope_missing"
            assert answer.json()["error"]["type"] == "permission_error"
            assert needed in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/v1", "/v1/", "/v2/models", "/v1/../metrics", "//v1/models", "/V1/models", "/nothing"]
)
def test_what_is_no_route_is_not_open_either(keyed: Keyed, path: str) -> None:
    assert keyed.http.request("GET", keyed.http.base_url.copy_with(raw_path=path.encode())).status_code == 401


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Basic {}", "{}", "Bearer {}x", "Bearer  x", "bearer é", "Bearer {} {}"]
)
def test_a_header_that_is_no_bearer_token(keyed: Keyed, header: str) -> None:
    headers = {"Authorization": header.replace("{}", keyed.tokens["admin"]).encode()}
    answer = keyed.http.get("/v1/models", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert keyed.tokens["admin"][:30] not in answer.text


def test_the_scheme_is_written_as_one_likes(keyed: Keyed) -> None:
    headers = {"Authorization": f"bEARER {keyed.tokens['chat']}"}
    assert keyed.http.get("/v1/models", headers=headers).status_code == 200
