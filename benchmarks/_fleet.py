"""A simulation of replicas that serve personas: events, a batch that grows and shrinks, resident personas, routers.

It knows no constant of any machine. Time is in seconds. The same arguments and seed give the same result.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import numpy as np

BOUND = 1.25  # the load of a persona's home over the mean load, up to which it keeps the persona's requests
PICKER = (6, 2, 1)  # docker/gateway/picker.yaml: the weights of residency, of the queue and of the KV cache
SCRAPE = 0.5  # seconds between two looks of the picker at the replicas, as docs/gateways.md says
FAST = 0.05  # the picker's own default
EVEN = (6, 6, 3)


@dataclass(frozen=True)
class Machine:
    """What a step of one replica takes: `fixed`, and more for each row, prompt token and position of context read."""

    fixed: float
    row: float
    prefill: float
    position: float
    rows: int  # most requests in the batch
    chunk: int  # most prompt tokens of a step
    budget: int  # bytes for personas


@dataclass(frozen=True)
class Way:
    """A way to serve personas: the bytes of one, what a missing one takes, and what it adds to a step."""

    nbytes: int
    load: float = 0.0  # seconds until a missing persona is there, in which others are served
    step: float = 0.0  # seconds that a step with personas takes longer
    each: float = 0.0  # the same for each distinct persona after the first
    prompt: int = 0  # tokens before the user's, which are computed if they are missing
    alone: bool = False  # the replica has one persona at a time and serves nobody while it loads another


@dataclass
class Request:
    """A request and what became of it."""

    arrival: float
    persona: int
    prompt: int  # tokens to compute; those of a missing system prompt are added
    answer: int
    hit: bool = False
    first: float = math.nan  # when its first token came
    end: float = math.nan
    finish: int = 0  # the count of steps of its replica at which it ends
    context: int = 0


@dataclass(frozen=True)
class Load:
    """The requests of a run: Poisson arrivals, Zipf personas, exponential lengths."""

    personas: int
    alpha: float  # Zipf's exponent
    rate: float  # requests a second, of all replicas
    requests: int
    prompt: float  # mean tokens of the user's text
    answer: float  # mean tokens

    def draw(self, seed: int) -> list[Request]:
        """The requests in order of arrival."""
        random = np.random.default_rng(seed)
        arrivals = random.exponential(1 / self.rate, self.requests).cumsum()
        personas = random.choice(self.personas, self.requests, p=popularity(self.personas, self.alpha))
        prompts = np.ceil(random.exponential(self.prompt, self.requests)).astype(int)
        answers = np.ceil(random.exponential(self.answer, self.requests)).astype(int)
        drawn = zip(arrivals.tolist(), personas.tolist(), prompts.tolist(), answers.tolist(), strict=True)
        return [Request(*one) for one in drawn]


def popularity(personas: int, alpha: float) -> np.ndarray:
    """Zipf's shares of the requests, [personas], the most popular first."""
    shares = np.arange(1, personas + 1, dtype=float) ** -alpha
    return np.asarray(shares / shares.sum())


def hit_rate(shares: np.ndarray, slots: int) -> float:
    """The hit rate of an LRU cache with so many slots, by Che's approximation (Fricker et al., arXiv 1202.3974)."""
    if slots >= len(shares):
        return 1.0
    low, high = 0.0, 1.0
    while (1 - np.exp(-shares * high)).sum() < slots:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-shares * middle)).sum() < slots else (low, middle)
    return float((shares * (1 - np.exp(-shares * low))).sum())


def capacity(machine: Machine, way: Way, prompt: float, answer: float, hits: float = 1.0) -> float:
    """Requests a second that a replica with a full batch of distinct personas finishes."""
    rows = machine.rows
    context = rows * (
        way.prompt + prompt + answer
    )  # an exponential answer has its mean still before it: as many behind
    step = machine.fixed + rows * machine.row + context * machine.position + way.step + (rows - 1) * way.each
    return 1 / (answer * step / rows + (prompt + (1 - hits) * way.prompt) * machine.prefill)


