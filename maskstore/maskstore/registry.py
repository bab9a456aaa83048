"""Persona names, their revisions and aliases, and certificates measured by this store, in one SQLite file.

A revision is a row that never changes; publishing adds one, rolling back moves the name to an older one. Every write is
one transaction: processes may share the file, and a crash leaves the state before or after. The table and the
messages call a revision `generation`, as the HTTP API and the commands do.
"""

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from maskstore import strictjson
from maskstore.errors import InvalidMaskValue, MaskConflict, MaskError, MaskExists, MaskNotFound
from maskstore.mask import Mask, MaskInfo, Phase, now
from maskstore.mirror import find_bucket, open_database, open_store
from maskstore.names import check_digest, check_name, split_reference
from maskstore.records import ANY, Anything, Certificate, Measurement, Persona, Revision
from maskstore.signing import Signable, message
from maskstore.sqlite import Watch

FILE = "registry.sqlite"
NOTES_LIMIT = 10_000
_MEASURED = [field.name for field in fields(Measurement)]
_CURRENT = (
    "select g.name, digest, number, created_at, g.gamma, phase from generation g join persona p on p.name = g.name"
)


class Registry:
    """The names of one store. `require_signed` and `accept_tensors` are the store's.

    A folder with the name of a bucket (`mirror.name_folder`) is a copy of what is there.
    """

    def __init__(
        self, root: str | os.PathLike[str], require_signed: bool = False, accept_tensors: bool = False
    ) -> None:
        bucket = find_bucket(Path(root))
        self.store = open_store(Path(root), bucket, require_signed, accept_tensors)
        self.path = self.store.root / FILE
        self.database = open_database(self.path, bucket)

    def publish(
        self, name: str, digest: str, expected: str | Anything | None = ANY, info: MaskInfo | None = None
    ) -> Revision:
        """Make a stored digest current under a name; does nothing if it is current already.

        `expected` is the digest that must be current (None: the name must be new); else MaskConflict and no change.
        The defaults of `info` become the revision's and override those of the file. MaskNotFound if the store does not
        have the digest, MaskExists if the name is an alias.
        """
        check_name(name)
        check_digest(digest)
        with self.database.write() as db:
            return self._publish(db, name, digest, expected, info)

    def publish_built(self, *masks: Mask, expected: str | Anything | None = ANY) -> list[Revision]:
        """Store masks that this store's server or commands built and measured, and publish each as its persona.

        All of them are published, or none. Their copies replace those that are not better signed, unless these were
        built here as well. Raises as `publish` does.
        """
        for mask in masks:
            check_name(mask.info.persona)
            self._add_built(mask)
        with self.database.write() as db:
            return [self._publish(db, mask.info.persona, mask.digest, expected, mask.info) for mask in masks]

    def _publish(
        self, db: sqlite3.Connection, name: str, digest: str, expected: str | Anything | None, info: MaskInfo | None
    ) -> Revision:
        self._check_no_alias(db, name)
        current = self._find(db, name)
        gamma, phase = (info.gamma, info.phase) if info else (None, None)
        if current and current.digest == digest:
            kept = info and self.store.summary(digest).info  # what the defaults are where the revision has none
            if info is None or (kept and self._is_served(db, current, kept, info)):
                return current
        _compare(name, current, expected)
        if digest not in self.store:
            raise MaskNotFound(f"no mask {digest[:16]} in the store to publish as {name}")
        return self._append(db, name, digest, gamma, phase)

    def _is_served(self, db: sqlite3.Connection, current: Revision, kept: MaskInfo, info: MaskInfo) -> bool:
        """Whether a current revision has the gamma and phase of `info`, by itself or by what is set for its persona."""
        gamma, phase = current.defaults(kept)
        return phase == info.phase and info.gamma in (gamma, self._describe(db, current.name).gamma)

    def _add_built(self, mask: Mask) -> None:
        """Store a mask that was built here, and record its certificate."""
        info = mask.info
        built_before = self._built_here(mask.digest)
        digest = self.store.add(mask, preferred=not built_before)
        if not built_before:
            with self.database.write() as db:
                db.execute("insert or replace into built values (?, ?)", (digest, _identify(mask)))
        measured = info.certificate, info.gamma, info.phase, info.calibration, now(), info.quantization
        self.record(Measurement(digest, *measured))

    def _built_here(self, digest: str) -> bool:
        """Whether the stored copy is the one that was built here."""
        with self.database.read() as db:
            row = db.execute("select copy from built where digest = ?", (digest,)).fetchone()
        try:
            return row is not None and row[0] == _identify(self.store.summary(digest))
        except MaskError:
            return False

    def record(self, measurement: Measurement) -> None:
        """Record a measurement of a digest; it replaces an earlier one of the same quantisation, gamma and phase."""
        check_digest(measurement.digest)
        texts = {name: strictjson.dump(getattr(measurement, name)) for name in ("certificate", "data")}
        row = vars(measurement) | texts | {"quantization": measurement.quantization or ""}
        names = ", ".join(f":{name}" for name in _MEASURED)
        with self.database.write() as db:
            db.execute(f"insert or replace into measurement ({', '.join(_MEASURED)}) values ({names})", row)

    def measurements(self, digest: str) -> list[Measurement]:
        """What was measured here of a digest, by the quantisation of the base and then by time."""
        with self.database.read() as db:
            return self._measurements(db, check_digest(digest))

    def find_measurement(
        self, revision: Revision, info: MaskInfo | None, quantization: str | None = None
    ) -> Measurement | None:
        """What was measured here of a revision on a base of this quantisation: at the gamma that its persona has, else
        at the one that it was published with, else last. Personas with equal masks may have different gammas. `info` is
        the file's, None if that cannot be read.
        """
        gamma, phase = revision.defaults(info) if info else (revision.gamma, revision.phase)
        with self.database.read() as db:
            row = db.execute("select gamma from persona where name = ?", (revision.name,)).fetchone()
            measured = self._measurements(db, check_digest(revision.digest))
        served = row[0] if row and row[0] is not None else gamma

        def rank(one: Measurement) -> tuple[bool, bool, str]:
            at = one.gamma, one.phase
            return at == (served, phase), at == (gamma, phase), one.measured_at

        return max((one for one in measured if one.quantization == quantization), key=rank, default=None)

    def _measurements(self, db: sqlite3.Connection, digest: str) -> list[Measurement]:
        query = f"select {', '.join(_MEASURED)} from measurement where digest = ? order by quantization, measured_at"
        return [_read_measurement(row) for row in db.execute(query, (digest,))]

    def certificate(self, revision: Revision, info: MaskInfo, quantization: str | None = None) -> Certificate:
        """The certificate measured here on a base of this quantisation, or else the one that the file claims, of
        whatever quantisation; `info` is the file's.
        """
        if measured := self.find_measurement(revision, info, quantization):
            return Certificate(measured.certificate, "measured", measured)
        if not info.certificate:
            return Certificate({}, None)
        verdict = dict.fromkeys({"passed", "verdict"} & {"passed", *info.certificate})
        claimed = {name: info.certificate.get(name) for name in verdict}
        return Certificate({**info.certificate, **verdict, "claimed": claimed}, "claimed")

    def resolve(self, reference: str) -> Revision:
        """The current revision of `name`, or the one of `name@digest-prefix`; the name may be an alias."""
        name, prefix = split_reference(reference)
        with self.database.read() as db:
            name = self._real(db, name)
            return self._pick(self._history(db, name), prefix, reference) if prefix else self._get(db, name)

    def watch(self) -> Watch:
        """A watch for changes of the registry by any process."""
        return self.database.watch()

    def names(self) -> list[Revision]:
        """The current revision of every persona, by name."""
        with self.database.read() as db:
            return [Revision(*row) for row in db.execute(f"{_CURRENT} and number = current order by g.name")]

    def history(self, name: str) -> list[Revision]:
        """All revisions of a persona, the newest first."""
        with self.database.read() as db:
            return self._history(db, self._real(db, check_name(name)))

    def rollback(self, name: str, to: int | str | None = None, expected: str | Anything | None = ANY) -> Revision:
        """Make an older revision current again: by number, by digest prefix, or the one before the current.

        `expected` is the digest that must be current, as for `publish` and every other method that takes it.
        """
        with self.database.write() as db:
            name = self._real(db, check_name(name))
            current, history = self._get(db, name), self._history(db, name)
            _compare(name, current, expected)
            if to is None:
                found = next((item for item in history if item.number < current.number), None)
            elif isinstance(to, int):
                found = next((item for item in history if item.number == to), None)
            else:
                found = self._pick(history, to, f"{name}@{to}")
            if found is None:
                raise MaskNotFound(f"{name} has no generation {to or f'before {current.number}'}")
            db.execute("update persona set current = ? where name = ?", (found.number, name))
            return found

    def alias(self, alias: str, name: str) -> None:
        """Make `alias` another name of the persona `name`; an existing alias is moved."""
        check_name(alias)
        with self.database.write() as db:
            name = self._real(db, check_name(name))
            if self._find(db, alias):
                raise MaskExists(f"{alias} is a persona, it cannot be an alias")
            db.execute("insert into alias values (?, ?) on conflict do update set name = excluded.name", (alias, name))

    def aliases(self) -> dict[str, str]:
        """Alias -> persona."""
        with self.database.read() as db:
            return dict(db.execute("select alias, name from alias order by alias").fetchall())

    def describe(self, name: str) -> Persona:
        """All that the registry records about a persona; the name may be an alias."""
        with self.database.read() as db:
            return self._describe(db, self._real(db, check_name(name)))

    def personas(self, tag: str | None = None) -> list[Persona]:
        """Every persona, or those with a tag, by name."""
        with self.database.read() as db:
            names = [row[0] for row in db.execute("select name from persona order by name")]
            found = [self._describe(db, name) for name in names]
        return [persona for persona in found if tag is None or tag in persona.tags]

    def rename(self, old: str, new: str, expected: str | Anything | None = ANY) -> Revision:
        """Rename a persona with its history, aliases and tags; MaskExists if the new name is taken."""
        check_name(new)
        with self.database.write() as db:
            old = self._real(db, check_name(old))
            _compare(old, self._get(db, old), expected)
            self._check_no_alias(db, new)
            if self._find(db, new):
                raise MaskExists(f"{new} is taken")
            db.execute("update persona set name = ? where name = ?", (new, old))
            return self._get(db, new)

    def change(
        self,
        name: str,
        *,
        gamma: float | Anything | None = ANY,
        notes: str | None = None,
        tags: Callable[[frozenset[str]], Iterable[str]] | None = None,
    ) -> Persona:
        """Set what the registry records about a persona, all of it or, if any of it is refused, nothing.

        `gamma` is the default of requests, within 0..1; None means the mask's, ANY leaves it. `notes` are free text of
        at most 10,000 characters. `tags` gives the new tags, spelled like names, from the old ones.
        """
        if gamma is not None and gamma is not ANY and not 0 <= gamma <= 1:
            raise InvalidMaskValue(f"gamma {gamma!r:.40} is not within 0..1")
        _check_notes(notes or "")
        with self.database.write() as db:
            name = self._real(db, check_name(name))
            if gamma is not ANY:
                db.execute("update persona set gamma = ? where name = ?", (gamma, name))
            if notes is not None:
                db.execute("update persona set notes = ? where name = ?", (notes, name))
            if tags is not None:
                new = [check_name(tag) for tag in dict.fromkeys(tags(frozenset(self._describe(db, name).tags)))]
                db.execute("delete from tag where name = ?", (name,))
                db.executemany("insert into tag values (?, ?)", [(name, tag) for tag in new])
            return self._describe(db, name)

    def served_info(self, revision: Revision, info: MaskInfo) -> MaskInfo:
        """The metadata of a revision as it is served by default: with its name, and the gamma and phase that it has
        here; `info` is that of the file, which personas with equal masks share. At another gamma or phase, the
        certificate is what was measured there on the base's own weights, or empty.
        """
        gamma, phase = revision.defaults(info)
        preferred = self.describe(revision.name).gamma
        gamma = gamma if preferred is None else preferred
        served = replace(info, persona=revision.name, gamma=gamma, phase=phase)
        if (gamma, phase) == (info.gamma, info.phase):
            return served
        measured = self.find_measurement(revision, info)
        fits = measured is not None and (measured.gamma, measured.phase) == (gamma, phase)
        return replace(served, certificate=measured.certificate if measured and fits else {})

    def pin(self, digest: str) -> None:
        """Keep a mask from being collected, with or without a name."""
        with self.database.write() as db:
            if digest not in self.store:
                raise MaskNotFound(f"no mask {digest[:16]} in the store to pin")
            db.execute("insert or ignore into pin values (?)", (digest,))

    def unpin(self, digest: str) -> None:
        """Undo `pin`."""
        with self.database.write() as db:
            if not db.execute("delete from pin where digest = ?", (check_digest(digest),)).rowcount:
                raise MaskNotFound(f"{digest[:16]} is not pinned")

    def find_pin(self, prefix: str) -> str:
        """The pinned digest that begins so, for pins whose names are gone. `MaskNotFound` unless there is one."""
        found = [digest for digest in self.pins() if digest.startswith(prefix)]
        if len(found) != 1:
            raise MaskNotFound(f"{len(found)} pinned masks begin with {prefix:.80}")
        return found[0]

    def pins(self) -> frozenset[str]:
        """The pinned digests."""
        with self.database.read() as db:
            return frozenset(row[0] for row in db.execute("select digest from pin"))

    def references(self) -> list[tuple[str, str]]:
        """Everything that refers to a mask: (what, digest), from revisions and pins."""
        with self.database.read() as db:
            return self._references(db)

    @contextmanager
    def referred(self) -> Iterator[frozenset[str]]:
        """The digests that something refers to; nothing can be published or pinned until the block ends."""
        with self.database.write() as db:
            yield frozenset(digest for _, digest in self._references(db))

    def _references(self, db: sqlite3.Connection) -> list[tuple[str, str]]:
        revisions = db.execute("select name, number, digest from generation order by name, number").fetchall()
        pins = db.execute("select digest from pin order by digest").fetchall()
        found = [(f"{name} generation {number}", digest) for name, number, digest in revisions]
        return found + [("pin", digest) for (digest,) in pins]

    def trim(self, name: str, keep: int) -> list[Revision]:
        """Delete all but the newest `keep` revisions of a persona, never the current one; return the deleted ones."""
        with self.database.write() as db:
            name = self._real(db, check_name(name))
            current = self._get(db, name)
            gone = [item for item in self._history(db, name)[max(keep, 0) :] if item != current]
            numbers = [(name, item.number) for item in gone]
            db.executemany("delete from generation where name = ? and number = ?", numbers)
            return gone

    def remove(self, name: str, expected: str | Anything | None = ANY) -> None:
        """Delete a persona with its history and aliases, or an alias alone. The masks stay until they are collected."""
        check_name(name)
        with self.database.write() as db:
            if expected is not ANY:
                _compare(name, self._find(db, name), expected)
            gone = db.execute("delete from alias where alias = ?", (name,)).rowcount
            gone += db.execute("delete from persona where name = ?", (name,)).rowcount
            if not gone:
                raise MaskNotFound(f"no persona {name}")

    def _append(
        self, db: sqlite3.Connection, name: str, digest: str, gamma: float | None, phase: Phase | None
    ) -> Revision:
        last = db.execute("select coalesce(max(number), 0) from generation where name = ?", (name,)).fetchone()[0]
        made = Revision(name, digest, last + 1, now(), gamma, phase)
        upsert = (
            "insert into persona (name, current) values (?, ?) on conflict do update set current = excluded.current"
        )
        db.execute(upsert, (name, made.number))
        db.execute(
            "insert into generation values (?, ?, ?, ?, ?, ?)",
            (name, made.number, digest, made.created_at, gamma, phase),
        )
        return made

    def _describe(self, db: sqlite3.Connection, name: str) -> Persona:
        current = self._get(db, name)
        gamma, notes = db.execute("select gamma, notes from persona where name = ?", (name,)).fetchone()
        aliases = tuple(row[0] for row in db.execute("select alias from alias where name = ? order by alias", (name,)))
        tags = tuple(row[0] for row in db.execute("select tag from tag where name = ? order by tag", (name,)))
        pinned = db.execute("select 1 from pin where digest = ?", (current.digest,)).fetchone() is not None
        return Persona(name, current, aliases, tags, gamma, notes, pinned)

    def _find(self, db: sqlite3.Connection, name: str) -> Revision | None:
        row = db.execute(f"{_CURRENT} and number = current where g.name = ?", (name,)).fetchone()
        return Revision(*row) if row else None

    def _get(self, db: sqlite3.Connection, name: str) -> Revision:
        found = self._find(db, name)
        if not found:
            raise MaskNotFound(f"no persona {name}")
        return found

    def _history(self, db: sqlite3.Connection, name: str) -> list[Revision]:
        rows = db.execute(f"{_CURRENT} where g.name = ? order by number desc", (name,))
        return [Revision(*row) for row in rows]

    def _pick(self, history: list[Revision], prefix: str, reference: str) -> Revision:
        """The newest revision whose digest has a prefix; two different digests are ambiguous."""
        found = [item for item in history if item.digest.startswith(prefix)]
        if not found:
            raise MaskNotFound(f"no generation {reference}")
        if len({item.digest for item in found}) > 1:
            raise MaskNotFound(f"{reference} means {len(found)} generations, give more digits")
        return found[0]

    def _real(self, db: sqlite3.Connection, name: str) -> str:
        """The persona that a name or an alias stands for."""
        row = db.execute("select name from alias where alias = ?", (name,)).fetchone()
        real: str = row[0] if row else name
        self._get(db, real)
        return real

    def _check_no_alias(self, db: sqlite3.Connection, name: str) -> None:
        row = db.execute("select name from alias where alias = ?", (name,)).fetchone()
        if row:
            raise MaskExists(f"{name} is an alias of {row[0]}")


def _check_notes(notes: str) -> None:
    if len(notes) > NOTES_LIMIT:
        raise InvalidMaskValue(f"notes of {len(notes)} characters, the limit is {NOTES_LIMIT}")
    if any("\ud800" <= character <= "\udfff" for character in notes):
        raise InvalidMaskValue("notes hold half of a surrogate pair, which is not a character")


def _read_measurement(row: tuple[Any, ...]) -> Measurement:
    digest, certificate, gamma, phase, data, measured_at, quantization = row
    figures, counts = (strictjson.parse(text, "a measurement") for text in (certificate, data))
    return Measurement(digest, figures, gamma, phase, counts, measured_at, quantization or None)


def _identify(copy: Signable) -> str:
    """A digest of a copy's tensors and metadata, without its signature."""
    return hashlib.sha256(message(copy, "everything")).hexdigest()


def _compare(name: str, current: Revision | None, expected: str | Anything | None) -> None:
    """Raise MaskConflict unless the expected digest is current."""
    actual = current.digest if current else None
    if expected is not ANY and expected != actual:
        wanted, found = (value[:16] if value else "nothing" for value in (expected, actual))
        raise MaskConflict(f"{name}: expected {wanted} to be current, it is {found}", actual)
