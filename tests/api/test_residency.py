"""While one persona's mask is loaded, everybody else is served; what cannot be loaded is refused with its reason."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from maskstore import Mask
from masquerade.engine import Engine
from masquerade.errors import Overloaded
from masquerade.model import VerifiedStore
from masquerade.service import serving as room
from masquerade.service.serving import Serving
from tests import world


@pytest.fixture(autouse=True)
def personas(serving: Serving) -> dict[str, str]:
    """Name -> digest."""
    made = {}
    for seed, name in enumerate(("slow", "calm", "loud")):
        made[name] = serving.store.add(world.make_mask(serving.base, 0.05, seed, name))
        serving.registry.publish(name, made[name])
    return made


def chat(http: httpx.Client, serving: Serving, persona: str | None, **more: object) -> httpx.Response:
    body = {"model": serving.base.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    return http.post("/v1/chat/completions", json=body | {"persona": persona, "temperature": 0} | more)


def test_nobody_waits_for_the_load_of_another_persona(
    http: httpx.Client, serving: Serving, personas: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, free, read = threading.Event(), threading.Event(), VerifiedStore.read

    def hold(self: VerifiedStore, digest: str) -> Mask:
        if digest == personas["slow"]:
            arrived.set()
            assert free.wait(60)
        return read(self, digest)

    monkeypatch.setattr(VerifiedStore, "read", hold)
    with ThreadPoolExecutor(24) as clients:
        held = [clients.submit(chat, http, serving, "slow") for _ in range(24)]  # more than there are worker threads
        assert arrived.wait(60)
        for persona in (None, "calm", "calm", "loud"):
            assert chat(http, serving, persona).status_code == 200
        assert not any(answer.done() for answer in held)
        assert http.get("/v1/personas/slow").json()["resident"] is False
        free.set()
        assert {answer.result().json()["generation"] for answer in held} == {personas["slow"]}
    assert serving.residency.loads.misses == 3


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_give_up_keep_nobody_out(
    http: httpx.Client,
    serving: Serving,
    personas: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    """Room for one mask, which is in use all the while; those who want another leave before they get it."""
    crowd = 8
    with serving.store.reader(personas["calm"]) as mask:
        serving.residency.budget = 2 * serving.manager.measure(mask) - 1
    monkeypatch.setattr(serving.residency, "_limit", crowd)
    held = serving.residency.get(personas["calm"])

    def give_up(_: int) -> None:
        with httpx.Client(base_url=http.base_url, timeout=1) as client, pytest.raises(httpx.ReadTimeout):
            chat(client, serving, "slow", stream=stream)

    for _ in range(2):
        with ThreadPoolExecutor(crowd) as clients:
            list(clients.map(give_up, range(crowd)))
        deadline = time.monotonic() + 30
        while serving.residency.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert chat(http, serving, "calm").json()["generation"] == personas["calm"]
    del held
    assert chat(http, serving, "slow").json()["generation"] == personas["slow"]


def test_who_waited_in_vain_gets_the_mask_that_is_there(
    http: httpx.Client, serving: Serving, personas: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request for a mask in use queues up behind a load; if the load gets no room, it is served all the same."""
    with serving.store.reader(personas["calm"]) as mask:
        serving.residency.budget = 2 * serving.manager.measure(mask) - 1
    held = serving.residency.get(personas["calm"])
    waiting = serving.residency.request(personas["slow"])
    deadline = time.monotonic() + 30
    while not serving.residency.evicting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.setattr(room, "MASK_SECONDS", 0.5)
    assert chat(http, serving, "calm").json()["generation"] == personas["calm"]
    refused = chat(http, serving, "loud")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert not waiting.done()
    del held
    assert waiting.result(30).digest == personas["slow"]


def test_a_finished_request_holds_no_mask(http: httpx.Client, serving: Serving, personas: dict[str, str]) -> None:
    """Room for one: each request needs what the one before has used."""
    serving.residency.budget = 1
    refused = chat(http, serving, "calm")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "mask_too_large")
    with serving.store.reader(personas["calm"]) as mask:
        serving.residency.budget = 2 * serving.manager.measure(mask) - 1
    for persona in ("calm", "loud", "calm", "slow"):
        assert chat(http, serving, persona).json()["generation"] == personas[persona]
    assert serving.residency.loads.evictions == 3


def test_a_refused_request_holds_no_mask_and_costs_nothing(
    http: httpx.Client, serving: Serving, personas: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even until garbage is collected: with room for one, the next one would wait for that."""
    with serving.store.reader(personas["calm"]) as mask:
        serving.residency.budget = 2 * serving.manager.measure(mask) - 1

    def refuse(*_: object) -> None:
        raise Overloaded("the queue is full")

    gc.disable()
    try:
        with monkeypatch.context() as full:
            full.setattr(Engine, "submit", refuse)
            assert chat(http, serving, "calm").status_code == 429
            assert chat(http, serving, "calm", stream=True).status_code == 429
        assert chat(http, serving, "loud").status_code == 200
    finally:
        gc.enable()
    assert 'masquerade_tokens_total{kind="prompt",persona="calm"} 0.0' in http.get("/metrics").text


def test_a_damaged_mask_is_refused_and_read_again_when_it_is_mended(
    http: httpx.Client, serving: Serving, personas: dict[str, str]
) -> None:
    path = serving.store.path(personas["loud"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused = chat(http, serving, "loud")
    assert (refused.status_code, refused.json()["error"]["code"]) == (500, "persona_damaged")
    assert chat(http, serving, "calm").status_code == 200
    path.write_bytes(whole)
    assert chat(http, serving, "loud").json()["generation"] == personas["loud"]
