"""Whether a key may have the persona that a name stands for: every route that takes a name, by every kind of name."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from masquerade.service.serving import Serving
from tests import world
from tests.access.conftest import Keyed, code_of
from tests.access.test_matrix import BATCHES, DECISIONS, JOBS, PERSONA

ALIASES = {"npc-pal": "npc-bob", "npc-king": "royal", "boss": "npc-bob", "crown": "royal"}
OWN, FOREIGN = frozenset({"npc-bob", "npc-pal"}), frozenset({"royal", "boss", "crown"})
KINDS = {
    "own": "npc-bob",
    "own alias": "npc-pal",
    "own alias to foreign": "npc-king",
    "foreign": "royal",
    "foreign alias": "crown",
    "foreign alias to own": "boss",
}
MANAGED = OWN  # the name and what it stands for are on the list
NAMED = OWN | {"npc-king"}  # the name is on the list
LINES = "\n".join(json.dumps({"prompt": f"question {n}?", "completion": "aaaa"}) for n in range(14)).encode()
RECIPE = {"score": "magnitude", "rho": 0.01}


@dataclass(frozen=True)
class Case:
    """One place of a route where a name may stand, as `{}`; `{base}` and `{file}` are filled in too."""

    method: str
    route: str
    path: str
    allowed: frozenset[str]
    body: Any = None
    form: Any = None
    header: bool = False
    generations: bool = False  # it takes `name@digest` as well
    taken: bool = False  # the name is given to something new: that it is taken may be said of an own one

    def __str__(self) -> str:
        return f"{self.method} {self.path} {json.dumps(self.body or self.form) if self.body or self.form else ''}"


CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
SAME = {"x-request-id": "same"}  # some errors have it in the body
SAID: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def job(suffix: str, **mask: Any) -> dict[str, Any]:
    method = {"type": "mask", "mask": RECIPE | mask}
    return {"model": "{base}", "training_file": "{file}", "suffix": suffix, "method": method}


CASES = [
    Case("POST", CHAT, CHAT, NAMED, SAID | {"model": "{base}:{}"}, generations=True),
    Case("POST", CHAT, CHAT, NAMED, SAID | {"model": "{base}", "persona": "{}"}, generations=True),
    Case("POST", CHAT, CHAT, NAMED, SAID | {"model": "{base}"}, header=True, generations=True),
    Case("POST", TEXT, TEXT, NAMED, {"model": "{base}:{}", "prompt": "hi", "max_tokens": 1}, generations=True),
    Case("POST", EMBED, EMBED, NAMED, {"model": "{base}:{}", "input": "hi"}, generations=True),
    Case("POST", EMBED, EMBED, NAMED, {"model": "{base}", "input": "hi", "persona": "{}"}, generations=True),
    Case("POST", EMBED, EMBED, NAMED, {"model": "{base}", "input": "hi"}, header=True, generations=True),
    Case("POST", RESPONSES, RESPONSES, NAMED, {"model": "{base}:{}", "input": "hi"}, generations=True),
    Case("POST", RESPONSES, RESPONSES, NAMED, {"model": "{base}", "input": "hi", "persona": "{}"}, generations=True),
    Case("POST", RESPONSES, RESPONSES, NAMED, {"model": "{base}", "input": "hi"}, header=True, generations=True),
    Case("POST", MESSAGES, MESSAGES, NAMED, SAID | {"model": "{base}:{}"}, generations=True),
    Case("POST", MESSAGES, MESSAGES, NAMED, SAID | {"model": "{base}", "persona": "{}"}, generations=True),
    Case("POST", MESSAGES, MESSAGES, NAMED, SAID | {"model": "{base}"}, header=True, generations=True),
    Case("POST", COUNT, COUNT, NAMED, SAID | {"model": "{base}:{}"}, generations=True),
    Case("POST", COUNT, COUNT, NAMED, SAID | {"model": "{base}", "persona": "{}"}, generations=True),
    Case("POST", COUNT, COUNT, NAMED, SAID | {"model": "{base}"}, header=True, generations=True),
    Case("POST", "/tokenize", "/tokenize", NAMED, {"model": "{base}:{}", "prompt": "hi"}, generations=True),
    Case("POST", "/detokenize", "/detokenize", NAMED, {"model": "{base}:{}", "tokens": [9]}, generations=True),
    Case("GET", "/v1/models/{model:path}", "/v1/models/{base}:{}", NAMED, generations=True),
    Case("GET", PERSONA, "/v1/personas/{}", NAMED, generations=True),
    Case("GET", PERSONA + "/diff/{other}", "/v1/personas/{}/diff/npc-eve", MANAGED, generations=True),
    Case("GET", PERSONA + "/diff/{other}", "/v1/personas/npc-eve/diff/{}", MANAGED, generations=True),
    Case("GET", PERSONA + "/content", "/v1/personas/{}/content", MANAGED, generations=True),
    Case("PUT", PERSONA + "/content", "/v1/personas/{}/content", MANAGED, taken=True),
    Case("PATCH", PERSONA, "/v1/personas/{}", MANAGED, {"gamma": 0.25, "notes": "mine", "tags": ["mine"]}),
    Case("DELETE", PERSONA, "/v1/personas/{}", NAMED),  # an alias goes alone
    Case("POST", PERSONA + "/rename", "/v1/personas/{}/rename", MANAGED, {"name": "npc-new"}),
    Case("POST", PERSONA + "/rename", "/v1/personas/npc-eve/rename", MANAGED, {"name": "{}"}, taken=True),
    Case("POST", PERSONA + "/rollback", "/v1/personas/{}/rollback", MANAGED, {"to": 1}),
    Case("PUT", PERSONA + "/pin", "/v1/personas/{}/pin", MANAGED, generations=True),
    Case("DELETE", PERSONA + "/pin", "/v1/personas/{}/pin", MANAGED),
    Case("PUT", "/v1/aliases/{alias}", "/v1/aliases/{}", NAMED, {"persona": "npc-eve"}, taken=True),
    Case("PUT", "/v1/aliases/{alias}", "/v1/aliases/npc-new", MANAGED, {"persona": "{}"}),
    Case("POST", "/v1/personas/compose", "/v1/personas/compose", MANAGED, {"name": "{}", "expression": "npc-eve"},
         taken=True),
    *(
        Case("POST", "/v1/personas/compose", "/v1/personas/compose", MANAGED,
             {"name": "npc-new", "expression": expression}, generations=True)
        for expression in ("{}", "npc-eve | {}", "~(npc-eve & ~{})", "{} - npc-eve")
    ),
    Case("POST", JOBS, JOBS, MANAGED, job("{}"), taken=True),
    Case("POST", JOBS, JOBS, MANAGED, job("{}", replace=True), taken=True),
    Case("POST", JOBS, JOBS, MANAGED, job("npc-new", contrast_name="{}", contrast_file="{file}"), taken=True),
    Case("POST", JOBS, JOBS, MANAGED, job("npc-new", contrast_name="{}", contrast_file="{file}", replace=True),
         taken=True),
    Case("POST", "/v1/personas", "/v1/personas", MANAGED, form={"name": "{}"}, taken=True),
    Case("POST", "/v1/personas", "/v1/personas", MANAGED, form={"name": "npc-new", "contrast_name": "{}"}, taken=True),
]  # fmt: skip
NAMELESS = {
    ("GET", "/metrics"),
    ("GET", "/v1/models"),  # of lists: tests/access/test_tenants.py
    ("GET", "/v1/personas"),
    *((method, route) for method, route in DECISIONS if route.startswith(("/v1/files", BATCHES))),
    *((method, route) for method, route in DECISIONS if route.startswith(RESPONSES + "/")),
    *((method, route) for method, route in DECISIONS if route.startswith(JOBS) and (method, route) != ("POST", JOBS)),
}


def test_every_route_that_takes_a_name_is_here() -> None:
    closed = {route for route, needed in DECISIONS.items() if needed != "open"}
    assert {(case.method, case.route) for case in CASES} | NAMELESS == closed


@pytest.fixture(scope="module")
def named(keyed: Keyed, tmp_path_factory: pytest.TempPathFactory) -> Keyed:
    """Every persona has two generations, and each kind of alias is there."""
    serving = keyed.serving
    for seed, name in enumerate(("npc-bob", "npc-eve", "royal"), 10):
        serving.registry.publish(name, serving.store.add(world.make_mask(serving.base, 0.05, seed, name)))
        serving.registry.pin(serving.registry.resolve(name).digest)
    for alias, name in ALIASES.items():
        serving.registry.alias(alias, name)
    return keyed


@pytest.fixture(scope="module")
def snapshot(named: Keyed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("registry") / "snapshot"
    copy(named.serving.registry.path, path)
    return path


def copy(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target)) as other:
        one.backup(other)


@pytest.fixture(scope="module")
def file(named: Keyed) -> str:
    sent = {"file": ("lines.jsonl", LINES)}
    found: str = named.ask("npc admin", "POST", "/v1/files", data={"purpose": "fine-tune"}, files=sent).json()["id"]
    return found


@pytest.fixture(autouse=True)
def _restore(named: Keyed, snapshot: Path) -> Iterator[None]:
    yield
    copy(snapshot, named.serving.registry.path)


def state(serving: Serving) -> Any:
    registry = serving.registry
    histories = {one.name: registry.history(one.name) for one in registry.names()}
    return registry.personas(), registry.aliases(), histories, registry.pins()


def ask(named: Keyed, file: str, case: Case, reference: str) -> Any:
    """Ask as a key with every scope and a list of `npc-*`; a job that is queued goes at once."""
    base = named.serving.base.name

    def fill(text: str) -> str:
        return text.replace("{}", reference).replace("{base}", base).replace("{file}", file)

    options: dict[str, Any] = {"headers": SAME | ({"X-Persona": reference} if case.header else {})}
    if case.body is not None:
        options["json"] = json.loads(fill(json.dumps(case.body)))
    elif case.form is not None:
        options["data"] = json.loads(fill(json.dumps(case.form))) | {"score": "magnitude", "rho": "0.01"}
        options["files"] = {part: (f"{part}.jsonl", LINES) for part in ("file", "contrast")}
    elif case.taken:
        serving = named.serving
        options["content"] = serving.store.path(serving.registry.resolve("npc-eve").digest).read_bytes()
    answer = named.ask("npc admin", case.method, fill(case.path), **options)
    if case.route in (JOBS, "/v1/personas") and answer.status_code == 200:
        named.ask("npc admin", "POST", f"{JOBS}/{answer.json()['id']}/cancel")
    return answer


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("suffix", ["", "@"], ids=["", "generation"])
@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_a_name_is_resolved_and_what_it_stands_for_is_checked(
    named: Keyed, file: str, case: Case, suffix: str, name: str
) -> None:
    registry = named.serving.registry
    real = ALIASES.get(name, name)
    generation = registry.history(real)[-1].digest[:8]
    reference = f"{name}@{generation}" if suffix else name
    before = state(named.serving)
    answer = ask(named, file, case, reference)
    if name in case.allowed:
        assert answer.status_code not in (401, 403), answer.text
        if not suffix or case.generations:
            assert answer.status_code < 300 or (case.taken and answer.status_code != 404), answer.text
        assert registry.history("royal") == before[2]["royal"]  # whatever became of the alias
        return
    assert answer.status_code in (403, 404), answer.text
    assert code_of(answer) in ("persona_forbidden", "persona_not_found", "model_not_found")
    assert state(named.serving) == before
    if name in FOREIGN:
        absent = ask(named, file, case, reference.replace(name, "nobody"))
        assert answer.text.replace(name, "nobody") == absent.text  # nor is it told whether it is there
    else:
        assert "royal" not in answer.text


def test_a_mask_cannot_be_taken_by_composing_it_through_an_alias(named: Keyed) -> None:
    """An administrator of `npc-*` has an alias that stands for another's persona."""
    serving = named.serving
    digest = serving.registry.resolve("royal").digest
    for expression in (
        "npc-king",
        f"npc-king@{digest[:8]}",
        "npc-king | npc-king",
        "~~npc-king",
        "~npc-king & npc-eve",
    ):
        body = {"name": "npc-loot", "expression": expression}
        answer = named.ask("npc admin", "POST", "/v1/personas/compose", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "persona_forbidden"), expression
    assert "npc-loot" not in [one.name for one in serving.registry.names()]


def test_who_may_have_both_names_may_do_everything_through_the_alias(named: Keyed) -> None:
    body = {"name": "npc-copy", "expression": "npc-king"}
    made = named.ask("admin", "POST", "/v1/personas/compose", json=body)
    assert (made.status_code, made.json()["generation"]) == (201, named.serving.registry.resolve("royal").digest)
