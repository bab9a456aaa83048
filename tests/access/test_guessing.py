"""Clients that guess secrets delay nobody else: a real server, and keys that are used for the first time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx
import pytest

from masquerade.keys import Key, mint
from tests import world
from tests.keys.making import bearer, make_key
from tests.serving import Server, serve

GUESSERS, PAUSE = 30, 0.2  # 150 wrong secrets a second: scrypt would need ten cores for them
KEYS = 7
NOTICED = 0.5  # seconds until a server knows a key that another process made


@contextmanager
def guessing(server: Server, ids: list[str]) -> Iterator[None]:
    """Clients with wrong secrets, none of them twice, of these ids and of unknown ones."""
    over, refused = threading.Event(), [0] * GUESSERS

    def guess(number: int) -> None:
        with httpx.Client(base_url=server.base_url, timeout=60) as http:
            while not over.wait(PAUSE):
                wrong = mint()
                known = ids[number // 2 % len(ids)] if number % 2 else wrong.id
                answer = http.get("/v1/models", headers=bearer(f"mq-{known}-{wrong.token[-48:]}"))
                refused[number] += answer.status_code in {401, 429}

    threads = [threading.Thread(target=guess, args=(number,)) for number in range(GUESSERS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert all(refused)


def first_use(server: Server, store: Path) -> float:
    """Seconds that a new key's first request takes, in the middle of several."""
    taken = []
    for _ in range(KEYS):
        token, _ = make_key(store, "chat")
        time.sleep(NOTICED)
        with httpx.Client(base_url=server.base_url, timeout=60) as http:
            http.get("/healthz")  # the connection is there
            started = time.perf_counter()
            assert http.get("/v1/models", headers=bearer(token)).status_code == 200
            taken.append(time.perf_counter() - started)
    return median(taken)


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Key]:
    """A key as they are made now, and one of the first version."""
    store = tmp_path / "store"
    return {"new": make_key(store, "chat")[1], "old": make_key(store, "chat", scrypt=True)[1]}


def test_wrong_secrets_do_not_delay_the_first_use_of_a_new_key(tmp_path: Path, keys: dict[str, Key]) -> None:
    store = tmp_path / "store"
    with serve("--model", str(world.make_model(tmp_path / "tiny")), "--store", str(store)) as server:
        quiet = first_use(server, store)
        for ids in ([keys["new"].id], [keys["old"].id]):
            with guessing(server, ids):
                assert first_use(server, store) < 10 * quiet + 0.1
