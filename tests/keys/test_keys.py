"""Keys as such: what they include, how they are kept, and how a ring finds them again."""

from __future__ import annotations

import re
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from masquerade.errors import InvalidKey, KeyNotFound, NotReady
from masquerade.keys import SCOPES, Keyring, KeyTable, mint
from masquerade.keys import key as keys
from masquerade.keys import ring as rings
from tests.keys.making import make_key


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What scrypt was asked to hash."""
    seen: list[str] = []
    real = keys._scrypt

    def watch(secret: str, salt: bytes) -> bytes:
        seen.append(secret)
        return real(secret, salt)

    monkeypatch.setattr(keys, "_scrypt", watch)
    return seen


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rings, "NOTICE_SECONDS", 0.0)


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
    ((_, first),) = KeyTable(tmp_path).all().items()
    assert first[16:] == keys._scrypt(secret, first[:16])
    assert keys._scrypt(secret, b"\0" * 16) != first[16:]  # salted: equal secrets would not look equal


def test_a_token_is_hashed_once(tmp_path: Path, hashed: list[str]) -> None:
    token, key = make_key(tmp_path, "chat")
    ring = Keyring(KeyTable(tmp_path))
    hashed.clear()
    assert ring.recall(token) is None
    assert ring.verify(token) == key
    assert [ring.recall(token), ring.verify(token)] == [key, key]
    assert len(hashed) == 1
    ring.close()


def test_a_wrong_secret_is_hashed_once_and_an_unknown_id_never(tmp_path: Path, hashed: list[str]) -> None:
    _, key = make_key(tmp_path, "chat")
    ring = Keyring(KeyTable(tmp_path))
    hashed.clear()
    wrong = f"mq-{key.id}-{'0' * 48}"
    with pytest.raises(InvalidKey) as first:
        ring.verify(wrong)
    for token in (wrong, f"mq-{'0' * 12}-{'0' * 48}", "sk-something", "", "mq-", "mq-é", f"mq-{key.id}-{'0' * 47}"):
        with pytest.raises(InvalidKey) as other:
            ring.recall(token)
        assert str(other.value) == str(first.value)
        assert token not in str(other.value) or not token
    assert len(hashed) == 1
    ring.close()


def test_what_is_remembered_is_no_token(tmp_path: Path) -> None:
    token, _ = make_key(tmp_path, "chat")
    ring = Keyring(KeyTable(tmp_path))
    ring.verify(token)
    assert token.rpartition("-")[2] not in repr(vars(ring))
    ring.close()


def test_revoking_is_noticed_and_final(tmp_path: Path) -> None:
    token, key = make_key(tmp_path, "chat")
    ring, table = Keyring(KeyTable(tmp_path)), KeyTable(tmp_path)
    ring.verify(token)
    revoked = table.revoke(key.id)
    assert table.revoke(key.id) == revoked  # again changes nothing
    with pytest.raises(InvalidKey, match="revoked"):
        ring.recall(token)
    assert len(ring) == 1  # a store whose keys are all revoked is not open again
    with pytest.raises(KeyNotFound, match="keys ls"):
        table.revoke("nobody")
    ring.close()


def test_a_key_added_later_is_known(tmp_path: Path) -> None:
    ring = Keyring(KeyTable(tmp_path))
    assert len(ring) == 0
    token, key = make_key(tmp_path, "chat")
    assert ring.verify(token) == key
    ring.close()


def test_a_key_expires(tmp_path: Path) -> None:
    token, key = make_key(tmp_path, "chat", expires_at=1000.0)
    now = [999.0]
    ring = Keyring(KeyTable(tmp_path), lambda: now[0])
    assert ring.verify(token) == key
    now[0] = 1000.0
    for ask in (ring.recall, ring.verify):
        with pytest.raises(InvalidKey, match="expired"):
            ask(token)
    ring.close()


def test_a_table_that_cannot_be_read_opens_nothing(tmp_path: Path) -> None:
    token, _ = make_key(tmp_path, "chat")
    ring = Keyring(KeyTable(tmp_path))
    ring.verify(token)
    ring.close()
    with pytest.raises(NotReady):
        ring.recall(token)


def test_many_threads_verify_and_revoke_at_once(tmp_path: Path) -> None:
    made = [make_key(tmp_path, "chat") for _ in range(6)]
    ring, table, started = Keyring(KeyTable(tmp_path)), KeyTable(tmp_path), threading.Barrier(8)

    def use(number: int) -> list[str]:
        started.wait()
        if number < 2:
            return [table.revoke(made[number][1].id).id]
        return [ring.verify(token).id for token, _ in made[2:]]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(use, range(8)))
    assert found[2:] == [[key.id for _, key in made[2:]]] * 6
    for token, _ in made[:2]:
        with pytest.raises(InvalidKey):
            ring.verify(token)
    ring.close()
