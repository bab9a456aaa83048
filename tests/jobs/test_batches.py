"""The table of batches and their results on disk: states, quotas, repeats, expiry, crashes and full disks."""

from __future__ import annotations

import io
import itertools
import json
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from masquerade.errors import BatchNotFound, InvalidValue, QuotaExceeded, StateConflict, UploadNotFound
from masquerade.jobs import BATCH_TRANSITIONS, BatchResults, BatchTable, JobTable, Quotas, Repeat, Uploads
from masquerade.jobs.batches import OPEN_STATES
from masquerade.jobs.records import BATCH_INPUT, BATCH_OUTPUT
from tests.databases import Place

CHAT = "/v1/chat/completions"


@pytest.fixture
def jobs(place: Place) -> JobTable:
    return JobTable(place.jobs(), Quotas(files=4, file_bytes=100, open_jobs=2))


@pytest.fixture
def table(jobs: JobTable) -> BatchTable:
    return BatchTable(jobs.group, jobs.quotas, jobs.worker)


@pytest.fixture
def uploads(tmp_path: Path, jobs: JobTable) -> Uploads:
    return Uploads(tmp_path / "files", jobs, limit=60)


def add(table: BatchTable, name: str = "file-1", owner: str = "ann", repeat: Repeat | None = None) -> str:
    """A batch of a file, which is added if it is not there."""
    files, file_id = JobTable(table.group), f"{name}-{owner}"
    try:
        files.get_file(file_id, owner)
    except UploadNotFound:
        files.add_file(owner, BATCH_INPUT, name, 1, "d", file_id)
    return table.add(owner, CHAT, file_id, None, repeat or Repeat()).id


def test_a_batch_needs_its_file(table: BatchTable) -> None:
    add(table)
    for owner, file_id in (("ann", "file-2"), ("bob", "file-1-ann")):
        with pytest.raises(UploadNotFound):
            table.add(owner, CHAT, file_id, None, Repeat())


PATHS = {
    "validating": (),
    "in_progress": ("in_progress",),
    "finalizing": ("in_progress", "finalizing"),
    "cancelling": ("cancelling",),
    "failed": ("failed",),
    "completed": ("in_progress", "finalizing", "completed"),
    "expired": ("in_progress", "expired"),
    "cancelled": ("cancelling", "cancelled"),
}


@pytest.mark.parametrize(("present", "following"), [*itertools.product(BATCH_TRANSITIONS, repeat=2)])
def test_states_follow_each_other_as_the_table_says(table: BatchTable, present: str, following: str) -> None:
    batch_id = add(table)
    for state in PATHS[present]:
        table.set_state(batch_id, state)  # type: ignore[arg-type]
    if following in BATCH_TRANSITIONS[present]:  # type: ignore[index]
        batch = table.set_state(batch_id, following)  # type: ignore[arg-type]
        assert batch.state == following
        assert batch.times.keys() == {*PATHS[present], following}
        assert batch.is_open == (following in OPEN_STATES)
        return
    with pytest.raises(StateConflict, match=f"is {present}; it cannot be {following}"):
        table.set_state(batch_id, following)  # type: ignore[arg-type]
    assert table.get(batch_id).state == present


def test_a_repeat_is_the_batch_that_is_there(table: BatchTable) -> None:
    first = add(table)
    assert add(table) == first
    assert add(table, owner="bob") != first
    table.set_state(first, "failed")
    assert add(table, repeat=Repeat(again=True)) == first
    second = add(table)
    assert second != first
    keyed = add(table, "file-2", repeat=Repeat("k"))
    table.set_state(keyed, "failed")
    assert add(table, "file-2", repeat=Repeat("k")) == keyed
    with pytest.raises(InvalidValue, match="was used for another request"):
        add(table, "file-3", repeat=Repeat("k"))


def test_open_batches_are_limited_by_owner(table: BatchTable) -> None:
    first, _ = add(table, "file-1"), add(table, "file-2")
    with pytest.raises(QuotaExceeded, match="2 batches are unfinished"):
        add(table, "file-3")
    add(table, "file-3", owner="bob")
    table.set_state(first, "failed")
    add(table, "file-3")
    assert len(table.open_batches()) == 3


