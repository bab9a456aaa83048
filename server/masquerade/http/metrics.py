"""Metrics for Prometheus. The number of values of each label is bounded, whatever clients send."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import prometheus_client
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from masquerade import __version__
from masquerade.http.gateway import OPERATIONS, GatewayCollector, ServerTimes
from masquerade.jobs import JobService
from masquerade.service.serving import Serving

PERSONAS = 20  # most personas with a label of their own
BASE, OTHER = "_base", "_other"  # not valid as names of personas
_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 5)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Histograms(NamedTuple):
    """The histograms of a persona's requests, in seconds."""

    first: Histogram
    gap: Histogram
    whole: Histogram


class Labels:
    """Gives a label each to the personas used most, up to a number; the others share one.

    A persona replaces the least used one only after twice as many uses, so that labels do not flap.
    """

    def __init__(self, most: int, drop: Callable[[str], None]) -> None:
        self._most = most
        self._drop = drop
        self._uses: Counter[str] = Counter()
        self._labelled: set[str] = set()

    def find(self, persona: str | None) -> str:
        """Count a use and return the label; None is the base."""
        if persona is None:
            return BASE
        self._uses[persona] += 1
        if persona in self._labelled:
            return persona
        if len(self._labelled) >= self._most:
            least = min(self._labelled, key=self._uses.__getitem__)
            if self._uses[persona] < 2 * self._uses[least]:
                return OTHER
            self._labelled.discard(least)
            self._drop(least)
        self._labelled.add(persona)
        return persona

    def current(self, persona: str | None) -> str:
        """The label without counting a use."""
        if persona is None:
            return BASE
        return persona if persona in self._labelled else OTHER


