"""What the names of personas mean, read from the registry once in each of its states.

Knows when the registry has changed, whoever changed it. Refuses to wait for it on the event loop.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from maskstore import Registry, Revision


class CachedRevision(NamedTuple):
    """A generation, and the registry's word on its gamma, which counts before the mask's own."""

    generation: Revision
    gamma: float | None


class RegistryCache:
    """Remembers no more than the registry holds: a name that means nothing is looked up each time. For one thread: the
    event loop's.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._watch = registry.watch()
        self._state: tuple[int, ...] | None = None
        self._known: dict[str, CachedRevision] = {}  # in this state

    async def resolve(self, reference: str) -> CachedRevision:
        """What a reference means now. Raises as `Registry.resolve` does."""
        state = self._watch.look()
        if state is None or state != self._state:
            self._state, self._known = state, {}
        known = self._known  # if the registry changes while it is read, nobody looks here again
        if reference not in known:
            known[reference] = await asyncio.to_thread(self._read, reference)
        return known[reference]

    def close(self) -> None:
        """Let go of the registry."""
        self._watch.close()

    def _read(self, reference: str) -> CachedRevision:
        generation = self._registry.resolve(reference)
        return CachedRevision(generation, self._registry.describe(generation.name).gamma)
