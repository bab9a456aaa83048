"""A real server with keys, and processes that change them: what it logs, audits and traces, and what it never tells."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests import world
from tests.cli.running import fail
from tests.keys.making import bearer
from tests.serving import Server, ServerDied, serve

CONTENT = "a secret that nobody may log"
WAIT_SECONDS = 60.0


def keys(store: Path, *arguments: str) -> dict[str, Any]:
    """`masquerade keys` in a process of its own."""
    command = [sys.executable, "-m", "masquerade", "keys", *arguments, "--store", str(store), "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@dataclass
class Collector:
    """A collector of traces: keeps the spans that are sent to it."""

    spans: list[Any] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    def find(self, request_id: str) -> dict[str, Any]:
        for span in self.spans:
            told = {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}
            if told.get("masquerade.request_id") == request_id:
                return told | {"name": span.name, "trace": span.trace_id.hex()}
        return {}


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    kept = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kept.bodies.append(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    kept.spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing on stderr."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield kept, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@dataclass(frozen=True)
class Run:
    """A running server and its admin's and a tenant's token."""

    server: Server
    store: Path
    admin: str
    tenant: str
    collector: Collector

    def ask(self, token: str | None, method: str, path: str, **options: Any) -> httpx.Response:
        headers = (bearer(token) if token else {}) | options.pop("headers", {})
        return httpx.request(method, self.server.base_url + path, headers=headers, timeout=60, **options)

    def chat(self, token: str, **fields: Any) -> httpx.Response:
        """A greedy answer; a sampled one ends before its first token now and then."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": CONTENT}], "max_tokens": 4, "temperature": 0}
        body |= fields
        return self.ask(token, "POST", "/v1/chat/completions", json=body, headers={"x-request-id": "chat-1"})

    def lines(self) -> list[dict[str, Any]]:
        """The log, which has nothing but JSON once the server runs."""
        return [json.loads(line) for line in self.server.said().splitlines() if line.startswith("{")]

    def line(self, request_id: str) -> dict[str, Any]:
        eventually(lambda: any(line.get("request_id") == request_id for line in self.lines()))
        return next(line for line in self.lines() if line.get("request_id") == request_id)

    def audited(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.store / "audit.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, collector: tuple[Collector, str]) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("process")
    model, store = world.make_model(folder / "tiny"), folder / "store"
    admin = keys(store, "add", "--scope", "admin")["key"]
    tenant = keys(store, "add", "--personas", "npc-*")["key"]
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector[1], "OTEL_BSP_SCHEDULE_DELAY": "100"}
    options = ("--model", str(model), "--store", str(store), "--log-format", "json", "--host", "0.0.0.0")
    with serve(*options, env=env) as server:
        yield Run(server, store, admin, tenant, collector[0])


def test_the_log_has_one_line_a_request_and_no_content(run: Run) -> None:
    usage = run.chat(run.tenant).json()["usage"]
    line = run.line("chat-1")
    assert line["route"] == "/v1/chat/completions"
    assert (line["status"], line["code"], line["persona"], line["generation"]) == (200, None, None, None)
    assert line["key"] == run.tenant.split("-")[1]
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["completion_tokens"] == usage["completion_tokens"]
    assert 0 < line["first_token_seconds"] <= line["seconds"]
    assert sum(one.get("request_id") == "chat-1" for one in run.lines()) == 1
    assert not [one for one in run.lines() if one.get("route") == "/readyz"]  # probes do not fill the log


def test_a_refusal_says_its_code(run: Run) -> None:
    run.ask(run.tenant, "DELETE", "/v1/personas/npc-bob", headers={"x-request-id": "refused-1"})
    line = run.line("refused-1")
    assert (line["status"], line["code"], line["key"]) == (403, "scope_missing", run.tenant.split("-")[1])


def test_a_trace_has_a_span_a_request(run: Run) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"x-request-id": "traced-1", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": CONTENT}], "max_tokens": 3, "stream": True}
    run.ask(run.tenant, "POST", "/v1/chat/completions", json=body, headers=headers)
    eventually(lambda: bool(run.collector.find("traced-1")))
    span = run.collector.find("traced-1")
    assert span["name"] == "POST /v1/chat/completions"
    assert span["trace"] == trace  # it goes on with the caller's
    assert span["masquerade.key"] == run.tenant.split("-")[1]
    assert span["masquerade.first_token_seconds"] > 0
    assert span["masquerade.completion_tokens"] == run.line("traced-1")["completion_tokens"]


