"""`masquerade keys`."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from masquerade.keys.ring import Keyring
from masquerade.keys.table import KeyTable
from tests.cli.running import fail, masquerade, succeed


def add(store: Path, *options: str) -> dict[str, Any]:
    return succeed("keys", "add", "--store", store, *options)


def test_a_key_is_shown_once(tmp_path: Path) -> None:
    done = masquerade("keys", "add", "--store", tmp_path, "--name", "bob")
    assert done.status == 0
    token = done.stdout.strip()  # nothing else, so that a script can keep it
    secret = token.rpartition("-")[2]
    assert secret not in done.stderr
    ring = Keyring(KeyTable(tmp_path))
    found = ring.find(token)
    assert found is not None
    assert found.name == "bob"
    ring.close()
    for options in ((), ("--json",)):
        listed = masquerade("keys", "ls", "--store", tmp_path, *options).stdout
        assert "bob" in listed
        assert secret not in listed
    assert secret not in (tmp_path / "audit.jsonl").read_text()


def test_what_is_asked_for_is_what_is_kept(tmp_path: Path) -> None:
    added = add(
        tmp_path, "--scope", "chat", "--scope", "metrics", "--personas", "npc-*", "--personas", "guide", "--rpm", "9"
    )
    (listed,) = succeed("keys", "ls", "--store", tmp_path)["keys"]
    assert added == listed | {"key": added["key"]}
    assert listed["scopes"] == ["chat", "metrics"]
    assert listed["personas"] == ["npc-*", "guide"]
    assert (listed["rpm"], listed["tpm"], listed["expires_at"], listed["state"]) == (9, None, None, "valid")
    assert add(tmp_path)["scopes"] == ["chat"]


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400), ("12h", 43_200), ("30d", 2_592_000), ("2w", 1_209_600)])
def test_times_until_the_end(tmp_path: Path, text: str, seconds: float) -> None:
    before = time.time()
    end = datetime.fromisoformat(add(tmp_path, "--expires", text)["expires_at"]).timestamp()
    assert before + seconds - 1 <= end <= time.time() + seconds


def test_an_end_on_a_date_is_its_start_in_utc(tmp_path: Path) -> None:
    end = datetime.fromisoformat(add(tmp_path, "--expires", "2999-01-31")["expires_at"])
    assert end == datetime(2999, 1, 31, tzinfo=UTC)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scope", "root"), "metrics, chat, build, admin"),
        (("--personas", "Npc *"), "is not a pattern"),
        (("--personas", ""), "is not a pattern"),
        (("--expires", "tomorrow"), "2027-01-31"),
        (("--expires", "2001-01-01"), "is in the past"),
        (("--expires", "999999w"), "is after 9999-12-31"),
        (("--expires", "9999-12-31T23:59:59-23:00"), "is after 9999-12-31"),
        (("--expires", "0d"), "neither"),
    ],
)
def test_nonsense_is_refused_and_makes_no_key(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    assert words in fail(2, "keys", "add", "--store", tmp_path, *options)
    assert succeed("keys", "ls", "--store", tmp_path) == {"keys": []}


def test_revoking(tmp_path: Path) -> None:
    key_id = add(tmp_path)["id"]
    assert succeed("keys", "revoke", key_id, "--store", tmp_path)["state"] == "revoked"
    assert succeed("keys", "ls", "--store", tmp_path)["keys"][0]["state"] == "revoked"
    assert "keys ls" in fail(1, "keys", "revoke", "nobody", "--store", tmp_path)


def test_what_is_done_to_keys_is_in_the_audit_log(tmp_path: Path) -> None:
    key_id = add(tmp_path)["id"]
    succeed("keys", "revoke", key_id, "--store", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["action"], line["target"], line["outcome"]) for line in lines] == [
        ("add_key", key_id, "done"),
        ("revoke_key", key_id, "done"),
    ]


def test_the_store_of_a_model_with_keys_still_gets_the_models_personas(tmp_path: Path) -> None:
    add(tmp_path)
    assert len(succeed("masks", "ls", "--store", tmp_path)["personas"]) == 8
