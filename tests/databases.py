"""A PostgreSQL cluster of the tests' own, and places of tables: a SQLite file, or a schema of the cluster."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import Row, create_engine, make_url, text

from masquerade.database.group import TableGroup
from masquerade.database.postgresql import PostgreSQL
from masquerade.database.sqlite import SQLiteGroup
from masquerade.database.url import DatabaseURL
from masquerade.jobs import open_group, open_responses
from masquerade.keys.table import KeyTable
from tests.serving import free_port

PASSWORD = "n0t-to-be-shown"
START_SECONDS = 60.0
_FASTER = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=16MB", "max_connections=60")
_schemas = itertools.count()


class Cluster:
    """A database server on a port of loopback. It runs as the user `postgres` where the tests run as root."""

    def __init__(self, folder: Path, binaries: Path) -> None:
        self.port = free_port()
        self._folder, self._binaries = folder, binaries
        self._user = "postgres" if os.getuid() == 0 else None
        if self._user:
            shutil.chown(folder, self._user)
        secret = folder / "password"
        secret.write_text(PASSWORD)
        options = "--auth=scram-sha-256", "--username=masquerade", f"--pwfile={secret}", "--no-sync", "--encoding=UTF8"
        self._run("initdb", f"--pgdata={folder / 'data'}", *options).check_returncode()
        self.start()

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        settings = [part for setting in _FASTER for part in ("-c", setting)]
        self._process = subprocess.Popen(
            [
                str(self._binaries / "postgres"),
                *("-D", str(self._folder / "data"), "-p", str(self.port)),
                *("-k", str(self._folder), "-h", "127.0.0.1", *settings),
            ],
            user=self._user,
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_SECONDS
        while self._run("pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)).returncode:
            assert self._process.poll() is None, "PostgreSQL does not start"
            assert time.monotonic() < deadline, "PostgreSQL does not answer"
            time.sleep(0.05)

    def stop(self) -> None:
        """End the server as a crash would, and wait until it has ended."""
        self._process.send_signal(3)  # SIGQUIT: at once
        self._process.wait()

    def url(self, options: str = "", password: str = PASSWORD) -> str:
        """The address of the cluster's database, with options of a session."""
        query = f"?options={quote(options)}" if options else ""
        return f"postgresql://masquerade:{quote(password)}@127.0.0.1:{self.port}/postgres{query}"

    def add_schema(self) -> str:
        """The name of a new schema."""
        name = f"s{next(_schemas)}"
        execute(self.url(), f"create schema {name}")
        return name

    def _run(self, name: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [str(self._binaries / name), *arguments], user=self._user, cwd="/", capture_output=True, check=False
        )


class Place:
    """Where the tables of one test are."""

    def __init__(self, folder: Path, cluster: Cluster | None) -> None:
        self.folder, self.cluster = folder, cluster
        self._schema = cluster.add_schema() if cluster else ""
        self._open: list[PostgreSQL] = []

    def url(self, options: str = "") -> str:
        """The address of the PostgreSQL database."""
        assert self.cluster is not None
        return self.cluster.url(f"-c search_path={self._schema} {options}".strip())

    def connect(self, options: str = "") -> PostgreSQL | None:
        """The database as one more server opens it; None for SQLite."""
        if self.cluster is None:
            return None
        self._open.append(PostgreSQL(DatabaseURL(self.url(options))))
        return self._open[-1]

    def jobs(self, *, patient: bool = True) -> TableGroup:
        """The tables of jobs as one more server opens them; if it is not patient, it waits for no lock."""
        if database := self.connect("" if patient else "-c lock_timeout=20"):
            return database.group("jobs")
        group = open_group(self.folder / "jobs.sqlite")
        if not patient:
            group.file.timeout = 0.0
        return group

    def keys(self, *, patient: bool = True) -> KeyTable:
        """The table of keys as one more server opens it; if it is not patient, it waits for no lock."""
        table = KeyTable(self.folder, self.connect("" if patient else "-c lock_timeout=20"))
        if isinstance(table.group, SQLiteGroup) and not patient:
            table.group.file.timeout = 0.0
        return table

    def responses(self) -> TableGroup:
        """The table of responses."""
        if database := self.connect():
            return database.group("responses", durable=False)
        return open_responses(self.folder / "jobs.sqlite")

    def execute(self, statement: str, *rows: dict[str, Any]) -> list[Row[Any]]:
        """Execute a statement beside the code, and return its rows."""
        url = self.url() if self.cluster else f"sqlite:///{self.folder / 'jobs.sqlite'}"
        return execute(url, statement, *rows)

    def close(self) -> None:
        """Close what was opened."""
        for database in self._open:
            database.close()


def execute(url: str, statement: str, *rows: dict[str, Any]) -> list[Row[Any]]:
    """Execute a statement in a transaction of its own, and return its rows."""
    address = make_url(url.replace("postgresql:", "postgresql+psycopg:"))
    engine = create_engine(address, connect_args={"timeout": 30} if address.drivername == "sqlite" else {})
    try:
        with engine.begin() as db:
            done = db.execute(text(statement), rows or None)
            return [*done.all()] if done.returns_rows else []
    finally:
        engine.dispose()


def find_binaries() -> Path | None:
    """The folder of PostgreSQL's programs."""
    found = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)]
    if on_path := shutil.which("initdb"):
        found.append(Path(on_path).resolve().parent)
    return next((folder for folder in found if (folder / "postgres").is_file()), None)


@contextmanager
def run_cluster() -> Iterator[Cluster]:
    """A cluster in a temporary folder. Skips the test where PostgreSQL is not installed."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed (Debian's package is called postgresql)")
    with tempfile.TemporaryDirectory(prefix="masquerade-pg-") as folder:
        cluster = Cluster(Path(folder), binaries)
        try:
            yield cluster
        finally:
            cluster.stop()
