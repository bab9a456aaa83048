"""Jobs survive what happens to servers: crashes, cancels, races for the queue, full quotas. Real sqlite, real files."""

from __future__ import annotations

import errno
import io
import itertools
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from masquerade.database.migrations import JOBS
from masquerade.database.postgresql import PostgreSQL
from masquerade.database.url import DatabaseURL
from masquerade.errors import (
    BuildFailed,
    InvalidValue,
    JobNotFound,
    MaskRefused,
    NotReady,
    QuotaExceeded,
    StateConflict,
    TooLarge,
    UploadNotFound,
)
from masquerade.jobs import (
    TRANSITIONS,
    Cancelled,
    Job,
    JobService,
    JobTable,
    Quotas,
    Repeat,
    Uploads,
    open_group,
)
from masquerade.jobs import uploads as uploads_module
from masquerade.jobs.records import LEASE_SECONDS
from masquerade.jobs.runner import Work
from masquerade.pruning import Progress
from tests.databases import Place

SPEC: dict[str, Any] = {"files": {}}  # what every job has; the rest is its work's own business


def upload(uploads: Uploads, owner: str, content: bytes, name: str = "a.jsonl") -> Any:
    return uploads.receive(owner, "fine-tune", name, io.BytesIO(content))


@pytest.fixture
def table(place: Place) -> JobTable:
    return JobTable(place.jobs(), Quotas(files=3, file_bytes=100, open_jobs=3))


@pytest.fixture
def uploads(tmp_path: Path, table: JobTable) -> Uploads:
    return Uploads(tmp_path / "files", table, limit=60)


@pytest.fixture
def open_desk(tmp_path: Path, place: Place) -> Iterator[Callable[..., JobService]]:
    """Desks over one folder; the last one open is closed at the end."""
    desks: list[JobService] = []

    def open_(work: Callable[[Job], Work]) -> JobService:
        database = place.connect()
        desk = JobService(tmp_path / "desk", lambda _, job: work(job), lambda item: item(), Quotas(), database=database)
        desks.append(desk)
        return desks[-1]

    yield open_
    for job_service in desks:
        job_service.close()


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def test_a_file_is_whole_and_lies_under_an_id_of_ours(uploads: Uploads, table: JobTable, tmp_path: Path) -> None:
    file = upload(uploads, "ann", b"abcdef", name="../../etc/passwd")
    assert uploads.path(file.id).read_bytes() == b"abcdef"
    assert (file.bytes, file.name) == (6, "../../etc/passwd")
    assert uploads.path(file.id).parent == tmp_path / "files"
    assert table.list_files("ann") == [file]


def test_a_file_that_is_sent_again_is_the_same_file(uploads: Uploads, table: JobTable, tmp_path: Path) -> None:
    first, again, other = (upload(uploads, "ann", content) for content in (b"abc", b"abc", b"abd"))
    assert again == replace(first, created_at=again.created_at)
    assert again.created_at > first.created_at  # and as new as another one would be
    assert first.id != other.id
    assert {path.name for path in (tmp_path / "files").iterdir()} == {first.id, other.id}


def test_a_file_that_is_too_large_or_finds_no_room_leaves_nothing(
    uploads: Uploads, table: JobTable, tmp_path: Path
) -> None:
    with pytest.raises(TooLarge, match="larger than 60 bytes"):
        upload(uploads, "ann", b"x" * 80)

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().read(2)

    with pytest.raises(OSError, match="No space"):
        uploads.receive("ann", "fine-tune", "a", Broken(b"abc"))
    assert list((tmp_path / "files").iterdir()) == []
    assert table.list_files("ann") == []


