"""An endpoint picker after the documents of its protocol, which knows nothing of the server's code.

Metrics: "Model Server Protocol" (proposal 003 of the Gateway API Inference Extension). Scores: the READMEs of llm-d's
plugins `queue-scorer`, `kv-cache-utilization-scorer`, `lora-affinity-scorer`, `prefix-cache-scorer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

PREFIX_BLOCK = 64  # characters


@dataclass(frozen=True)
class Endpoint:
    """A model server, as its metrics describe it."""

    waiting: float
    running: float
    cache_usage: float
    block_size: int
    blocks: int
    max_adapters: int
    active: frozenset[str]
    queued: frozenset[str]


def read_endpoint(metrics: str) -> Endpoint:
    """Of several series of the adapters, the one with the latest time counts."""
    samples = [sample for family in text_string_to_metric_families(metrics) for sample in family.samples]

    def find(name: str) -> list[Sample]:
        return [sample for sample in samples if sample.name == name]

    (cache,) = find("vllm:cache_config_info")
    adapters = max(find("vllm:lora_requests_info"), key=lambda sample: sample.value).labels
    return Endpoint(
        *(
            find(f"vllm:{name}")[0].value
            for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc")
        ),
        int(cache.labels["block_size"]),
        int(cache.labels["num_gpu_blocks"]),
        int(adapters["max_lora"]),
        frozenset(_split(adapters["running_lora_adapters"])),
        frozenset(_split(adapters["waiting_lora_adapters"])),
    )


def _split(names: str) -> Iterator[str]:
    return (name.strip() for name in names.split(",") if name.strip())


@dataclass
class Picker:
    """Picks the server of each request by the weights of an `EndpointPickerConfig`."""

    config: dict[str, Any]
    servers: Sequence[httpx.Client]
    sent: list[set[str]] = field(init=False)  # beginnings of the prompts of each server

    def __post_init__(self) -> None:
        self.sent = [set() for _ in self.servers]

    def pick(self, model: str, prompt: str) -> int:
        """The place of the server with the highest weighted score, the first of equal ones."""
        endpoints = [read_endpoint(server.get("/metrics").text) for server in self.servers]
        totals = [0.0] * len(endpoints)
        for plugin in self.config["schedulingProfiles"][0]["plugins"]:
            if score := self._scorers.get(plugin["pluginRef"]):
                for place, value in enumerate(score(endpoints, model, prompt)):
                    totals[place] += plugin["weight"] * value
        place = totals.index(max(totals))
        self.sent[place].update(_beginnings(prompt))
        return place

    @property
    def _scorers(self) -> dict[str, Callable[[list[Endpoint], str, str], list[float]]]:
        return {
            "queue-scorer": _score_queues,
            "kv-cache-utilization-scorer": lambda endpoints, *_: [1 - one.cache_usage for one in endpoints],
            "lora-affinity-scorer": lambda endpoints, model, _: [_score_adapter(one, model) for one in endpoints],
            "prefix-cache-scorer": lambda _, __, prompt: [_score_prefix(sent, prompt) for sent in self.sent],
        }


def _score_queues(endpoints: list[Endpoint], *_: str) -> list[float]:
    lengths = [one.waiting for one in endpoints]
    least, most = min(lengths), max(lengths)
    return [1.0 if most == least else (most - length) / (most - least) for length in lengths]


def _score_adapter(endpoint: Endpoint, model: str) -> float:
    if model in endpoint.active:
        return 1.0
    if len(endpoint.active) + len(endpoint.queued) < endpoint.max_adapters:
        return 0.8
    return 0.6 if model in endpoint.queued else 0.0


def _score_prefix(sent: set[str], prompt: str) -> float:
    beginnings = _beginnings(prompt)
    return sum(one in sent for one in beginnings) / len(beginnings) if beginnings else 0.0


def _beginnings(prompt: str) -> list[str]:
    return [prompt[:end] for end in range(PREFIX_BLOCK, len(prompt) + 1, PREFIX_BLOCK)]
