"""Tables of jobs and of keys that an older version wrote are brought up to date, and nothing that counts is lost.

The schemas are those that each version left in files, written down here: a migration that is edited afterwards, or a
version without its record, fails.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from masquerade.database import migrations
from masquerade.errors import StoreTooNew
from masquerade.jobs import JobTable, open_group
from masquerade.keys import mint
from masquerade.keys import table as keys
from masquerade.keys.key import matches
from masquerade.keys.ring import Keyring
from masquerade.keys.table import KeyTable as Keys
from tests.keys.making import hash_with_scrypt

FIRST = """
create table file (
    id text primary key, owner text not null, purpose text not null, name text not null, bytes integer not null,
    digest text not null, created_at real not null
) strict;
create table job (
    id text primary key, owner text not null, state text not null, spec text not null, created_at real not null,
    started_at real, finished_at real, error text, result text
) strict;
create table event (
    number integer primary key autoincrement, job text not null references job on delete cascade,
    created_at real not null, level text not null, message text not null, data text not null
) strict;
create index event_of_job on event (job, number);
"""
SPEC = json.dumps({"base": "b", "files": {"own": "file-1"}})
ROWS = f"""
insert into file values ('file-1', 'local', 'fine-tune', 'a.jsonl', 3, 'd', 1e9);
insert into job (id, owner, state, spec, created_at) values ('ftjob-1', 'local', 'queued', '{SPEC}', 1e9);
insert into event (job, created_at, level, message, data) values ('ftjob-1', 1e9, 'info', 'queued', '{{}}');
insert into job (id, owner, state, spec, created_at, started_at, finished_at, result)
    values ('ftjob-0', 'local', 'succeeded', '{SPEC}', 9e8, 9e8, 9e8, '{{"mask": "x"}}');
"""
SECOND = f"""{FIRST}
alter table job add column key text;
alter table job add column cancelling integer not null default 0;
"""
THIRD = f"""{SECOND}
create table response (
    id text primary key, owner text not null, bytes integer not null, created_at real not null,
    body text not null, input text not null
) strict;
create index response_of_owner on response (owner, created_at, bytes);
create index response_by_age on response (created_at);
"""
FOURTH = f"""{THIRD}
create table batch (
    id text primary key, owner text not null, state text not null, endpoint text not null, input_file text not null,
    metadata text not null, created_at real not null, times text not null default '{{}}',
    total integer not null default 0, completed integer not null default 0, failed integer not null default 0,
    output_file text, error_file text, errors text not null default '[]', key text
) strict;
"""
RECORDED = {1: FIRST, 2: SECOND, 3: THIRD, 4: FOURTH}
KEYS = """
create table key (
    id text primary key, name text not null, scopes text not null, personas text not null, rpm integer, tpm integer,
    created_at real not null, expires_at real, revoked_at real, hash blob not null
) strict;
"""


def make(path: Path, script: str, version: int) -> Path:
    """A file as a version left it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as db:
        db.executescript(script)
        db.execute(f"pragma user_version = {version}")
        db.commit()
    return path


def columns(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every table's columns: name, type, whether null may be, default, place in the key."""
    with closing(sqlite3.connect(path)) as db:
        tables = [name for (name,) in db.execute("select name from sqlite_master where type = 'table' order by name")]
        return {table: [row[1:] for row in db.execute(f"pragma table_info({table})")] for table in tables}


def test_every_older_version_is_recorded() -> None:
    assert list(RECORDED) == [*range(1, len(migrations.JOBS))]
    assert len(migrations.KEYS) == 2  # one older: its file is the one recorded here


@pytest.mark.parametrize("version", RECORDED)
def test_a_version_left_what_is_recorded(tmp_path: Path, version: int) -> None:
    recorded = make(tmp_path / "recorded", RECORDED[version], version)
    assert columns(recorded) == columns(make(tmp_path / "migrated", "".join(migrations.JOBS[:version]), version))


@pytest.mark.parametrize("version", RECORDED)
def test_what_it_said_is_there_afterwards(tmp_path: Path, version: int) -> None:
    table = JobTable(open_group(make(tmp_path / "jobs.sqlite", RECORDED[version] + ROWS, version)))
    assert table.get_file("file-1", "local").name == "a.jsonl"
    done = table.get_job("ftjob-0", "local")
    assert (done.state, done.result, done.key, done.cancelling) == ("succeeded", {"mask": "x"}, None, False)
    job = table.take_next()
    assert job is not None
    assert (job.id, job.spec["files"], job.key, job.cancelling) == ("ftjob-1", {"own": "file-1"}, None, False)
    assert [event.message for event in table.list_events("ftjob-1")] == ["queued", "running"]
    assert table.ask_to_cancel("ftjob-1").cancelling


@pytest.mark.parametrize("version", RECORDED)
def test_it_is_as_good_as_new_afterwards(tmp_path: Path, version: int) -> None:
    old, fresh = make(tmp_path / "old.sqlite", RECORDED[version] + ROWS, version), tmp_path / "new.sqlite"
    open_group(old)
    open_group(fresh)
    assert columns(old) == columns(fresh)


def test_jobs_that_the_first_version_cannot_have_finished_go(tmp_path: Path) -> None:
    rows = "insert into job (id, owner, state, spec, created_at) values ('ftjob-1', 'local', 'queued', '{}', 1e9);"
    assert JobTable(open_group(make(tmp_path / "jobs.sqlite", FIRST + rows, 1))).open_jobs() == []


def test_keys_of_the_first_version_open_what_they_did(tmp_path: Path) -> None:
    token, row = mint().token, "'bob', '[\"chat\"]', '[\"npc-*\"]', 9, null, 1e9, null, null"
    rows = f"insert into key values ('{token.split('-')[1]}', {row}, x'{hash_with_scrypt(token).hex()}');"
    make(tmp_path / keys.FILE, KEYS + rows, 1)
    table = Keys(tmp_path)
    ring = Keyring(table)
    key = ring.find_scrypt(token)
    assert (key.name, key.scopes, key.personas, key.rpm) == ("bob", {"chat"}, ("npc-*",), 9)
    assert key.problem(2e9) is None
    assert matches(token.rpartition("-")[2], table.all()[key])
    ring.close()
    Keys(tmp_path / "fresh")
    assert columns(tmp_path / keys.FILE) == columns(tmp_path / "fresh" / keys.FILE)


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    make(tmp_path / keys.FILE, KEYS, len(migrations.KEYS) + 1)
    with pytest.raises(StoreTooNew):
        Keys(tmp_path)