def test_quotas_say_their_numbers_and_keep_nothing(uploads: Uploads, table: JobTable, tmp_path: Path) -> None:
    upload(uploads, "ann", b"x" * 60)
    with pytest.raises(QuotaExceeded, match="60 bytes of files and 50 more exceed the limit of 100"):
        upload(uploads, "ann", b"x" * 50)
    for content in (b"a", b"b"):
        upload(uploads, "ann", content)
    with pytest.raises(QuotaExceeded, match="3 files already"):
        upload(uploads, "ann", b"c")
    assert len(list((tmp_path / "files").iterdir())) == 3
    upload(uploads, "bob", b"x" * 60)  # somebody else's quota
    for _ in range(3):
        table.add_job("ann", SPEC)
    with pytest.raises(QuotaExceeded, match="3 jobs are unfinished"):
        table.add_job("ann", SPEC)


def test_a_file_that_is_kept_for_now_goes_when_nobody_wants_it(
    uploads: Uploads, table: JobTable, tmp_path: Path
) -> None:
    def keep() -> Any:
        return uploads.receive("ann", "fine-tune", "a.jsonl", io.BytesIO(b"x"), tentative=True)

    first, second = keep(), keep()
    assert first.id == second.id
    assert first.created_at < second.created_at  # what is sent again is as new as what is sent first
    uploads.discard([first])
    assert table.list_files("ann") == [second]  # the other may still want it
    uploads.discard([second])
    assert table.list_files("ann") == list((tmp_path / "files").iterdir()) == []
    for wanted in (lambda: upload(uploads, "ann", b"x"), lambda: uploads.confirm([keep()])):
        file = keep()
        wanted()
        uploads.discard([file])
        assert [one.id for one in table.list_files("ann")] == [file.id]
        uploads.discard([keep()])
        assert [one.id for one in table.list_files("ann")] == [file.id]
        uploads.remove(file.id, "ann")


def test_files_and_jobs_belong_to_their_owner(uploads: Uploads, table: JobTable) -> None:
    file, job = upload(uploads, "ann", b"x"), table.add_job("ann", SPEC)
    with pytest.raises(UploadNotFound):
        table.get_file(file.id, "bob")
    with pytest.raises(UploadNotFound):
        uploads.remove(file.id, "bob")
    with pytest.raises(JobNotFound):
        table.get_job(job.id, "bob")
    assert table.list_files("bob") == []
    assert table.list_jobs("bob") == ([], False)


def test_a_file_that_a_job_needs_stays(uploads: Uploads, table: JobTable) -> None:
    file = upload(uploads, "ann", b"x")
    job = table.add_job("ann", {"files": {"training": file.id}})
    with pytest.raises(StateConflict, match=job.id):
        uploads.remove(file.id, "ann")
    table.finish(job.id, "cancelled")
    uploads.remove(file.id, "ann")
    assert not uploads.path(file.id).exists()


def test_old_files_and_ended_jobs_are_forgotten_but_for_what_is_needed(
    uploads: Uploads, table: JobTable, tmp_path: Path
) -> None:
    idle, needed = upload(uploads, "ann", b"a"), upload(uploads, "ann", b"b")
    ended, waiting = table.add_job("ann", SPEC), table.add_job("ann", {"files": {"training": needed.id}})
    table.finish(ended.id, "cancelled")
    month = table.quotas.days * 86_400
    uploads.expire(time.time() + month - 60)
    assert table.list_files("ann") == [needed, idle]
    uploads.expire(time.time() + month + 60)
    assert table.list_files("ann") == [needed]
    assert [job.id for job in table.list_jobs("ann")[0]] == [waiting.id]
    assert {path.name for path in (tmp_path / "files").iterdir()} == {needed.id}


@pytest.mark.parametrize("state", TRANSITIONS)
@pytest.mark.parametrize("target", ["succeeded", "failed", "cancelled"])
def test_jobs_move_only_along_the_table(table: JobTable, place: Place, state: str, target: str) -> None:
    job = table.add_job("ann", SPEC)
    place.execute("update job set state = :state", {"state": state})
    if target in TRANSITIONS[state]:  # type: ignore[index]
        assert table.finish(job.id, target).state == target  # type: ignore[arg-type]
    else:
        with pytest.raises(StateConflict, match=f"is {state}; it cannot be {target}"):
            table.finish(job.id, target)  # type: ignore[arg-type]
        assert table.get_job(job.id).state == state


