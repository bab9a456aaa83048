"""Stored responses: whose they are, for how long, and how many."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from masquerade.errors import ResponseNotFound
from masquerade.jobs import JobService, Quotas, ResponseTable, StoredResponse
from tests.databases import Place

DAY = 86_400.0


def make(place: Place, **quotas: Any) -> ResponseTable:
    return ResponseTable(place.responses(), Quotas(**quotas))


def response(name: str, size: int = 0) -> StoredResponse:
    return StoredResponse({"id": name, "text": "x" * size, "word": "Köln"}, [{"type": "message", "id": "msg_1"}])


def has(table: ResponseTable, name: str, owner: str = "a") -> bool:
    try:
        return table.get(name, owner).body["id"] == name
    except ResponseNotFound:
        return False


def test_what_was_stored_comes_back(place: Place) -> None:
    make(place).add("a", response("resp_1"))
    assert make(place).get("resp_1", "a") == response("resp_1")


def test_only_its_owner_has_it(place: Place) -> None:
    table = make(place)
    table.add("a", response("resp_1"))
    assert not has(table, "resp_1", "b")
    with pytest.raises(ResponseNotFound):
        table.remove("resp_1", "b")
    table.remove("resp_1", "a")
    assert not has(table, "resp_1")
    with pytest.raises(ResponseNotFound):
        table.remove("resp_1", "a")


def test_the_oldest_go_first_beyond_the_number(place: Place) -> None:
    table = make(place, responses=3)
    table.add("b", response("resp_b"))
    for number in range(5):
        table.add("a", response(f"resp_{number}"))
    assert [has(table, f"resp_{number}") for number in range(5)] == [False, False, True, True, True]
    assert has(table, "resp_b", "b")


def test_the_oldest_go_first_beyond_the_bytes(place: Place) -> None:
    table = make(place, response_bytes=1000)
    for number, size in enumerate((300, 300, 300, 700)):
        table.add("a", response(f"resp_{number}", size))
    assert [has(table, f"resp_{number}") for number in range(4)] == [False, False, False, True]
    table.add("a", response("resp_4", 2000))  # more than all may have together
    assert not any(has(table, f"resp_{number}") for number in range(5))


@pytest.mark.parametrize("deletes", [True, False], ids=["expired", "before that"])
def test_it_is_gone_after_its_days(place: Place, monkeypatch: pytest.MonkeyPatch, deletes: bool) -> None:
    table, now = make(place, response_days=2), time.time()
    table.add("a", response("resp_1"))
    monkeypatch.setattr(time, "time", lambda: now + 1.9 * DAY)
    table.add("a", response("resp_2"))
    assert has(table, "resp_1")
    monkeypatch.setattr(time, "time", lambda: now + 2.1 * DAY)
    if deletes:
        table.expire(time.time())
        assert [row.id for row in place.execute("select id from response")] == ["resp_2"]
    assert not has(table, "resp_1")
    assert has(table, "resp_2")


def test_the_service_deletes_what_has_expired(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_service() -> JobService:
        nothing: Callable[..., Any] = lambda *_: iter(())  # noqa: E731 - there are no jobs
        return JobService(place.folder, nothing, nothing, Quotas(response_days=1), database=place.connect())

    service, now = open_service(), time.time()
    service.responses.add("a", response("resp_1"))
    service.close()
    monkeypatch.setattr(time, "time", lambda: now + 2 * DAY)
    open_service().close()
    assert place.execute("select id from response") == []
