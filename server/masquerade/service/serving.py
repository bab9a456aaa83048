"""What a server serves: one base, an engine over it, and the personas of its store. Knows no HTTP."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from maskstore import InvalidName, MaskError, MaskInfo, MaskMismatch, MaskNotFound, Registry, Revision, Store
from masquerade.engine import Engine, Phase
from masquerade.errors import InvalidValue, ModelNotFound, Overloaded, PersonaConflict, PersonaNotFound, quote
from masquerade.model import AppliedMask, Base, MaskManager, Residency, ResidentMask, find_targets
from masquerade.service.notifier import StepNotifier
from masquerade.service.registry_cache import RegistryCache
from masquerade.service.workers import Workers

_log = logging.getLogger(__name__)
PATIENCE = 120.0  # seconds that a request waits for its mask


@dataclass(frozen=True)
class ResolvedPersona:
    """The persona a request wears, resolved; of the bare base all but `model` are empty."""

    model: str  # the id that the answer echoes
    persona: str | None = None
    generation: str | None = None  # the mask's digest
    gamma: float | None = None
    phase: Phase = "all"
    applied: AppliedMask | None = None


class RequestCounts:
    """How many requests wore a mask since the server started. Safe for several threads."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, digest: str) -> None:
        """One more."""
        with self._lock:
            self._counts[digest] += 1

    def of(self, digest: str) -> int:
        """Requests that wore the mask of a digest."""
        return self._counts[digest]


@dataclass(frozen=True)
class Serving:
    """Everything that a request needs, loaded once."""

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

    @cached_property
    def names(self) -> RegistryCache:
        """What the names of its personas mean."""
        return RegistryCache(self.registry)

    def personas(self) -> Iterator[Revision]:
        """The current revisions of this base's personas; those whose masks cannot be read are logged and left out."""
        for generation in self.registry.names():
            try:
                fits = self.fits_base(generation)
            except MaskError as error:
                if generation.digest not in self.unreadable:
                    self.unreadable.add(generation.digest)
                    _log.warning("the mask of the persona %s cannot be read: %s", generation.name, error)
                continue
            self.unreadable.discard(generation.digest)
            if fits:
                yield generation

    def fits_base(self, generation: Revision) -> bool:
        """Whether a generation's mask is for this base."""
        return self.store.summary(generation.digest).base.fingerprint == self.base.fingerprint

    def choose(self, model: str, persona: str | None, header: str | None) -> tuple[str, str] | None:
        """Which persona a request names, as (reference, field that named it); None is the bare base.

        `base:persona` in `model` and the field `persona` must agree; the header counts when both are silent. Raises
        `ModelNotFound` and `PersonaConflict`.
        """
        suffix = self._suffix(model)
        if suffix is not None and persona is not None and suffix != persona:
            raise PersonaConflict(
                f"the model {quote(model)} names the persona {quote(suffix)}, but the field `persona` says "
                f"{quote(persona)}; give one",
                param="persona",
            )
        if suffix is not None:
            return suffix, "model"
        if persona is not None:
            return persona, "persona"
        return (header, "persona") if header else None

    async def resolve_persona(
        self,
        choice: tuple[str, str] | None,
        gamma: float | None,
        phase: Phase | None,
        gone: Callable[[], Awaitable[None]],
    ) -> ResolvedPersona:
        """Resolve a choice and have its mask on the device. While one mask is loaded, nobody else waits.

        `gone` raises when the client goes away; a wait for the mask ends with that. Raises `ModelNotFound` or
        `PersonaNotFound`, depending on the field that named the persona, and `InvalidValue` for a gamma or a phase
        without a persona to apply it to; `MaskTooLarge` and `Overloaded` as the residency does.
        """
        if choice is None:
            for field, value in (("gamma", gamma), ("persona_phase", phase)):
                if value is not None:
                    raise InvalidValue(f"`{field}` needs a persona, and the request names none", param=field)
            return ResolvedPersona(self.base.name)
        reference, field = choice
        try:
            generation, preferred = await self.names.resolve(reference)
            worn = await self._fetch(generation.digest, gone)
        except TimeoutError as error:
            raise Overloaded(
                f"the mask of {quote(reference)} has not got room on the device for {PATIENCE:.0f} s; try again later",
                retry_after=10,
            ) from error
        except (MaskNotFound, InvalidName, MaskMismatch) as error:
            what = ModelNotFound if field == "model" else PersonaNotFound
            raise what(
                f"the base {self.base.name!r} has no persona {quote(reference)}: {error.message}; see GET /v1/models",
                param=field,
            ) from error
        self.request_counts.count(generation.digest)
        usual, usually = generation.defaults(self._look_up(generation.digest) or worn.info)
        strength = next(value for value in (gamma, preferred, usual) if value is not None)
        return ResolvedPersona(
            model=f"{self.base.name}:{reference}",
            persona=generation.name,
            generation=generation.digest,
            gamma=strength,
            phase=phase or usually,
            applied=AppliedMask(worn, strength) if strength < 1 else None,
        )

    def _look_up(self, digest: str) -> MaskInfo | None:
        """What the kept copy of a mask says: a better one may have come since the mask was loaded. None if it cannot be
        read; a mask that is on the device is served all the same.
        """
        try:
            return self.store.summary(digest).info
        except MaskError:
            return None

    async def _fetch(self, digest: str, gone: Callable[[], Awaitable[None]]) -> ResidentMask:
        """A mask on the device; without a turn of the event loop if it is there. Raises `TimeoutError`."""
        asked = self.residency.request(digest)
        if asked.done():
            return asked.result()
        there, left = asyncio.wrap_future(asked), asyncio.ensure_future(gone())
        either: set[asyncio.Future[Any]] = {there, left}
        try:
            await asyncio.wait(either, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            if left.done():
                await left
            if there.done():
                return there.result()
            if worn := self.residency.find(digest):
                return worn
            raise TimeoutError
        finally:
            there.cancel()
            left.cancel()

    @property
    def largest_mask(self) -> int:
        """Bytes of the tensors of a bitmap mask over every maskable Linear: no mask of this base needs more."""
        linears = find_targets(self.base.model).values()
        return sum(linear.out_features * 8 * -(-linear.in_features // 64) for linear in linears)

    def _suffix(self, model: str) -> str | None:
        """The persona in a model id: the whole id is tried first, then what follows its last colon."""
        if model == self.base.name:
            return None
        name, colon, suffix = model.rpartition(":")
        if not colon or name != self.base.name:
            raise ModelNotFound(
                f"the model {quote(model)} is not served; {self.base.name} is, and {self.base.name}:PERSONA",
                param="model",
            )
        return suffix
