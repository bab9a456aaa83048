"""What gateways and collectors read: the load under vLLM's names, load reports (ORCA), OpenTelemetry's histograms."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from masquerade.engine import BLOCK_SIZE
from masquerade.errors import InvalidValue
from masquerade.service.serving import Serving

PROVIDER = "masquerade"
OPERATIONS = {  # by route, in OpenTelemetry's words
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class Load(NamedTuple):
    """The load of a server at a moment."""

    waiting: int  # requests in the queue, and those that wait for a mask
    running: int  # requests in the batch
    capacity: int  # most requests in the batch
    blocks_used: int  # of the KV cache, by requests
    blocks: int  # of the KV cache

    @property
    def cache_usage(self) -> float:
        """The share of the KV cache that requests hold, from 0 to 1; blocks kept for reuse are free."""
        return self.blocks_used / self.blocks

    @property
    def utilisation(self) -> float:
        """Requests over the capacity of the batch; above 1 if some have to wait."""
        return (self.waiting + self.running) / self.capacity


def read_load(serving: Serving) -> Load:
    """The present load."""
    occupancy = serving.engine.occupancy
    blocks = occupancy.blocks_used + occupancy.blocks_cached + occupancy.blocks_empty
    waiting = occupancy.waiting + serving.residency.waiting
    return Load(waiting, occupancy.running, serving.engine.config.max_running, occupancy.blocks_used, blocks)


def list_residents(serving: Serving) -> tuple[list[str], list[str]]:
    """The names and aliases of the personas on the device, and of those that are loading."""
    tiers = {name: serving.residency.tier(digest) for name, digest in _read_digests(serving).items()}
    return (
        [name for name, tier in tiers.items() if tier == "device"],
        [name for name, tier in tiers.items() if tier == "loading"],
    )


def _read_digests(serving: Serving) -> dict[str, str]:
    """The current digest of each name and alias."""
    digests = {revision.name: revision.digest for revision in serving.registry.names()}
    return digests | {name: digests[to] for name, to in serving.registry.aliases().items() if to in digests}


class GatewayCollector:
    """The metrics of the Gateway API Inference Extension's model server protocol, read at each scrape.

    Raises `InvalidValue` if the base's name cannot be told apart in a comma-separated list.
    """

    def __init__(self, serving: Serving) -> None:
        if "," in serving.base.name:
            raise InvalidValue(
                f"the model is called {serving.base.name!r}, and a comma separates the names in "
                "vllm:lora_requests_info; give --served-model-name without one, or leave out --gateway-metrics"
            )
        self._serving = serving
        self._largest_mask = serving.largest_mask

    def collect(self) -> Iterator[Metric]:
        """The present values."""
        load = read_load(self._serving)
        yield GaugeMetricFamily(
            "vllm:num_requests_waiting", "Requests in the queue or waiting for a mask.", value=load.waiting
        )
        yield GaugeMetricFamily("vllm:num_requests_running", "Requests in the batch.", value=load.running)
        yield GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Share of the KV cache held by requests, 0 to 1.", value=load.cache_usage
        )
        blocks = {"block_size": str(BLOCK_SIZE), "num_gpu_blocks": str(load.blocks)}
        yield _info("vllm:cache_config_info", "The KV cache: positions of a block, number of blocks.", blocks, 1)
        yield self._collect_adapters()

    def _collect_adapters(self) -> Metric:
        """Personas and aliases by residency, as the `model` of a request names them: one series, none of the past."""
        serving = self._serving
        digests = _read_digests(serving)
        resident, loading = list_residents(serving)
        shared = len(resident) - len({digests[name] for name in resident})  # names that need no room of their own
        capacity = serving.residency.estimate_capacity(self._largest_mask) + shared
        # A picker takes a full list for a server without room, but idle masks make room.
        more = len(resident) + len(loading) + serving.residency.has_room
        labels = {
            "max_lora": str(max(capacity, more)),
            "running_lora_adapters": self._list(resident),
            "waiting_lora_adapters": self._list(loading),
        }
        text = "Personas on the device, and loading; the value is the time of the scrape."
        return _info("vllm:lora_requests_info", text, labels, time.time())

    def _list(self, names: list[str]) -> str:
        return ",".join(f"{self._serving.base.name}:{name}" for name in sorted(names))


class ServerTimes:
    """OpenTelemetry's histograms of a GenAI server, in seconds, under the names of its mapping to Prometheus."""

    def __init__(self, registry: CollectorRegistry, base: str) -> None:
        self._base = base
        labels = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")

        def histogram(name: str, text: str, buckets: tuple[float, ...], *more: str) -> Histogram:
            name = f"gen_ai_server_{name}_seconds"
            return Histogram(name, text, (*labels, *more), registry=registry, buckets=buckets)

        self._duration = histogram("request_duration", "From a request to its end.", _DURATION, "error_type")
        self._first = histogram("time_to_first_token", "From a request to its first token.", _FIRST)
        self._token = histogram("time_per_output_token", "Each token after the first, on average.", _TOKEN)

    def observe(
        self, operation: str, persona: str | None, seconds: float, first_token: float | None, tokens: float, error: str
    ) -> None:
        """Count a request: its seconds in total and to its first token, and its output tokens an answer.

        `persona` is a label, None the base. Requests with an `error` count in the duration only.
        """
        labels = operation, PROVIDER, self._model(persona)
        self._duration.labels(*labels, error).observe(seconds)
        if error or first_token is None:
            return
        self._first.labels(*labels).observe(first_token)
        if tokens > 1:
            self._token.labels(*labels).observe((seconds - first_token) / (tokens - 1))

    def forget(self, persona: str) -> None:
        """Remove the series of a persona."""
        for histogram in (self._duration, self._first, self._token):
            histogram.remove_by_labels({"gen_ai_request_model": self._model(persona)})

    def _model(self, persona: str | None) -> str:
        return self._base if persona is None else f"{self._base}:{persona}"


class LoadReportMiddleware:
    """Adds the load to the responses of routes that generate, if the request asks for it in a known format (ORCA).

    It is the innermost middleware, so that a request without a valid key learns nothing.
    """

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app = app
        self._serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] not in OPERATIONS:
            await self._app(scope, receive, send)
            return
        write = FORMATS.get(Headers(scope=scope).get("endpoint-load-metrics-format", "").upper())

        async def send_with_load(message: Message) -> None:
            if write and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["endpoint-load-metrics"] = write(read_load(self._serving))
            await send(message)

        await self._app(scope, receive, send_with_load)


def _write_text(load: Load) -> str:
    named = ", ".join(f"named_metrics.{name}={value}" for name, value in _named_metrics(load).items())
    return f"TEXT application_utilization={load.utilisation}, {named}"


def _write_json(load: Load) -> str:
    report = {"application_utilization": load.utilisation, "named_metrics": _named_metrics(load)}
    return f"JSON {json.dumps(report)}"


def _named_metrics(load: Load) -> dict[str, float]:
    return {
        "kv_cache_usage_perc": load.cache_usage,
        "num_requests_waiting": float(load.waiting),
        "num_requests_running": float(load.running),
    }


FORMATS: dict[str, Callable[[Load], str]] = {"TEXT": _write_text, "JSON": _write_json}


def _info(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