def test_what_is_done_and_what_is_tried_is_audited(run: Run) -> None:
    run.ask(run.admin, "PUT", "/v1/personas/ghost/pin", headers={"x-request-id": "audit-1"})
    run.ask(run.tenant, "DELETE", "/v1/personas/npc-bob", headers={"x-request-id": "audit-2"})
    run.ask(run.admin, "GET", "/v1/personas/ghost/content", headers={"x-request-id": "audit-3"})
    file = {"file": ("notes.jsonl", json.dumps({"text": CONTENT}).encode())}
    sent = run.ask(run.admin, "POST", "/v1/files", data={"purpose": "fine-tune"}, files=file)
    run.ask(run.admin, "GET", "/v1/files", headers={"x-request-id": "audit-4"})
    eventually(lambda: any(line["action"] == "upload" for line in run.audited()))
    found = {line["request_id"]: line for line in run.audited()}
    admin, tenant = run.admin.split("-")[1], run.tenant.split("-")[1]
    told = {name: (found[name]["key"], found[name]["action"], found[name]["target"], found[name]["outcome"])
            for name in ("audit-1", "audit-2", "audit-3")}  # fmt: skip
    assert told == {
        "audit-1": (admin, "pin", "ghost", "persona_not_found"),
        "audit-2": (tenant, "delete_persona", "npc-bob", "scope_missing"),
        "audit-3": (admin, "export", "ghost", "persona_not_found"),
    }
    assert "audit-4" not in found  # looking changes nothing
    (upload,) = [line for line in run.audited() if line["action"] == "upload"]
    assert (upload["target"], upload["outcome"]) == (sent.json()["id"], "done")
    assert set(upload) == {"time", "request_id", "key", "action", "target", "outcome"}


def test_a_key_is_revoked_by_another_process_while_the_server_runs(run: Run) -> None:
    made = keys(run.store, "add")
    assert run.chat(made["key"]).status_code == 200  # a key that is made is known, too
    keys(run.store, "revoke", made["id"])
    time.sleep(1)  # it is noticed within a second
    refused = run.chat(made["key"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert run.chat(run.tenant).status_code == 200


def test_secrets_and_content_are_nowhere(run: Run) -> None:
    run.chat(run.admin, persona="npc-nobody")
    run.ask(run.admin + "0", "GET", "/v1/models")
    run.ask(None, "GET", "/v1/models", headers={"Authorization": f"Basic {run.admin}"})
    run.ask(run.admin, "GET", f"/v1/models/{'x' * 40}", params={"q": CONTENT})
    eventually(lambda: any(line.get("status") == 401 for line in run.lines()))
    written = [run.server.said().encode(), (run.store / "audit.jsonl").read_bytes(), *run.collector.bodies]
    written.append(run.ask(run.admin, "GET", "/metrics").content)
    written += [path.read_bytes() for path in run.store.glob("keys.sqlite*")]
    for told in (run.admin, run.tenant):
        assert not any(told.rpartition("-")[2].encode() in one for one in written)
    assert not any(CONTENT.encode() in one for one in written[:3])


def test_without_keys_only_loopback_is_served(tmp_path: Path) -> None:
    assert "masquerade keys add" in fail(2, "serve", "--store", tmp_path / "a", "--host", "0.0.0.0", "--port", "0")
    with pytest.raises(ServerDied, match="exit status 2"), serve("--store", str(tmp_path / "b"), "--host", "0.0.0.0"):
        pass


def test_without_keys_others_are_served_if_that_is_insisted_on(tmp_path: Path) -> None:
    model = world.make_model(tmp_path / "tiny")
    options = ("--model", str(model), "--store", str(tmp_path / "c"), "--host", "0.0.0.0", "--insecure-no-auth")
    with serve(*options) as server:
        answer = httpx.get(server.base_url + "/v1/models", headers={"Host": "gate.example"})
        assert answer.status_code == 200  # by whatever name the one in front calls it
