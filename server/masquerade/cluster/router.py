"""Chooses the replica for a request: one that has the request's persona on its device, unless its queue is too long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

SLACK = 8  # requests by which the queue of a resident replica may exceed the shortest


class Affinity(NamedTuple):
    """What the choice of a replica for a request depends on."""

    persona: str | None = None  # the name in the request; None for the base
    needs_jobs: bool = False  # whether only a replica that runs the store's jobs can answer


@dataclass(frozen=True)
class Candidate:
    """A replica, as the router knows it."""

    name: str  # unique
    queue: int = 0  # requests that it has now
    personas: frozenset[str] = frozenset()  # on its device
    runs_jobs: bool = True


def rank(candidates: Sequence[Candidate], affinity: Affinity) -> list[list[Candidate]]:
    """The candidates in groups, the first to be tried first; each candidate is in the last group or is unfit.

    A persona goes to the replicas that have it, or to its first one by rendezvous hashing (Thaler and Ravishankar,
    1998), so that requests which arrive together agree before any of them has loaded the mask. If the queues of those
    are longer than the shortest queue by more than `SLACK`, it spills to the next replica in that order.
    """
    fit = [one for one in candidates if one.runs_jobs] if affinity.needs_jobs else []
    fit = fit or [*candidates]
    if affinity.persona is None or len(fit) < 2:
        return [fit]
    order = sorted(fit, key=lambda one: _weigh(affinity.persona, one.name), reverse=True)
    homes = [one for one in order if affinity.persona in one.personas] or order[:1]
    limit = min(one.queue for one in fit) + SLACK
    near = [one for one in homes if one.queue <= limit]
    spilled = [one for one in order if one not in homes and one.queue <= limit]
    return [near or spilled[:1], order]


class PersonaRouter(RequestRouter):
    """Ray Serve's router of the replicas. The first argument of a call is its `Affinity`."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas in groups; Ray takes the one with the shortest queue of the first group that has room."""
        affinity = pending_request.args[0] if pending_request and pending_request.args else Affinity()
        if not isinstance(affinity, Affinity):
            affinity = Affinity()
        if pending_request:
            pending_request.routing_context.should_backoff = True  # the last group has every replica
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        candidates = [_describe(replica, self._replica_queue_len_cache.get) for replica in candidate_replicas]
        return [[replicas[one.name] for one in group] for group in rank(candidates, affinity)]


def _describe(replica: RunningReplica, find_queue: Callable[[Any], int | None]) -> Candidate:
    stats = replica.routing_stats
    return Candidate(
        replica.replica_id.unique_id,
        find_queue(replica.replica_id) or 0,
        frozenset(stats.get("personas", ())),
        stats.get("runs_jobs", True),
    )


def _weigh(persona: str | None, replica: str) -> bytes:
    name = f"{persona}\0{replica}".encode("utf-8", "surrogatepass")  # a client's name may have half of a pair
    return blake2b(name, digest_size=8).digest()
