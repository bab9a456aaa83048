"""Keys as such: what they include, how they are kept, and how a ring finds them again."""

from __future__ import annotations

import hashlib
import hmac
import re
import stat
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from masquerade.errors import InvalidKey, KeyNotFound, NotReady
from masquerade.keys import SCOPES, mint
from masquerade.keys import ring as rings
from masquerade.keys.key import is_scrypt, looks_random, seal
from masquerade.keys.ring import Keyring
from masquerade.keys.table import KeyTable
from tests.databases import Place
from tests.keys.making import make_key


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each hash was computed, and how often two were compared."""
    done: Counter[str] = Counter()

    def count(place: Any, name: str) -> None:
        real = getattr(place, name)

        def counted(*given: Any, **named: Any) -> Any:
            done[name] += 1
            return real(*given, **named)

        monkeypatch.setattr(place, name, counted)

    count(hmac, "digest")
    count(hmac, "compare_digest")
    count(hashlib, "scrypt")
    return done


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    shared = "place" in request.fixturenames and request.getfixturevalue("place").cluster
    monkeypatch.setattr(rings, "REFRESH_SECONDS", 0.01 if shared else 0.0)


def settle(ring: Keyring) -> None:
    """Wait until a ring whose thread looks at a database has looked again."""
    now, deadline = time.monotonic(), time.monotonic() + 20
    while ring._thread.is_alive() and ring._checked < now:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_scopes_include_each_other(tmp_path: Path) -> None:
    assert SCOPES["chat"] < SCOPES["build"] < SCOPES["admin"]
    _, both = make_key(tmp_path, "chat", "metrics")
    assert [both.may(scope) for scope in ("metrics", "chat", "build", "admin")] == [True, True, False, False]
    _, admin = make_key(tmp_path, "admin")
    assert all(admin.may(scope) for scope in SCOPES)


@pytest.mark.parametrize(
    ("patterns", "name", "allowed"),
    [
        (("*",), "anything", True),
        (("npc-*",), "npc-bob", True),
        (("npc-*",), "npc", False),
        (("npc-*", "guide"), "guide", True),
        (("guide",), "guide2", False),
        (("npc-?",), "npc-bob", False),
        (("NPC-*",), "npc-bob", False),
    ],
)
def test_patterns_of_names(tmp_path: Path, patterns: tuple[str, ...], name: str, allowed: bool) -> None:
    assert make_key(tmp_path, "chat", personas=patterns)[1].allows(name) is allowed


def test_a_token_can_be_recognised_and_is_long_enough_not_to_be_guessed() -> None:
    tokens = {mint().token for _ in range(3)}
    assert len(tokens) == 3
    assert all(re.fullmatch(r"mq-[0-9a-f]{12}-[0-9a-f]{48}", token) for token in tokens)


def test_the_file_holds_no_secret_and_is_its_owners_only(tmp_path: Path) -> None:
    token, key = make_key(tmp_path, "chat")
    secret = token.rpartition("-")[2]
    path = tmp_path / "keys.sqlite"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    written = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert key.id.encode() in written
    for told in (secret, secret[:16], secret[-16:]):
        assert told.encode() not in written
        assert bytes.fromhex(told) not in written
    ((_, kept),) = KeyTable(tmp_path).all().items()
    assert kept[32:] == hmac.digest(kept[:32], secret.encode(), "sha256")
    assert seal(key.id, secret).hash[32:] != kept[32:]  # salted: equal secrets would not look equal


def test_a_known_id_costs_what_an_unknown_one_costs(place: Place, work: Counter[str]) -> None:
    """The same calls, as often: time can tell nothing that the calls do not."""
    token, key = make_key(place.keys(), "chat")
    ring = Keyring(place.keys())
    for wrong in (f"mq-{key.id}-{mint().token[-48:]}", mint().token):
        work.clear()
        with pytest.raises(InvalidKey):
            ring.find(wrong)
        assert work == {"digest": 1, "compare_digest": 1}
    work.clear()
    assert ring.find(token) == key
    assert work == {"digest": 1, "compare_digest": 1}
    ring.close()


def test_what_is_no_key_is_refused_as_a_wrong_one_is(place: Place) -> None:
    _, key = make_key(place.keys(), "chat")
    ring = Keyring(place.keys())
    said = set()
    for token in (f"mq-{key.id}-{'0' * 48}", mint().token, "sk-other", "", "mq-", "mq-é", f"mq-{key.id}-"):
        with pytest.raises(InvalidKey) as refusal:
            ring.find(token)
        said.add(str(refusal.value))
    assert len(said) == 1
    ring.close()


class TestScrypt:
    """Keys of the first version, whose hash is scrypt's until they are used."""

    def test_it_is_paid_once_and_never_again(self, place: Place, work: Counter[str]) -> None:
        token, key = make_key(place.keys(), "chat", scrypt=True)
        ring = Keyring(place.keys())
        work.clear()
        assert ring.find(token) is None
        assert work["scrypt"] == 0
        assert ring.find_scrypt(token) == key
        assert (work.pop("scrypt"), ring.find(token)) == (1, key)
        ring.close()
        again = Keyring(place.keys())  # another server of the store
        assert again.find(token) == key
        assert again.find_scrypt(token) == key
        assert work["scrypt"] == 0
        again.close()

    def test_only_for_an_id_of_old(self, place: Place, work: Counter[str]) -> None:
        _, old = make_key(place.keys(), "chat", scrypt=True)
        _, new = make_key(place.keys(), "chat")
        ring = Keyring(place.keys())
        work.clear()
        for wrong in (mint().token, f"mq-{new.id}-{mint().token[-48:]}"):
            with pytest.raises(InvalidKey):
                ring.find(wrong)
        assert work["scrypt"] == 0
        with pytest.raises(InvalidKey) as refusal:
            ring.find_scrypt(f"mq-{old.id}-{mint().token[-48:]}")
        assert str(refusal.value) == rings._UNKNOWN
        assert is_scrypt(place.keys().all()[old])  # a wrong secret replaces nothing
        ring.close()

    def test_a_revoked_one_stays_revoked(self, place: Place) -> None:
        token, key = make_key(place.keys(), "chat", scrypt=True)
        ring = Keyring(place.keys())
        place.keys().revoke(key.id)
        settle(ring)
        for _ in range(2):
            with pytest.raises(InvalidKey, match="revoked"):
                ring.find_scrypt(token)
        ring.close()

    def test_a_table_that_cannot_be_written_keeps_nobody_out(self, place: Place) -> None:
        token, key = make_key(place.keys(), "chat", scrypt=True)
        table = place.keys(patient=False)
        ring = Keyring(table)
        with place.keys().group.write():
            assert ring.find_scrypt(token) == key
            assert ring.find(token) == key
        assert is_scrypt(table.all()[key])
        ring.close()


