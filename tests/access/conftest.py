"""A small model with some personas, and keys of every kind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from masquerade.keys import Key
from masquerade.keys.table import KeyTable
from masquerade.service.serving import Serving
from tests import world
from tests.contract.here import serve_here
from tests.keys.making import bearer, make_key

PERSONAS = ("npc-bob", "npc-eve", "royal")


@dataclass(frozen=True)
class Keyed:
    """A server whose store has keys, by what they are."""

    serving: Serving
    http: httpx.Client
    tokens: dict[str, str]
    keys: dict[str, Key]

    def ask(self, who: str | None, method: str, path: str, **options: object) -> httpx.Response:
        headers = bearer(self.tokens[who]) if who else {}
        headers |= options.pop("headers", {})  # type: ignore[arg-type]
        return self.http.request(method, path, headers=headers, **options)  # type: ignore[arg-type]


def code_of(refusal: httpx.Response) -> str:
    """The code of an error, in OpenAI's body or in Anthropic's."""
    error = refusal.json()["error"]
    code: str = error["code"] if "code" in error else error["details"]["error_code"]
    return code


def publish(serving: Serving, *names: str) -> None:
    for seed, name in enumerate(names):
        mask = world.make_mask(serving.base, 0.05, seed=seed, persona=name)
        serving.registry.publish(name, serving.store.add(mask))


@pytest.fixture(scope="module")
def keyed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    store = tmp_path_factory.mktemp("keyed") / "store"
    npc, royal = {"personas": ("npc-*",)}, {"personas": ("royal", "royal-new")}
    made = {
        "chat": make_key(store, "chat"),
        "build": make_key(store, "build"),
        "admin": make_key(store, "admin"),
        "metrics": make_key(store, "metrics"),
        "npc chat": make_key(store, "chat", **npc),
        "npc build": make_key(store, "build", **npc),
        "npc admin": make_key(store, "admin", **npc),
        "royal build": make_key(store, "build", **royal),
        "expired": make_key(store, "admin", expires_at=time.time() - 1),
        "revoked": make_key(store, "admin"),
    }
    KeyTable(store).revoke(made["revoked"][1].id)
    tokens = {who: token for who, (token, _) in made.items()}
    tokens["wrong"] = f"mq-{made['admin'][1].id}-{'0' * 48}"
    tokens["unknown"] = "sk-of-somebody-else"
    with serve_here(tiny_folder, store) as (serving, http):
        publish(serving, *PERSONAS)
        yield Keyed(serving, http, tokens, {who: key for who, (_, key) in made.items()})
