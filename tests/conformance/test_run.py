"""A client that cannot be installed is skipped with the reason, and no server is started for it alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conformance import clients, run
from tests.conformance.clients import Client

SCRIPT = "with_openai"


@pytest.mark.parametrize(
    ("client", "path", "reason"),
    [
        (Client(SCRIPT, ("openai==6",), npm=True), "", "there is no node and no npm on the PATH"),
        (Client(SCRIPT, ("no requirement",)), None, "Invalid requirement"),
    ],
    ids=["without node", "refused by pip"],
)
def test_it_is_skipped(
    client: Client,
    path: str | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(clients.CLIENTS, "absent", client)
    monkeypatch.setattr(clients, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(run, "start", lambda _: pytest.fail("a server was started"))
    monkeypatch.setattr("sys.argv", ["run", "--json", "--only", "absent"])
    if path is not None:
        monkeypatch.setenv("PATH", path)
    assert run.main() == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["clients"]) == (False, {})
    assert reason in found["skipped"]["absent"]
