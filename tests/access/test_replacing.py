"""What a job may publish: what its key may when the job is queued, and still may when it is done."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from masquerade.jobs import Job, JobTable, open_group
from masquerade.keys import Key
from masquerade.keys.table import KeyTable as Keys
from masquerade.service.serving import Serving
from tests.access.conftest import publish
from tests.contract.here import serve_here
from tests.keys.making import bearer, make_key

JOBS = "/v1/fine_tuning/jobs"
NOTICED = 0.6  # seconds after which a running server knows what has become of a key
TEXTS = [f"question {number}?" for number in range(14)]
OWN, OTHER = (
    "\n".join(json.dumps({"prompt": text, "completion": letter * 5 + text[9:]}) for text in TEXTS).encode()
    for letter in "ae"
)
RECIPE = {"score": "attribution", "rho": 0.05, "phase": "all", "force": True}


@dataclass(frozen=True)
class World:
    """A server, and a client with a key that has a list."""

    serving: Serving
    http: httpx.Client
    key: Key | None

    @property
    def store(self) -> Path:
        return self.serving.store.root

    @property
    def current(self) -> dict[str, str]:
        return {one.name: one.digest for one in self.serving.registry.names()}

    def order(self, name: str, headers: dict[str, str] | None = None, **mask: Any) -> httpx.Response:
        return self.http.post(JOBS, json=body_of(self.http, self.serving, name, **mask), headers=headers)

    def job(self, job_id: str) -> Job:
        """With any route: a revoked key sees nothing."""
        return JobTable(open_group(self.store / "jobs" / "jobs.sqlite")).get_job(job_id)

    def wait(self, job_id: str, *states: str) -> Job:
        deadline = time.monotonic() + 120
        while (job := self.job(job_id)).state not in states:
            assert time.monotonic() < deadline, job
            time.sleep(0.02)
        return job

    @contextmanager
    def held(self) -> Iterator[None]:
        """No job gets on until the block ends."""
        free = threading.Event()
        self.serving.engine.run_background(lambda: free.wait(60))
        try:
            yield
        finally:
            free.set()


def body_of(http: httpx.Client, serving: Serving, name: str, **mask: Any) -> dict[str, Any]:
    own, other = (
        http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a", content)}).json()["id"]
        for content in (OWN, OTHER)
    )
    method = {"type": "mask", "mask": RECIPE | {"contrast_file": other, "neutral_file": own} | mask}
    return {"model": serving.base.name, "training_file": own, "suffix": name, "method": method}


@contextmanager
def open_world(tiny_folder: Path, store: Path, token: str | None, key: Key | None) -> Iterator[World]:
    with serve_here(tiny_folder, store) as (serving, http):
        if token:
            http.headers.update(bearer(token))
        if not serving.registry.names():
            publish(serving, "npc-bob", "npc-eve", "royal")
        yield World(serving, http, key)


@pytest.fixture
def builder(tiny_folder: Path, tmp_path: Path) -> Iterator[World]:
    token, key = make_key(tmp_path / "store", "build", personas=("npc-*",))
    with open_world(tiny_folder, tmp_path / "store", token, key) as world:
        yield world


@pytest.fixture
def manager(tiny_folder: Path, tmp_path: Path) -> Iterator[World]:
    token, key = make_key(tmp_path / "store", "admin", personas=("npc-*",))
    with open_world(tiny_folder, tmp_path / "store", token, key) as world:
        yield world


def alter(world: World, **columns: Any) -> None:
    """Change the rights of a key in the file; no command does so."""
    assert world.key is not None
    with closing(sqlite3.connect(world.store / "keys.sqlite")) as db, db:
        for column, value in columns.items():
            db.execute(f"update key set {column} = ? where id = ?", (value, world.key.id))


def code_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json().get("error") or {}
    return answer.status_code, error.get("code"), error.get("param")


@pytest.mark.parametrize("mask", [{}, {"contrast_name": "npc-eve"}], ids=["persona", "opposite"])
def test_a_key_that_may_build_may_not_replace(builder: World, mask: dict[str, str]) -> None:
    before = builder.current
    for name in ("npc-bob", "npc-new"):  # also where there is nothing to replace yet
        answer = builder.order(name, replace=True, **mask)
        assert code_of(answer) == (403, "scope_missing", "method.mask.replace")
        assert "admin" in answer.json()["error"]["message"]
    form = {"name": "npc-bob", "replace": "true", "score": "attribution", "rho": "0.05", "force": "true"} | mask
    parts = {"file": ("a", OWN), "contrast": ("b", OTHER), "neutral": ("c", OWN)}
    answer = builder.http.post("/v1/personas", data=form, files=parts)
    assert code_of(answer) == (403, "scope_missing", "replace")
    assert builder.http.get(JOBS).json()["data"] == []
    assert builder.current == before


def test_who_manages_replaces_what_is_on_the_list_and_nothing_else(manager: World) -> None:
    before = manager.current
    assert code_of(manager.order("royal", replace=True)) == (403, "persona_forbidden", "suffix")
    answer = manager.order("npc-bob", replace=True, contrast_name="royal")
    assert code_of(answer) == (403, "persona_forbidden", "method.mask.contrast_name")
    assert manager.current == before
    made = manager.order("npc-bob", replace=True, contrast_name="npc-eve").json()
    assert manager.wait(made["id"], "succeeded", "failed").error is None
    changed = {name for name, digest in manager.current.items() if before[name] != digest}
    assert changed == {"npc-bob", "npc-eve"}


def test_a_name_that_is_made_must_be_on_the_list_too(builder: World) -> None:
    asked = body_of(builder.http, builder.serving, "")
    del asked["suffix"]
    answer = builder.http.post(JOBS, json=asked)
    assert code_of(answer) == (403, "persona_forbidden", "suffix")
    assert "no `suffix` was given" in answer.json()["error"]["message"]
    alter(builder, personas='["npc-*", "persona-*"]')
    time.sleep(NOTICED)
    made = builder.http.post(JOBS, json=asked).json()
    assert builder.wait(made["id"], "succeeded", "failed").error is None
    assert made["persona"] in builder.current


CHANGES: dict[str, Callable[[World], object]] = {
    "revoked": lambda world: Keys(world.store).revoke(world.key.id),  # type: ignore[union-attr]
    "expired": lambda world: alter(world, expires_at=time.time() - 1),
    "without the persona": lambda world: alter(world, personas='["npc-eve"]'),
    "without the opposite": lambda world: alter(world, personas='["npc-bob", "npc-new"]'),
    "without the scope": lambda world: alter(world, scopes='["chat"]'),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("replace", [False, True], ids=["new", "replaced"])
def test_a_job_publishes_nothing_that_its_key_may_not_any_more(
    tiny_folder: Path, tmp_path: Path, change: Callable[[World], object], replace: bool
) -> None:
    token, key = make_key(tmp_path / "store", "admin" if replace else "build", personas=("npc-*",))
    name, opposite = ("npc-bob", "npc-eve") if replace else ("npc-new", "npc-eve-2")
    with open_world(tiny_folder, tmp_path / "store", token, key) as world:
        before, kept = world.current, len(list(world.store.rglob("*.safetensors")))
        with world.held():
            answer = world.order(name, replace=replace, contrast_name=opposite)
            assert answer.status_code == 200, answer.text
            world.wait(answer.json()["id"], "running")
            change(world)
            time.sleep(NOTICED)
        job = world.wait(answer.json()["id"], "succeeded", "failed")
        assert job.state == "failed"
        assert job.error is not None
        assert job.error["code"] in ("invalid_api_key", "persona_forbidden", "scope_missing")
        assert "published" in job.error["message"]
        assert world.current == before
        assert len(list(world.store.rglob("*.safetensors"))) == kept


def test_a_key_that_may_only_build_by_now_does_not_replace(manager: World) -> None:
    before = manager.current
    with manager.held():
        job = manager.order("npc-bob", replace=True).json()["id"]
        manager.wait(job, "running")
        alter(manager, scopes='["build"]')
        time.sleep(NOTICED)
    error = manager.wait(job, "failed", "succeeded").error
    assert error is not None
    assert error["code"] == "scope_missing"
    assert manager.current == before


def test_a_repeat_is_allowed_what_its_key_may_now(manager: World) -> None:
    with manager.held():
        asked = body_of(manager.http, manager.serving, "npc-bob", replace=True)
        headers = {"Idempotency-Key": "k"}
        first = manager.http.post(JOBS, json=asked, headers=headers)
        assert manager.http.post(JOBS, json=asked, headers=headers).json()["id"] == first.json()["id"]
        alter(manager, scopes='["build"]')
        time.sleep(NOTICED)
        for again in (headers, {}, {"x-stainless-retry-count": "1"}):
            answer = manager.http.post(JOBS, json=asked, headers=again)
            assert code_of(answer) == (403, "scope_missing", "method.mask.replace")


def test_a_server_that_starts_again_asks_again(tiny_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    token, key = make_key(store, "admin", personas=("npc-*",))
    with open_world(tiny_folder, store, token, key) as world:
        before = world.current
        free = threading.Event()
        world.serving.engine.run_background(
            lambda: free.wait(2)
        )  # the server stops meanwhile, with the job in its queue
        jobs = [world.order("npc-bob", replace=True).json()["id"], world.order("npc-new").json()["id"]]
        Keys(store).revoke(key.id)
    with open_world(tiny_folder, store, token, key) as world:
        for job in jobs:
            error = world.wait(job, "failed", "succeeded").error
            assert error is not None
            assert error["code"] == "invalid_api_key"
        assert JobTable(open_group(store / "jobs" / "jobs.sqlite")).progress(jobs[1]) is None  # nor was it begun
        assert world.current == before


def test_what_was_queued_before_there_were_keys_is_not_published_after(tiny_folder: Path, tmp_path: Path) -> None:
    with open_world(tiny_folder, tmp_path / "store", None, None) as world:
        before = world.current
        published = world.order("npc-bob", replace=True).json()["id"]
        assert world.wait(published, "failed", "succeeded").state == "succeeded"  # all is allowed without keys
        after = world.current
        assert after != before
        with world.held():
            job = world.order("npc-eve", replace=True).json()["id"]
            world.wait(job, "running")
            make_key(world.store, "chat")
            time.sleep(NOTICED)
        error = world.wait(job, "failed", "succeeded").error
        assert error is not None
        assert error["code"] == "invalid_api_key"
        assert world.current == after
