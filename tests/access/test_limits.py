"""Limits for all clients: other origins, and requests that are too large, too slow or too many. One form of error."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from masquerade.http import limits
from masquerade.http.limits import Policy, Protocol
from masquerade.service.serving import Serving
from tests.contract.here import forbid_ends, serve_here, slow_down
from tests.keys.making import bearer, make_key

POLICY = Policy(
    body_bytes=20_000, header_bytes=2000, headers=30, body_seconds=1.0, cors_origins=("https://friend.example",)
)


@pytest.fixture(scope="module")
def here(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, httpx.Client]]:
    """A server without keys."""
    with serve_here(tiny_folder, tmp_path_factory.mktemp("limits") / "store", policy=POLICY) as both:
        yield both


@pytest.fixture
def serving(here: tuple[Serving, httpx.Client]) -> Serving:
    return here[0]


@pytest.fixture
def http(here: tuple[Serving, httpx.Client]) -> httpx.Client:
    return here[1]


def chat(serving: Serving, **fields: Any) -> dict[str, Any]:
    return {"model": serving.base.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2} | fields


def check(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil", "1.2.3.4", "[", ""]
)
def test_a_page_whose_name_is_bound_to_loopback_gets_nothing(http: httpx.Client, serving: Serving, host: str) -> None:
    check(http.get("/v1/models", headers={"Host": host}), 403, "origin_forbidden")
    check(http.post("/v1/chat/completions", headers={"Host": host}, json=chat(serving)), 403, "origin_forbidden")


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:1234", "127.0.0.1:8000", "[::1]:8000", "127.1.2.3", "ui.localhost"]
)
def test_names_of_loopback_are_fine(http: httpx.Client, host: str) -> None:
    assert http.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:1", "null", "http://["])
def test_pages_from_elsewhere_get_nothing(http: httpx.Client, serving: Serving, origin: str) -> None:
    headers = {"Origin": origin}
    check(http.get("/v1/models", headers=headers), 403, "origin_forbidden")
    check(http.get("/metrics", headers=headers), 403, "origin_forbidden")
    check(http.delete("/v1/personas/p", headers=headers), 403, "origin_forbidden")
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json"):
        body = json.dumps(chat(serving)).encode()
        answer = http.post("/v1/chat/completions", headers=headers | {"Content-Type": kind}, content=body)
        check(answer, 403, "origin_forbidden")


def test_the_servers_own_page_may(http: httpx.Client, serving: Serving) -> None:
    origin = str(http.base_url).rstrip("/")
    assert http.post("/v1/chat/completions", headers={"Origin": origin}, json=chat(serving)).status_code == 200


def test_a_form_that_says_it_is_text_is_no_json(http: httpx.Client, serving: Serving) -> None:
    """As browsers too old for `Origin` would send it."""
    body = json.dumps(chat(serving)).encode()
    check(http.post("/v1/chat/completions", headers={"Content-Type": "text/plain"}, content=body), 400, "invalid_value")


def test_cors_is_for_those_who_were_named(http: httpx.Client, serving: Serving) -> None:
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    friend, foe = {"Origin": "https://friend.example"}, {"Origin": "https://foe.example"}
    allowed = http.options("/v1/chat/completions", headers=friend | asking)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://friend.example"
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    check(http.options("/v1/chat/completions", headers=foe | asking), 403, "origin_forbidden")
    answer = http.post("/v1/chat/completions", headers=friend, json=chat(serving))
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert http.post("/v1/chat/completions", headers=friend, json={}).headers["access-control-allow-origin"]
    assert "access-control-allow-origin" not in http.get("/v1/models", headers=foe).headers
    large = http.post("/v1/chat/completions", headers=friend, json=chat(serving, user="x" * POLICY.body_bytes))
    check(large, 413, "body_too_large")  # a page can read that, too
    assert large.headers["access-control-allow-origin"] == "https://friend.example"


def test_a_page_can_read_that_the_server_failed(
    http: httpx.Client, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(serving.registry), "describe", lambda *_: 1 / 0)
    failed = http.get("/v1/personas/p", headers={"Origin": "https://friend.example"})
    check(failed, 500, "internal_error")
    assert failed.headers["access-control-allow-origin"] == "https://friend.example"


def test_without_names_nobody_hears_of_cors(tiny_folder: Path, tmp_path: Path) -> None:
    with serve_here(tiny_folder, tmp_path / "store") as (_, http):
        answer = http.get("/v1/models", headers={"Origin": str(http.base_url).rstrip("/")})
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]
        asking = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        check(http.options("/v1/chat/completions", headers=asking), 403, "origin_forbidden")


def test_a_body_that_is_declared_too_large(http: httpx.Client, serving: Serving) -> None:
    answer = http.post("/v1/chat/completions", json=chat(serving, user="x" * POLICY.body_bytes))
    check(answer, 413, "body_too_large")
    assert str(POLICY.body_bytes) in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_a_body_that_turns_out_too_large(http: httpx.Client, kind: str) -> None:
    pieces = (b" " * 1000 for _ in range(POLICY.body_bytes // 1000 + 2))
    answer = http.post("/v1/chat/completions", headers={"Content-Type": kind}, content=pieces)
    check(answer, 413, "body_too_large")


def test_who_is_still_sending_hears_that_it_is_too_much(http: httpx.Client) -> None:
    """Many clients read nothing before they have sent everything; a connection that is closed on them loses it."""
    size, piece = 2**23, b"x" * 2**16
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"
    with socket.create_connection((http.base_url.host, http.base_url.port or 80), timeout=30) as line:
        line.sendall(head.encode())
        for _ in range(size // len(piece)):
            line.sendall(piece)
            time.sleep(0.001)  # the answer has long been sent
        heard = b""
        while more := line.recv(2**16):
            heard += more
    assert heard.startswith(b"HTTP/1.1 413 ")
    assert heard.endswith(b"}}")


def test_a_body_just_within_the_limit(http: httpx.Client, serving: Serving) -> None:
    body = json.dumps(chat(serving)).encode().ljust(POLICY.body_bytes)
    for content in (body, iter([body[:7000], body[7000:]])):
        answer = http.post("/v1/chat/completions", headers={"Content-Type": "application/json"}, content=content)
        assert answer.status_code == 200, answer.text


def test_files_have_limits_of_their_own(http: httpx.Client) -> None:
    lines = b'{"text": "good day"}\n' * 2000
    files = {"file": ("f.jsonl", lines)}
    assert http.post("/v1/files", data={"purpose": "fine-tune"}, files=files).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/personas"), ("POST", "/v1/personas"), ("POST", "/v1/files"), ("PUT", "/v1/personas/p/content")],
)
def test_json_has_the_same_limit_where_files_go(http: httpx.Client, method: str, path: str) -> None:
    """It is read in whole, into memory."""
    body = b'"' + b"a" * POLICY.body_bytes + b'"'
    answer = http.request(method, path, content=body, headers={"Content-Type": "application/json"})
    check(answer, 413, "body_too_large")


def test_the_name_of_a_forms_type_may_have_capitals(http: httpx.Client) -> None:
    request = http.build_request("POST", "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("f", b"{}\n")})
    request.headers["Content-Type"] = request.headers["Content-Type"].replace("multipart/f", "Multipart/F")
    assert http.send(request).status_code == 200


def test_too_many_headers_and_too_long_ones(http: httpx.Client) -> None:
    check(http.get("/v1/models", headers={"x-long": "x" * POLICY.header_bytes}), 431, "headers_too_large")
    many = {f"x-{number}": "1" for number in range(POLICY.headers + 1)}
    check(http.get("/healthz", headers=many), 431, "headers_too_large")


def talk(http: httpx.Client, *pieces: bytes) -> tuple[int, dict[str, Any]]:
    """What is said to bytes on a socket, until the server hangs up or has answered in full. Always with an id."""
    with socket.create_connection((http.base_url.host, http.base_url.port or 80), timeout=60) as wire:
        for piece in pieces:
            wire.sendall(piece)
        heard = b""
        while b"\r\n\r\n" not in heard or not heard.rstrip().endswith(b"}"):
            more = wire.recv(65536)
            if not more:
                break
            heard += more
    head, _, body = heard.partition(b"\r\n\r\n")
    assert b"\r\nx-request-id: " in head.lower()
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    "bytes_", [b"\x16\x03\x01 hello\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 100_000]
)
def test_what_is_no_http_is_told_so_in_the_same_form(http: httpx.Client, bytes_: bytes) -> None:
    status, told = talk(http, bytes_)
    assert (status, told["error"]["type"]) == (400, "invalid_request_error")


def test_a_body_that_stops_arriving(http: httpx.Client) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    status, told = talk(http, head + b"Content-Length: 1000\r\n\r\n", b'{"model"')
    assert (status, told["error"]["code"]) == (408, "request_timeout")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/files", "/v1/personas/p/content", "/v1/personas"])
def test_a_body_that_arrives_drop_by_drop(tiny_folder: Path, tmp_path: Path, path: str) -> None:
    """Never silent for long enough to be refused for that, and never done: a file too holds no connection for ever."""
    method = "PUT" if path.endswith("content") else "POST"
    kind = "application/json" if "chat" in path else "multipart/form-data; boundary=x"
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 100000\r\n\r\n"
    with serve_here(tiny_folder, tmp_path / "store", policy=Policy(body_seconds=0.3)) as (_, http):
        address = http.base_url.host, http.base_url.port or 80
        with socket.create_connection(address, timeout=60) as wire:
            wire.sendall(head.encode())
            wire.settimeout(0.05)
            started, heard = time.monotonic(), b""
            drops = itertools.chain(b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n', itertools.repeat(32))
            while not heard:
                assert time.monotonic() - started < 60
                wire.sendall(bytes([next(drops)]))
                try:
                    heard = wire.recv(65536)
                except TimeoutError:
                    continue
    assert heard.startswith(b"HTTP/1.1 408 ")


def test_a_large_file_has_the_time_that_its_size_needs(tiny_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Slower than every other body may be, and fast enough for a file."""
    monkeypatch.setattr(limits, "_WHOLE_BODY", 0.05)
    policy = Policy(body_seconds=20.0, upload_rate=1.0)
    with serve_here(tiny_folder, tmp_path / "store", policy=policy) as (_, http):
        line = b'{"text": "good day"}\n'
        head = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        head += b'--x\r\nContent-Disposition: form-data; name="file"; filename="f.jsonl"\r\n\r\n'

        def pieces() -> Iterator[bytes]:
            yield head
            for _ in range(60):
                time.sleep(0.03)
                yield line
            yield b"\r\n--x--\r\n"

        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = http.post("/v1/files", headers=headers, content=pieces())
        assert answer.status_code == 200, answer.text
        assert answer.json()["bytes"] == 60 * len(line)


