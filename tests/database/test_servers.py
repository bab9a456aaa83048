"""Real servers on a real database, which die, lose it and find it again; no password is told anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from masquerade.database.url import DatabaseURL
from masquerade.errors import InvalidValue
from tests.building.asking import build, connect, finish
from tests.cli.running import fail, masquerade, succeed
from tests.databases import PASSWORD, Cluster, Place
from tests.keys.making import bearer
from tests.serving import Server, free_port, serve


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


@pytest.mark.timeout(300)
def test_servers_share_a_database_and_outlive_each_other_and_it(shared: Place, tmp_path: Path) -> None:
    store, url = str(tmp_path / "store"), shared.url()
    options = "--model", "demo", "--store", store, "--database", url
    key = succeed("keys", "add", "--store", store, "--database", url, "--scope", "admin")
    with serve(*options) as first, serve(*options) as second:
        with connect(first, api_key=key["key"]) as sdk:
            job = build(sdk, "p", samples=64).id
            told = lambda: [event.message for event in sdk.fine_tuning.jobs.list_events(job, limit=100)]  # noqa: E731
            wait_for(lambda: any(message.startswith("backward") for message in told()))
        first.process.kill()
        first.process.wait()
        with connect(second, api_key=key["key"]) as sdk:
            assert finish(sdk, job).status == "succeeded"
            assert "p" in [model.id.rpartition(":")[2] for model in sdk.models.list()]
            assert told().count("running") == 2
        check_keys(second, key["key"], store, url)
        check_outage(second, key["key"], shared)
        assert PASSWORD not in first.said() + second.said()
        assert "Traceback" not in second.said()
    assert "keys.sqlite" not in {path.name for path in Path(store).iterdir()}


def check_keys(server: Server, admin: str, store: str, url: str) -> None:
    """Keys of another process are valid, and no longer valid, soon."""
    added = succeed("keys", "add", "--store", store, "--database", url)
    assert status(server, admin) == 200
    wait_for(lambda: status(server, added["key"]) == 200)
    succeed("keys", "revoke", added["id"], "--store", store, "--database", url)
    wait_for(lambda: status(server, added["key"]) == 401)


def check_outage(server: Server, key: str, place: Place) -> None:
    """Without its database a server refuses, says so and comes back."""
    assert place.cluster is not None
    place.cluster.stop()
    try:
        wait_for(lambda: status(server, key) == 503)
        for path in ("/v1/models", "/v1/files"):
            answer = httpx.get(f"{server.base_url}{path}", headers=bearer(key), timeout=30)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
            assert int(answer.headers["Retry-After"]) >= 1
            assert "database does not answer" in answer.json()["error"]["message"]
        assert httpx.get(f"{server.base_url}/healthz", timeout=30).status_code == 200
    finally:
        place.cluster.start()
    wait_for(lambda: status(server, key) == 200)
    assert httpx.get(f"{server.base_url}/v1/files", headers=bearer(key), timeout=30).status_code == 200


def status(server: Server, key: str) -> int:
    return httpx.get(f"{server.base_url}/v1/models", headers=bearer(key), timeout=30).status_code


def test_a_database_that_is_not_there_is_named_without_its_password(cluster: Cluster, tmp_path: Path) -> None:
    port = free_port()
    closed = f"postgresql://ann:{PASSWORD}@127.0.0.1:{port}/jobs"
    refused = cluster.url(password=f"wrong-{PASSWORD}")
    for command in (("serve", "--model", "demo"), ("keys", "ls")):
        said = fail(1, *command, "--store", tmp_path, "--database", closed)
        assert f"postgresql://ann@127.0.0.1:{port}/jobs cannot be used: " in said
        assert "refused" in said
        assert PASSWORD not in said
        said = fail(1, *command, "--store", tmp_path, "--database", refused)
        assert "password authentication failed" in said
        assert PASSWORD not in said


@pytest.mark.parametrize(
    "text",
    [
        f"mysql://ann:{PASSWORD}@host/name",
        f"ann:{PASSWORD}@host/name",
        f"postgresql://ann:{PASSWORD}@host:{PASSWORD}/name",
        f"postgresql://ann:x@{PASSWORD}@host/name",
    ],
)
def test_what_is_no_address_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(InvalidValue) as refusal:
        DatabaseURL(text)
    assert PASSWORD not in str(refusal.value)


def test_nothing_shows_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (f"postgresql://ann:{PASSWORD}@db:5433/x", f"postgresql://ann@db:5433/x?password={PASSWORD}"):
        assert str(DatabaseURL(url)) == repr(DatabaseURL(url)) == "postgresql://ann@db:5433/x"
        monkeypatch.setenv("MASQUERADE_DATABASE", url)
        for options in ((), ("--json",)):
            shown = masquerade("config", "show", "serve", *options).stdout
            assert PASSWORD not in shown
        assert "MASQUERADE_DATABASE" in shown
        monkeypatch.delenv("MASQUERADE_DATABASE")
        file = tmp_path / "masquerade.toml"
        file.write_text(f'database = "{url}"\n')
        shown = masquerade("--config", file, "config", "show", "serve", "--json").stdout
        assert "postgresql://ann@db:5433/x" in shown
        assert PASSWORD not in shown
        for refused in (url, url.replace(PASSWORD, f"x/{PASSWORD}")):
            file.write_text(f'database = ["{refused}"]\n')
            assert PASSWORD not in masquerade("--config", file, "config", "show", "serve").stderr


def test_keys_of_the_file_are_copied_before_a_server_starts_without_them(shared: Place, tmp_path: Path) -> None:
    added = succeed("keys", "add", "--store", tmp_path)
    command = "serve", "--model", "demo", "--store", tmp_path, "--database", shared.url()
    assert "keys copy" in fail(1, *command)
    target = "--store", tmp_path, "--database", shared.url()
    assert succeed("keys", "copy", *target) == {"copied": [added["id"]]}
    assert succeed("keys", "copy", *target) == {"copied": []}
    assert [key["id"] for key in succeed("keys", "ls", *target)["keys"]] == [added["id"]]