def test_the_queue_is_fair_to_owners(table: JobTable) -> None:
    table = JobTable(table.group, Quotas(open_jobs=100))
    for owner in ("ann", "ann", "ann", "bob", "cat", "bob"):
        table.add_job(owner, SPEC)
    order = []
    while job := table.take_next():
        order.append(job.owner)
        table.finish(job.id, "succeeded")
    assert order == ["ann", "bob", "cat", "ann", "bob", "ann"]


def test_a_job_is_taken_once(table: JobTable) -> None:
    table = JobTable(table.group, Quotas(open_jobs=100))
    for _ in range(40):
        table.add_job("ann", SPEC)
    taken: list[str] = []

    def take() -> None:
        while job := table.take_next():
            taken.append(job.id)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 40


def test_pages_of_jobs_add_up(table: JobTable) -> None:
    ids = [table.add_job("ann", SPEC | {"n": n}).id for n in range(3)][::-1]
    first, more = table.list_jobs("ann", limit=2)
    assert ([job.id for job in first], more) == (ids[:2], True)
    rest, more = table.list_jobs("ann", after=ids[1], limit=2)
    assert ([job.id for job in rest], more) == (ids[2:], False)


def test_work_is_done_told_and_remembered(open_desk: Callable[..., JobService]) -> None:
    def work(job: Job) -> Work:
        for done in (1, 2, 3):
            yield Progress("count", done, 3)
        return lambda: {"made": job.spec["name"]}

    job_service = open_desk(work)
    job = job_service.table.add_job("ann", SPEC | {"name": "p"})
    job_service.runner.start()
    wait_for(lambda: job_service.table.get_job(job.id).state == "succeeded")
    assert job_service.table.get_job(job.id).result == {"made": "p"}
    told = [event.message for event in job_service.table.list_events(job.id)]
    assert told == ["queued", "running", "count 1/3", "count 3/3", "succeeded"]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(BuildFailed("too few"), "build_failed", "too few"), (MemoryError(), "build_failed", "MemoryError")],
)
def test_a_job_that_fails_says_why_and_the_next_one_runs(
    open_desk: Callable[..., JobService], error: Exception, code: str, words: str
) -> None:
    def work(job: Job) -> Work:
        yield Progress("try", 1, 1)
        if job.spec["bad"]:
            raise error
        return dict

    job_service = open_desk(work)
    bad, good = (
        job_service.table.add_job("ann", SPEC | {"bad": True}),
        job_service.table.add_job("ann", SPEC | {"bad": False}),
    )
    job_service.runner.start()
    wait_for(lambda: job_service.table.get_job(good.id).state == "succeeded")
    failed = job_service.table.get_job(bad.id)
    assert failed.state == "failed"
    assert failed.error is not None
    assert failed.error["code"] == code
    assert words in failed.error["message"]


def test_a_job_that_cannot_run_now_is_not_tried_without_a_pause(open_desk: Callable[..., JobService]) -> None:
    """Also if another one was submitted while it ran."""
    tries = []

    def work(_: Job) -> Work:
        tries.append(time.monotonic())
        yield Progress("try", 1, 1)
        job_service.runner.wake()
        raise NotReady("no room")

    job_service = open_desk(work)
    job_service.table.add_job("ann", SPEC)
    job_service.runner.start()
    wait_for(lambda: len(tries) > 2)
    assert min(later - earlier for earlier, later in itertools.pairwise(tries)) > 0.3