def test_who_sent_half_a_body_is_hung_up_on(http: httpx.Client) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((http.base_url.host, http.base_url.port or 80), timeout=60) as wire:
        wire.sendall(head + b"Content-Length: 1000\r\n\r\n{")
        while wire.recv(65536):
            pass


@pytest.mark.parametrize(
    "pieces", [(), (b"GET /healthz HTTP/1.1\r\nHost: a\r\n",), (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", b"GET")]
)
def test_a_head_that_stops_arriving(http: httpx.Client, pieces: tuple[bytes, ...], monkeypatch: Any) -> None:
    """Also after an earlier request on the same connection; until then an unfinished request keeps the connection."""
    monkeypatch.setattr(Protocol, "head_seconds", 0.5)
    with socket.create_connection((http.base_url.host, http.base_url.port or 80), timeout=60) as wire:
        for piece in pieces:
            wire.sendall(piece)
            time.sleep(0.1)
        heard = b""
        while more := wire.recv(65536):
            heard += more
    answers = heard.split(b"HTTP/1.1 ")[1:]
    assert answers[-1].startswith(b"408 ")
    assert json.loads(answers[-1].partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    assert len(answers) == max(1, len(pieces))


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long(tiny_folder: Path, tmp_path: Path, stream: bool, monkeypatch: Any) -> None:
    """The model is slow and the limit is short: the end does not depend on the machine."""
    with serve_here(tiny_folder, tmp_path / "store", policy=Policy(answer_seconds=0.3)) as (serving, http):
        slow_down(monkeypatch)
        body = chat(serving, max_tokens=200, stream=stream, logit_bias=forbid_ends(serving))
        answer = http.post("/v1/chat/completions", json=body)
        if stream:
            assert answer.status_code == 200
            events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
            assert json.loads(events[-1])["error"]["code"] == "answer_timeout"
        else:
            check(answer, 504, "answer_timeout")
            assert answer.headers["x-should-retry"] == "false"
        deadline = time.monotonic() + 60
        while serving.engine.occupancy.running:  # it is not computed for nobody
            assert time.monotonic() < deadline
            time.sleep(0.01)


class Clock:
    """Stands still until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_limits_of_a_key_are_told_and_kept(tiny_folder: Path, tmp_path: Path) -> None:
    clock = Clock()
    token, _ = make_key(tmp_path / "store", "chat", rpm=3, tpm=100)
    with serve_here(tiny_folder, tmp_path / "store", clock=clock) as (serving, http):
        http.headers.update(bearer(token))
        first = http.post("/v1/chat/completions", json=chat(serving))
        assert first.headers["x-ratelimit-limit-requests"] == "3"
        assert first.headers["x-ratelimit-remaining-requests"] == "2"
        assert first.headers["x-ratelimit-reset-requests"] == "20.000s"
        used = first.json()["usage"]["total_tokens"]
        second = http.get("/v1/models")
        assert second.headers["x-ratelimit-remaining-tokens"] == str(100 - used)
        assert http.get("/healthz").status_code == 200  # is nobody's
        assert "x-ratelimit-limit-requests" not in http.get("/healthz").headers
        http.get("/v1/models")
        refused = http.get("/v1/models")
        check(refused, 429, "rate_limited")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "20"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        clock.now += 20
        assert http.get("/v1/models").status_code == 200


def test_a_stream_that_nobody_reads_to_its_end_is_charged(tiny_folder: Path, tmp_path: Path) -> None:
    token, _ = make_key(tmp_path / "store", "chat", tpm=1000)
    with serve_here(tiny_folder, tmp_path / "store", clock=Clock()) as (serving, http):
        http.headers.update(bearer(token))
        with http.stream("POST", "/v1/chat/completions", json=chat(serving, max_tokens=200, stream=True)) as answer:
            next(answer.iter_lines())
        deadline = time.monotonic() + 60
        while http.get("/v1/models").headers["x-ratelimit-remaining-tokens"] == "1000":
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_many_at_once_get_no_more_than_the_limit(tiny_folder: Path, tmp_path: Path) -> None:
    token, _ = make_key(tmp_path / "store", "chat", rpm=10)
    told: list[int] = []
    with serve_here(tiny_folder, tmp_path / "store", clock=Clock()) as (_, http):

        def ask() -> None:
            told.extend(http.get("/v1/models", headers=bearer(token)).status_code for _ in range(5))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(told) == [200] * 10 + [429] * 20


COUNT = "/v1/messages/count_tokens"


@pytest.mark.parametrize(
    ("path", "fields", "tokens"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 300}]}, 300),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 13_000}]}, 13_000 // 13),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1000}, 2),
        ("/v1/completions", {"prompt": "x" * 13_000}, 13_000 // 13),
        ("/v1/completions", {"prompt": [7] * 5_000}, 4 * 256),
        ("/tokenize", {"prompt": "x" * 700}, 700),
        (COUNT, {"messages": [{"role": "user", "content": "x" * 700}]}, 700),
    ],
    ids=[
        "a little",
        "by its bytes",
        "with its answer",
        "a prompt",
        "token ids",
        "only counted",
        "a chat's count",
    ],
)
def test_what_was_tried_is_charged(
    tiny_folder: Path, tmp_path: Path, path: str, fields: dict[str, Any], tokens: int
) -> None:
    """A token of the model's is 13 bytes at most, so many that a prompt has is certain."""
    token, _ = make_key(tmp_path / "store", "chat", tpm=100_000)
    with serve_here(tiny_folder, tmp_path / "store", clock=Clock()) as (serving, http):
        http.headers.update(bearer(token))
        answer = http.post(path, json={"model": serving.base.name} | fields)
        assert answer.status_code == (200 if path in ("/tokenize", COUNT) else 400)
        left = int(http.get("/v1/models").headers["x-ratelimit-remaining-tokens"])
        assert tokens <= 100_000 - left < tokens + 20


def test_who_tried_too_much_waits(tiny_folder: Path, tmp_path: Path) -> None:
    token, _ = make_key(tmp_path / "store", "chat", tpm=600)
    clock = Clock()
    with serve_here(tiny_folder, tmp_path / "store", clock=clock) as (serving, http):
        http.headers.update(bearer(token))
        said = [{"role": "user", "content": "x" * 15_000}]
        check(http.post("/v1/chat/completions", json=chat(serving, messages=said)), 400, "context_length_exceeded")
        check(http.post("/v1/chat/completions", json=chat(serving)), 429, "rate_limited")
        clock.now += 60
        assert http.post("/v1/chat/completions", json=chat(serving)).status_code == 200
