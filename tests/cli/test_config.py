"""Where options get their values from: flag, environment, file, default, in this order."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import fail, masquerade, succeed

CONTENT = """
model = "demo"

[serve]
port = 9000
max_running = 4
cors-origin = ["https://a.example", "https://b.example"]
require-signed = true

[masks.ls]
store = "/srv/masks"
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory and a user's config folder with nothing in them."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("MASQUERADE_CONFIG", raising=False)


def found(*flags: str, command: str = "serve") -> dict[str, tuple[object, str]]:
    """Option -> value and source, as `config show` says it."""
    shown = succeed(*flags, "config", "show", command)["settings"]
    return {one["option"]: (one["value"], one["source"]) for one in shown}


def test_without_a_file_all_is_default() -> None:
    assert {source for _, source in found().values()} == {"default"}
    assert found()["--port"] == (8000, "default")


def test_the_file_counts_before_the_default_and_the_environment_before_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("masquerade.toml").write_text(CONTENT)
    monkeypatch.setenv("MASQUERADE_SERVE_PORT", "9001")
    settings = found()
    assert settings["--port"] == (9001, "MASQUERADE_SERVE_PORT")
    assert settings["--max-running"] == (4, "masquerade.toml")
    assert settings["--cors-origin"] == (["https://a.example", "https://b.example"], "masquerade.toml")
    assert settings["--require-signed"] == (True, "masquerade.toml")
    assert settings["--max-waiting"] == (256, "default")


def test_what_stands_above_the_sections_is_for_every_command_that_has_the_option() -> None:
    Path("masquerade.toml").write_text(CONTENT)
    assert found(command="masks ls")["--model"] == ("demo", "masquerade.toml")
    assert found(command="masks ls")["--store"] == ("/srv/masks", "masquerade.toml")
    assert found(command="masks gc")["--store"] == (None, "default")


def test_a_command_uses_what_the_file_says_unless_a_flag_says_otherwise(tiny_folder: Path, tmp_path: Path) -> None:
    Path("masquerade.toml").write_text(f'model = "{tiny_folder}"\nstore = "{tmp_path / "a"}"\n')
    assert f"there is no store in {tmp_path / 'a'}" in fail(2, "masks", "ls")
    succeed("masks", "trust", "ann", "0" * 64)
    assert succeed("masks", "ls") == {"personas": []}
    succeed("masks", "trust", "ann", "0" * 64, "--store", tmp_path / "b")
    assert (tmp_path / "b").is_dir()


def test_which_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "config" / "masquerade" / "masquerade.toml"
    own.parent.mkdir(parents=True)
    for port, file in enumerate((own, Path("masquerade.toml"), tmp_path / "env.toml", tmp_path / "flag.toml"), 9001):
        file.write_text(f"[serve]\nport = {port}\n")
    assert found("--config", str(tmp_path / "flag.toml"))["--port"][0] == 9004
    monkeypatch.setenv("MASQUERADE_CONFIG", str(tmp_path / "env.toml"))
    assert found()["--port"][0] == 9003
    monkeypatch.delenv("MASQUERADE_CONFIG")
    assert found()["--port"][0] == 9002
    Path("masquerade.toml").unlink()
    assert found()["--port"] == (9001, str(own))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[serv]", "there is no command for the section [serv]; is 'serve' meant?"),
        ("[masks.shwo]", "there is no command for the section [masks.shwo]; is 'show' meant?"),
        ("[serve]\nprot = 1", "[serve] has no option 'prot'; is 'port' meant?"),
        ("stoer = '/srv'", "there is no option 'stoer'; is 'store' meant?"),
        ("[serve]\nport = 'many'", "[serve] port is 'many'"),
        ("[serve]\nport = 99999", "[serve] port is 99999"),
        ("[serve]\ndevice = 'tpu'", "[serve] device is 'tpu'"),
        ("[serve]\nport = [1]", "[serve] port is [1]; it must be one value"),
        ("[serve]\ncors-origin = 'https://a'", "it must be a list"),
        ("[serve]\nrequire-signed = 1", "it must be true or false"),
        ("config = 'other.toml'", "there is no option 'config'"),
        ("[serve]\nconfig = 'other.toml'", "[serve] has no option 'config'"),
        ("[masks]\nls = 1", "write a section [masks.ls]"),
        ("[serve", "is not TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(content: str, words: str) -> None:
    Path("bad.toml").write_text(content)
    said = fail(2, "--config", "bad.toml", "masks", "ls")
    assert said.startswith("masquerade: bad.toml")
    assert words in said


def test_a_file_that_is_not_there_is_refused() -> None:
    assert "none.toml" in fail(1, "--config", "none.toml", "version")


def test_a_command_that_is_not_there_is_refused() -> None:
    assert "'dance'" in fail(2, "config", "show", "dance")
    assert masquerade("config", "show").stdout.count("--store") > 10