def test_batches_are_their_owners(table: BatchTable) -> None:
    mine, theirs = add(table), add(table, owner="bob")
    assert [one.id for one in table.list("ann")[0]] == [mine]
    for read in (lambda: table.get(theirs, "ann"), lambda: table.list("ann", theirs), lambda: table.get("batch_0")):
        with pytest.raises(BatchNotFound):
            read()


def test_a_file_stays_while_a_batch_reads_it(jobs: JobTable, table: BatchTable, uploads: Uploads) -> None:
    file = uploads.receive("ann", BATCH_INPUT, "a.jsonl", io.BytesIO(b"abc"))
    batch_id = table.add("ann", CHAT, file.id, None, Repeat()).id
    with pytest.raises(StateConflict, match=f"is needed by the batch {batch_id}"):
        uploads.remove(file.id, "ann")
    later = file.created_at + jobs.quotas.days * 86_400 + 60
    uploads.expire(later)
    assert uploads.path(file.id).exists()
    assert table.get(batch_id).is_open
    table.set_state(batch_id, "failed")
    uploads.expire(later)
    assert not uploads.path(file.id).exists()
    with pytest.raises(BatchNotFound):
        table.get(batch_id)


def test_files_of_results_are_never_refused_and_count_afterwards(
    jobs: JobTable, uploads: Uploads, tmp_path: Path
) -> None:
    result = tmp_path / "result"
    result.write_bytes(b"x" * 90)
    first = uploads.adopt("ann", "a", result, "d", BATCH_OUTPUT)
    assert uploads.adopt("ann", "a", result, "d", BATCH_OUTPUT) == first  # as after a crash
    uploads.adopt("ann", "b", result, "d", BATCH_OUTPUT)
    with pytest.raises(QuotaExceeded, match="180 bytes of files"):
        jobs.check_room("ann")
    with pytest.raises(QuotaExceeded):
        uploads.receive("ann", BATCH_INPUT, "a.jsonl", io.BytesIO(b"abc"))
    jobs.check_room("bob")


def line(custom_id: str) -> str:
    return json.dumps({"custom_id": custom_id, "response": "x" * 50})


def test_results_are_there_after_a_crash_without_the_line_that_was_cut(tmp_path: Path) -> None:
    results = BatchResults(tmp_path, "batch_1")
    for number in range(6):
        results.append(str(number), line(str(number)), failed=number == 3)
    for path, rest in ((results.output, b'{"custom_id": "7'), (results.errors, b"\0" * 40 + b"\n")):
        path.write_bytes(path.read_bytes() + rest)
    again = BatchResults(tmp_path, "batch_1")
    assert again.done == set("012345")
    assert (again.completed, again.failed) == (5, 1)
    again.append("3", line("3"), failed=False)  # it has a result
    again.append("7", line("7"), failed=False)
    assert [json.loads(one)["custom_id"] for one in again.output.read_text().splitlines()] == [*"01245", "7"]
    assert [json.loads(one)["custom_id"] for one in again.errors.read_text().splitlines()] == ["3"]
    again.close()
    again.append("8", line("8"), failed=False)
    assert "8" not in again.done
    again.discard()
    assert list(tmp_path.iterdir()) == []


def test_threads_append_whole_lines_once(tmp_path: Path) -> None:
    results = BatchResults(tmp_path, "batch_1")
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(lambda number: results.append(str(number % 50), line(str(number % 50)), failed=False), range(200))
        )
    written = [json.loads(one)["custom_id"] for one in results.output.read_text().splitlines()]
    assert sorted(written, key=int) == [str(number) for number in range(50)]


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path) -> None:
    results = BatchResults(tmp_path, "batch_1")
    results.append("a", line("a"), failed=False)
    before, limits = results.output.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            results.append("b", line("b"), failed=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert results.output.read_bytes() == before
    results.append("b", line("b"), failed=False)
    assert BatchResults(tmp_path, "batch_1").done == {"a", "b"}
