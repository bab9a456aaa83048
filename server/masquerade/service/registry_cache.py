"""Resolves references to personas and finds measurements, with one read of each per state of the registry."""

from __future__ import annotations

import asyncio

from maskstore import MaskInfo, Measurement, Registry, Revision


class RegistryCache:
    """What was read since the last change of the registry. Misses are not cached, so that the cache is never larger
    than the registry. For the event loop's thread only.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._watch = registry.watch()
        self._state: tuple[int, ...] | None = None
        self._resolved: dict[str, tuple[Revision, float | None]] = {}  # in this state
        self._measured: dict[Revision, Measurement] = {}

    async def resolve(self, reference: str) -> tuple[Revision, float | None]:
        """The revision, and the persona's gamma, which overrides the revision's unless it is None.

        Reads in a thread. Raises as `Registry.resolve` does.
        """
        self._look()
        resolved = self._resolved  # a read that overlaps a change goes into the dictionary of the old state
        if reference not in resolved:
            resolved[reference] = await asyncio.to_thread(self._read, reference)
        return resolved[reference]

    async def find_measurement(
        self, revision: Revision, info: MaskInfo | None, quantization: str | None
    ) -> Measurement | None:
        """See `Registry.find_measurement`; the quantisation is the same in every call."""
        self._look()
        measured = self._measured
        if revision not in measured:
            found = await asyncio.to_thread(self._registry.find_measurement, revision, info, quantization)
            if found is None:
                return None
            measured[revision] = found
        return measured[revision]

    def _look(self) -> None:
        """Forget what was read if the registry has changed."""
        state = self._watch.look()
        if state is None or state != self._state:
            self._state, self._resolved, self._measured = state, {}, {}

    def close(self) -> None:
        """Close the connection to the registry."""
        self._watch.close()

    def _read(self, reference: str) -> tuple[Revision, float | None]:
        revision = self._registry.resolve(reference)
        return revision, self._registry.describe(revision.name).gamma
