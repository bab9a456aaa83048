"""The server as a process: health, start and end."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from masquerade import __version__
from tests.contract.asking import CHAT, Api, Json, body, events_of
from tests.serving import STOP_SECONDS, ServerDied, serve


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/health", "/ping"])
def test_a_running_server_is_healthy(api: Api, path: str) -> None:
    assert api.http.get(path).status_code == 200


def test_probes_of_other_servers_are_answered(api: Api) -> None:
    assert api.http.post("/ping").json() == api.http.get("/health").json() == {"status": "ready"}
    assert api.http.get("/version").json() == {"version": __version__}


def test_a_model_that_is_not_there_ends_the_start_with_its_name() -> None:
    with pytest.raises(ServerDied, match=r"(?s)exit status 1 .*no-such-model"), serve("--model", "/no-such-model"):
        pass


def test_an_unknown_flag_is_a_usage_error() -> None:
    with pytest.raises(ServerDied, match="exit status 2 "), serve("--model", "demo", "--no-such-flag"):
        pass


def speaking(rambler: Path, max_tokens: int) -> Json:
    return body(model=rambler.name, max_tokens=max_tokens, stream=True)


def test_a_server_that_is_told_to_end_ends_its_answer_first(rambler: Path) -> None:
    with serve("--model", str(rambler)) as server, httpx.Client(base_url=server.base_url, timeout=30) as http:
        with http.stream("POST", CHAT, json=speaking(rambler, 500)) as response:
            events = events_of(response)
            next(events)
            server.process.terminate()
            assert list(events)[-1] == "[DONE]"
        server.process.wait(STOP_SECONDS)


def test_a_server_that_is_told_to_end_does_not_speak_forever(rambler: Path) -> None:
    with (
        serve("--model", str(rambler)) as server,
        httpx.Client(base_url=server.base_url, timeout=30) as http,
        http.stream("POST", CHAT, json=speaking(rambler, 8000)) as response,
    ):
        events = events_of(response)
        next(events)
        server.process.terminate()
        server.process.wait(STOP_SECONDS)
