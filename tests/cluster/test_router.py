"""Which replica a request goes to: affinity to personas, spilling by the length of queues, and jobs."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from masquerade.app import describe
from masquerade.cluster.ingress import JOBS, find_affinity
from masquerade.cluster.router import SLACK, Affinity, Candidate, rank
from masquerade.http.dependencies import find_job_service

PERSONAS = [f"persona-{number}" for number in range(400)]


def fleet(count: int, **queues: int) -> list[Candidate]:
    return [Candidate(f"r{number}", queues.get(f"r{number}", 0)) for number in range(count)]


def choose(candidates: list[Candidate], persona: str | None) -> Candidate:
    """What Ray takes: the shortest queue of the first group."""
    return min(rank(candidates, Affinity(persona))[0], key=lambda one: one.queue)


def test_requests_that_arrive_together_agree_and_personas_spread() -> None:
    candidates = fleet(4)
    homes = Counter()
    for persona in PERSONAS:
        shuffled = random.Random(persona).sample(candidates, 4)
        assert choose(shuffled, persona) == choose(candidates, persona)
        homes[choose(candidates, persona).name] += 1
    assert min(homes.values()) > 60  # of 100 on average


def test_few_personas_move_when_a_replica_joins() -> None:
    moved = [choose(fleet(4), persona) != choose(fleet(5), persona) for persona in PERSONAS]
    assert 0.1 < sum(moved) / len(moved) < 0.3  # a fifth


def test_a_resident_persona_draws_its_requests() -> None:
    for resident in range(4):
        candidates = fleet(4)
        candidates[resident] = Candidate(f"r{resident}", SLACK, frozenset({"grumpy"}))
        assert choose(candidates, "grumpy").name == f"r{resident}"


def test_a_long_queue_spills_to_one_other_replica_and_all_are_tried_in_the_end() -> None:
    candidates = [Candidate("r0", SLACK + 1, frozenset({"grumpy"})), *fleet(4)[1:]]
    first, last = rank(candidates, Affinity("grumpy"))
    assert len(first) == 1
    assert first[0].name != "r0"
    assert set(last) == set(candidates)


def test_two_residents_share() -> None:
    both = [Candidate("r0", 3, frozenset({"grumpy"})), Candidate("r1", 1, frozenset({"grumpy"})), Candidate("r2", 0)]
    assert choose(both, "grumpy").name == "r1"


def test_no_load_of_one_persona_leaves_a_replica_idle() -> None:
    queues = {f"r{number}": 0 for number in range(4)}
    resident: set[str] = set()
    for _ in range(400):
        candidates = [
            Candidate(name, queue, frozenset({"popular"} if name in resident else ())) for name, queue in queues.items()
        ]
        chosen = choose(candidates, "popular").name
        queues[chosen] += 1
        resident.add(chosen)
    assert max(queues.values()) - min(queues.values()) <= SLACK + 1


def test_a_name_that_is_no_text_is_ranked_like_any_other() -> None:
    persona = find_affinity(make_scope("POST", "/v1/completions"), b'{"persona": "\\ud800"}').persona
    assert persona == "\ud800"
    near, every = rank(fleet(4), Affinity(persona))
    assert len(near) == 1
    assert set(every) == set(fleet(4))


def test_names_keep_their_order_of_replicas() -> None:
    """Ingresses of two versions, during an upgrade, agree."""
    order = rank(fleet(4), Affinity("grumpy"))[1]
    assert [one.name for one in order] == ["r0", "r3", "r2", "r1"]


def test_the_base_goes_anywhere() -> None:
    assert rank(fleet(3), Affinity()) == [fleet(3)]


def test_jobs_go_to_the_replica_that_runs_them() -> None:
    candidates = [Candidate("r0", runs_jobs=False), Candidate("r1", queue=100), Candidate("r2", runs_jobs=False)]
    assert rank(candidates, Affinity(needs_jobs=True)) == [[candidates[1]]]
    without = [Candidate("r0", runs_jobs=False)]
    assert rank(without, Affinity(needs_jobs=True)) == [without]  # which says where jobs run


def make_scope(method: str, path: str, *headers: tuple[bytes, bytes]) -> dict[str, object]:
    return {"type": "http", "method": method, "path": path, "headers": list(headers)}


@pytest.mark.parametrize(
    ("body", "persona"),
    [
        (b'{"model": "base:grumpy"}', "grumpy"),
        (b'{"model": "folder:v1:grumpy", "persona": "grumpy"}', "grumpy"),
        (b'{"model": "base", "persona": "grumpy@0123456789"}', "grumpy"),
        (b'{"model": "base"}', None),
        (b"[" * 100_000, None),
        (b"[1]", None),
        (b"\xff", None),
    ],
)
def test_the_persona_is_found_where_requests_name_it(body: bytes, persona: str | None) -> None:
    assert find_affinity(make_scope("POST", "/v1/chat/completions"), body) == Affinity(persona)


def test_the_header_counts_where_the_body_names_none() -> None:
    scope = make_scope("POST", "/v1/messages", (b"x-persona", b"grumpy"))
    assert find_affinity(scope, b'{"model": "base"}') == Affinity("grumpy")
    assert find_affinity(scope, b'{"model": "base:kind"}') == Affinity("kind")


def test_the_routes_of_jobs_are_those_that_depend_on_them() -> None:
    from fastapi.dependencies.models import Dependant
    from fastapi.routing import iter_route_contexts

    def needs_jobs(dependant: Dependant) -> bool:
        return any(one.call is find_job_service or needs_jobs(one) for one in dependant.dependencies)

    seen = 0
    for context in iter_route_contexts(describe().routes):
        dependant = getattr(context, "dependant", None)
        if dependant is None:
            continue
        for method in context.methods:
            path = context.path.replace("{file_id}", "f").replace("{job_id}", "j").replace("{batch_id}", "b")
            assert (JOBS.fullmatch(f"{method} {path}") is not None) == needs_jobs(dependant), f"{method} {path}"
            seen += 1
    assert seen > 30
