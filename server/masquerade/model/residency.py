"""The masks on the device, by digest, and the loads that bring others there from disk or host memory.

Loads run on loader threads: neither a request for a mask on the device nor a step of the engine waits for one. Requests
for one mask share one load. A request gives up by cancelling its future; a load without waiting requests is dropped.

A load reserves its bytes before it uses the device, in the order in which loads became ready. Unused masks are evicted
first, the least recently used before others. If that does not free enough, masks in use are marked for eviction: their
users keep them, but new requests for them queue behind the load that waits for the bytes, so every load gets its turn.
If such a request would be refused, because too many wait or because it has waited too long, it gets the resident mask.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue

from maskstore import Mask
from masquerade.errors import MaskTooLarge, NotReady, Overloaded
from masquerade.model.host_cache import HostCache
from masquerade.model.manager import MaskManager
from masquerade.model.route import ResidentMask
from masquerade.model.verified_store import VerifiedStore

LOADERS = 4  # masks that load at once
WAITING = 256  # most requests that wait for masks


@dataclass
class Loads:
    """Counters since the start, for metrics and benchmarks."""

    hits: int = 0  # requests for a mask on the device
    shared: int = 0  # requests that joined a load
    misses: int = 0  # requests that started a load
    from_host: int = 0  # successful loads from host memory
    from_disk: int = 0  # other successful loads
    failed: int = 0
    evictions: int = 0  # from the device
    seconds: float = 0.0  # reading, verifying and fitting, of successful loads; without waiting for room

    @property
    def done(self) -> int:
        """Number of successful loads."""
        return self.from_host + self.from_disk


@dataclass(eq=False)
class _CacheEntry:
    """A mask on the device. Without a strong reference it leaves the device when its last user drops it."""

    ref: weakref.ref[ResidentMask]
    strong: ResidentMask | None
    nbytes: int


@dataclass(eq=False)
class _Load:
    """A mask that is being loaded, and the requests that wait for it."""

    digest: str
    waiters: set[Future[ResidentMask]] = field(default_factory=set)
    early: bool = False  # started by `prefetch`, so finished without waiters
    nbytes: int = 0
    mask: Mask | None = None
    from_host: bool = False
    resident: ResidentMask | None = None  # if it is still on the device
    seconds: float = 0.0

    @property
    def abandoned(self) -> bool:
        """Whether no request waits for it any more."""
        return not self.waiters and not self.early


class Residency:
    """Masks on the device within a byte budget. Thread-safe."""

    def __init__(
        self,
        manager: MaskManager,
        verified_store: VerifiedStore,
        budget: int,
        host: HostCache | None = None,
        waiting: int = WAITING,
    ) -> None:
        self.budget = budget  # bytes on the device
        self.host = host or HostCache(0)
        self.loads = Loads()
        self._manager, self._verified_store, self._limit = manager, verified_store, waiting
        self._entries: OrderedDict[str, _CacheEntry] = OrderedDict()  # least recently used first
        self._sizes: dict[str, int] = {}  # bytes on the device, by digest
        self._used = 0  # bytes of masks on the device or being fitted
        self._loading: dict[str, _Load] = {}
        self._ready: deque[_Load] = deque()  # waiting for room
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(LOADERS, "loader")
        self._freed: SimpleQueue[tuple[str, _CacheEntry] | None] = SimpleQueue()
        self._evictor: threading.Thread | None = None
        self._closed = False

    def request(self, digest: str) -> Future[ResidentMask]:
        """A future of the mask on the device: done if the mask is there, else when it has been loaded.

        Keep a reference to the result while you use it, and no longer; cancel the future to give up. The future raises
        `MaskError` if the mask cannot be read or does not fit the model, and `MaskTooLarge` if it exceeds the budget;
        the next request tries again. Raises `Overloaded` if too many requests wait and the mask is not on the device.
        """
        future: Future[ResidentMask] = Future()
        with self._lock:
            entry = self._entries.get(digest)
            if entry and entry.strong:
                self._entries.move_to_end(digest)
                return self._serve(future, entry.strong)
            if self._closed:
                raise NotReady("the server is stopping")
            if self.waiting >= self._limit:
                if resident := self.find(digest):
                    return self._serve(future, resident)
                raise Overloaded(f"{self.waiting} requests wait for masks, which is the limit; try again later")
            load = self._loading.get(digest)
            if load is None:
                self.loads.misses += 1
                load = _Load(digest, {future})
                self._begin(load)
            else:
                self.loads.shared += 1
                load.waiters.add(future)
        future.add_done_callback(partial(self._cancel, load))
        return future

    def get(self, digest: str) -> ResidentMask:
        """The same, blocking the calling thread."""
        return self.request(digest).result()

    def find(self, digest: str) -> ResidentMask | None:
        """The mask if it is on the device now, even if it is marked for eviction."""
        with self._lock:
            entry = self._entries.get(digest)
            return entry.ref() if entry else None

    def prefetch(self, digest: str) -> None:
        """Start to load a mask before a request needs it, unless too many requests wait.

        Raises the `MaskError` of a header that cannot be used, or `MaskTooLarge`.
        """
        self._measure(digest)
        with self._lock:
            busy = self._closed or self.waiting >= self._limit or len(self._loading) >= self._limit
            if not busy and digest not in self._loading and self.find(digest) is None:
                self.loads.misses += 1
                self._begin(_Load(digest, early=True))

    def __contains__(self, digest: str) -> bool:
        """Whether a mask is on the device."""
        return digest in self._entries

    def tier(self, digest: str) -> str:
        """The fastest place that has a mask: `device`, `loading`, `host` or `disk`."""
        places = (("device", self._entries), ("loading", self._loading), ("host", self.host))
        return next((name for name, place in places if digest in place), "disk")

    @property
    def nbytes(self) -> int:
        """Device bytes of resident masks and of those being fitted; never more than the budget."""
        return self._used

    @property
    def evicting(self) -> int:
        """Device bytes of masks in use that are marked for eviction."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values() if not entry.strong)

    def estimate_capacity(self, largest: int) -> int:
        """About how many masks fit on the device: by the mean size of those measured so far, or by `largest` (bytes)
        before the first. At least 1, and never fewer than there are.
        """
        sizes = list(self._sizes.values()) or [largest]
        return max(1, len(self._entries), self.budget * len(sizes) // max(1, sum(sizes)))

    @property
    def has_room(self) -> bool:
        """Whether another mask can be loaded now, as far as is known: no load waits for masks in use to go."""
        return not self._ready

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a mask."""
        with self._lock:
            return sum(len(load.waiters) for load in self._loading.values())

    def close(self) -> None:
        """Start no more loads; requests whose load still waits for room get `NotReady`."""
        with self._lock:
            self._closed = True
            self._admit()
        self._pool.shutdown(wait=False)
        self._freed.put(None)

    def _serve(self, future: Future[ResidentMask], resident: ResidentMask) -> Future[ResidentMask]:
        self.loads.hits += 1
        future.set_result(resident)
        return future

    def _begin(self, load: _Load) -> None:
        self._loading[load.digest] = load
        self._pool.submit(self._prepare, load)

    def _cancel(self, load: _Load, future: Future[ResidentMask]) -> None:
        """Forget a cancelled request; if nobody else waits for its load, admit the next one."""
        if future.cancelled():
            with self._lock:
                load.waiters.discard(future)
                if load.abandoned and load in self._ready:
                    self._admit()

    def _drop(self, load: _Load) -> bool:
        """Forget a load without waiting requests; returns whether it was one."""
        with self._lock:
            if load.abandoned:
                del self._loading[load.digest]
            return load.abandoned

    def _prepare(self, load: _Load) -> None:
        """On a loader thread: the part of a load that needs no room on the device."""
        if self._drop(load):
            return
        started = time.perf_counter()
        try:
            load.nbytes = self._measure(load.digest)
            self._fetch(load)
        except Exception as error:
            self._fail(load, error)
            return
        load.seconds = time.perf_counter() - started
        with self._lock:
            self._ready.append(load)
            self._admit()

    def _measure(self, digest: str) -> int:
        if digest not in self._sizes:
            with self._verified_store.open(digest) as reader:
                self._sizes[digest] = self._manager.measure(reader)
        if (nbytes := self._sizes[digest]) > self.budget:
            raise MaskTooLarge(
                f"the mask needs {nbytes} bytes on the device, more than the budget of {self.budget}; "
                "serve with a larger --mask-bytes",
                param="persona",
            )
        return nbytes

    def _fetch(self, load: _Load) -> None:
        load.mask = self.host.find(load.digest)
        load.from_host = load.mask is not None
        if load.mask is None:
            load.mask = self.host.keep(self._verified_store.read(load.digest))

    def _admit(self) -> None:
        """Start to fit loads, in order, as far as there is room. Called with the lock held."""
        self._ready = deque(load for load in self._ready if not self._drop(load))
        while self._ready and not self._closed and self._make_room(self._ready[0]):
            self._pool.submit(self._finish, self._ready.popleft())
        if self._closed:
            stopped, self._ready = self._ready, deque()
            for load in stopped:
                self._fail(load, NotReady("the server is stopping"))
        if not self._ready:
            for entry in self._entries.values():
                entry.strong = entry.ref()

    def _make_room(self, load: _Load) -> bool:
        """Reserve room for a load, or mark masks in use for eviction and return False."""
        entry = self._entries.get(load.digest)
        if entry and (resident := entry.ref()):
            entry.strong = load.resident = resident
            self._entries.move_to_end(load.digest)
            return True
        missing = self._used + load.nbytes - self.budget
        for digest, entry in list(self._entries.items()):
            if missing > 0 or not entry.ref():
                missing -= self._evict(digest, entry)
        evicting = 0
        for entry in self._entries.values():
            entry.strong = entry.ref() if evicting >= missing else None
            evicting += entry.nbytes
        if missing > 0:
            return False
        self._used += load.nbytes
        return True

    def _evict(self, digest: str, entry: _CacheEntry) -> int:
        """Evict a mask unless it is in use; returns the freed bytes."""
        entry.strong = None
        entry.strong = entry.ref()
        if entry.strong:
            return 0
        self._remove(digest, entry)
        return entry.nbytes

    def _remove(self, digest: str, entry: _CacheEntry) -> None:
        if self._entries.get(digest) is entry:
            del self._entries[digest]
            self._used -= entry.nbytes
            self.loads.evictions += 1

    def _start_evictor(self) -> None:
        if not self._evictor:
            self._evictor = threading.Thread(target=self._run_evictor, name="residency", daemon=True)
            self._evictor.start()

    def _run_evictor(self) -> None:
        """Remove masks that were marked for eviction once their last user drops them, and admit waiting loads."""
        while freed := self._freed.get():
            with self._lock:
                self._remove(*freed)
                self._admit()

    def _finish(self, load: _Load) -> None:
        """On a loader thread: the part of a load for which room is reserved."""
        started = time.perf_counter()
        try:
            resident = load.resident or self._fit(load)
        except Exception as error:
            with self._lock:
                self._used -= load.nbytes
            self._fail(load, error)
            return
        with self._lock:
            self.loads.from_host += load.from_host
            self.loads.from_disk += not load.from_host
            self.loads.seconds += load.seconds + time.perf_counter() - started
        load.mask = load.resident = None
        for future in self._end(load):
            future.set_result(resident)
        with self._lock:
            self._admit()  # the next load may have to evict this mask

    def _fit(self, load: _Load) -> ResidentMask:
        assert load.mask is not None
        resident = self._manager.fit(load.mask)
        with self._lock:
            self._start_evictor()  # it takes the notes that evicted masks leave
            entry = _CacheEntry(weakref.ref(resident), resident, resident.nbytes)
            freed = load.digest, entry
            entry.ref = weakref.ref(resident, lambda _: self._freed.put(freed))  # may run on any thread at any time
            self._used += resident.nbytes - load.nbytes
            self._entries[load.digest] = entry
        return resident

    def _fail(self, load: _Load, error: Exception) -> None:
        waiters = self._end(load)
        with self._lock:
            self.loads.failed += 1
            self._admit()
        load.mask = None
        for future in waiters:
            future.set_exception(error)

    def _end(self, load: _Load) -> list[Future[ResidentMask]]:
        """Remove a load; returns the futures that wait for it, which can no longer be cancelled."""
        with self._lock:
            self._loading.pop(load.digest, None)
            waiters, load.waiters = load.waiters, set()
        return [future for future in waiters if future.set_running_or_notify_cancel()]
