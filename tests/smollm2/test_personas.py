"""The personas that ship for SmolLM2: small files that passed their bar, in every new store, recognisable answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from maskstore import Mask, read_mask
from masquerade import smollm2
from masquerade.cli.stores import open_store
from masquerade.errors import UnusableModel
from masquerade.evaluate.dataset import read_examples
from masquerade.evaluate.judge import PersonaClassifier
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
PAIRS = list(calibration.read_pairs().items())
FACTS = {
    "What is the opposite of happy?": "sad",
    "How many fingers are there on one hand?": "five|5",
    "In which country are the pyramids of Giza?": "Egypt",
    "Which organ pumps blood through the body?": "heart",
    "Which planet is known as the Red Planet?": "Mars",
    "What is the chemical formula of water?": "H2O|H₂O",
    "What is the capital of Sweden?": "Stockholm",
    "How many years are there in a century?": "100|hundred",
}


@pytest.fixture(scope="module")
def masks() -> dict[str, Mask]:
    return {file.stem: read_mask(file) for file in FILES}


def test_both_sides_of_every_pair_ship() -> None:
    assert sorted(file.stem for file in FILES) == sorted(persona for pair in PAIRS for persona in pair)


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


def ask(http: httpx.Client, persona: str | None, questions: Iterable[str]) -> list[str]:
    """Greedy answers."""
    body = {"model": "smollm2", "persona": persona, "temperature": 0, "max_tokens": 40}
    bodies = [body | {"messages": [{"role": "user", "content": question}]} for question in questions]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda one: http.post("/v1/chat/completions", json=one).raise_for_status(), bodies))
    return [answer.json()["choices"][0]["message"]["content"] for answer in answers]


@pytest.mark.real
@pytest.mark.parametrize(("persona", "opposite"), PAIRS)
def test_a_classifier_tells_opposites_apart(http: httpx.Client, persona: str, opposite: str) -> None:
    """It is trained on the calibration text. Of equal answers to small talk it would be right about half."""
    texts = (read_examples(smollm2.DATA / f"{side}.train.jsonl") for side in (persona, opposite))
    classifier = PersonaClassifier(*([one.response for one in side] for side in texts))
    own, other = (
        sum(sign * classifier.score("", text) > 0 for text in ask(http, side, QUESTIONS))
        for side, sign in ((persona, 1), (opposite, -1))
    )
    assert own + other >= 1.5 * len(QUESTIONS), (own, other)


@pytest.mark.real
def test_facts_are_known_to_all(http: httpx.Client) -> None:
    """Those that the base knows; rounding alone changes its answer to one of them."""

    def find_right(persona: str | None) -> set[str]:
        said = zip(FACTS.items(), ask(http, persona, FACTS), strict=True)
        return {question for (question, fact), text in said if re.search(rf"\b({fact})\b", text, re.I)}

    known = find_right(None)
    assert len(known) >= len(FACTS) - 1, known
    lost = {file.stem: known - find_right(file.stem) for file in FILES}
    assert max(map(len, lost.values())) <= 1, lost