@pytest.mark.parametrize(
    ("secret", "random"),
    [("0" * 48, False), ("0123456789abcdef" * 3, False), ("deadbeef" * 6, False), ("01234567" + "0" * 40, True)],
)
def test_what_looks_drawn_at_random(secret: str, random: bool) -> None:
    assert looks_random(secret) is random
    assert all(looks_random(mint().token[-48:]) for _ in range(200))


def test_what_is_remembered_is_no_token(place: Place) -> None:
    token, _ = make_key(place.keys(), "chat")
    ring = Keyring(place.keys())
    ring.find(token)
    assert token.rpartition("-")[2] not in repr(vars(ring))
    ring.close()


def test_revoking_is_noticed_and_final(place: Place) -> None:
    token, key = make_key(place.keys(), "chat")
    ring, table = Keyring(place.keys()), place.keys()
    ring.find(token)
    revoked = table.revoke(key.id)
    settle(ring)
    assert table.revoke(key.id) == revoked  # again changes nothing
    with pytest.raises(InvalidKey, match="revoked"):
        ring.find(token)
    assert len(ring) == 1  # a store whose keys are all revoked is not open again
    with pytest.raises(KeyNotFound, match="keys ls"):
        table.revoke("nobody")
    ring.close()


def test_a_key_added_later_is_known(place: Place) -> None:
    ring = Keyring(place.keys())
    assert len(ring) == 0
    token, key = make_key(place.keys(), "chat")
    settle(ring)
    assert ring.find(token) == key
    ring.close()


def test_a_key_expires(place: Place) -> None:
    token, key = make_key(place.keys(), "chat", expires_at=1000.0)
    now = [999.0]
    ring = Keyring(place.keys(), lambda: now[0])
    assert ring.find(token) == key
    now[0] = 1000.0
    with pytest.raises(InvalidKey, match="expired"):
        ring.find(token)
    ring.close()


def test_a_table_that_cannot_be_read_opens_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    token, _ = make_key(place.keys(), "chat")
    ring = Keyring(place.keys())
    ring.find(token)
    ring.close()
    monkeypatch.setattr(rings, "STALE_SECONDS", 0.0)
    with pytest.raises(NotReady):
        ring.find(token)


def test_many_threads_verify_and_revoke_at_once(place: Place) -> None:
    made = [make_key(place.keys(), "chat") for _ in range(6)]
    ring, table, started = Keyring(place.keys()), place.keys(), threading.Barrier(8)

    def use(number: int) -> list[str]:
        started.wait()
        if number < 2:
            return [table.revoke(made[number][1].id).id]
        return [found.id for token, _ in made[2:] if (found := ring.find(token))]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(use, range(8)))
    assert found[2:] == [[key.id for _, key in made[2:]]] * 6
    settle(ring)
    for token, _ in made[:2]:
        with pytest.raises(InvalidKey):
            ring.find(token)
    ring.close()
