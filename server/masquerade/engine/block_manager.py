"""Who holds which page of the cache, and which pages hold something worth finding again.

Knows page numbers, holders and keys. Refuses to know what a page contains: a key stands for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockManager:
    """Pages 1 to `count`; page 0 is never given to anybody.

    Every page is held by somebody, idle (held by nobody, but findable), or blank. An idle page is as good as free: the
    one that was idle longest is taken when no blank one is left.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._holders = [0] * (count + 1)
        self._blank = list(range(count, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest idle first
        self._page_of: dict[bytes, int] = {}
        self._keys_of: dict[int, list[bytes]] = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._blank) + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages that nobody holds and that can be found."""
        return len(self._idle)

    def take(self) -> int:
        """Hold a page whose content is forgotten. Only while `free` is positive."""
        page = self._blank.pop() if self._blank else self._forget()
        self._holders[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """The page published under a key. It must be held before anything else is taken."""
        return self._page_of.get(key)

    def is_idle(self, page: int) -> bool:
        """Whether a page is findable and held by nobody."""
        return page in self._idle

    def hold(self, page: int) -> None:
        """One more holder of a found page."""
        self._idle.pop(page, None)
        self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less of each page. The first released is the first to be forgotten."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._keys_of:
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def publish(self, page: int, key: bytes) -> None:
        """Make a held page findable, under one key more. A key that has a page keeps it."""
        if key not in self._page_of:
            self._page_of[key] = page
            self._keys_of.setdefault(page, []).append(key)

    def forget(self, pages: Iterable[int]) -> None:
        """Let held pages not be found any more."""
        for page in pages:
            for key in self._keys_of.pop(page, ()):
                del self._page_of[key]

    def _forget(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self.forget([page])
        return page
