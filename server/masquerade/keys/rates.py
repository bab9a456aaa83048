"""Rate limits of keys: requests and tokens a minute, counted by each process.

The library `limits` has no bucket that can be overdrawn, which charging tokens after the answer needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from masquerade.errors import RateLimited
from masquerade.keys.key import Key


class Bucket:
    """A token bucket: holds at most one minute's amount and fills evenly. It may be overdrawn."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.size = per_minute
        self._rate = per_minute / 60  # a second
        self._clock = clock
        self._level = float(per_minute)
        self._seen = clock()

    @property
    def level(self) -> float:
        """The present level; negative after an overdraft."""
        now = self._clock()
        self._level = min(self.size, self._level + (now - self._seen) * self._rate)
        self._seen = now
        return self._level

    def take(self, amount: float) -> None:
        """Draw an amount, which may exceed the level."""
        self._level = self.level - amount

    def wait(self, level: float) -> float:
        """Seconds until a level is reached."""
        return max(0.0, (level - self.level) / self._rate)


class Rates:
    """The buckets of all keys with limits. For one thread, the event loop's; `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: dict[str, dict[str, Bucket]] = {}

    def admit(self, key: Key, *, background: bool = False) -> None:
        """Count a request. Raises `RateLimited`, and counts nothing, if the minute's requests or tokens are used up.

        A request in the background is refused if less than half of them are left: the key's other requests come first.

        The tokens of a request are known only when its answer ends. So a request is admitted while any are left, and
        the next one waits until an overdraft is made up for.
        """
        buckets = self._of(key)
        for kind, bucket in buckets.items():
            if seconds := bucket.wait(max(1, bucket.size / 2) if background else 1):
                whole = max(1, math.ceil(seconds))
                raise RateLimited(
                    f"this key may use {bucket.size} {kind} a minute; try again in {whole} s", kind, retry_after=whole
                )
        if "requests" in buckets:
            buckets["requests"].take(1)

    def charge(self, key: Key, tokens: int) -> None:
        """Count the tokens that a request has used."""
        if bucket := self._of(key).get("tokens"):
            bucket.take(tokens)

    def headers(self, key: Key) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*` headers: the limit, what remains, and the time until the bucket is full."""
        found = {}
        for kind, bucket in self._of(key).items():
            found[f"x-ratelimit-limit-{kind}"] = str(bucket.size)
            found[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(bucket.level)))
            found[f"x-ratelimit-reset-{kind}"] = f"{bucket.wait(bucket.size):.3f}s"
        return found

    def _of(self, key: Key) -> dict[str, Bucket]:
        if key.rpm is None and key.tpm is None:
            return {}
        if key.id not in self._buckets:
            limits = {"requests": key.rpm, "tokens": key.tpm}
            self._buckets[key.id] = {
                kind: Bucket(limit, self._clock) for kind, limit in limits.items() if limit is not None
            }
        return self._buckets[key.id]
