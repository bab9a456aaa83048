"""The project's own client against the real server, and its README."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from masquerade import demo
from masquerade_client import BadRequest, Client, NotFound
from tests.contract.asking import PARTY, PERSONAS, Api
from tests.serving import Server, serve

README = Path(__file__).parents[2] / "clients" / "python" / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(name="client")
def _client(server: Server) -> Client:
    return Client(server.base_url)


def test_a_chat_is_what_raw_http_says(client: Client, api: Api) -> None:
    with client:
        reply = client.chat(PARTY, persona="introvert", temperature=0, max_tokens=48)
    assert reply.text == api.text(persona="introvert")
    assert (reply.model, reply.persona) == ("demo:introvert", "introvert")
    assert reply.generation == api.chat(persona="introvert")["generation"]


def test_every_option_is_understood(client: Client) -> None:
    with client:
        reply = client.chat(
            PARTY,
            model="demo",
            persona="introvert",
            gamma=0.2,
            phase="all",
            temperature=0.7,
            top_p=0.9,
            top_k=20,
            seed=1,
            max_tokens=5,
        )
    assert reply.usage.completion_tokens <= 5


def test_a_stream_is_a_chat_in_pieces(client: Client) -> None:
    with client:
        whole = client.chat(PARTY, persona="introvert", temperature=0)
        with client.stream(PARTY, persona="introvert", temperature=0) as stream:
            pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert (stream.reply.usage, stream.reply.generation) == (whole.usage, whole.generation)


def test_models_are_listed_by_persona(client: Client) -> None:
    with client:
        assert {model.persona for model in client.models()} == {None, *PERSONAS}


def test_it_is_ready(client: Client) -> None:
    with client:
        assert client.ready()


def test_errors_have_their_types(client: Client) -> None:
    with client:
        with pytest.raises(NotFound) as caught:
            client.chat(PARTY, persona="pirate")
        with pytest.raises(BadRequest) as refused, client.stream(PARTY, temperature=9):
            pass
    assert (caught.value.code, caught.value.param) == ("persona_not_found", "persona")
    assert refused.value.param == "temperature"


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    """A server that examples may change."""
    with serve("--model", "demo") as running:
        yield running


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_readme_runs(
    example: str, own: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, source in {"cheerful": "cheerful.train", "facts": "facts"}.items():
        lines = (demo.DATA / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()
        Path(tmp_path, f"{name}.jsonl").write_text("\n".join(lines[:20]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code = example.replace("http://127.0.0.1:8000", own.base_url).replace("Client()", f"Client({own.base_url!r})")
    exec(compile(code, str(README), "exec"), {"__name__": "example"})
    assert capsys.readouterr().out
