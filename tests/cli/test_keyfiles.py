"""Keys that come in files: `serve --key-file`, SIGHUP, and the end that SIGTERM asks for."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from masquerade.cli.keyfiles import add_missing
from masquerade.errors import InvalidValue
from masquerade.keys import mint
from masquerade.keys.ring import Keyring
from masquerade.keys.table import KeyTable
from tests.cli.running import fail, succeed
from tests.keys.making import bearer, make_key
from tests.serving import serve

WAIT_SECONDS = 60.0


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def write(path: Path, token: str) -> str:
    path.write_text(f"{token}\n")
    return token


def opens(store: Path, token: str) -> frozenset[str]:
    """The scopes that a token has in a store."""
    ring = Keyring(KeyTable(store))
    try:
        return frozenset(ring.find_scrypt(token).scopes)
    finally:
        ring.close()


def test_a_file_makes_a_key_once(store: Path, tmp_path: Path) -> None:
    token = write(tmp_path / "admin-key", mint().token)
    other = write(tmp_path / "metrics-key", mint().token)
    given = [f"admin={tmp_path / 'admin-key'}", f"metrics={tmp_path / 'metrics-key'}"]
    assert add_missing(store, given) == 2
    assert add_missing(store, given) == 2
    assert (opens(store, token), opens(store, other)) == ({"admin"}, {"metrics"})
    listed = succeed("keys", "ls", "--store", store)["keys"]
    assert {one["name"] for one in listed} == {"admin-key", "metrics-key"}
    kept = b"".join(path.read_bytes() for path in store.iterdir())
    assert token.rpartition("-")[2].encode() not in kept


def test_a_revoked_key_stays_revoked(store: Path, tmp_path: Path) -> None:
    token = write(tmp_path / "key", mint().token)
    add_missing(store, [f"chat={tmp_path / 'key'}"])
    succeed("keys", "revoke", token.split("-")[1], "--store", store)
    assert add_missing(store, [f"chat={tmp_path / 'key'}"]) == 1
    with pytest.raises(Exception, match="revoked"):
        opens(store, token)


def test_another_file_adds_a_key_and_takes_none_away(store: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "key", mint().token)
    add_missing(store, [f"chat={tmp_path / 'key'}"])
    second = write(tmp_path / "key", mint().token)
    assert add_missing(store, [f"chat={tmp_path / 'key'}"]) == 2
    assert opens(store, first) == opens(store, second) == {"chat"}


@pytest.mark.parametrize("content", ["", "secret", "mq-0-1", "mq-" + "0" * 12 + "-" + "g" * 48, "\0" * 5000])
def test_what_is_no_key_is_refused_and_not_told(store: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content)
    with pytest.raises(InvalidValue, match="does not hold a key") as refusal:
        add_missing(store, [f"admin={tmp_path / 'key'}"])
    assert not content or content not in str(refusal.value)
    assert succeed("keys", "ls", "--store", store) == {"keys": []}


@pytest.mark.parametrize("secret", ["0" * 48, "deadbeef" * 6, "0123456789abcdef" * 3])
def test_a_secret_that_is_not_random_is_refused_and_not_told(store: Path, tmp_path: Path, secret: str) -> None:
    write(tmp_path / "key", f"mq-{'0' * 12}-{secret}")
    with pytest.raises(InvalidValue, match=r"key is not random.*openssl rand -hex 24") as refusal:
        add_missing(store, [f"admin={tmp_path / 'key'}"])
    assert secret not in str(refusal.value)
    assert succeed("keys", "ls", "--store", store) == {"keys": []}


def test_a_file_whose_key_is_kept_by_scrypt_is_known_again(store: Path, tmp_path: Path) -> None:
    token, _ = make_key(store, "chat", scrypt=True)
    write(tmp_path / "key", token)
    assert add_missing(store, [f"chat={tmp_path / 'key'}"]) == 1
    write(tmp_path / "key", token[:-48] + mint().token[-48:])
    with pytest.raises(InvalidValue, match="another secret"):
        add_missing(store, [f"chat={tmp_path / 'key'}"])


def test_a_known_id_with_another_secret_or_scope_is_refused(store: Path, tmp_path: Path) -> None:
    token = write(tmp_path / "key", mint().token)
    add_missing(store, [f"chat={tmp_path / 'key'}"])
    with pytest.raises(InvalidValue, match="has the scopes chat, not admin"):
        add_missing(store, [f"admin={tmp_path / 'key'}"])
    write(tmp_path / "key", token[:-48] + mint().token[-48:])
    with pytest.raises(InvalidValue, match="another secret"):
        add_missing(store, [f"chat={tmp_path / 'key'}"])


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [("root=/x", 2, "metrics, chat, build, admin"), ("admin", 2, "SCOPE=FILE"), ("admin=/no/such/file", 1, "/no/such")],
)
def test_a_server_does_not_start_without_the_keys_it_was_promised(
    tiny_folder: Path, store: Path, given: str, status: int, words: str
) -> None:
    assert words in fail(status, "serve", "--model", tiny_folder, "--store", store, "--port", "0", "--key-file", given)


def answers(url: str, token: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=bearer(token)), timeout=30) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as refusal:
        refusal.close()
        return False


def test_hangup_reads_the_files_again_and_ends_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "key", mint().token)
    with serve("--model", str(tiny_folder), "--key-file", f"admin={tmp_path / 'key'}") as server:
        url = f"{server.base_url}/v1/models"
        assert answers(url, first)
        second = mint().token
        assert not answers(url, second)
        (tmp_path / "key").write_text("nonsense")
        server.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + WAIT_SECONDS
        while "SIGHUP changed nothing" not in server.said():
            assert time.monotonic() < deadline, server.said()
            time.sleep(0.05)
        write(tmp_path / "key", second)
        server.process.send_signal(signal.SIGHUP)
        while not answers(url, second):
            assert time.monotonic() < deadline, server.said()
            time.sleep(0.05)
        assert answers(url, first)
        server.process.terminate()
        assert server.process.wait(WAIT_SECONDS) == 0


def test_a_server_that_loads_ends_when_it_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    """As the first process of a container would: the kernel keeps from it what it does not handle."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--map-root-user", "--user"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("there are no namespaces of processes here")
    script = (
        "import os, signal, sys, time\n"
        "from masquerade.cli import main\n"
        "def tell(*_, **__):\n"
        "    assert os.getpid() == 1\n"
        "    os.kill(1, signal.SIGTERM)\n"
        "    time.sleep(60)\n"
        "import masquerade.model\n"
        "masquerade.model.load = tell\n"
        "sys.argv[0:1] = ['masquerade', 'serve']\n"
        "main()\n"
    )
    options = ["--model", str(tiny_folder), "--store", str(tmp_path), "--port", "0"]
    command = [*unshare, sys.executable, "-c", script, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_SECONDS)
    assert done.returncode == 0, done.stderr
