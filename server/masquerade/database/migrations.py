"""The migrations of the SQLite files, of keys and of jobs, batches and responses; `tables.py` has their result."""

from __future__ import annotations

_FIRST_JOBS = """
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
_CANCELLING = """
alter table job add column key text;
alter table job add column cancelling integer not null default 0;
delete from job where json_extract(spec, '$.base') is null;
"""
_RESPONSES = """
create table response (
    id text primary key, owner text not null, bytes integer not null, created_at real not null,
    body text not null, input text not null
) strict;
create index response_of_owner on response (owner, created_at, bytes);
create index response_by_age on response (created_at);
"""
_BATCHES = """
create table batch (
    id text primary key, owner text not null, state text not null, endpoint text not null, input_file text not null,
    metadata text not null, created_at real not null, times text not null default '{}',
    total integer not null default 0, completed integer not null default 0, failed integer not null default 0,
    output_file text, error_file text, errors text not null default '[]', key text
) strict;
"""
_LEASES = """
alter table file add column claims integer not null default 0;
alter table job add column worker text;
alter table job add column lease_until real;
alter table batch add column worker text;
alter table batch add column lease_until real;
"""
JOBS = (_FIRST_JOBS, _CANCELLING, _RESPONSES, _BATCHES, _LEASES)

_FIRST_KEYS = """
create table key (
    id text primary key, name text not null, scopes text not null, personas text not null, rpm integer, tpm integer,
    created_at real not null, expires_at real, revoked_at real, hash blob not null
) strict
"""
_HASHES = ""  # since 2 a hash may be HMAC's, before it was scrypt's; a key's hash is replaced when the key is used
KEYS = (_FIRST_KEYS, _HASHES)
