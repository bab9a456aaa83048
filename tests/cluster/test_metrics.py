"""The metrics of several replicas as one text: labelled, and summed."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from masquerade.cluster import metrics


def write(answers: int, seconds: float, running: int) -> str:
    registry = CollectorRegistry()
    Counter("masquerade_answers", "Answers.", ["persona"], registry=registry).labels("grumpy").inc(answers)
    Histogram("masquerade_answer_seconds", "Times.", buckets=(1, 2), registry=registry).observe(seconds)
    Gauge("masquerade_batch_requests", "Running.", registry=registry).set(running)
    Gauge("process_start_time_seconds", "A time, whose sum means nothing.", registry=registry).set(5)
    Info("masquerade", "What is served.", registry=registry).info({"base": "demo"})
    return generate_latest(registry).decode()


def read(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


TEXTS = {"one": write(3, 0.5, 2), "two": write(4, 1.5, 5)}


def test_labels_keep_every_series_apart() -> None:
    found = read(metrics.label(TEXTS))
    alone = {replica: read(text.encode()) for replica, text in TEXTS.items()}
    assert len(found) == sum(map(len, alone.values()))
    for replica, series in alone.items():
        for (name, labels), value in series.items():
            assert found[name, tuple(sorted((*labels, ("replica", replica))))] == value


def test_sums_have_the_series_of_one_replica() -> None:
    found = read(metrics.add(TEXTS))
    assert found["masquerade_answers_total", (("persona", "grumpy"),)] == 7
    assert found["masquerade_answer_seconds_count", ()] == 2
    assert found["masquerade_answer_seconds_sum", ()] == 2.0
    assert found["masquerade_answer_seconds_bucket", (("le", "1.0"),)] == 1
    assert found["masquerade_answer_seconds_bucket", (("le", "2.0"),)] == 2
    assert found["masquerade_batch_requests", ()] == 7
    assert not any(name == "process_start_time_seconds" for name, _ in found)


def test_the_types_survive() -> None:
    for text in (metrics.label(TEXTS), metrics.add(TEXTS)):
        types = {family.name: family.type for family in text_string_to_metric_families(text.decode())}
        assert types["masquerade_answers"] == "counter"
        assert types["masquerade_answer_seconds"] == "histogram"
