"""A registry that an older version wrote is brought up to date, and nothing that it said is lost.

The schemas are those that each version left in files, written down here: a migration that is edited afterwards, or a
version without its record, fails.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from maskstore import Registry, database
from maskstore.registry import FILE
from tests.maskstore import world

ALIAS = """
create table alias (
        alias text primary key,
        name text not null references persona on update cascade on delete cascade
    ) strict, without rowid;
"""
GENERATION = """
create table generation (
        name text not null references persona on update cascade on delete cascade,
        number integer not null, digest text not null, created_at text not null,
        primary key (name, number)
    ) strict, without rowid;
"""
TAG = """
create table tag (
        name text not null references persona on update cascade on delete cascade,
        tag text not null,
        primary key (name, tag)
    ) strict, without rowid;
create table pin (digest text primary key) strict, without rowid;
"""
FIRST = "create table persona (name text primary key, current integer not null) strict, without rowid;"
SECOND = """
create table persona (
    name text primary key, current integer not null, gamma real, notes text not null default ''
) strict, without rowid;
"""
ROWS = """
insert into persona (name, current) values ('old', 2), ('other', 1);
insert into generation (name, number, digest, created_at) values
    ('old', 1, '{first}', '2026-01-01T00:00:00Z'), ('old', 2, '{second}', '2026-01-02T00:00:00Z'),
    ('other', 1, '{first}', '2026-01-03T00:00:00Z');
insert into alias values ('older', 'old');
"""
MORE = """
update persona set gamma = 0.25, notes = 'kept' where name = 'old';
insert into tag values ('old', 'good');
insert into pin values ('{first}');
"""
DEFAULTS = """
alter table generation add column gamma real;
alter table generation add column phase text;
"""
LATER = "update generation set gamma = 0.75, phase = 'decode' where name = 'other';"
MEASUREMENT = """
create table measurement (
        digest text primary key, certificate text not null, gamma real not null, phase text not null,
        data text not null, measured_at text not null
    ) strict, without rowid;
"""
MEASURED = """
insert into measurement values
    ('{first}', '{{"passed":false}}', 0.5, 'decode', '{{"own":{{}}}}', '2026-01-04T00:00:00Z');
"""
QUANTISED = """
create table measurement (
        digest text not null, quantization text not null, certificate text not null, gamma real not null,
        phase text not null, data text not null, measured_at text not null,
        primary key (digest, quantization)
    ) strict, without rowid;
"""
QUANTISED_ROWS = """
insert into measurement values
    ('{first}', '', '{{"passed":false}}', 0.5, 'decode', '{{"own":{{}}}}', '2026-01-04T00:00:00Z'),
    ('{first}', 'nf4', '{{"passed":true}}', 0.5, 'decode', '{{"own":{{}}}}', '2026-01-04T00:00:00Z');
"""
BUILT = "create table built (digest text primary key, copy text not null) strict, without rowid;"
_THIRD = SECOND + GENERATION + ALIAS + TAG + DEFAULTS
RECORDED = {
    1: (FIRST + GENERATION + ALIAS, ROWS),
    2: (SECOND + GENERATION + ALIAS + TAG, ROWS + MORE),
    3: (_THIRD, ROWS + MORE + LATER),
    4: (_THIRD + MEASUREMENT, ROWS + MORE + LATER + MEASURED),
    5: (_THIRD + MEASUREMENT + BUILT, ROWS + MORE + LATER + MEASURED),
    6: (_THIRD + QUANTISED + BUILT, ROWS + MORE + LATER + QUANTISED_ROWS),
}


def make(root: Path, version: int) -> tuple[str, str]:
    """A store as a version left it: two masks, two personas; their digests."""
    registry = Registry(root)
    digests = registry.store.add(world.mask(1)), registry.store.add(world.mask(2))
    (root / FILE).unlink()
    schema, rows = RECORDED[version]
    with closing(sqlite3.connect(root / FILE)) as db:
        db.executescript(schema + rows.format(first=digests[0], second=digests[1]))
        db.execute(f"pragma user_version = {version}")
        db.commit()
    return digests


def columns(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every table's columns: name, type, whether null may be, default, place in the key."""
    with closing(sqlite3.connect(path)) as db:
        tables = [name for (name,) in db.execute("select name from sqlite_master where type = 'table' order by name")]
        return {table: [row[1:] for row in db.execute(f"pragma table_info({table})")] for table in tables}


def test_every_older_version_is_recorded() -> None:
    assert list(RECORDED) == [*range(1, database.SCHEMA)]


@pytest.mark.parametrize("version", RECORDED)
def test_a_version_left_what_is_recorded(tmp_path: Path, version: int) -> None:
    for name, script in (("recorded", RECORDED[version][0]), ("migrated", "".join(database.MIGRATIONS[:version]))):
        with closing(sqlite3.connect(tmp_path / name)) as db:
            db.executescript(script)
    assert columns(tmp_path / "recorded") == columns(tmp_path / "migrated")


@pytest.mark.parametrize("version", RECORDED)
def test_what_it_said_is_there_afterwards(tmp_path: Path, version: int) -> None:
    first, second = make(tmp_path / "store", version)
    registry = Registry(tmp_path / "store")
    told = registry.describe("older")
    assert (told.name, told.current.digest, told.aliases) == ("old", second, ("older",))
    assert [one.digest for one in registry.history("old")] == [second, first]
    assert (told.gamma, told.notes, told.tags) == ((0.25, "kept", ("good",)) if version > 1 else (None, "", ()))
    assert (told.current.gamma, told.current.phase) == (None, None)
    other = registry.resolve("other")
    assert (other.gamma, other.phase) == ((0.75, "decode") if version > 2 else (None, None))
    found = registry.certificate(other, world.info(certificate={"passed": True}))
    assert found.source == ("measured" if version > 3 else "claimed")  # before, measured and claimed are not told apart
    assert found.figures["passed"] is (False if version > 3 else None)
    measured = [one.quantization for one in registry.measurements(first)]
    assert measured == ([] if version <= 3 else [None] if version <= 5 else [None, "nf4"])
    assert {one.name for one in registry.personas()} == {"old", "other"}
    assert database.Database(tmp_path / "store" / FILE).faults() == []


@pytest.mark.parametrize("version", RECORDED)
def test_it_is_as_good_as_new_afterwards(tmp_path: Path, version: int) -> None:
    first, _ = make(tmp_path / "store", version)
    registry, _ = Registry(tmp_path / "store"), Registry(tmp_path / "fresh")
    assert columns(tmp_path / "store" / FILE) == columns(tmp_path / "fresh" / FILE)
    assert registry.rollback("old").digest == first
    registry.change("other", tags=lambda old: {*old, "new"})
    assert Registry(tmp_path / "store").describe("other").tags == ("new",)


@pytest.mark.parametrize("version", RECORDED)
def test_a_migration_that_fails_changes_nothing(tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, second = make(tmp_path / "store", version)
    before = columns(tmp_path / "store" / FILE)
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, "alter table nobody add column x;"))
        with pytest.raises(Exception, match="nobody"):
            Registry(tmp_path / "store")
    assert columns(tmp_path / "store" / FILE) == before
    assert Registry(tmp_path / "store").describe("old").current.digest == second
