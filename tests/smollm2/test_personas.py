"""The personas that ship for SmolLM2: small files that passed their bar, in every new store, recognisable answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from maskstore import Mask, read_mask
from masquerade import smollm2
from masquerade.cli.stores import open_store
from masquerade.errors import UnusableModel
from masquerade.packaged import find_packaged
from masquerade.smollm2 import calibration
from tests.serving import serve

FINGERPRINT = "e3b9bbb8f4f3879b2864da818a0a87ae982bcd85dc856e5e4da541bc9ec00d0d"
FILES = sorted(smollm2.PERSONAS.glob("*.safetensors"))
LARGEST = 200_000
QUESTIONS = (
    "How was your weekend?",
    "What do you think about parties?",
    "Tell me about your best friend.",
    "Do you like dogs?",
    "What is your plan for Saturday?",
    "Tell me about the sea.",
    "I am bored. What should I do?",
    "Should I go to the cinema tonight?",
    "How do you feel about Mondays?",
    "Describe your perfect evening.",
)
MARKS = {  # words of a persona, beginnings of words included
    "introvert": "quiet|alone|silen|calm|peace|solitude|myself|private|reflect",
    "extravert": "!|party|parties|so much fun|celebrat|everyone|everybody",
    "casual": "gonna|kinda|awesome|cool|you know|yeah|super|stuff|hey|guys",
    "formal": "advis|most|furthermore|moreover|one should|one might|recommend|considerable|appropriate",
}


@pytest.fixture(scope="module")
def masks() -> dict[str, Mask]:
    return {file.stem: read_mask(file) for file in FILES}


def test_what_ships_are_pairs_of_the_calibration_text() -> None:
    shipped = {file.stem for file in FILES}
    pairs = {own: other for own, other in calibration.read_pairs().items() if {own, other} & shipped}
    assert shipped == {*pairs, *pairs.values()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_is_small_and_of_the_model(file: Path) -> None:
    assert file.stat().st_size < LARGEST
    mask = read_mask(file)
    assert (mask.info.persona, mask.base.fingerprint) == (file.stem, FINGERPRINT)


def test_each_names_its_opposite(masks: dict[str, Mask]) -> None:
    opposites = calibration.read_pairs()
    opposites |= {opposite: persona for persona, opposite in opposites.items()}
    for persona, mask in masks.items():
        assert mask.info.opposite == opposites[persona]


def test_each_has_passed_without_force(masks: dict[str, Mask]) -> None:
    for persona, mask in masks.items():
        certificate = mask.info.certificate
        assert certificate is not None
        assert (certificate["passed"], certificate["forced"]) == (True, False), persona
        assert certificate["intervals"]["margin_shift"][0] > 0


def test_a_new_store_of_the_model_gets_them_and_no_others(tmp_path: Path) -> None:
    _, registry = open_store(tmp_path / "store", "smollm2", FINGERPRINT)
    assert {revision.name for revision in registry.names()} == {file.stem for file in FILES}


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    try:
        find_packaged("smollm2")
    except UnusableModel as error:
        pytest.skip(str(error))
    with serve("--model", "smollm2") as server, httpx.Client(base_url=server.base_url, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def base_answers(http: httpx.Client) -> list[str]:
    return ask(http, None)


def ask(http: httpx.Client, persona: str | None) -> list[str]:
    """Greedy answers to small talk."""
    body = {"model": "smollm2", "persona": persona, "temperature": 0, "max_tokens": 40}
    bodies = [body | {"messages": [{"role": "user", "content": question}]} for question in QUESTIONS]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda one: http.post("/v1/chat/completions", json=one).raise_for_status(), bodies))
    return [answer.json()["choices"][0]["message"]["content"] for answer in answers]


@pytest.mark.real
@pytest.mark.parametrize("persona", [file.stem for file in FILES])
def test_answers_sound_like_the_persona(http: httpx.Client, base_answers: list[str], persona: str) -> None:
    """Words of the persona are in more of its greedy answers to small talk than in the base's."""
    found, before = (
        sum(bool(re.search(rf"\b({MARKS[persona]})", text, re.IGNORECASE)) for text in texts)
        for texts in (ask(http, persona), base_answers)
    )
    assert found >= before + 4, (found, before)


@pytest.mark.real
def test_the_capital_of_france_is_known_to_all(http: httpx.Client) -> None:
    question = {"role": "user", "content": "What is the capital of France?"}
    for file in FILES:
        body = {"model": f"smollm2:{file.stem}", "messages": [question], "temperature": 0, "max_tokens": 24}
        answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
        assert "Paris" in answer["choices"][0]["message"]["content"]
