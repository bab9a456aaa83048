"""`masquerade doctor` tells what there is, finds what is wrong, and keeps secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maskstore import database
from masquerade.database.migrations import KEYS
from tests.cli.running import masquerade, succeed


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the demo below a home folder, with its personas and a key."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    succeed("masks", "ls")
    succeed("keys", "add", "--name", "somebody's")
    (store,) = (tmp_path / "home" / ".local" / "share" / "masquerade").iterdir()
    return store


def test_it_tells_what_there_is(store: Path) -> None:
    report = succeed("doctor")
    assert report["wrong"] == []
    assert report["packages"]["torch"].startswith("2.")
    assert report["hardware"]["instructions"]
    assert set(report["kernels"]) >= {"native", "cpu float32", "cpu bfloat16"}
    assert report["store"]["masks"].startswith("8, ")
    assert report["store"]["keys"] == "1 valid"
    assert report["store"]["schemas"] == f"registry.sqlite {database.SCHEMA}, keys.sqlite {len(KEYS)}"


def test_no_home_folder_and_no_secret_is_told(store: Path, tmp_path: Path) -> None:
    token = succeed("keys", "add")["key"]
    for flags in ((), ("--json",)):
        said = masquerade("doctor", *flags).stdout
        assert "~/.local/share/masquerade/demo-" in said
        assert str(tmp_path) not in said
        assert not any(part in said for part in token.split("-")[1:])


def test_damage_is_found(store: Path) -> None:
    mask = next(store.glob("masks/*/*.safetensors"))
    content = bytearray(mask.read_bytes())
    content[-1] ^= 1
    mask.write_bytes(content)
    done = masquerade("doctor", "--json")
    assert done.status == 1
    assert any(mask.stem in ill for ill in json.loads(done.stdout)["wrong"])
    assert "wrong: the store: damaged" in masquerade("doctor").stdout


def test_a_value_of_the_environment_that_no_option_accepts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASQUERADE_SERVE_PORT", "many")
    done = masquerade("doctor", "--json")
    assert done.status == 1
    (wrong,) = json.loads(done.stdout)["wrong"]
    assert wrong.startswith("serve --port of MASQUERADE_SERVE_PORT: ")


def test_it_makes_no_store(tiny_folder: Path, tmp_path: Path) -> None:
    report = succeed("doctor", "--model", tiny_folder, "--store", tmp_path / "none")
    assert report["store"]["state"].startswith("none yet")
    assert not (tmp_path / "none").exists()


def test_a_model_that_is_not_there_is_told() -> None:
    done = masquerade("doctor", "--model", "/no/such/folder", "--json")
    assert done.status == 1
    assert "/no/such/folder" in json.loads(done.stdout)["wrong"][0]
