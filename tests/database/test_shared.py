"""Several servers on one database: who runs what, who may go on, and what is refused."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, inspect, text

from masquerade.database.postgresql import PostgreSQL
from masquerade.database.tables import KEY, METADATA
from masquerade.errors import LeaseLost, NotReady, UnusableStore
from masquerade.jobs import BatchTable, Job, JobService, JobTable, Quotas, Repeat, Uploads, open_group, runner
from masquerade.jobs.records import LEASE_SECONDS
from masquerade.jobs.runner import Work
from masquerade.keys.table import KeyTable
from masquerade.pruning import Progress
from tests.databases import Place

SPEC: dict[str, Any] = {"files": {}}


@pytest.fixture
def open_server(shared: Place) -> Iterator[Callable[[Callable[[Job], Work]], JobService]]:
    """Servers of one store and database; all are closed at the end."""
    opened: list[JobService] = []

    def open_(work: Callable[[Job], Work]) -> JobService:
        folder, database = shared.folder / "jobs", shared.connect()
        quotas = Quotas(open_jobs=100)
        opened.append(JobService(folder, lambda _, job: work(job), lambda item: item(), quotas, database=database))
        return opened[-1]

    yield open_
    for server in opened:
        server.close()


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def expire_leases(place: Place, table: str = "job") -> None:
    """Let the time of all leases pass."""
    place.execute(f"update {table} set lease_until = lease_until - :seconds", {"seconds": 2 * LEASE_SECONDS})


def test_keys_are_read_while_writers_that_wait_have_all_connections(shared: Place) -> None:
    database = shared.connect()
    assert database is not None
    holder, table = shared.connect(), KeyTable(shared.folder, database)
    assert holder is not None
    watch = table.group.watch(KEY)
    seen = watch.look()
    with holder.group("jobs").write():
        writers = [threading.Thread(target=write_once, args=(database,)) for _ in range(20)]
        for writer in writers:
            writer.start()
        wait_for(lambda: database._engine.pool.checkedout() == 16)  # type: ignore[attr-defined]
        assert watch.look() == seen
        assert table.all() == {}
    for writer in writers:
        writer.join()


def write_once(database: PostgreSQL) -> None:
    with suppress(NotReady), database.group("jobs").write():
        pass


def test_a_transaction_that_hangs_is_a_database_that_is_not_ready(shared: Place) -> None:
    database = shared.connect("-c idle_in_transaction_session_timeout=100")
    assert database is not None
    with pytest.raises(NotReady, match="does not answer"):
        hang(database)


def hang(database: PostgreSQL) -> None:
    with database.group("jobs").write() as db:
        time.sleep(1)
        db.execute(text("select 1"))


def test_the_definitions_are_what_the_migrations_of_the_files_make(tmp_path: Path) -> None:
    open_group(tmp_path / "jobs.sqlite")
    KeyTable(tmp_path)
    found: dict[str, Any] = {}
    for name in ("jobs.sqlite", "keys.sqlite"):
        engine = create_engine(f"sqlite:///{tmp_path / name}")
        schema = inspect(engine)
        for table in schema.get_table_names():
            columns = {
                one["name"]: (bool(one["nullable"]) and not one["primary_key"], (one["default"] or "").strip("'"))
                for one in schema.get_columns(table)
            }
            indexes = {(index["name"], *index["column_names"]) for index in schema.get_indexes(table)}
            with engine.connect() as db:
                keys = [(row[2], row[6].lower()) for row in db.exec_driver_sql(f"pragma foreign_key_list({table})")]
            found[table] = columns, indexes, keys
        engine.dispose()
    defined = {}
    for name, definition in METADATA.tables.items():
        columns = {
            column.name: (bool(column.nullable), getattr(column.server_default, "arg", ""))
            for column in definition.columns
            if column.name != "rowid"
        }
        columns |= {"number": (False, "")} if name == "event" else {}
        indexes = {(str(index.name), *(column.name for column in index.columns)) for index in definition.indexes}
        links = [(key.column.table.name, key.ondelete) for key in definition.foreign_keys]
        defined[name] = columns, indexes, links
    del defined["masquerade"]  # only a database needs it
    found.pop("sqlite_sequence", None)
    assert found == defined


def test_two_servers_run_each_job_once(open_server: Any) -> None:
    runs: Counter[str] = Counter()
    counting = threading.Lock()

    def work(job: Job) -> Work:
        with counting:
            runs[job.id] += 1
        yield Progress("count", 1, 1)
        return dict

    first, second = open_server(work), open_server(work)
    jobs = {first.table.add_job("ann", SPEC | {"n": n}).id for n in range(20)}
    for server in (first, second):
        server.runner.start()
    wait_for(lambda: second.table.count_jobs()["succeeded"] == len(jobs))
    assert runs == dict.fromkeys(jobs, 1)


def test_who_has_lost_its_lease_goes_on_with_nothing_and_finishes_nothing(
    open_server: Any, shared: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "RENEW_SECONDS", 60)
    resume, ended = threading.Event(), threading.Event()
    finished: list[str] = []

    def slow(job: Job) -> Work:
        try:
            yield Progress("slow", 1, 2)
            resume.wait(30)
            yield Progress("slow", 2, 2)
        finally:
            ended.set()
        return lambda: finished.append("slow") or {}  # type: ignore[func-returns-value]

    def quick(job: Job) -> Work:
        yield Progress("quick", 1, 1)
        return lambda: finished.append("quick") or {}  # type: ignore[func-returns-value]

    first, second = open_server(slow), open_server(quick)
    job = first.table.add_job("ann", SPEC)
    first.runner.start()
    wait_for(lambda: first.table.progress(job.id) is not None)
    expire_leases(shared)  # the server hangs, or does not reach the database
    second.runner.start()
    wait_for(lambda: second.table.get_job(job.id).state == "succeeded")
    resume.set()
    assert ended.wait(30)
    first.runner.stop()
    assert finished == ["quick"]
    assert second.table.get_job(job.id).state == "succeeded"


def test_events_and_ends_are_of_the_server_that_has_the_lease(shared: Place) -> None:
    first, second = JobTable(shared.jobs()), JobTable(shared.jobs())
    job = first.add_job("ann", SPEC)
    assert first.take_next() is not None
    assert second.take_next() is None
    assert second.requeue_running() == []
    expire_leases(shared)
    assert first.renew(job.id) is not None  # nobody has taken it
    expire_leases(shared)
    taken = second.take_next()
    assert taken is not None
    assert taken.id == job.id
    assert first.renew(job.id) is None
    assert first.requeue_running() == []
    for act in (lambda: first.finish(job.id, "succeeded"), lambda: first.add_event(job.id, "info", "still here")):
        with pytest.raises(LeaseLost):
            act()
    second.finish(job.id, "succeeded")


def test_any_server_cancels_what_another_one_runs(open_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "RENEW_SECONDS", 0.05)

    def spin(job: Job) -> Work:
        while True:
            time.sleep(0.001)
            yield Progress("spin", 1, 2)

    first, second = open_server(spin), open_server(spin)
    job = first.table.add_job("ann", SPEC)
    first.runner.start()
    wait_for(lambda: first.table.progress(job.id) is not None)
    assert second.runner.cancel(job.id).cancelling
    wait_for(lambda: second.table.get_job(job.id).state == "cancelled")


def test_a_batch_is_its_servers_until_that_dies(shared: Place) -> None:
    tables = [BatchTable(shared.jobs(), Quotas(), worker) for worker in ("first", "second")]
    first, second = tables
    JobTable(first.group).add_file("ann", "batch", "a", 1, "d", "file-1")
    batch = first.add("ann", "/v1/embeddings", "file-1", None, Repeat())
    assert [one.id for one in first.claim_open()] == [batch.id]
    assert second.claim_open() == []
    with pytest.raises(LeaseLost):
        second.claim(batch.id)
    assert second.ask_to_cancel(batch.id).state == "cancelling"  # who is asked to may do so
    expire_leases(shared, "batch")
    assert [one.id for one in second.claim_open()] == [batch.id]
    assert first.claim_open() == []
    for act in (lambda: first.set_state(batch.id, "cancelled"), lambda: first.set_counts(batch.id, 1, 0)):
        with pytest.raises(LeaseLost):
            act()
    second.release()
    first.claim(batch.id)  # as when a client repeats its request there
    assert second.claim_open() == []
    for act in (lambda: second.claim(batch.id), lambda: second.set_counts(batch.id, 1, 0)):
        with pytest.raises(LeaseLost):
            act()
    first.release()
    assert [one.id for one in first.claim_open()] == [batch.id]


def test_a_file_that_two_servers_were_sent_stays_for_the_one_that_wants_it(shared: Place, tmp_path: Path) -> None:
    first, second = (Uploads(tmp_path / "files", JobTable(shared.jobs()), 100) for _ in range(2))

    def send(uploads: Uploads) -> Any:
        return uploads.receive("ann", "fine-tune", "a", io.BytesIO(b"a"), tentative=True)

    file = send(first)
    assert send(second).id == file.id
    first.discard([file])
    assert second.path(file.id).read_bytes() == b"a"
    second.confirm([file])
    first.discard([send(first)])
    assert second.path(file.id).exists()


def test_a_server_deletes_no_upload_that_another_one_receives(shared: Place, tmp_path: Path) -> None:
    first = Uploads(tmp_path / "files", JobTable(shared.jobs()), 100)

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            Uploads(tmp_path / "files", JobTable(shared.jobs()), 100)  # another server starts
            return super().read(size)

    file = first.receive("ann", "fine-tune", "a", Slow(b"abc"))
    assert first.path(file.id).read_bytes() == b"abc"


def test_nul_can_be_asked_for_and_sent(shared: Place) -> None:
    table = JobTable(shared.jobs())
    table.add_file("ann", "fine-tune", "a\0b", 1, "d", "file-1")
    assert table.find_file("ann", "fine-tune", "a\0b", "d") is not None
    assert table.list_jobs("a\0") == ([], False)


def test_the_database_of_another_store_is_refused(open_server: Any, shared: Place, tmp_path: Path) -> None:
    open_server(lambda _: iter(()))
    with pytest.raises(UnusableStore, match="belongs to a store"):
        JobService(tmp_path / "other", lambda *_: iter(()), lambda item: item(), database=shared.connect())  # type: ignore[arg-type, return-value]


def test_a_keyring_learns_of_keys_of_other_servers(shared: Place) -> None:
    from masquerade.errors import InvalidKey
    from masquerade.keys.ring import Keyring
    from tests.keys.making import make_key

    with closing(Keyring(shared.keys())) as ring:
        token, key = make_key(shared.keys(), "chat")

        def is_known() -> bool:
            try:
                return ring.find(token) == key
            except InvalidKey:
                return False

        wait_for(is_known)
        shared.keys().revoke(key.id)
        wait_for(lambda: not is_known())
        assert len(ring) == 1