class Replica:
    """One server: a queue, a batch that moves in steps, and the personas that are resident."""

    def __init__(self, machine: Machine, way: Way, events: Events) -> None:
        self.machine, self.way = machine, way
        self.slots = 1 if way.alone else max(1, machine.budget // way.nbytes)
        self.resident: OrderedDict[int, None] = OrderedDict()
        self.loading: dict[int, list[Request]] = {}
        self.load = 0  # requests here that have not ended
        self.rows: list[tuple[int, int, Request]] = []  # a heap by the step at which they end
        self.busy = 0.0
        self.made = 0  # tokens of answers
        self._events, self._order = events, count()
        self._queues: OrderedDict[int, deque[Request]] = OrderedDict()  # of the persona alone, else all under -1
        self._admitted: list[Request] = []
        self._personas: Counter[int] = Counter()  # of the batch
        self._pins: Counter[int] = Counter()  # of all requests here
        self._context = self.steps = self._run = self._version = 0
        self._start = self._step = self._loader_free = 0.0
        self._running = self._swapping = False

    @property
    def waiting(self) -> int:
        """Requests that are not in the batch."""
        return self.load - len(self.rows) - len(self._admitted)

    @property
    def has_room(self) -> bool:
        """Whether the resident personas that no request needs would make room, as `max_lora` says."""
        return sum(1 for uses in self._pins.values() if uses) < self.slots

    def touch(self, persona: int) -> bool:
        """Make the persona the last that is evicted; whether it was resident."""
        hit = persona in self.resident
        self.resident[persona] = None
        self.resident.move_to_end(persona)
        if len(self.resident) > self.slots:
            victim = next((one for one in self.resident if not self._pins[one]), None)
            if victim is not None:
                del self.resident[victim]
        return hit

    def accept(self, request: Request, now: float) -> None:
        """Queue a request, or have it wait for its persona."""
        persona = request.persona
        self.load += 1
        self._pins[persona] += 1
        request.hit = persona in self.resident
        request.context = self.way.prompt + request.prompt
        if self.way.alone:
            self._enqueue(request, now)
        elif request.hit or not self.way.load:
            if not self.touch(persona):
                request.prompt += self.way.prompt
            self._enqueue(request, now)
        elif persona in self.loading:
            self.loading[persona].append(request)
        else:
            self.loading[persona] = [request]
            self._loader_free = max(self._loader_free, now) + self.way.load
            self._events.add(self._loader_free, lambda at: self._loaded(persona, at))

    def _loaded(self, persona: int, now: float) -> None:
        self.touch(persona)
        for request in self.loading.pop(persona):
            self._enqueue(request, now)

    def _enqueue(self, request: Request, now: float) -> None:
        self._queues.setdefault(request.persona if self.way.alone else -1, deque()).append(request)
        if not self._running:
            self._begin(now)
        elif self._run > 1 and len(self.rows) < self.machine.rows:  # join at the end of the present step
            done = min(self._run, max(1, math.ceil((now - self._start) / self._step)))
            self._schedule(self._start, self._step, done)

    def _begin(self, now: float) -> None:
        """Start the next steps: one with prompts, or as many as there are until a row ends."""
        if self._swapping:
            return
        if self.way.alone and not self.rows and self._queues and next(iter(self.resident), None) not in self._queues:
            self._swap(now)
            return
        tokens = self._admit()
        rows = len(self.rows)
        self._running = rows > 0
        if not rows:
            return
        steps = 1 if self._admitted else self.rows[0][0] - self.steps
        machine, way = self.machine, self.way
        step = machine.fixed + rows * machine.row + tokens * machine.prefill
        step += (self._context + rows * steps / 2) * machine.position
        step += way.step + (len(self._personas) - 1) * way.each
        self._schedule(now, step, steps)

    def _swap(self, now: float) -> None:
        """Replace the only persona by that of the oldest queue."""
        self._swapping = True
        persona = next(iter(self._queues))

        def end(at: float) -> None:
            self._swapping = False
            self.resident.clear()
            self.resident[persona] = None
            self._begin(at)

        self.busy += self.way.load
        self._events.add(now + self.way.load, end)

    def _admit(self) -> int:
        """Move requests from the queue to the batch; the prompt tokens to compute."""
        key = next(iter(self.resident), -1) if self.way.alone else -1
        queue, tokens = self._queues.get(key, deque()), 0
        while queue and len(self.rows) < self.machine.rows and tokens < self.machine.chunk:
            request = queue.popleft()
            tokens += request.prompt
            request.finish = self.steps + request.answer
            heapq.heappush(self.rows, (request.finish, next(self._order), request))
            self._admitted.append(request)
            self._personas[request.persona] += 1
            self._context += request.context
        if not queue:
            self._queues.pop(key, None)
        return tokens

    def _schedule(self, start: float, step: float, steps: int) -> None:
        self._start, self._step, self._run = start, step, steps
        self._version += 1
        version = self._version
        self._events.add(start + steps * step, lambda at: self._advance(at) if version == self._version else None)

    def _advance(self, now: float) -> None:
        """End the present steps: every row has as many tokens more."""
        self.busy += now - self._start
        self.made += self._run * len(self.rows)
        self.steps += self._run
        self._context += self._run * len(self.rows)
        for request in self._admitted:
            request.first = now
        self._admitted = []
        while self.rows and self.rows[0][0] <= self.steps:
            request = heapq.heappop(self.rows)[2]
            request.end = now
            self.load -= 1
            self._context -= request.context + request.answer
            for counted in (self._personas, self._pins):
                counted[request.persona] -= 1
                if not counted[request.persona]:
                    del counted[request.persona]
        self._begin(now)


class Events:
    """What is to happen, in order of time."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()

    def add(self, at: float, act: Callable[[float], None]) -> None:
        """Call `act` with the time, at that time."""
        heapq.heappush(self._heap, (at, next(self._order), act))

    def run(self, until: float) -> None:
        """Everything until then."""
        while self._heap and self._heap[0][0] <= until:
            at, _, act = heapq.heappop(self._heap)
            act(at)


@dataclass
class Router:
    """What a router knows: the replicas, and for a picker what it saw of them last."""

    replicas: Sequence[Replica]
    random: np.random.Generator
    seen: list[tuple[int, float, set[int], set[int], bool]] = field(default_factory=list)
    seen_at: float = -math.inf
    turn: int = 0

    def spread(self, _: int, __: float) -> int:
        """The replica with the least load, in turn if several have it."""
        self.turn += 1
        size = len(self.replicas)
        order = ((self.turn + place) % size for place in range(size))
        return min(order, key=lambda index: self.replicas[index].load)

    def draw(self, _: int, __: float) -> int:
        """Any replica."""
        return int(self.random.integers(len(self.replicas)))

    def prefer(self, persona: int, _: float) -> int:
        """The persona's home, or the next one after it whose load is within the bound.

        Hashing with bounded loads (Mirrokni et al., arXiv 1608.01350). Nobody queues while others have room.
        """
        size = len(self.replicas)
        mean = (1 + sum(replica.load for replica in self.replicas)) / size
        bound = max(math.ceil(mean), min(math.ceil(BOUND * mean), self.replicas[0].machine.rows))
        home = _scatter(persona, size)
        return next(at for place in range(size) if self.replicas[at := (home + place) % size].load < bound)

    def pick(self, persona: int, now: float, weights: Sequence[float] = PICKER, scrape: float = SCRAPE) -> int:
        """The highest score of what the last scrape saw; any of the equals.

        Scores are those of the scorers' sources (Gateway API Inference Extension, pkg/epp/scheduling). No prompt is
        another's prefix here, so the prefix scorer has nothing to say.
        """
        if now - self.seen_at >= scrape or not self.seen:
            self.seen_at = now
            self.seen = [
                (one.waiting, len(one.rows) / one.machine.rows, set(one.resident), set(one.loading), one.has_room)
                for one in self.replicas
            ]
        least, most = min(one[0] for one in self.seen), max(one[0] for one in self.seen)
        affine, queued, cached = weights
        scores = []
        for waiting, usage, resident, loading, room in self.seen:
            affinity = 1.0 if persona in resident else 0.8 if room else 0.6 if persona in loading else 0.0
            queue = 1.0 if most == least else (most - waiting) / (most - least)
            scores.append(affine * affinity + queued * queue + cached * (1 - usage))
        best = max(scores)
        equals = [index for index, score in enumerate(scores) if score > best - 1e-9]
        return equals[int(self.random.integers(len(equals)))]


ROUTINGS: dict[str, Callable[[Router, int, float], int]] = {
    "random": Router.draw,
    "least load": Router.spread,
    "affinity": Router.prefer,
    "picker.yaml": Router.pick,
    "picker.yaml, scrapes of 50 ms": partial(Router.pick, scrape=FAST),
    "picker, weights 6, 6, 3": partial(Router.pick, weights=EVEN),
    "picker, weights 6, 6, 3, scrapes of 50 ms": partial(Router.pick, weights=EVEN, scrape=FAST),
}


def _fill(fleet: Sequence[Replica], load: Load, homes: bool, seed: int, requests: int) -> None:
    """Fill the replicas with the personas of so many requests, at their homes or anywhere: the last come first."""
    random = np.random.default_rng(seed)
    personas = random.choice(load.personas, requests, p=popularity(load.personas, load.alpha)).tolist()
    anywhere = random.integers(len(fleet), size=requests).tolist()
    room = sum(one.slots for one in fleet)
    for persona, at in zip(personas, anywhere, strict=True):
        one = fleet[_scatter(persona, len(fleet)) if homes else at]
        if persona not in one.resident and len(one.resident) < one.slots:
            one.resident[persona] = None
            one.resident.move_to_end(persona, last=False)
            room -= 1
        if not room:
            return


def _scatter(persona: int, size: int) -> int:
    """A replica for a persona, by Knuth's multiplicative hash."""
    return (persona * 2654435761 % 2**32) * size >> 32


@dataclass(frozen=True)
class Outcome:
    """What a run came to; times in seconds. Hits and percentiles are of the requests after the lead-in."""

    hits: float  # share of requests whose persona was resident
    first: tuple[float, float, float]  # to the first token: 50th, 95th and 99th percentile
    total: tuple[float, float, float]
    busy: float  # share of the time, of all replicas
    span: float  # when the last request ended
    tokens: int  # of answers, that the replicas made
    served: tuple[Request, ...]


def simulate(
    machine: Machine, way: Way, load: Load, replicas: int, routing: str, seed: int, warm: int, lead: float = 0.25
) -> Outcome:
    """Serve a load. `warm` requests fill the replicas with personas before, without taking time.

    The share `lead` of the requests is served, but not measured: queues and residents settle.
    """
    events = Events()
    fleet = [Replica(machine, way, events) for _ in range(replicas)]
    router = Router(fleet, np.random.default_rng(seed + 1))
    if not way.alone:
        _fill(fleet, load, routing not in ("random", "least load"), seed + 2, warm)
    requests = load.draw(seed)
    choose = ROUTINGS[routing]
    for request in requests:
        events.run(request.arrival)
        fleet[choose(router, request.persona, request.arrival)].accept(request, request.arrival)
    events.run(math.inf)
    span = max(request.end for request in requests)
    measured = requests[int(lead * len(requests)) :]
    return Outcome(
        sum(request.hit for request in measured) / len(measured),
        _percentiles([request.first - request.arrival for request in measured]),
        _percentiles([request.end - request.arrival for request in measured]),
        sum(one.busy for one in fleet) / (replicas * span),
        span,
        sum(one.made for one in fleet),
        tuple(requests),
    )


def _percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = np.percentile(seconds, (50, 95, 99)).tolist()
    return low, middle, high
