"""How a server starts: refusals that say what to do, nothing taken before it is ready, stores of older versions."""

from __future__ import annotations

import http.client
import json
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
import torch

from masquerade.cli.loading import Loading
from masquerade.cli.serve import _listen
from masquerade.errors import StoreTooNew
from masquerade.jobs import open_group
from masquerade.keys import table as keys
from masquerade.keys.table import KeyTable as Keys
from tests.cli.running import fail
from tests.serving import serve

MOUNTING = ["unshare", "--mount", "--map-root-user"]
NEWER = 99


def script(path: Path, *statements: str, version: int) -> None:
    """Make an sqlite file by hand."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.executescript(statement)
        db.execute(f"pragma user_version = {version}")
        db.commit()


@pytest.mark.parametrize("name", ["registry.sqlite", "keys.sqlite", "jobs/jobs.sqlite"])
def test_a_store_of_a_newer_version_is_refused(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    script(tmp_path / name, "create table t (a)", version=NEWER)
    before = (tmp_path / name).read_bytes()
    said = fail(1, "serve", "--model", tiny_folder, "--store", tmp_path, "--port", "0")
    assert f"{tmp_path / name} was written by a newer version of Masquerade (schema {NEWER}; " in said
    assert (tmp_path / name).read_bytes() == before


def test_each_table_refuses_a_newer_version_itself(tmp_path: Path) -> None:
    for file in (keys.FILE, "jobs.sqlite", "registry.sqlite"):
        script(tmp_path / file, "create table t (a)", version=NEWER)
    with pytest.raises(StoreTooNew):
        Keys(tmp_path)
    with pytest.raises(StoreTooNew):
        open_group(tmp_path / "jobs.sqlite")
    assert "newer version wrote this: schema 99" in fail(1, "masks", "ls", "--store", tmp_path)


def test_a_damaged_table_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "registry.sqlite").write_bytes(b"no database" * 1000)
    assert "registry.sqlite cannot be read" in fail(1, "serve", "--model", tiny_folder, "--store", tmp_path)


def test_a_store_that_is_a_file_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store").touch()
    assert "cannot be written" in fail(1, "serve", "--model", tiny_folder, "--store", tmp_path / "store")


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        ("size=1m", "a server needs 16777216; make room"),
        ("size=64m,ro", "Read-only file system; give the folder to this user, or name another one with --store"),
    ],
)
def test_a_disk_without_room_or_without_writing_is_refused(
    tiny_folder: Path, tmp_path: Path, mount: str, words: str
) -> None:
    if subprocess.run([*MOUNTING, "mount", "-t", "tmpfs", "t", tmp_path], capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    command = f"mount -t tmpfs -o {mount} t {tmp_path} && exec {sys.executable} -m masquerade serve"
    done = subprocess.run(
        [*MOUNTING, "sh", "-c", f"{command} --model {tiny_folder} --store {tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(tiny_folder: Path, tmp_path: Path) -> None:
    said = fail(1, "serve", "--model", tiny_folder, "--store", tmp_path, "--port", "0", "--device", "cuda")
    assert "torch sees no CUDA device" in said


def ask(address: tuple[str, int], method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPConnection(*address, timeout=30)) as connection:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def test_requests_while_the_model_is_loaded_get_503() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with Loading(listener):
            assert ask(address, "GET", "/healthz")[0] == 200
            assert ask(address, "GET", "/readyz")[0] == 503
            status, headers, body = ask(address, "POST", "/v1/chat/completions", b"{}" * 10_000)
            assert (status, json.loads(body)["error"]["code"]) == (503, "not_ready")
            assert int(headers["Retry-After"]) >= 1
            assert ask(address, "HEAD", "/readyz")[2] == b""
            for path in ("/v1/messages", "/v1/messages/count_tokens?beta=true"):
                status, headers, body = ask(address, "POST", path, b"{}")
                refused = json.loads(body)
                assert (status, refused["type"], refused["error"]["type"]) == (503, "error", "overloaded_error")
                assert refused["request_id"] == headers["request-id"] == headers["x-request-id"]
                assert int(headers["Retry-After"]) >= 1
        with socket.create_connection(address) as late, listener.accept()[0] as taken:
            late.sendall(b"hello")
            assert taken.recv(5) == b"hello"


def test_a_server_is_warm_before_it_is_ready(tiny_folder: Path) -> None:
    with serve("--model", str(tiny_folder)) as server:
        with urllib.request.urlopen(f"{server.base_url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        assert "masquerade_engine_steps_total 2.0" in lines
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.base_url}/v1/models/nobody")
        assert refused.value.code == 404
        refused.value.close()


def test_small_answers_do_not_wait_for_the_clients_acknowledgement() -> None:
    """Nagle's algorithm is off on what is accepted: with it, an answer of two writes takes 40 ms."""
    with _listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
