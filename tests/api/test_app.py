"""What surrounds the routes: request ids, and failures that nobody foresaw."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from maskstore import Registry
from masquerade import app
from masquerade.app import create_app
from masquerade.engine import Engine
from masquerade.jobs import JobTable
from masquerade.model import Base, MaskManager, Residency, VerifiedStore
from masquerade.openai.answers import ChatAnswer
from masquerade.service.serving import Serving
from tests import world
from tests.contract.asking import events_of
from tests.contract.here import listen

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def test_a_failure_that_nobody_foresaw_is_answered_and_the_connection_lives(
    http: httpx.Client, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = CHAT | {"model": serving.base.name}
    monkeypatch.setattr(Serving, "find_reference", lambda *_: 1 / 0)
    for _ in range(3):  # the same connection, again and again
        answer = http.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine"})
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert "division" not in answer.text
        assert answer.headers["x-request-id"] == "mine"
    monkeypatch.undo()
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_a_failure_in_the_midst_of_a_stream_is_its_last_event(
    http: httpx.Client, serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one that nobody foresaw: the status has been sent, the client is told all the same, and the log has it."""
    monkeypatch.setattr(ChatAnswer, "chunks", lambda *_: 1 / 0)
    body = CHAT | {"model": serving.base.name, "stream": True}
    answer = http.post("/v1/chat/completions", json=body)
    *_, last = events_of(answer)
    assert answer.status_code == 200
    assert json.loads(last)["error"]["code"] == "internal_error"
    assert "division" not in answer.text
    assert any("ZeroDivisionError" in caplog.handler.format(record) for record in caplog.records)
    monkeypatch.undo()
    assert http.get("/metrics").text.count('masquerade_errors_total{code="internal_error",method="POST"} 1.0') == 1
    assert http.post("/v1/chat/completions", json=body).text.endswith("data: [DONE]\n\n")
    assert not serving.engine.occupancy.running


def test_a_failure_in_the_midst_of_events_is_the_last_one(
    http: httpx.Client, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    sent = {"file": ("f.jsonl", "\n".join([json.dumps(line)] * 4).encode())}
    file = http.post("/v1/files", data={"purpose": "fine-tune"}, files=sent).json()["id"]
    method = {"type": "mask", "mask": {"score": "magnitude", "rho": 0.01}}
    asked = {"model": serving.base.name, "training_file": file, "suffix": "p", "method": method}
    job = http.post("/v1/fine_tuning/jobs", json=asked).json()["id"]

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error in /secret/place")

    monkeypatch.setattr(JobTable, "list_events", fail)
    answer = http.get(f"/v1/fine_tuning/jobs/{job}/events", params={"stream": "true"})
    *_, last = events_of(answer)
    assert json.loads(last)["error"]["code"] == "internal_error"
    assert "secret" not in answer.text


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


def test_a_damaged_mask_is_left_out_of_lists_and_logged_once(
    http: httpx.Client, serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    digests = [serving.store.add(world.make_mask(serving.base, 0.1, seed=seed)) for seed in (1, 2)]
    for name, digest in zip(("damaged", "sound"), digests, strict=True):
        serving.registry.publish(name, digest)
    path = serving.store.path(digests[0])
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    for _ in range(2):
        assert [one["id"] for one in http.get("/v1/personas").json()["data"]] == ["sound"]
        models = [one["id"] for one in http.get("/v1/models").json()["data"]]
        assert models == [serving.base.name, f"{serving.base.name}:sound"]
    assert len([record for record in caplog.records if "damaged" in record.getMessage()]) == 1
    for asked in ("/v1/personas/damaged", f"/v1/models/{serving.base.name}:damaged"):
        answer = http.get(asked)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "persona_damaged")
    path.write_bytes(whole)
    assert [one["id"] for one in http.get("/v1/personas").json()["data"]] == ["damaged", "sound"]


def test_the_next_server_takes_over_the_jobs_of_one_that_ends(
    tiny: Base, manager: MaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "TAKE_OVER_SECONDS", 0.05)

    def make() -> Serving:
        registry = Registry(tmp_path / "store")
        residency = Residency(manager, VerifiedStore(registry.store, tiny.fingerprint), 2**20)
        return Serving(tiny, Engine(tiny), registry.store, registry, residency, manager)

    def upload(http: httpx.Client) -> httpx.Response:
        return http.post("/v1/files", files={"file": ("x.jsonl", b"{}")}, data={"purpose": "fine-tune"})

    with ExitStack() as second:
        with listen(create_app(make())) as first:
            http = second.enter_context(listen(create_app(make())))
            file = upload(first).json()["id"]
            assert upload(http).status_code == 503
        deadline = time.monotonic() + 30
        while (found := http.get(f"/v1/files/{file}")).status_code == 503:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert found.json()["id"] == file
        assert http.get("/v1/batches").status_code == 200
