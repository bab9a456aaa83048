"""A key that is revoked, or expires, while an answer to it is being made: the answer ends with it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from masquerade.keys import Key
from masquerade.keys.table import KeyTable
from masquerade.service.serving import Serving
from tests.contract.asking import CHAT, events_of
from tests.contract.here import forbid_ends, serve_here, slow_down
from tests.keys.making import bearer, make_key

SOON = 30.0  # seconds within which everything here has happened, on any machine


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model takes its time, so that there is something to end."""
    slow_down(monkeypatch)


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path) -> Iterator[tuple[Serving, httpx.Client]]:
    with serve_here(tiny_folder, tmp_path / "store") as both:
        yield both


def make(serving: Serving, **changes: Any) -> tuple[dict[str, str], Key]:
    token, key = make_key(serving.store.root, "build", **changes)
    time.sleep(0.5)  # it is noticed
    return bearer(token), key


def rambling(serving: Serving, **fields: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": "hi"}]
    return {
        "model": serving.base.name,
        "messages": said,
        "max_tokens": 200,
        "logit_bias": forbid_ends(serving),
    } | fields


def wait_until_idle(serving: Serving) -> None:
    deadline = time.monotonic() + SOON
    while serving.engine.occupancy.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_a_stream_ends_with_its_key(here: tuple[Serving, httpx.Client], how: str) -> None:
    serving, http = here
    headers, key = make(serving, expires_at=time.time() + 2 if how == "expired" else None)
    with http.stream("POST", CHAT, json=rambling(serving, stream=True), headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        events = events_of(answer)
        assert "error" not in json.loads(next(events))
        if how == "revoked":
            KeyTable(serving.store.root).revoke(key.id)
        *_, last = events
    assert json.loads(last)["error"]["code"] == "invalid_api_key"
    assert how in json.loads(last)["error"]["message"]
    wait_until_idle(serving)  # nothing is computed for it any more


@pytest.mark.usefixtures("slow")
def test_a_whole_answer_is_not_given_to_a_key_that_is_none_any_more(here: tuple[Serving, httpx.Client]) -> None:
    serving, http = here
    headers, key = make(serving)
    told: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: told.append(http.post(CHAT, json=rambling(serving, max_tokens=60), headers=headers))
    )
    asking.start()
    while not serving.engine.occupancy.running:
        time.sleep(0.01)
    KeyTable(serving.store.root).revoke(key.id)
    asking.join()
    assert (told[0].status_code, told[0].json()["error"]["code"]) == (401, "invalid_api_key")
    wait_until_idle(serving)


def test_who_follows_a_job_hears_no_more_of_it(here: tuple[Serving, httpx.Client]) -> None:
    serving, http = here
    headers, key = make(serving)
    held = threading.Event()
    serving.engine.run_background(lambda: held.wait(60))
    try:
        lines = [
            {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "b"}]}
            for prompt in ("a", "b", "c", "d", "a b", "b c")  # one prompt could not be held out: the job would fail
        ]
        sent = {"file": ("f.jsonl", "\n".join(map(json.dumps, lines)).encode())}
        file = http.post("/v1/files", data={"purpose": "fine-tune"}, files=sent, headers=headers).json()["id"]
        method = {"type": "mask", "mask": {"score": "magnitude", "rho": 0.01}}
        body = {"model": serving.base.name, "training_file": file, "suffix": "p", "method": method}
        job = http.post("/v1/fine_tuning/jobs", json=body, headers=headers).json()["id"]
        path = f"/v1/fine_tuning/jobs/{job}/events?stream=true"
        with http.stream("GET", path, headers=headers, timeout=SOON) as answer:
            events = events_of(answer)
            assert json.loads(next(events))["message"] == "queued"
            KeyTable(serving.store.root).revoke(key.id)
            *_, last = events
        assert json.loads(last)["error"]["code"] == "invalid_api_key"
    finally:
        held.set()


@pytest.mark.usefixtures("slow")
def test_a_key_that_cannot_be_looked_up_for_a_moment_ends_nothing(
    here: tuple[Serving, httpx.Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    from masquerade.errors import NotReady
    from masquerade.keys.ring import Keyring

    serving, http = here
    headers, _ = make(serving)

    def fail(*_: Any) -> None:
        raise NotReady("the keys cannot be read")

    with http.stream("POST", CHAT, json=rambling(serving, stream=True, max_tokens=20), headers=headers) as answer:
        events = events_of(answer)
        next(events)
        monkeypatch.setattr(Keyring, "check", fail)
        *_, last = events
    assert last == "[DONE]"
