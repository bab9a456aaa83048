"""Personas and builds on a real server, once with `Client` and once with `AsyncClient`."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from masquerade import demo
from masquerade_client import AsyncClient, BuildEvent, BuildFailed, Client, Conflict, NotFound
from tests.serving import Server, serve

QUICK: dict[str, Any] = {"score": "attribution", "rho": 0.003, "phase": "all", "force": True, "samples": 24}


class Blocking:
    """An asynchronous object, whose calls are run to their ends, and whose iterators are lists."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._target, self._loop = target, loop

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if inspect.iscoroutinefunction(found):
            return lambda *words, **named: self._loop.run_until_complete(found(*words, **named))
        if inspect.isasyncgenfunction(found):
            return lambda *words: self._loop.run_until_complete(_collect(found(*words)))
        return found if callable(found) else Blocking(found, self._loop)


async def _collect(stream: Any) -> list[Any]:
    return [one async for one in stream]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--model", "demo") as server:
        yield server


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(kind: str, server: Server) -> Iterator[Any]:
    if kind == "sync":
        with Client(server.base_url) as client:
            yield client
        return
    loop = asyncio.new_event_loop()
    client = Blocking(AsyncClient(server.base_url), loop)
    yield client
    client.aclose()
    loop.close()


def lines(name: str, count: int = 64) -> list[dict[str, Any]]:
    text = (demo.DATA / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()[:count]]


@pytest.fixture
def neutral(tmp_path: Path) -> Path:
    path = tmp_path / "neutral.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines("facts.jsonl", 16)), encoding="utf-8")
    return path


def test_a_persona_from_its_birth_to_its_end(client: Any, kind: str, tmp_path: Path) -> None:
    personas, name, mask = client.personas, f"stiff-{kind}", tmp_path / "mask"
    made = personas.compose(name, "formal | gloomy")
    assert name in [one.name for one in personas.list()]
    assert personas.update(name, gamma=0.25, notes="both", tags=["test", kind]).gamma == 0.25
    assert [one.name for one in personas.list(tag=kind)] == [name]
    assert personas.diff(name, "formal").total.both == personas.diff("formal", "formal").total.a
    assert personas.alias(f"alias-{kind}", name).aliases == (f"alias-{kind}",)
    assert personas.pin(name).pinned
    assert not personas.unpin(name).pinned
    personas.export(name, mask)
    personas.import_(name, demo.PERSONAS / "formal.safetensors", expected=made.generation)
    with pytest.raises(Conflict):
        personas.rollback(name, expected=made.generation)
    assert personas.rollback(name).generation == made.generation
    assert [one.number for one in personas.get(name).history] == [2, 1]
    renamed = personas.rename(name, f"other-{kind}")
    assert (renamed.gamma, renamed.notes) == (0.25, "both")
    assert personas.import_(name, mask).generation == made.generation
    for one in (name, f"other-{kind}"):
        personas.delete(one)
    with pytest.raises(NotFound):
        personas.get(name)


def test_a_build_from_objects_tells_what_happens(client: Any, kind: str, neutral: Path) -> None:
    sent: list[tuple[int, int]] = []
    told: list[BuildEvent] = []
    begun = client.builds.create(
        f"built-{kind}",
        (line for line in lines("formal.train.jsonl")),
        contrast=lines("casual.train.jsonl"),
        contrast_name=f"opposite-{kind}",
        neutral=neutral,
        sent=lambda *share: sent.append(share),
        **QUICK,
    )
    done = client.builds.wait(begun.id, told.append)
    assert [made.persona for made in done.made] == [f"built-{kind}", f"opposite-{kind}"]
    assert sent[-1][0] == sent[-1][1] > 0
    assert {"forward", "backward", "certify"} <= {event.stage for event in told}
    assert [event.id for event in client.builds.events(begun.id)] == [event.id for event in told]
    assert client.builds.list()[0].id == client.builds.get(begun.id).id == begun.id
    assert client.chat("Hello!", persona=f"built-{kind}", max_tokens=4).generation == done.made[0].generation


def test_a_build_from_a_system_prompt(client: Any, kind: str, neutral: Path) -> None:
    questions = [{"prompt": line["messages"][-2]["content"]} for line in lines("formal.train.jsonl", 32)]
    begun = client.builds.create(f"told-{kind}", questions, system_prompt="You are casual.", neutral=neutral, **QUICK)
    (made,) = client.builds.wait(begun.id).made
    assert client.personas.get(made.persona).built["calibration"]["system_prompt"]["text"] == "You are casual."


def test_a_cancelled_build_is_a_failure_that_has_the_build(client: Any, kind: str) -> None:
    begun = client.builds.create(f"never-{kind}", demo.DATA / "formal.train.jsonl")
    client.builds.cancel(begun.id)
    with pytest.raises(BuildFailed, match=f"the build of 'never-{kind}' was cancelled") as caught:
        client.builds.wait(begun.id)
    assert (caught.value.build.status, caught.value.build.persona) == ("cancelled", f"never-{kind}")


def test_the_server_in_numbers(client: Any) -> None:
    assert "masquerade_ready 1" in client.metrics()


def test_a_stock_client_for_the_same_server(client: Any, kind: str) -> None:
    stock = client.openai() if kind == "sync" else Blocking(client.openai(), client._loop)
    assert "demo:formal" in [model.id for model in _list_models(stock, kind)]


def _list_models(stock: Any, kind: str) -> list[Any]:
    if kind == "sync":
        return list(stock.models.list())

    async def collect() -> list[Any]:
        async with stock._target as open_:
            return [model async for model in open_.models.list()]

    found: list[Any] = stock._loop.run_until_complete(collect())
    return found


@pytest.mark.parametrize("part", [lambda client: client.personas, lambda client: client.builds])
def test_both_clients_have_the_same_methods(part: Callable[[Any], Any]) -> None:
    """With the same parameters, names and defaults."""

    def surface(of: Any) -> dict[str, list[Any]]:
        methods = {name: getattr(of, name) for name in dir(of) if not name.startswith("_")}
        return {
            name: [(p.name, p.kind, p.default) for p in signature(method)]
            for name, method in methods.items()
            if callable(method)
        }

    def signature(method: Any) -> list[inspect.Parameter]:
        return list(inspect.signature(method).parameters.values())

    assert surface(part(Client())) == surface(part(AsyncClient()))
