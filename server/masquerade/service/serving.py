"""The served base with its engine and personas: finds, resolves and loads the persona of a request."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

from maskstore import (
    InvalidName,
    MaskError,
    MaskInfo,
    MaskMismatch,
    MaskNotFound,
    Measurement,
    Registry,
    Revision,
    Store,
)
from masquerade.engine import Engine, Phase
from masquerade.errors import InvalidValue, ModelNotFound, Overloaded, PersonaConflict, PersonaNotFound, quote
from masquerade.model import AppliedMask, Base, MaskManager, Residency, ResidentMask, find_targets
from masquerade.service.notifier import StepNotifier
from masquerade.service.registry_cache import RegistryCache
from masquerade.service.workers import Workers

_log = logging.getLogger(__name__)
MASK_SECONDS = 120.0  # most seconds that a request waits for its mask
MOST_NAMED = 8  # personas in the message of an error


class PersonaReference(NamedTuple):
    """A persona as a request names it."""

    name: str  # a name, `name@digest` or an alias
    field: str  # the field of the request


@dataclass(frozen=True)
class ResolvedPersona:
    """The persona of a request, with its mask on the device. For the base, only `model` is set."""

    model: str  # the id in the response
    persona: str | None = None
    digest: str | None = None  # of the mask
    gamma: float | None = None
    phase: Phase = "all"
    applied: AppliedMask | None = None  # None also for gamma 1


class RequestCounts:
    """Requests by mask since the server started. Safe for several threads."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, digest: str) -> None:
        """Count a request."""
        with self._lock:
            self._counts[digest] += 1

    def of(self, digest: str) -> int:
        """The requests with the mask of a digest."""
        return self._counts[digest]


