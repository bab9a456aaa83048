"""Every route of the application, asked by everybody. A route that is not in the table fails the test: decide."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Literal

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from masquerade.app import create_app
from masquerade.keys import SCOPES
from tests.access.conftest import Keyed, code_of

Decision = Literal["open", "metrics", "chat", "build", "admin"]
JOBS, PERSONA, BATCHES = "/v1/fine_tuning/jobs", "/v1/personas/{name}", "/v1/batches"
DECISIONS: dict[tuple[str, str], Decision] = {
    ("GET", "/"): "open",
    ("GET", "/web/{name}"): "open",
    ("GET", "/docs"): "open",
    ("GET", "/openapi.json"): "open",
    ("GET", "/healthz"): "open",
    ("HEAD", "/healthz"): "open",
    ("GET", "/readyz"): "open",
    ("HEAD", "/readyz"): "open",
    ("GET", "/health"): "open",
    ("HEAD", "/health"): "open",
    ("GET", "/ping"): "open",
    ("HEAD", "/ping"): "open",
    ("POST", "/ping"): "open",
    ("GET", "/version"): "open",
    ("GET", "/metrics"): "metrics",
    ("POST", "/v1/chat/completions"): "chat",
    ("POST", "/v1/completions"): "chat",
    ("POST", "/v1/responses"): "chat",
    ("GET", "/v1/responses/{response_id}"): "chat",
    ("DELETE", "/v1/responses/{response_id}"): "chat",
    ("POST", "/v1/responses/{response_id}/cancel"): "chat",
    ("GET", "/v1/responses/{response_id}/input_items"): "chat",
    ("POST", "/v1/embeddings"): "chat",
    ("POST", "/v1/messages"): "chat",
    ("POST", "/v1/messages/count_tokens"): "chat",
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
    ("POST", BATCHES): "build",
    ("GET", BATCHES): "build",
    ("GET", BATCHES + "/{batch_id}"): "build",
    ("POST", BATCHES + "/{batch_id}/cancel"): "build",
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
# The requests are well formed and name what does not exist, so that permitted ones change nothing.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "ghost", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "ghost", "prompt": "hi"},
    "/v1/responses": {"model": "ghost", "input": "hi"},
    "/v1/embeddings": {"model": "ghost", "input": "hi"},
    "/v1/messages": {"model": "ghost", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"model": "ghost", "messages": [{"role": "user", "content": "hi"}]},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1]},
    JOBS: {"model": "ghost", "training_file": "file-0", "suffix": "npc-x", "method": {"type": "mask"}},
    BATCHES: {"input_file_id": "file-0", "endpoint": "/v1/completions", "completion_window": "24h"},
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
    "{response_id}": "resp_0",
    "{batch_id}": "batch_0",
}


def fill(path: str) -> str:
    for place, value in PLACES.items():
        path = path.replace(place, value)
    return path


def ask(keyed: Keyed, who: str | None, method: str, path: str) -> Any:
    return keyed.ask(who, method, fill(path), json=BODIES.get(path) if method != "GET" else None)


def routes_of(app: FastAPI) -> set[tuple[str, str]]:
    """Every route with its methods; what has none, a mounted application or a web socket, counts as any."""
    return {
        (method, route.path)
        for route in iter_route_contexts(app.routes)
        for method in (set(getattr(route, "methods", None) or {"ANY"}) - {"HEAD"} or {"HEAD"})
    }


def test_every_route_has_a_decision(keyed: Keyed) -> None:
    assert routes_of(create_app(keyed.serving).app) == set(DECISIONS)


def test_whatever_is_added_needs_one(keyed: Keyed) -> None:
    app = create_app(keyed.serving).app
    app.add_api_route("/v1/new", lambda: None)
    app.add_api_route("/v1/head", lambda: None, methods=["HEAD"])
    app.add_api_websocket_route("/v1/socket", lambda _: None)
    app.mount("/v1/mounted", FastAPI())
    added = {path for _, path in routes_of(app) - set(DECISIONS)}
    assert {"/v1/new", "/v1/head", "/v1/socket"} <= added
    assert any(path.startswith("/v1/mounted") for path in added)


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
            assert code_of(answer) == "invalid_api_key"
            assert answer.json()["error"]["type"] == "authentication_error"
    for scope in SCOPES:
        answer = ask(keyed, scope, method, path)
        if needed == "open" or needed in SCOPES[scope]:
            assert answer.status_code not in (401, 403), (scope, answer.text)
            assert answer.status_code < 500, (scope, answer.text)
        else:
            assert answer.status_code == 403, scope
            assert code_of(answer) == "scope_missing"
            assert answer.json()["error"]["type"] == "permission_error"
            assert needed in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def theirs(keyed: Keyed) -> dict[str, str]:
    """What is another tenant's, by the place in a path that names it."""
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    sent = {"file": ("lines.jsonl", "\n".join([json.dumps(line)] * 4).encode())}
    file = keyed.ask("royal build", "POST", "/v1/files", data={"purpose": "fine-tune"}, files=sent).json()["id"]
    body = {"model": keyed.serving.base.name, "training_file": file, "suffix": "royal-new"}
    method = {"type": "mask", "mask": {"score": "magnitude", "rho": 0.01}}
    job = keyed.ask("royal build", "POST", JOBS, json=body | {"method": method}).json()["id"]
    keyed.ask("royal build", "POST", f"{JOBS}/{job}/cancel")
    sent = {"file": ("requests.jsonl", b"{}")}
    requests = keyed.ask("royal build", "POST", "/v1/files", data={"purpose": "batch"}, files=sent).json()["id"]
    body = BODIES[BATCHES] | {"input_file_id": requests}
    batch = keyed.ask("royal build", "POST", BATCHES, json=body).json()["id"]
    model = f"{keyed.serving.base.name}:royal"
    asked = {"model": model, "input": "hi", "max_output_tokens": 1}
    response = keyed.ask("royal build", "POST", "/v1/responses", json=asked).json()["id"]
    return {
        "{name}": "royal",
        "{other}": "royal",
        "{alias}": "royal",
        "{file_id}": file,
        "{job_id}": job,
        "{batch_id}": batch,
        "{model:path}": model,
        "{response_id}": response,
    }


