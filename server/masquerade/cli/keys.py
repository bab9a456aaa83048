"""`masquerade keys`: manage API keys, without importing torch."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table as Columns

from masquerade.cli.options import AsJson, Database, Model, StoreFolder, open_database, say
from masquerade.cli.stores import find_store
from masquerade.database.url import DatabaseURL
from masquerade.errors import InvalidValue
from masquerade.keys import SCOPES, Audit, Key, Scope, mint
from masquerade.keys.key import find_scope

if TYPE_CHECKING:
    from masquerade.keys.table import KeyTable

app = typer.Typer(help="Make, list and revoke the keys of a store.", no_args_is_help=True)
LATEST = datetime(9999, 12, 31, tzinfo=UTC).timestamp()  # that a key ends; dates have no later years
MOST = 10**12  # requests or tokens a minute
_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_PATTERN = re.compile(r"[a-z0-9._*?\[\]!-]{1,64}")  # characters of names, and the wildcards of fnmatch


@app.command("add")
def add_key(
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="chat (default), build (includes chat), admin (all) or metrics (only /metrics); can be repeated."
        ),
    ] = None,
    personas: Annotated[
        list[str] | None,
        typer.Option(help='Personas that the key can use and build, such as "npc-*"; can be repeated. By default all.'),
    ] = None,
    rpm: Annotated[int | None, typer.Option(min=1, max=MOST, help="Requests per minute.")] = None,
    tpm: Annotated[int | None, typer.Option(min=1, max=MOST, help="Tokens per minute, of prompts and answers.")] = None,
    expires: Annotated[str | None, typer.Option(help="30d, 12h, or a date such as 2027-01-31 (00:00 UTC).")] = None,
    name: Annotated[str, typer.Option(help="Label of the key in `keys ls`.")] = "",
    model: Model = "demo",
    store: StoreFolder = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Create a key and print it on stdout. It cannot be shown again. A running server accepts it at once."""
    scopes = frozenset(_check_scope(one) for one in scope or ["chat"])
    patterns = tuple(_check_pattern(one) for one in personas or ["*"])
    now = time.time()
    expires_at = None if expires is None else _parse_end(expires, now)
    root = find_store(store, model)
    minted = mint()
    key = Key(minted.id, name, scopes, patterns, rpm, tpm, now, expires_at, None)
    with _open_keys(root, database) as table:
        table.add(key, minted.hash)
    _note(root, "add_key", key)
    if as_json:
        print(json.dumps({"key": minted.token} | _describe(key)))
    else:
        granted = f"{' '.join(sorted(key.scopes))}, personas {' '.join(key.personas)}"
        print(f"key {key.id}: {granted}\nIt cannot be shown again:", file=sys.stderr)
        print(minted.token)


@app.command("ls")
def list_keys(
    model: Model = "demo", store: StoreFolder = None, database: Database = None, as_json: AsJson = False
) -> None:
    """List all keys, including revoked and expired ones, without secrets."""
    with _open_keys(find_store(store, model), database) as known:
        keys = [*known.all()]
    table = Columns("id", "name", "state", "scopes", "personas", "a minute", "expires")
    for key in keys:
        row = _describe(key)
        limits = [f"{value} {what}" for value, what in ((key.rpm, "requests"), (key.tpm, "tokens")) if value]
        table.add_row(
            key.id,
            key.name,
            row["state"],
            " ".join(row["scopes"]),
            " ".join(key.personas),
            ", ".join(limits) or "-",
            row["expires_at"] or "never",
        )
    say(as_json, {"keys": [_describe(key) for key in keys]}, table)


@app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id: the 12 digits after `mq-`.")],
    model: Model = "demo",
    store: StoreFolder = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Revoke a key permanently. A running server rejects it within a second, and aborts its running answers."""
    root = find_store(store, model)
    with _open_keys(root, database) as table:
        key = table.revoke(key_id)
    _note(root, "revoke_key", key)
    say(as_json, _describe(key), f"{key.id} is revoked")


@app.command("copy")
def copy_keys(
    model: Model = "demo", store: StoreFolder = None, database: Database = None, as_json: AsJson = False
) -> None:
    """Copy the keys of a store's file into its database, except those whose ids are there."""
    if database is None:
        raise InvalidValue("copying keys needs a database; give it with --database")
    root = find_store(store, model)
    with _open_keys(root, None) as source, _open_keys(root, database) as target:
        known = {key.id for key in target.all()}
        copied = {key: stored for key, stored in source.all().items() if key.id not in known}
        for key, stored in copied.items():
            target.add(key, stored)
            _note(root, "copy_key", key)
    say(as_json, {"copied": [key.id for key in copied]}, f"{len(copied)} keys are copied to {database}")


@contextmanager
def _open_keys(root: Path, url: DatabaseURL | None) -> Iterator[KeyTable]:
    from masquerade.keys.table import KeyTable

    database = open_database(url)
    try:
        yield KeyTable(root, database)
    finally:
        if database:
            database.close()


def _note(root: Path, action: str, key: Key) -> None:
    Audit(root).write(key=None, action=action, target=key.id, outcome="done")


def _describe(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "state": key.problem(time.time()) or "valid",
        "scopes": sorted(key.scopes),
        "personas": list(key.personas),
        "rpm": key.rpm,
        "tpm": key.tpm,
        **{name: _moment(getattr(key, name)) for name in ("created_at", "expires_at", "revoked_at")},
    }


def _moment(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(min(at, LATEST), UTC).isoformat(timespec="seconds")


def _check_scope(scope: str) -> Scope:
    if found := find_scope(scope):
        return found
    raise InvalidValue(f"there is no scope {scope!r:.40}; there are {', '.join(SCOPES)}")


def _check_pattern(pattern: str) -> str:
    if not _PATTERN.fullmatch(pattern):
        raise InvalidValue(f"{pattern!r:.80} is not a pattern of persona names, such as `npc-*`")
    return pattern


def _parse_end(text: str, now: float) -> float:
    """Unix seconds of a date, or of a number of minutes, hours, days or weeks from `now`."""
    if found := re.fullmatch(r"([1-9][0-9]{0,5})([mhdw])", text):
        moment = now + int(found[1]) * _SECONDS[found[2]]
    else:
        try:
            end = datetime.fromisoformat(text)
        except ValueError:
            raise InvalidValue(
                f"{text!r:.40} is neither a time such as 30d or 12h nor a date such as 2027-01-31"
            ) from None
        moment = (end if end.tzinfo else end.replace(tzinfo=UTC)).timestamp()
    if moment <= now:
        raise InvalidValue(f"{text} is in the past")
    if moment > LATEST:
        raise InvalidValue(f"{text} is after {_moment(LATEST)}, which is the limit; without --expires a key has no end")
    return moment
