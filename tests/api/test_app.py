"""What surrounds the routes: request ids, and failures that nobody foresaw."""

from __future__ import annotations

import httpx
import pytest

from masquerade.api import Serving
from tests import world

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def test_a_failure_that_nobody_foresaw_is_answered_and_the_connection_lives(
    http: httpx.Client, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = CHAT | {"model": serving.base.name}
    monkeypatch.setattr(Serving, "choose", lambda *_: 1 / 0)
    for _ in range(3):  # the same connection, again and again
        answer = http.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine"})
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert "division" not in answer.text
        assert answer.headers["x-request-id"] == "mine"
    monkeypatch.undo()
    assert http.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(("given", "kept"), [("abc-1", True), ("x" * 129, False), ("", False)])
def test_a_sane_request_id_is_kept(http: httpx.Client, given: str, kept: bool) -> None:
    found = http.get("/healthz", headers={"x-request-id": given}).headers["x-request-id"]
    assert (found == given) == kept
    assert found


def test_a_damaged_mask_is_an_error_of_the_server_and_tells_no_path(http: httpx.Client, serving: Serving) -> None:
    digest = serving.store.add(world.make_mask(serving.base, 0.1, seed=1))
    serving.registry.publish("p", digest)
    path = serving.store.path(digest)
    path.write_bytes(path.read_bytes()[:-1])
    answer = http.post("/v1/chat/completions", json=CHAT | {"model": f"{serving.base.name}:p"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "persona_damaged")
    assert str(serving.store.root) not in answer.text