# The same places, with what nobody has.
NOWHERE = {"{name}": "ghost", "{other}": "ghost", "{alias}": "ghost", "{model:path}": "{base}:ghost"}
NOWHERE |= {"{file_id}": "file-0", "{job_id}": "ftjob-0", "{batch_id}": "batch_0", "{response_id}": "resp_0"}


def places(paths: Iterable[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Each place of each path that is not open to everybody."""
    return [
        (method, path, place)
        for method, path in paths
        if DECISIONS[method, path] != "open"
        for place in re.findall(r"{[^}]+}", path)
    ]


@pytest.mark.parametrize(("method", "path", "place"), places(DECISIONS))
def test_what_is_another_tenants_is_as_good_as_nowhere(
    keyed: Keyed, theirs: dict[str, str], method: str, path: str, place: str
) -> None:
    """Whatever the key's scope: the answer is that for what does not exist, to the letter, and nothing has changed."""
    before = keyed.serving.registry.personas(), keyed.serving.registry.aliases()
    base = keyed.serving.base.name
    body = BODIES.get(path) if method != "GET" else None
    for who in ("npc chat", "npc build", "npc admin"):
        told = []
        for name in (theirs[place], NOWHERE[place].replace("{base}", base)):
            own = {"{name}": "npc-bob", "{other}": "npc-bob"} | {place: name}
            filled = path
            for one, value in own.items():
                filled = filled.replace(one, value)
            answer = keyed.ask(who, method, filled, json=body)
            told.append((answer.status_code, answer.text.replace(name, "")))
        assert told[0] == told[1]
        assert told[0][0] in (403, 404), told
    assert (keyed.serving.registry.personas(), keyed.serving.registry.aliases()) == before


def test_lists_are_without_what_is_another_tenants(keyed: Keyed, theirs: dict[str, str]) -> None:
    for path in (path for (method, path), needed in DECISIONS.items() if method == "GET" and needed != "open"):
        if "{" in path or path == "/metrics":
            continue
        for who in ("npc chat", "npc build", "npc admin"):
            answer = keyed.ask(who, "GET", path)
            assert not [name for name in theirs.values() if name in answer.text], (who, path)


@pytest.mark.parametrize(
    ("method", "path"),
    [route for route, needed in DECISIONS.items() if needed in ("build", "admin") and route[0] != "GET"],
)
def test_the_scope_is_asked_for_before_the_body_is_looked_at(keyed: Keyed, method: str, path: str) -> None:
    """Who may not hears that, whatever is wrong with what was sent; who may is noted when it is wrong."""
    wrong: dict[str, Any] = {"content": b"{", "headers": {"Content-Type": "application/json", "x-request-id": path}}
    answer = keyed.ask("chat", method, fill(path), **wrong)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "scope_missing")
    answer = keyed.ask("admin", method, fill(path), **wrong)
    assert answer.status_code in (400, 404)
    written = (keyed.serving.store.root / "audit.jsonl").read_text().splitlines()
    outcomes = [line["outcome"] for line in map(json.loads, written) if line["request_id"] == path]
    assert outcomes[-2:] == ["scope_missing", answer.json()["error"]["code"]]


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


def test_a_key_may_come_in_either_header_or_twice(keyed: Keyed) -> None:
    token = keyed.tokens["chat"]
    for headers in (
        {"x-api-key": token},
        {"x-api-key": token, "Authorization": f"Bearer {token}"},
        {"x-api-key": token, "Authorization": "Basic b3RoZXI6d29ybGQ="},
    ):
        assert keyed.http.get("/v1/models", headers=headers).status_code == 200
    assert keyed.http.get("/metrics", headers={"x-api-key": token}).status_code == 403


def test_two_different_keys_are_refused_whichever_is_right(keyed: Keyed) -> None:
    right, wrong = keyed.tokens["admin"], keyed.tokens["wrong"]
    for authorization, own in ((right, wrong), (wrong, right), (right, keyed.tokens["chat"])):
        headers = {"Authorization": f"Bearer {authorization}", "x-api-key": own}
        answer = keyed.http.get("/v1/models", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert "different" in answer.json()["error"]["message"]
