"""Resolves references to personas, with one read of the registry per reference and state of the registry."""

from __future__ import annotations

import asyncio

from maskstore import Registry, Revision


class RegistryCache:
    """The resolved references since the last change of the registry. Misses are not cached, so that the cache is never
    larger than the registry. For the event loop's thread only.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._watch = registry.watch()
        self._state: tuple[int, ...] | None = None
        self._resolved: dict[str, tuple[Revision, float | None]] = {}  # in this state

    async def resolve(self, reference: str) -> tuple[Revision, float | None]:
        """The revision, and the persona's gamma, which overrides the revision's unless it is None.

        Reads in a thread. Raises as `Registry.resolve` does.
        """
        state = self._watch.look()
        if state is None or state != self._state:
            self._state, self._resolved = state, {}
        resolved = self._resolved  # a read that overlaps a change goes into the dictionary of the old state
        if reference not in resolved:
            resolved[reference] = await asyncio.to_thread(self._read, reference)
        return resolved[reference]

    def close(self) -> None:
        """Close the connection to the registry."""
        self._watch.close()

    def _read(self, reference: str) -> tuple[Revision, float | None]:
        revision = self._registry.resolve(reference)
        return revision, self._registry.describe(revision.name).gamma
