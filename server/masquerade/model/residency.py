"""Which masks are on the device, by digest, and the loads that bring others there.

A load goes from disk or host memory to the device, on a loader thread: neither a request for a mask that is on the
device nor a step of the engine waits for it. Requests for one mask share one load. A request gives up by cancelling its
future; a load that nobody waits for any more is dropped.

Room is given out in bytes, in the order in which loads became ready to use it. Masks that nobody wears go first, the
least recently used before others. If that is not enough, worn ones are let go: whoever wears one goes on doing so, but
new requests for it queue up behind the load that waits for the room, so that no load waits for ever. Where such a
request would be refused, because too many wait or because it has waited too long, it gets the mask that is there.
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

LOADERS = 4  # masks that are read at once; a fifth waits for one of them
WAITING = 256  # requests that may wait for masks


@dataclass
class Loads:
    """Totals since the residency was made; read by metrics and benchmarks."""

    hits: int = 0  # asked for and on the device
    shared: int = 0  # asked for and on its way already
    misses: int = 0  # asked for and not there: each starts a load
    from_host: int = 0  # loads that needed no disk
    done: int = 0  # loads that ended well
    failed: int = 0
    evictions: int = 0  # from the device
    seconds: float = 0.0  # of loads that ended well: reading, verifying, fitting; not waiting for room


@dataclass(eq=False)
class _Kept:
    """A mask on the device. One without a hold goes when nobody wears it any more."""

    look: weakref.ref[ResidentMask]
    hold: ResidentMask | None
    nbytes: int


@dataclass(eq=False)
class _Load:
    """A mask on its way, and everybody who waits for it."""

    digest: str
    askers: set[Future[ResidentMask]] = field(default_factory=set)
    early: bool = False  # begun before anybody asked, so worth finishing without askers
    nbytes: int = 0
    mask: Mask | None = None
    worn: ResidentMask | None = None  # once there
    seconds: float = 0.0

    @property
    def abandoned(self) -> bool:
        """Whether everybody who waited has given up."""
        return not self.askers and not self.early


class Residency:
    """Masks on the device within a byte budget. Safe for several threads."""

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
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # the least recently used first
        self._sizes: dict[str, int] = {}  # bytes on the device, by digest
        self._used = 0  # bytes of what is kept or being fitted
        self._coming: dict[str, _Load] = {}
        self._queue: deque[_Load] = deque()  # ready, and waiting for room
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(LOADERS, "loader")
        self._gone: SimpleQueue[tuple[str, _Kept] | None] = SimpleQueue()
        self._watcher: threading.Thread | None = None
        self._closed = False

    def request(self, digest: str) -> Future[ResidentMask]:
        """The mask of a digest on the device: at once, or as soon as it has been loaded.

        Hold what the future gives for as long as it is worn, and no longer; cancel the future to give up. It raises
        `MaskError` if the mask cannot be read or does not fit the model, and `MaskTooLarge` if it never will; the next
        request tries again. Raises `Overloaded` if too many wait already and the mask is not on the device.
        """
        future: Future[ResidentMask] = Future()
        with self._lock:
            kept = self._kept.get(digest)
            if kept and kept.hold:
                self._kept.move_to_end(digest)
                return self._serve(future, kept.hold)
            if self._closed:
                raise NotReady("the server is stopping")
            if self.waiting >= self._limit:
                if worn := self.find(digest):
                    return self._serve(future, worn)
                raise Overloaded(f"{self.waiting} requests wait for masks, which is the limit; try again later")
            load = self._coming.get(digest)
            if load is None:
                self.loads.misses += 1
                load = _Load(digest, {future})
                self._begin(load)
            else:
                self.loads.shared += 1
                load.askers.add(future)
        future.add_done_callback(partial(self._leave, load))
        return future

    def get(self, digest: str) -> ResidentMask:
        """The same, waiting for it on the calling thread."""
        return self.request(digest).result()

    def find(self, digest: str) -> ResidentMask | None:
        """The mask if it is on the device now, also one that a load waits to replace."""
        with self._lock:
            kept = self._kept.get(digest)
            return kept.look() if kept else None

    def prefetch(self, digest: str) -> None:
        """Begin to load a mask that will be asked for soon, if that is possible now.

        Raises what says that it never will be: a `MaskError` of its header, or `MaskTooLarge`.
        """
        self._measure(digest)
        with self._lock:
            busy = self._closed or self.waiting >= self._limit or len(self._coming) >= self._limit
            if not busy and digest not in self._coming and self.find(digest) is None:
                self.loads.misses += 1
                self._begin(_Load(digest, early=True))

    def __contains__(self, digest: str) -> bool:
        """Whether a mask is on the device."""
        return digest in self._kept

    def tier(self, digest: str) -> str:
        """Where a mask is nearest: `device`, `loading`, `host` or `disk`."""
        places = (("device", self._kept), ("loading", self._coming), ("host", self.host))
        return next((name for name, place in places if digest in place), "disk")

    @property
    def nbytes(self) -> int:
        """Device bytes of the masks kept here and of those being fitted; never more than the budget."""
        return self._used

    @property
    def leaving(self) -> int:
        """Device bytes of masks that go as soon as nobody wears them, because a load waits for their room."""
        with self._lock:
            return sum(kept.nbytes for kept in self._kept.values() if not kept.hold)

    @property
    def waiting(self) -> int:
        """Requests that wait for a mask."""
        with self._lock:
            return sum(len(load.askers) for load in self._coming.values())

    def close(self) -> None:
        """Begin no more loads; whoever waits for one that has not got its room gets `NotReady`."""
        with self._lock:
            self._closed = True
            self._admit()
        self._pool.shutdown(wait=False)
        self._gone.put(None)

    def _serve(self, future: Future[ResidentMask], worn: ResidentMask) -> Future[ResidentMask]:
        self.loads.hits += 1
        future.set_result(worn)
        return future

    def _begin(self, load: _Load) -> None:
        self._coming[load.digest] = load
        self._pool.submit(self._prepare, load)

    def _leave(self, load: _Load, future: Future[ResidentMask]) -> None:
        """Forget who gave up; a load that waits for room for nobody else keeps nothing from the others."""
        if future.cancelled():
            with self._lock:
                load.askers.discard(future)
                if load.abandoned and load in self._queue:
                    self._admit()

    def _drop(self, load: _Load) -> bool:
        """Forget a load that everybody has given up; whether it was one."""
        with self._lock:
            if load.abandoned:
                del self._coming[load.digest]
            return load.abandoned

    def _prepare(self, load: _Load) -> None:
        """On a loader thread: everything that needs no room on the device."""
        if self._drop(load):
            return
        started = time.perf_counter()
        try:
            load.nbytes = self._measure(load.digest)
            load.mask = self._fetch(load.digest)
        except Exception as error:
            self._fail(load, error)
            return
        load.seconds = time.perf_counter() - started
        with self._lock:
            self._queue.append(load)
            self._admit()

    def _measure(self, digest: str) -> int:
        if digest not in self._sizes:
            with self._verified_store.open(digest) as reader:
                self._sizes[digest] = self._manager.measure(reader)
        if (nbytes := self._sizes[digest]) > self.budget:
            raise MaskTooLarge(
                f"the mask needs {nbytes} bytes on the device, and there is room for {self.budget} in all; serve with "
                "a larger --mask-bytes",
                param="persona",
            )
        return nbytes

    def _fetch(self, digest: str) -> Mask:
        if mask := self.host.find(digest):
            with self._lock:
                self.loads.from_host += 1
            return mask
        return self.host.keep(self._verified_store.read(digest))

    def _admit(self) -> None:
        """Start fitting whatever there is room for. Called with the lock held."""
        self._queue = deque(load for load in self._queue if not self._drop(load))
        while self._queue and not self._closed and self._make_room(self._queue[0]):
            self._pool.submit(self._finish, self._queue.popleft())
        while self._queue and self._closed:
            self._fail(self._queue.popleft(), NotReady("the server is stopping"))
        if not self._queue:
            for kept in self._kept.values():
                kept.hold = kept.look()

    def _make_room(self, load: _Load) -> bool:
        """Take room for a load, or let go of the worn masks in its way."""
        kept = self._kept.get(load.digest)
        if kept and (worn := kept.look()):
            kept.hold = load.worn = worn
            self._kept.move_to_end(load.digest)
            return True
        missing = self._used + load.nbytes - self.budget
        for digest, kept in list(self._kept.items()):
            if missing > 0 or not kept.look():
                missing -= self._evict(digest, kept)
        leaving = 0
        for kept in self._kept.values():
            kept.hold = kept.look() if leaving >= missing else None
            leaving += kept.nbytes
        if missing > 0:
            self._start_watching()
            return False
        self._used += load.nbytes
        return True

    def _evict(self, digest: str, kept: _Kept) -> int:
        """Drop a mask if nobody else holds it; the bytes that this frees."""
        kept.hold = None
        kept.hold = kept.look()
        if kept.hold:
            return 0
        self._forget(digest, kept)
        return kept.nbytes

    def _forget(self, digest: str, kept: _Kept) -> None:
        if self._kept.get(digest) is kept:
            del self._kept[digest]
            self._used -= kept.nbytes
            self.loads.evictions += 1

    def _start_watching(self) -> None:
        if not self._watcher:
            self._watcher = threading.Thread(target=self._watch, name="residency", daemon=True)
            self._watcher.start()

    def _watch(self) -> None:
        """Give the room of masks that were let go to whoever waits for it, as soon as nobody wears them."""
        while note := self._gone.get():
            with self._lock:
                self._forget(*note)
                self._admit()

    def _finish(self, load: _Load) -> None:
        """On a loader thread, with room for the mask."""
        started = time.perf_counter()
        try:
            worn = load.worn or self._fit(load)
        except Exception as error:
            with self._lock:
                self._used -= load.nbytes
            self._fail(load, error)
            return
        with self._lock:
            self.loads.done += 1
            self.loads.seconds += load.seconds + time.perf_counter() - started
        load.mask = load.worn = None
        for future in self._end(load):
            future.set_result(worn)
        with self._lock:
            self._admit()  # whoever waits for room may have this mask in the way

    def _fit(self, load: _Load) -> ResidentMask:
        assert load.mask is not None
        worn = self._manager.fit(load.mask)
        with self._lock:
            kept = _Kept(weakref.ref(worn), worn, worn.nbytes)
            note = load.digest, kept
            kept.look = weakref.ref(worn, lambda _: self._gone.put(note))  # may run on any thread, at any moment
            self._used += worn.nbytes - load.nbytes
            self._kept[load.digest] = kept
        return worn

    def _fail(self, load: _Load, error: Exception) -> None:
        askers = self._end(load)
        with self._lock:
            self.loads.failed += 1
            self._admit()
        load.mask = None
        for future in askers:
            future.set_exception(error)

    def _end(self, load: _Load) -> list[Future[ResidentMask]]:
        """Take a load off the list; those who still wait for it, and cannot give up any more."""
        with self._lock:
            self._coming.pop(load.digest, None)
            askers, load.askers = load.askers, set()
        return [future for future in askers if future.set_running_or_notify_cancel()]
