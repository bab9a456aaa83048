"""The registry is read once for a name, until something in it changes."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import httpx
import pytest

from maskstore import Registry
from masquerade.service.registry_cache import RegistryCache
from masquerade.service.serving import Serving
from tests import world


@pytest.fixture(autouse=True)
def digests(serving: Serving) -> list[str]:
    """Two masks; the first is `calm`."""
    made = [serving.store.add(world.make_mask(serving.base, 0.05, seed, "calm")) for seed in range(2)]
    serving.registry.publish("calm", made[0])
    return made


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the registry was asked for."""
    asked: list[str] = []
    ask = RegistryCache._read
    monkeypatch.setattr(
        RegistryCache, "_read", lambda self, reference: (asked.append(reference), ask(self, reference))[1]
    )
    return asked


def chat(http: httpx.Client, serving: Serving, persona: str) -> httpx.Response:
    body = {"model": serving.base.name, "persona": persona, "messages": [{"role": "user", "content": "hi"}]}
    return http.post("/v1/chat/completions", json=body | {"max_tokens": 2})


def test_once_for_a_name(http: httpx.Client, serving: Serving, digests: list[str], read: list[str]) -> None:
    assert {chat(http, serving, "calm").json()["generation"] for _ in range(3)} == {digests[0]}
    assert read == ["calm"]
    for _ in range(2):
        assert chat(http, serving, "nobody").status_code == 404
    assert read == ["calm", "nobody", "nobody"]


def test_what_another_process_changes_counts_from_the_next_request(
    http: httpx.Client, serving: Serving, digests: list[str]
) -> None:
    another = Registry(serving.store.root)
    assert chat(http, serving, "calm").json()["generation"] == digests[0]
    another.publish("calm", digests[1])
    assert chat(http, serving, "calm").json()["generation"] == digests[1]
    another.change("calm", gamma=0.5)
    assert chat(http, serving, "calm").json()["gamma"] == 0.5
    another.rollback("calm", 1)
    assert chat(http, serving, "calm").json()["generation"] == digests[0]
    another.rename("calm", "quiet")
    assert chat(http, serving, "calm").status_code == 404
    assert chat(http, serving, "quiet").json()["generation"] == digests[0]
    another.alias("calm", "quiet")
    assert chat(http, serving, "calm").json()["persona"] == "quiet"


def test_a_locked_registry_is_waited_for(http: httpx.Client, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat(http, serving, "calm").status_code == 200
    monkeypatch.setattr(serving.registry.database, "timeout", 0.05)
    with closing(sqlite3.connect(serving.registry.path, isolation_level=None)) as writer:
        writer.execute("begin exclusive")
        refused = chat(http, serving, "calm")
        writer.execute("rollback")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
    assert chat(http, serving, "calm").status_code == 200