@dataclass(frozen=True)
class Serving:
    """Everything that requests share."""

    base: Base
    engine: Engine
    store: Store
    registry: Registry
    residency: Residency
    manager: MaskManager
    request_counts: RequestCounts = field(default_factory=RequestCounts)
    notifier: StepNotifier = field(default_factory=StepNotifier)
    workers: Workers = field(default_factory=Workers)
    unreadable: set[str] = field(default_factory=set)  # digests that are logged
    accept_uncertified: bool = False  # serve masks that `find_warning` warns of
    warned: set[str] = field(default_factory=set)  # digests of such masks that are logged

    @cached_property
    def registry_cache(self) -> RegistryCache:
        """The resolved references of requests."""
        return RegistryCache(self.registry)

    def personas(self) -> Iterator[Revision]:
        """The current revisions of the personas that are served."""
        return filter(self._is_served, self.own_personas())

    def own_personas(self) -> Iterator[Revision]:
        """The current revisions of this base's personas, served or not; those whose masks cannot be read are logged and
        left out.
        """
        for revision in self.registry.names():
            try:
                fits = self._is_of_base(revision)
            except MaskError as error:
                if revision.digest not in self.unreadable:
                    self.unreadable.add(revision.digest)
                    _log.warning("the mask of the persona %s cannot be read: %s", revision.name, error)
                continue
            self.unreadable.discard(revision.digest)
            if fits:
                yield revision

    def fits_base(self, revision: Revision) -> bool:
        """Whether a revision's mask is for this base and served on it."""
        return self._is_of_base(revision) and self._is_served(revision)

    def _is_of_base(self, revision: Revision) -> bool:
        return self.store.summary(revision.digest).base.fingerprint == self.base.fingerprint

    def _is_served(self, revision: Revision) -> bool:
        return self.accept_uncertified or self.find_warning(revision) is None

    def find_warning(self, revision: Revision) -> str | None:
        """Why a mask of this base may do something else here than its certificate says: None, or a clause about it.

        A mask is fine on the quantisation that its maker certified it on. On another one it needs a certificate that
        this store measured there and that is no refusal.
        """
        if not self._is_elsewhere(revision):
            return None
        info = self._read_info(revision.digest)
        return self._warn(revision, self.registry.find_measurement(revision, info, self.base.quantization))

    def _is_elsewhere(self, revision: Revision) -> bool:
        info = self._read_info(revision.digest)
        return (info.quantization if info else None) != self.base.quantization

    def _warn(self, revision: Revision, measured: Measurement | None) -> str | None:
        how = self.base.quantization
        weights = f"{how} weights" if how else "unquantised weights"
        if measured is None:
            options = f"{revision.name} --quantization {how}" if how else revision.name
            return f"it was not measured on {weights}; `masquerade masks certify {options}` does that"
        if measured.certificate.get("passed") is False:
            reasons = "; ".join(measured.certificate.get("reasons", ())) or "no reason is recorded"
            return f"its certificate on {weights} is a refusal: {reasons}"
        return None

    def find_reference(self, model: str, persona: str | None, header: str | None) -> PersonaReference | None:
        """The persona that a request names; None is the base.

        `base:persona` in `model` and the field `persona` must agree; the header counts if neither names a persona.
        Raises `ModelNotFound` and `PersonaConflict`.
        """
        suffix = self._suffix(model)
        if suffix is not None and persona is not None and suffix != persona:
            raise PersonaConflict(
                f"the model {quote(model)} names the persona {quote(suffix)}, but the field `persona` says "
                f"{quote(persona)}; give one",
                param="persona",
            )
        if suffix is not None:
            return PersonaReference(suffix, "model")
        if persona is not None:
            return PersonaReference(persona, "persona")
        return PersonaReference(header, "persona") if header else None

    async def resolve_persona(
        self,
        reference: PersonaReference | None,
        gamma: float | None,
        phase: Phase | None,
        disconnected: Callable[[], Awaitable[None]],
        sees: Callable[[str], bool],
    ) -> ResolvedPersona:
        """Resolve a reference and wait until its mask is on the device. Other requests do not wait.

        `disconnected` raises when the client disconnects, which ends the wait. `sees` says whether the caller may be
        told of a persona. Raises `ModelNotFound` or
        `PersonaNotFound`, depending on the field of the reference; `InvalidValue` for a gamma or a phase without a
        persona; `MaskTooLarge` and `Overloaded` as the residency does.
        """
        if reference is None:
            for field, value in (("gamma", gamma), ("persona_phase", phase)):
                if value is not None:
                    raise InvalidValue(f"`{field}` needs a persona, and the request names none", param=field)
            return ResolvedPersona(self.base.name)
        revision, preferred = await self.find_revision(reference, sees)
        try:
            mask = await self._load(revision.digest, disconnected)
        except TimeoutError as error:
            raise Overloaded(
                f"the device has had no room for the mask of {quote(reference.name)} for {MASK_SECONDS:.0f} s; "
                "try again later",
                retry_after=10,
            ) from error
        except (MaskNotFound, MaskMismatch) as error:
            raise await self._refuse(reference, error, sees) from error
        self.request_counts.count(revision.digest)
        default_gamma, default_phase = revision.defaults(self._read_info(revision.digest) or mask.info)
        gamma = next(value for value in (gamma, preferred, default_gamma) if value is not None)
        return ResolvedPersona(
            model=f"{self.base.name}:{reference.name}",
            persona=revision.name,
            digest=revision.digest,
            gamma=gamma,
            phase=phase or default_phase,
            applied=AppliedMask(mask, gamma) if gamma < 1 else None,
        )

    async def find_revision(
        self, reference: PersonaReference, sees: Callable[[str], bool]
    ) -> tuple[Revision, float | None]:
        """The revision that a reference means, and its persona's own gamma. Raises as `resolve_persona` does."""
        try:
            revision, preferred = await self.registry_cache.resolve(reference.name)
            await self._check_certified(revision)
        except (MaskNotFound, MaskMismatch, InvalidName) as error:
            raise await self._refuse(reference, error, sees) from error
        return revision, preferred

    async def _check_certified(self, revision: Revision) -> None:
        """Raise `MaskMismatch` for a mask with a warning, or log the warning once if such masks are accepted."""
        if not self._is_elsewhere(revision):
            return
        info = self._read_info(revision.digest)
        measured = await self.registry_cache.find_measurement(revision, info, self.base.quantization)
        if (warning := self._warn(revision, measured)) is None:
            return
        if not self.accept_uncertified:
            raise MaskMismatch(f"{warning}; `masquerade serve --accept-uncertified` serves it all the same")
        if revision.digest not in self.warned:
            self.warned.add(revision.digest)
            _log.warning("the persona %s is served without a certificate: %s", revision.name, warning)

    async def _refuse(
        self, reference: PersonaReference, error: MaskError, sees: Callable[[str], bool]
    ) -> ModelNotFound | PersonaNotFound:
        kind = ModelNotFound if reference.field == "model" else PersonaNotFound
        message = await asyncio.to_thread(self._describe_missing, reference.name, error, sees)
        return kind(message, param=reference.field)

    def _describe_missing(self, reference: str, error: MaskError, sees: Callable[[str], bool]) -> str:
        """Why a reference means no persona, which personas there are, and how to build one. Reads the registry."""
        why = f"there is no persona {quote(reference)}"
        if isinstance(error, MaskMismatch):
            why = f"the persona {quote(reference)} does not fit: {error.message}"
        elif isinstance(error, InvalidName):
            why += ", which is not a name ([a-z0-9][a-z0-9._-]{0,63}, or that with @ and 8 to 64 hex digits)"
        elif "@" in reference:
            why = error.message
        visible = (revision.name for revision in self.personas() if sees(revision.name))
        names = [*islice(visible, MOST_NAMED + 1)]
        found = ", ".join(names[:MOST_NAMED]) or "none that you may use"
        more = " and more, which GET /v1/models lists" if len(names) > MOST_NAMED else ""
        return (
            f"{why}; the base {self.base.name!r} has {found}{more}; POST /v1/personas or `masquerade build` makes one"
        )

    def _read_info(self, digest: str) -> MaskInfo | None:
        """The info in the mask's file, which may be newer than the loaded one. None if the file cannot be read, which
        does not stop a loaded mask.
        """
        try:
            return self.store.summary(digest).info
        except MaskError:
            return None

    async def _load(self, digest: str, disconnected: Callable[[], Awaitable[None]]) -> ResidentMask:
        """A mask on the device, without yielding to the event loop if it is there. Raises `TimeoutError`."""
        request = self.residency.request(digest)
        if request.done():
            return request.result()
        loaded, left = asyncio.wrap_future(request), asyncio.ensure_future(disconnected())
        either: set[asyncio.Future[Any]] = {loaded, left}
        try:
            await asyncio.wait(either, timeout=MASK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if left.done():
                await left
            if loaded.done():
                return loaded.result()
            if mask := self.residency.find(digest):
                return mask
            raise TimeoutError
        finally:
            loaded.cancel()
            left.cancel()

    @property
    def largest_mask(self) -> int:
        """The upper bound for a mask of this base: bytes of the tensors of a bitmap mask over every maskable Linear."""
        linears = find_targets(self.base.model).values()
        return sum(linear.out_features * 8 * -(-linear.in_features // 64) for linear in linears)

    def _suffix(self, model: str) -> str | None:
        """The persona in the model id `base:persona`; None for the base's own id. Raises `ModelNotFound`."""
        if model == self.base.name:
            return None
        name, colon, suffix = model.rpartition(":")
        if not colon or name != self.base.name:
            raise ModelNotFound(
                f"the model {quote(model)} is not served; {self.base.name} is, and {self.base.name}:PERSONA",
                param="model",
            )
        return suffix
