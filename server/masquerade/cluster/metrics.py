"""The metrics of several replicas as one text for Prometheus: each replica's own, or their sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

AMOUNTS = {  # gauges whose sum over the replicas means something; so do the sums of all counters and histograms
    "masquerade_ready",
    "masquerade_queue_requests",
    "masquerade_batch_requests",
    "masquerade_batch_capacity_requests",
    "masquerade_kv_pages",
    "masquerade_mask_bytes",
    "masquerade_mask_waiting_requests",
    "process_resident_memory_bytes",
}
Key = tuple[str, tuple[tuple[str, str], ...]]  # of a series: the name and the labels


def label(texts: Mapping[str, str]) -> bytes:
    """The metrics of each replica, given by its name, with the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            kept = families.setdefault(family.name, _copy(family))
            for sample in family.samples:
                kept.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
    return _render(families)


def add(texts: Mapping[str, str]) -> bytes:
    """The sums over the replicas: counters, histograms, and the gauges of `AMOUNTS`."""
    families: dict[str, Metric] = {}
    sums: dict[str, dict[Key, float]] = {}
    for text in texts.values():
        for family in text_string_to_metric_families(text):
            if family.type == "gauge" and family.name not in AMOUNTS:
                continue
            families.setdefault(family.name, _copy(family))
            values = sums.setdefault(family.name, {})
            for sample in family.samples:
                if not sample.name.endswith("_created"):  # a time
                    key = sample.name, tuple(sample.labels.items())
                    values[key] = values.get(key, 0.0) + sample.value
    for name, family in families.items():
        family.samples = [Sample(series, dict(labels), value) for (series, labels), value in sums[name].items()]
    return _render(families)


def _copy(family: Metric) -> Metric:
    """The family without its samples."""
    return Metric(family.name, family.documentation, family.type)


class _Families(Collector):
    def __init__(self, families: Mapping[str, Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families.values()


def _render(families: Mapping[str, Metric]) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families))
    return generate_latest(registry)
