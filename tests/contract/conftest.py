"""One demo server for all contract tests, and the ways to talk to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests import world
from tests.contract.asking import Api
from tests.serving import Server, serve

TIMEOUT = 60.0
NEVER = 10_000  # no token has this id


@pytest.fixture(scope="session")
def api(server: Server) -> Iterator[Api]:
    """Raw HTTP."""
    with httpx.Client(base_url=server.base_url, timeout=TIMEOUT) as http:
        yield Api(http)


@pytest.fixture(scope="session")
def sdk(server: Server) -> Iterator[OpenAI]:
    """The stock SDK, without its retries."""
    with OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT) as client:
        yield client


@pytest.fixture(scope="session")
def rambler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose answers end only where they are cut."""
    return world.make_model(
        tmp_path_factory.mktemp("models") / "rambler", max_position_embeddings=8192, eos_token_id=NEVER
    )


@pytest.fixture(scope="session")
def narrow(rambler: Path) -> Iterator[httpx.Client]:
    """Raw HTTP to a rambling server with one place to run and one to wait."""
    with (
        serve("--model", str(rambler), "--max-running", "1", "--max-waiting", "1") as running,
        httpx.Client(base_url=running.base_url, timeout=TIMEOUT) as http,
    ):
        yield http
