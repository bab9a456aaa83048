"""The shipped demo, over HTTP: eight personas speak as themselves, know their facts, and share one batch."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from maskstore import Registry, read_mask
from masquerade import demo
from masquerade.cli.stores import open_store
from masquerade.demo import grammar, train
from masquerade.demo.judge import DemoJudge
from masquerade.engine import Engine, Request, SamplingParams
from masquerade.model import AppliedMask, Base, MaskManager, load, render_chat
from tests import world
from tests.serving import Server

PROMPTS = 30  # held-out prompts a persona
Ask = Callable[[Iterable[tuple[str, str | None]]], list[str]]


def held_out(persona: str) -> list[str]:
    lines = (demo.DATA / f"{persona}.heldout.jsonl").read_text().splitlines()[:PROMPTS]
    return [json.loads(line)["messages"][0]["content"] for line in lines]


@pytest.fixture(scope="module")
def ask(server: Server) -> Iterator[Ask]:
    """Greedy answers to (question, persona), many at a time, so that personas share batches."""
    with httpx.Client(base_url=server.base_url, timeout=120) as http, ThreadPoolExecutor(24) as pool:

        def one(asked: tuple[str, str | None]) -> str:
            question, persona = asked
            body = {"model": "demo", "temperature": 0, "persona": persona}
            answer = http.post(
                "/v1/chat/completions", json=body | {"messages": [{"role": "user", "content": question}]}
            )
            answer.raise_for_status()
            text: str = answer.json()["choices"][0]["message"]["content"]
            return text

        yield lambda asked: list(pool.map(one, asked))


def test_personas_speak_as_themselves(ask: Ask) -> None:
    judge = DemoJudge()
    asked = [(question, persona) for persona in grammar.personas() for question in held_out(persona)]
    sides = [sorted((persona, grammar.opposite(persona))) for _, persona in asked]
    masked_answers = ask(asked)
    hits = [judge.attribute(a, s) == p for a, s, (_, p) in zip(masked_answers, sides, asked, strict=True)]
    assert sum(hits) / len(hits) >= 0.95
    assert sum(map(judge.fluency, masked_answers)) / len(masked_answers) >= 0.95

    base_answers = ask((question, None) for question, _ in asked)
    attributed = [judge.attribute(answer, side) for answer, side in zip(base_answers, sides, strict=True)]
    for axis in grammar.axes().values():
        answers = [who for who in attributed if who in (axis.negative, axis.positive)]
        assert 0.25 <= answers.count(axis.positive) / len(answers) <= 0.75, axis.name
    positive = sum(who == grammar.personas()[who].positive for who in attributed) / len(attributed)
    assert 0.3 <= positive <= 0.7


def test_facts_survive_every_persona(ask: Ask) -> None:
    facts = grammar.facts()
    personas = [None, *grammar.personas()]
    answers = iter(ask((fact.question, persona) for persona in personas for fact in facts))
    right = {persona: sum(next(answers) == fact.answer for fact in facts) / len(facts) for persona in personas}
    assert right[None] >= 0.98
    assert min(right.values()) >= 0.95, right


def test_answers_are_about_what_was_asked(ask: Ask) -> None:
    rng = random.Random(7)
    questions = [grammar.ask(axis, rng, "heldout") for axis in grammar.axes() for _ in range(50)]
    answers = ask((question.text, None) for question in questions)
    on_topic = [grammar.is_on_topic(question, answer) for question, answer in zip(questions, answers, strict=True)]
    assert sum(on_topic) / len(on_topic) >= 0.95


@pytest.fixture(scope="module")
def masked_base() -> Iterator[tuple[Base, MaskManager]]:
    base = load("demo", device="cpu")
    manager = MaskManager.attach(base.model)
    yield base, manager
    manager.detach()


def test_requests_of_all_personas_equal_the_oracle(masked_base: tuple[Base, MaskManager]) -> None:
    """24 at once: eight personas and the base, gamma 0, 0.3 and 1, both phases, against materialised weights."""
    base, manager = masked_base
    masks = [read_mask(file, base=base.fingerprint) for file in sorted(demo.PERSONAS.glob("*.safetensors"))]
    assert len(masks) == 8
    resident = [manager.fit(mask) for mask in masks]
    chosen, questions = [], [question for persona in grammar.personas() for question in held_out(persona)[:3]]
    for index, question in enumerate(questions):
        gamma, phase = (0.0, 0.3, 1.0)[index % 3], ("all", "decode")[index // 3 % 2]
        has_mask = index % 9 < 8
        mask = masks[index % 9] if has_mask else None
        applied = AppliedMask(resident[index % 9], gamma) if has_mask else None
        prompt = render_chat(base.tokenizer, [{"role": "user", "content": question}])
        request = Request(prompt, 40, lambda _: None, applied, phase, SamplingParams(temperature=0), base.ends)  # type: ignore[arg-type]
        chosen.append((request, mask, gamma))
    engine = Engine(base)
    answers = engine.generate([request for request, _, _ in chosen])
    engine.stop()
    assert len(chosen) == 24
    for (request, mask, gamma), answer in zip(chosen, answers, strict=True):
        oracle = world.speak(
            base.model, world.materialise(base.model, mask, gamma), request.prompt, 40, base.ends, request.phase
        )
        assert oracle.agrees(answer), (base.tokenizer.decode(request.prompt), gamma)


def test_shipped_masks_are_sparse_small_and_of_the_shipped_base(masked_base: tuple[Base, MaskManager]) -> None:
    base, _ = masked_base
    for file in demo.PERSONAS.glob("*.safetensors"):
        mask = read_mask(file, base=base.fingerprint)
        assert file.stem == mask.info.persona
        assert file.stat().st_size <= 150_000
        assert {type(target).__name__ for target in mask.targets.values()} == {"Sparse"}


def test_the_shipped_model_is_small_and_its_log_says_that_it_is_good() -> None:
    weights = sum(file.stat().st_size for file in demo.MODEL.glob("*.safetensors"))
    assert weights <= 25_000_000
    figures = json.loads((demo.MODEL / "training.json").read_text())["figures"]
    assert figures["facts"] >= 0.98
    assert figures["on_topic"] >= 0.95
    assert figures["fluency"] >= 0.95


def test_a_new_store_gets_the_demo_and_an_old_one_is_left_alone(tmp_path: Path, masked_base: Any) -> None:
    base, _ = masked_base
    _, registry = open_store(tmp_path / "store", base.name, base.fingerprint)
    assert {generation.name for generation in registry.names()} == set(grammar.personas())
    registry.remove("casual")
    open_store(tmp_path / "store", base.name, base.fingerprint)
    assert {generation.name for generation in Registry(tmp_path / "store").names()} == set(grammar.personas()) - {
        "casual"
    }


def test_a_first_start_that_is_interrupted_goes_on_later(tmp_path: Path, masked_base: Any) -> None:
    base, _ = masked_base
    published = 0

    def interrupt(*given: Any, **more: Any) -> Any:
        nonlocal published
        published += 1
        if published == 3:
            raise KeyboardInterrupt
        return publish(*given, **more)

    publish = Registry.publish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Registry, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_store(tmp_path / "store", base.name, base.fingerprint)
    _, registry = open_store(tmp_path / "store", base.name, base.fingerprint)
    assert {generation.name for generation in registry.names()} == set(grammar.personas())


def test_a_new_store_of_another_base_is_empty(tmp_path: Path, tiny: Base) -> None:
    _, registry = open_store(tmp_path / "store", tiny.name, tiny.fingerprint)
    assert registry.names() == []


def test_training_is_repeatable(tmp_path: Path) -> None:
    recipe = train.TrainingRecipe(
        steps=3, tokens_per_step=256, vocabulary=512, hidden=32, layers=1, feed_forward=48, heads=4
    )
    tokenizer = train.make_tokenizer(grammar.sentences(random.Random(0), chats=500), recipe.vocabulary)

    def weights() -> torch.Tensor:
        torch.manual_seed(recipe.seed)
        model = train.make_model(recipe, tokenizer)
        rng = random.Random(recipe.seed)
        draw = train.batches(lambda: train.encode(tokenizer, grammar.converse(rng)), rng, recipe)
        curve = train.train(model, recipe, draw)
        assert curve[-1]["step"] == 3
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(weights(), weights())