def test_a_job_goes_on_when_its_table_has_room_again(
    open_desk: Callable[..., JobService], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite had no room for the job's progress."""
    tries = []

    def work(_: Job) -> Work:
        tries.append(time.monotonic())
        yield Progress("try", 1, 1)
        return lambda: {"made": "it"}

    def refuse(*_: object) -> None:
        monkeypatch.undo()
        raise OperationalError("INSERT INTO event", None, sqlite3.OperationalError("database or disk is full"))

    job_service = open_desk(work)
    job = job_service.table.add_job("ann", SPEC)
    monkeypatch.setattr(JobTable, "add_event", refuse)
    job_service.runner.start()
    wait_for(lambda: job_service.table.get_job(job.id).state == "succeeded")
    assert len(tries) == 2


def test_a_job_that_fails_may_have_made_something(open_desk: Callable[..., JobService]) -> None:
    def work(_: Job) -> Work:
        yield Progress("try", 1, 1)
        raise MaskRefused("one of two", result={"made": "the other"})

    job_service = open_desk(work)
    began = time.time()
    job = job_service.table.add_job("ann", SPEC)
    job_service.runner.start()
    wait_for(lambda: job_service.table.get_job(job.id).state == "failed")
    failed = job_service.table.get_job(job.id)
    assert failed.result == {"made": "the other"}
    assert failed.error == {"code": "mask_refused", "message": "one of two", "param": None}
    assert job_service.table.failed_jobs({"mask_refused"}, began) == [failed]
    assert job_service.table.failed_jobs({"mask_refused"}, time.time()) == []
    assert job_service.table.failed_jobs({"build_failed"}, began) == []


def test_cancelling_ends_a_job_within_one_item(open_desk: Callable[..., JobService]) -> None:
    cleaned, begun = threading.Event(), threading.Event()

    def work(job: Job) -> Work:
        try:
            while True:
                begun.set()
                yield Progress("spin", 1, 2)
        finally:
            cleaned.set()

    job_service = open_desk(work)
    running, waiting = job_service.table.add_job("ann", SPEC), job_service.table.add_job("ann", SPEC)
    job_service.runner.start()
    assert begun.wait(20)
    assert job_service.runner.cancel(waiting.id).state == "cancelled"
    assert job_service.runner.cancel(running.id).cancelling
    wait_for(lambda: job_service.table.get_job(running.id).state == "cancelled")
    assert cleaned.is_set()
    with pytest.raises(StateConflict, match="is cancelled"):
        job_service.runner.cancel(running.id)


@pytest.mark.parametrize("first", [False, True], ids=["file first", "database first"])
def test_a_file_of_jobs_has_one_process_at_a_time(tmp_path: Path, shared: Place, first: bool) -> None:
    def open_(database: PostgreSQL | None) -> JobService:
        return JobService(tmp_path / "desk", lambda *_: iter(()), lambda item: item(), database=database)  # type: ignore[arg-type, return-value]

    job_service = open_(shared.connect() if first else None)
    for database in [None] if first else [None, shared.connect()]:
        with pytest.raises(NotReady, match="another server"):
            open_(database)
    if first:
        open_(shared.connect()).close()
    job_service.close()
    open_(None).close()


def _serve_and_hang(folder: Path, url: str | None) -> None:
    def work(job: Job) -> Work:
        yield Progress("spin", 1, 2)
        time.sleep(600)
        return dict

    database = PostgreSQL(DatabaseURL(url)) if url else None
    job_service = JobService(folder, lambda _, job: work(job), lambda item: item(), database=database)
    job_service.uploads.path("file-half.partial").write_bytes(b"half")
    job_service.table.add_job("ann", SPEC | {"name": "p"})
    job_service.runner.start()
    threading.Event().wait()


def test_a_killed_server_loses_nothing_and_leaves_nothing(
    open_desk: Callable[..., JobService], place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = place.url() if place.cluster else None
    process = multiprocessing.get_context("spawn").Process(target=_serve_and_hang, args=(tmp_path / "desk", url))
    process.start()

    def work(job: Job) -> Work:
        yield Progress("count", 1, 1)
        return lambda: {"made": job.spec["name"]}

    if place.cluster is None:  # only one server at a time can have it
        table = JobTable(open_group(tmp_path / "desk" / "jobs.sqlite"))
    else:
        job_service = open_desk(work)
        table = job_service.table
        job_service.runner.start()

    def is_running() -> bool:
        return any(event.message == "spin 1/2" for job in table.open_jobs() for event in table.list_events(job.id))

    wait_for(is_running, 60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (job,), _ = table.list_jobs("ann")
    assert job.state == "running"
    if place.cluster is None:
        job_service = open_desk(work)
        job_service.runner.start()
    else:
        place.execute("update job set lease_until = lease_until - :most", {"most": LEASE_SECONDS})  # as time would
    wait_for(lambda: table.get_job(job.id).state == "succeeded")
    assert "the server stopped; the job goes on" in [event.message for event in table.list_events(job.id)]
    monkeypatch.setattr(uploads_module, "SHARED_SECONDS", 0.0)
    job_service.close()
    open_desk(work)
    assert list(job_service.uploads.path("file").parent.iterdir()) == []


def spin(_: Job) -> Work:
    for done in itertools.count(1):
        time.sleep(0.001)
        yield Progress("spin", done, 0)
    raise AssertionError


def test_a_server_that_stops_puts_its_job_back(open_desk: Callable[..., JobService]) -> None:
    job_service = open_desk(spin)
    job = job_service.table.add_job("ann", SPEC)
    job_service.runner.start()
    wait_for(lambda: job_service.table.progress(job.id) is not None)
    job_service.runner.stop()
    assert job_service.table.get_job(job.id).state == "queued"


def test_a_cancel_is_remembered_over_a_crash(open_desk: Callable[..., JobService]) -> None:
    job_service = open_desk(spin)
    asked, other = job_service.table.add_job("ann", SPEC), job_service.table.add_job("ann", SPEC)
    assert job_service.table.take_next() == job_service.table.get_job(asked.id)
    job_service.table.ask_to_cancel(asked.id)  # and then the server dies
    job_service.runner.start()
    wait_for(lambda: job_service.table.get_job(other.id).state == "running")
    assert job_service.table.get_job(asked.id).state == "cancelled"


def test_work_that_is_cancelled_can_clean_up_and_work_that_is_stopped_can_go_on(
    open_desk: Callable[..., JobService],
) -> None:
    ends: list[type[BaseException]] = []

    def work(job: Job) -> Work:
        try:
            yield from spin(job)
        except BaseException as end:
            ends.append(type(end))
            raise
        raise AssertionError

    job_service = open_desk(work)
    first, second = job_service.table.add_job("ann", SPEC), job_service.table.add_job("ann", SPEC)
    job_service.runner.start()
    wait_for(lambda: job_service.table.progress(first.id) is not None)
    job_service.runner.cancel(first.id)
    wait_for(lambda: job_service.table.progress(second.id) is not None)
    job_service.runner.stop()
    assert ends == [Cancelled, GeneratorExit]


def test_a_job_whose_place_of_work_is_gone_waits_for_another(tmp_path: Path) -> None:
    ready = threading.Event()

    def execute(item: Callable[[], Any]) -> Any:
        if not ready.is_set():
            raise NotReady("the engine is not running")
        return item()

    def work(_: JobService, job: Job) -> Work:
        yield Progress("try", 1, 1)
        return dict

    job_service = JobService(tmp_path / "desk", work, execute)
    job = job_service.table.add_job("ann", SPEC)
    job_service.runner.start()
    wait_for(
        lambda: "the server stopped; the job goes on" in [e.message for e in job_service.table.list_events(job.id)]
    )
    ready.set()
    wait_for(lambda: job_service.table.get_job(job.id).state == "succeeded")
    job_service.close()


def test_only_what_uses_the_model_is_done_on_its_thread(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1, "model") as model:

        def work(_: JobService, job: Job) -> Work:
            threads = []
            for model_next in (False, True, True, False, True):
                threads.append(threading.current_thread().name)
                yield Progress("try", len(threads), None, model_next)
            threads.append(threading.current_thread().name)
            return lambda: {"threads": [*threads, threading.current_thread().name]}

        job_service = JobService(tmp_path / "desk", work, lambda item: model.submit(item).result())
        job = job_service.table.add_job("ann", SPEC)
        job_service.runner.start()
        wait_for(lambda: job_service.table.get_job(job.id).state == "succeeded")
        result = job_service.table.get_job(job.id).result
        assert result is not None
        assert result["threads"] == ["jobs", "jobs", "model_0", "model_0", "jobs", "model_0", "jobs"]
        job_service.close()


def test_a_repeated_request_finds_its_job(table: JobTable) -> None:
    first = table.add_job("ann", SPEC | {"n": 1}, Repeat())
    assert table.add_job("ann", SPEC | {"n": 1}, Repeat()).id == first.id
    assert table.add_job("ann", SPEC | {"n": 2}, Repeat()).id != first.id
    assert table.find_repeated("bob", SPEC | {"n": 1}, Repeat()) is None
    table.finish(first.id, "cancelled")
    assert table.find_repeated("ann", SPEC | {"n": 1}, Repeat()) is None
    assert table.find_repeated("ann", SPEC | {"n": 1}, Repeat(again=True)) == table.get_job(first.id)


def test_a_key_is_of_one_request(table: JobTable) -> None:
    first = table.add_job("ann", SPEC | {"n": 1}, Repeat("k"))
    assert table.add_job("ann", SPEC | {"n": 1}, Repeat("other")).id != first.id
    table.finish(first.id, "cancelled")
    assert table.add_job("ann", SPEC | {"n": 1}, Repeat("k")).id == first.id
    with pytest.raises(InvalidValue, match=f"was used for another request, for {first.id}"):
        table.add_job("ann", SPEC | {"n": 2}, Repeat("k"))
    assert table.add_job("bob", SPEC | {"n": 2}, Repeat("k")).id != first.id


def test_events_are_paged_from_the_newest_beyond_any_number(table: JobTable, place: Place) -> None:
    job, other = table.add_job("ann", SPEC), table.add_job("bob", SPEC)
    told = [{"job": (job, other)[number % 2].id, "message": str(number)} for number in range(2400)]
    sql = "insert into event (job, created_at, level, message, data) values (:job, 0, 'info', :message, '{}')"
    place.execute(sql, *told)
    seen: list[str] = []
    more, before = True, None
    while more:
        events, more = table.last_events(job.id, before, 100)
        seen += [event.message for event in events]
        before = events[-1].number
    assert seen == [str(number) for number in range(2398, -1, -2)] + ["queued"]


def test_what_a_job_made_is_a_file_that_takes_no_room(uploads: Uploads, table: JobTable, tmp_path: Path) -> None:
    mask = tmp_path / "mask"
    mask.write_bytes(b"m" * 1000)  # beyond the limit of an upload, and beyond the quota
    file = uploads.adopt("ann", "p.safetensors", mask, "d" * 64)
    assert uploads.adopt("ann", "p.safetensors", mask, "d" * 64) == file
    assert uploads.path(file.id).samefile(mask)
    assert table.list_files("ann", "fine-tune-results") == [file]
    upload(uploads, "ann", b"x" * 60)
    mask.unlink()  # the persona is gone
    assert uploads.path(file.id).read_bytes() == b"m" * 1000
    uploads.remove(file.id, "ann")
    assert not uploads.path(file.id).exists()


def test_the_next_job_is_expected_to_take_as_long_as_the_last(table: JobTable, place: Place) -> None:
    assert table.typical_seconds() is None
    for seconds in (10, 20, 90):
        table.finish(_start(table), "succeeded")
        newest = "rowid = (select max(rowid) from job)"
        place.execute(f"update job set started_at = finished_at - :seconds where {newest}", {"seconds": seconds})
    assert table.typical_seconds() == pytest.approx(20)


def _start(table: JobTable) -> str:
    job = table.add_job("ann", SPEC)
    table.take_next()
    return job.id


def test_a_table_of_before_is_brought_up_to_date(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "old.sqlite")) as db, db:
        db.executescript(JOBS[0])
        db.execute("insert into file values ('file-1', 'ann', 'fine-tune', 'a', 1, 'd', 0)")
        db.execute("pragma user_version = 1")
    table = JobTable(open_group(tmp_path / "old.sqlite"))
    assert [file.id for file in table.list_files("ann")] == ["file-1"]
    assert table.add_job("ann", SPEC).state == "queued"
    assert JobTable(open_group(tmp_path / "old.sqlite")).open_jobs() == table.open_jobs()


READS: dict[str, Callable[[JobTable], object]] = {
    "get_file": lambda table: table.get_file("file-1", "ann"),
    "name_file": lambda table: table.name_file("file-1"),
    "find_file": lambda table: table.find_file("ann", "fine-tune", "a", "d"),
    "list_files": lambda table: table.list_files("ann"),
    "check_room": lambda table: table.check_room("ann"),
    "known_files": lambda table: table.known_files(),
    "find_repeated": lambda table: table.find_repeated("ann", SPEC, Repeat()),
    "get_job": lambda table: table.get_job(table.list_jobs("ann")[0][0].id),
    "list_jobs": lambda table: table.list_jobs("ann"),
    "open_jobs": lambda table: table.open_jobs(),
    "failed_jobs": lambda table: table.failed_jobs({"mask_refused"}, 0.0),
    "typical_seconds": lambda table: table.typical_seconds(),
    "count_jobs": lambda table: table.count_jobs(),
    "list_events": lambda table: table.list_events("job"),
    "last_events": lambda table: table.last_events("job"),
    "progress": lambda table: table.progress("job"),
    "has_next": lambda table: table.has_next(),
}
WRITES: dict[str, Callable[[JobTable], object]] = {
    "add_file": lambda table: table.add_file("ann", "fine-tune", "b", 1, "e", "file-2"),
    "remove_file": lambda table: table.remove_file("file-1", "ann"),
    "add_job": lambda table: table.add_job("ann", SPEC),
    "expire": lambda table: table.expire(time.time()),
    "take_next": lambda table: table.take_next(),
    "finish": lambda table: table.finish("job", "failed"),
    "ask_to_cancel": lambda table: table.ask_to_cancel("job"),
    "requeue_running": lambda table: table.requeue_running(),
    "add_event": lambda table: table.add_event("job", "info", "so far"),
    "claim_file": lambda table: table.claim_file("ann", "fine-tune", "a", "d", tentative=True),
    "confirm_file": lambda table: table.confirm_file("file-1"),
    "discard_file": lambda table: table.discard_file("file-1"),
    "renew": lambda table: table.renew("job"),
}


class TestLocks:
    """Another server holds the write lock all the while."""

    @pytest.fixture
    def locked(self, table: JobTable, place: Place) -> Iterator[JobTable]:
        table.add_file("ann", "fine-tune", "a", 1, "d", "file-1")
        table.add_job("ann", SPEC)
        with table.group.write():
            yield JobTable(place.jobs(patient=False))

    def test_every_method_either_reads_or_writes(self) -> None:
        public = {name for name in vars(JobTable) if not name.startswith("_")}
        assert READS.keys() | WRITES.keys() == public
        assert not READS.keys() & WRITES.keys()

    @pytest.mark.parametrize("name", READS)
    def test_who_reads_waits_for_nobody(self, locked: JobTable, name: str) -> None:
        READS[name](locked)

    @pytest.mark.parametrize("name", WRITES)
    def test_who_writes_needs_the_lock(self, locked: JobTable, name: str) -> None:
        with pytest.raises((sqlite3.OperationalError, NotReady), match=r"locked|try again"):
            WRITES[name](locked)

    def test_opening_a_table_of_this_version_needs_none(self, locked: JobTable, place: Place) -> None:
        assert JobTable(place.jobs()).count_jobs()["queued"] == 1

    def test_a_reader_cannot_write(self, table: JobTable) -> None:
        with pytest.raises((sqlite3.OperationalError, NotReady), match=r"readonly|try again"), table.group.read() as db:
            db.execute(text("delete from job"))
