"""`/v1/files` over HTTP: pages, and every way in which an upload goes wrong."""

from __future__ import annotations

import errno
import gzip
import logging
import resource
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from maskstore.sqlite import SQLiteFile
from masquerade.jobs.uploads import Uploads
from masquerade.service.serving import Serving

FORM = {"purpose": "fine-tune"}


def send(http: httpx.Client, content: bytes = b'{"text": "a"}', name: str = "a.jsonl", **more: Any) -> httpx.Response:
    return http.post("/v1/files", data=FORM, files={"file": (name, content)}, **more)


def kept(serving: Serving) -> list[str]:
    return sorted(path.name for path in (serving.store.root / "jobs" / "files").iterdir())


def refuse(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"], error["param"]


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """A disk that is full, for this process: no file may become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_pages_of_files_add_up_in_both_orders(http: httpx.Client) -> None:
    ids = [send(http, str(number).encode()).json()["id"] for number in range(5)]
    for order, expected in (("asc", ids), ("desc", ids[::-1])):
        seen: list[str] = []
        more, after = True, {}
        while more:
            page = http.get("/v1/files", params={"limit": 2, "order": order} | after).json()
            seen += [file["id"] for file in page["data"]]
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
            more, after = page["has_more"], {"after": page["last_id"]}
        assert seen == expected
    assert http.get("/v1/files", params={"purpose": "fine-tune-results"}).json()["data"] == []


def test_a_page_or_a_file_that_is_none_is_refused(http: httpx.Client) -> None:
    for query, status, code, param in (
        ("limit=0", 400, "invalid_value", "limit"),
        ("limit=10001", 400, "invalid_value", "limit"),
        ("order=up", 400, "invalid_value", "order"),
        ("after=file-none", 404, "file_not_found", "after"),
    ):
        found = refuse(http.get(f"/v1/files?{query}"))
        assert found[:2] == (status, code)
        assert param in str(found[2])
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert refuse(http.request(method, f"/v1/files/file-none{path}"))[:2] == (404, "file_not_found")


def test_a_file_that_should_expire_or_is_there_twice_is_refused(http: httpx.Client, serving: Serving) -> None:
    anchor = {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    refused = http.post("/v1/files", data=anchor, files={"file": ("a", b"x")})
    assert refuse(refused) == (400, "unsupported_parameter", "expires_after")
    twice = [("file", ("a", b"x")), ("file", ("b", b"y"))]
    refused = http.post("/v1/files", data={"purpose": "fine-tune"}, files=twice)
    assert refuse(refused) == (400, "invalid_value", "file")
    for path in ("/v1/files", "/v1/personas"):
        refused = http.post(path, data={"purpose": "fine-tune", "name": "p"})
        assert refuse(refused) == (400, "invalid_value", "file")
        assert "multipart/form-data" in refused.json()["error"]["message"]
    assert kept(serving) == []


def test_parts_of_a_file_and_ranges_that_are_none(http: httpx.Client) -> None:
    path = f"/v1/files/{send(http, b'0123456789').json()['id']}/content"
    part = http.get(path, headers={"Range": "bytes=2-4"})
    assert (part.status_code, part.content) == (206, b"234")
    for where in (path, "/", "/web/main.js"):
        assert refuse(http.get(where, headers={"Range": "bytes=x"})) == (400, "invalid_value", "Range")
        beyond = http.get(where, headers={"Range": "bytes=99999999-"})
        assert refuse(beyond) == (416, "range_not_satisfiable", "Range")
        assert beyond.headers["content-range"].startswith("bytes */")
    assert http.get(path).content == b"0123456789"


def test_names_are_shown_and_never_believed(http: httpx.Client, serving: Serving) -> None:
    for name in ("../../etc/passwd", "a" * 1000, "ü\u202e.jsonl", "\x00"):
        file = send(http, name.encode() + b"!", name).json()
        assert len(file["filename"]) <= 255
        assert file["id"] in kept(serving)
    assert len(kept(serving)) == 4


def test_a_body_in_another_coding_is_refused_unread(http: httpx.Client, serving: Serving) -> None:
    """A few kilobytes that would unpack to a gigabyte are never unpacked."""
    bomb = gzip.compress(bytes(2**24))
    headers = {"Content-Encoding": "gzip", "Content-Type": "multipart/form-data; boundary=x"}
    for path in ("/v1/files", "/v1/personas"):
        answer = http.post(path, content=bomb, headers=headers)
        assert refuse(answer) == (400, "unsupported_parameter", "Content-Encoding")
    answer = http.post("/v1/fine_tuning/jobs", content=bomb, headers={"Content-Encoding": "gzip"})
    assert refuse(answer)[:2] == (400, "invalid_value")
    assert kept(serving) == []


def test_a_form_that_is_none_is_refused(http: httpx.Client) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    for body in (
        b"",
        b"--x\r\n",
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--x--\r\n',
        b"--x\r\nContent-Disposition: form-data\r\n\r\nfine-tune\r\n--x--\r\n",
        b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nno file\r\n--x--\r\n',
        b"no multipart at all",
    ):
        assert refuse(http.post("/v1/files", content=body, headers=headers))[0] == 400


def test_an_upload_that_breaks_off_leaves_nothing(
    http: httpx.Client, serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"a" * 2**21
    with caplog.at_level(logging.ERROR):
        for length in (b"Content-Length: 9999999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n200000\r\n"):
            with socket.create_connection((http.base_url.host, http.base_url.port)) as broken:
                broken.sendall(head + length + part)
        assert send(http).status_code == 200
        time.sleep(0.2)
    assert len(kept(serving)) == 1
    assert caplog.records == []


def test_a_full_disk_is_said_and_nothing_is_left(http: httpx.Client, serving: Serving) -> None:
    before = kept(serving)
    for size in (600_000, 3_000_000):  # held in memory while it arrives, and not
        with no_room_beyond(400_000):
            answer = send(http, bytes(size))
        assert refuse(answer) == (507, "storage_full", None)
        assert answer.json()["error"]["type"] == "server_error"
        assert answer.headers["x-should-retry"] == "false"
        assert str(serving.store.root) not in answer.text
        assert kept(serving) == before
    assert send(http, bytes(600_000)).status_code == 200


def test_tables_that_somebody_holds_are_a_503(http: httpx.Client, serving: Serving, monkeypatch: Any) -> None:
    def connect(file: SQLiteFile) -> sqlite3.Connection:
        return sqlite3.connect(file.path, timeout=0.1, isolation_level=None)

    monkeypatch.setattr(SQLiteFile, "connect", connect)
    with closing(sqlite3.connect(serving.store.root / "jobs" / "jobs.sqlite", isolation_level=None)) as other:
        other.execute("begin exclusive")
        answer = send(http, b"{}")
        other.execute("rollback")
    assert refuse(answer)[:2] == (503, "not_ready")
    assert int(answer.headers["Retry-After"]) >= 1
    assert send(http, b"{}").status_code == 200


@pytest.mark.parametrize(
    "fault", [OSError(errno.EROFS, "read-only"), OSError(errno.EIO, "broken"), sqlite3.OperationalError("readonly")]
)
def test_a_disk_that_refuses_is_said(http: httpx.Client, monkeypatch: Any, fault: Exception) -> None:
    def refuse_it(*_: Any, **__: Any) -> None:
        if isinstance(fault, sqlite3.Error):
            fault.sqlite_errorcode = sqlite3.SQLITE_READONLY_DBMOVED
        raise fault

    monkeypatch.setattr(Uploads, "receive", refuse_it)
    assert refuse(send(http, b"{}"))[:2] == (500, "unusable_store")


def test_a_mask_that_finds_no_room_is_said_and_changes_nothing(http: httpx.Client, serving: Serving) -> None:
    with no_room_beyond(2**13):
        answer = http.put("/v1/personas/p/content", content=bytes(2**14))
    assert refuse(answer)[:2] == (507, "storage_full")
    assert not list(Path(serving.store.root / "quarantine").iterdir())