class Metrics:
    """The counters of requests, in a registry of their own. For the event loop's thread only.

    `gateway` adds the metrics that gateways and collectors know by other names. Raises as `GatewayCollector`.
    """

    def __init__(self, serving: Serving, find_jobs: Callable[[], JobService | None], *, gateway: bool = False) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=False)
        self._labels = Labels(PERSONAS, self._forget)

        def counter(name: str, text: str, *labels: str) -> prometheus_client.Counter:
            return prometheus_client.Counter(f"masquerade_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"masquerade_{name}", text, ("persona",), registry=registry, buckets=buckets)

        self.requests = counter("requests", "HTTP requests.", "method", "route", "status")
        self.errors = counter("errors", "Failures, also those within a stream.", "method", "code")
        self.limited = counter("rate_limited", "Requests refused by a key's limits.", "limit")
        self._answers = counter("answers", "Finished answers.", "persona", "reason")
        self._tokens = counter("tokens", "Tokens: prompt, cached (of the prompt), completion.", "persona", "kind")
        self._first = histogram("first_token_seconds", "From a request to its first token.", _FIRST)
        self._gap = histogram("inter_token_seconds", "Between two tokens of an answer.", _GAP)
        self._whole = histogram("answer_seconds", "From a request to the end of its answers.", _WHOLE)
        registry.register(_State(serving, find_jobs))
        self._server_times = ServerTimes(registry, serving.base.name) if gateway else None
        if gateway:
            registry.register(GatewayCollector(serving))
        ProcessCollector(registry=registry)

    def times_of(self, persona: str | None) -> Histograms:
        """The histograms of a request's persona; counts a use of its label."""
        label = self._labels.find(persona)
        return Histograms(self._first.labels(label), self._gap.labels(label), self._whole.labels(label))

    def count(self, persona: str | None, prompt: int, cached: int, completion: int, reasons: Sequence[str]) -> None:
        """Add the tokens of a request and the finish reasons of its answers."""
        label = self._labels.current(persona)
        for kind, tokens in (("prompt", prompt), ("cached", cached), ("completion", completion)):
            self._tokens.labels(label, kind).inc(tokens)
        for reason in reasons:
            self._answers.labels(label, reason).inc()

    def observe_operation(
        self, route: str, persona: str | None, seconds: float, first_token: float | None, tokens: float, error: str
    ) -> None:
        """Count a request in OpenTelemetry's histograms, if they are served. Parameters as of `ServerTimes.observe`."""
        if self._server_times and route in OPERATIONS:
            label = self._labels.current(persona) if persona else None
            self._server_times.observe(OPERATIONS[route], label, seconds, first_token, tokens, error)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def _forget(self, persona: str) -> None:
        for family in (self._answers, self._tokens, self._first, self._gap, self._whole):
            family.remove_by_labels({"persona": persona})
        if self._server_times:
            self._server_times.forget(persona)


class _State:
    """Values read at each scrape: the engine, its cache, the masks, the jobs and batches."""

    def __init__(self, serving: Serving, find_jobs: Callable[[], JobService | None]) -> None:
        self._serving = serving
        self._find_jobs = find_jobs
        self._devices = ", ".join(map(str, serving.base.devices))  # found by a walk through the model's modules

    def collect(self) -> Iterator[Metric]:
        """The present values."""
        serving, engine = self._serving, self._serving.engine
        info = {"version": __version__, "base": serving.base.name, "fingerprint": serving.base.fingerprint}
        yield InfoMetricFamily("masquerade", "What is served.", value=info | {"device": self._devices})
        yield _gauge("ready", "1 while the engine takes requests.", float(engine.ready))
        occupancy = engine.occupancy
        yield _gauge("queue_requests", "Requests in the queue.", occupancy.waiting)
        yield _gauge("batch_requests", "Requests in the batch.", occupancy.running)
        yield _gauge("batch_capacity_requests", "Most requests in a batch.", engine.config.max_running)
        yield _gauge("batch_personas", "Distinct masks in the batch.", occupancy.masks)
        blocks = {"held": occupancy.blocks_used, "kept": occupancy.blocks_cached, "blank": occupancy.blocks_empty}
        yield _gauges("kv_pages", "Blocks of the KV cache: held by requests, kept for reuse, blank.", "state", blocks)
        counts = engine.counts
        yield _counter("engine_steps", "Forward passes.", counts.steps)
        yield _counter("engine_failures", "Forward passes that failed.", counts.failures)
        yield _counter("engine_preemptions", "Requests whose blocks were taken for others.", counts.preemptions)
        yield _counter("engine_sampled_tokens", "Tokens of answers.", counts.sampled)
        drafts = {"accepted": counts.accepted, "rejected": counts.drafted - counts.accepted}
        yield _counters("engine_draft_tokens", "Tokens of drafts (speculative decoding).", "outcome", drafts)
        positions = {"computed": counts.computed, "cached": counts.cached}
        yield _counters("engine_positions", "Positions computed, and found in the cache.", "source", positions)
        yield from self._collect_masks()
        service = self._find_jobs()
        yield _gauges("jobs", "Builds of this store.", "state", service.table.count_jobs() if service else {})
        yield _gauges("batches", "Batches of this store.", "state", service.batches.count_batches() if service else {})

    def _collect_masks(self) -> Iterator[Metric]:
        residency = self._serving.residency
        loads, host = residency.loads, residency.host
        tiers = Counter({"device": 0, "loading": 0, "host": 0, "disk": 0})
        tiers.update(residency.tier(revision.digest) for revision in self._serving.registry.names())
        yield _gauges("personas", "Personas of the store, by where their masks are nearest.", "tier", tiers)
        nbytes = {"device": residency.nbytes, "host": host.nbytes}
        yield _gauges("mask_bytes", "Bytes of masks.", "tier", nbytes)
        yield _gauge("mask_waiting_requests", "Requests that wait for a mask.", residency.waiting)
        lookups = {"hit": loads.hits, "shared": loads.shared, "miss": loads.misses}
        yield _counters("mask_requests", "Requests for masks: on the device, loading, to be loaded.", "result", lookups)
        sources = {"host": loads.from_host, "disk": loads.from_disk}
        yield _counters("cold_loads", "Successful loads of masks onto the device.", "source", sources)
        yield _counter("cold_load_failures", "Loads that failed.", loads.failed)
        yield _counter("cold_load_seconds", "Time of successful loads, without waits for room.", loads.seconds)
        evictions = {"device": loads.evictions, "host": host.evictions}
        yield _counters("mask_evictions", "Evicted masks.", "tier", evictions)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"masquerade_{name}", text, value=value)


def _gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    return _add_values(GaugeMetricFamily(f"masquerade_{name}", text, labels=[label]), values)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"masquerade_{name}", text, value=value)


def _counters(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    return _add_values(CounterMetricFamily(f"masquerade_{name}", text, labels=[label]), values)


def _add_values(family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, float]) -> Metric:
    for key, value in values.items():
        family.add_metric([key], value)
    return family
