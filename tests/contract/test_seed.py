"""Chance that can be repeated."""

from __future__ import annotations

import pytest

from tests.contract.asking import QUESTIONS, STRANGE, Api, Json

SEEDS = (0, 1, 7, 2**31, 2**63 - 1)


@pytest.mark.parametrize("seed", [*SEEDS, -1])
def test_a_seed_repeats(api: Api, seed: int) -> None:
    assert api.text(temperature=1, seed=seed) == api.text(temperature=1, seed=seed)


def test_seeds_differ_somewhere(api: Api) -> None:
    assert len({api.text(temperature=1, seed=seed) for seed in range(8)}) > 1


def test_no_seed_means_a_new_draw(api: Api) -> None:
    assert len({api.text(temperature=1) for _ in range(8)}) > 1


def test_a_seeded_answer_is_the_same_beside_others(api: Api) -> None:
    seeded: Json = {"temperature": 1, "seed": 7, "persona": "cheerful"}
    personas = (None, "introvert", "extravert", "formal", "gloomy")
    others: list[Json] = [
        {"question": question, "persona": persona, "temperature": 1.3}
        for question, persona in zip(QUESTIONS * 2, personas * 2, strict=False)
    ]
    alone = api.text(**seeded)
    assert {api.texts([*others[:4], seeded, *others[4:]])[4] for _ in range(3)} == {alone}


def test_requests_with_the_same_seed_do_not_share_their_luck(api: Api) -> None:
    seeded: Json = {"temperature": 1, "seed": 7}
    assert len(set(api.texts([seeded] * 6))) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seeded_stream_says_what_one_piece_says(api: Api, seed: int) -> None:
    assert api.streamed(temperature=1, seed=seed) == api.text(temperature=1, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_of_strange_tokens_says_what_one_piece_says(api: Api, seed: int) -> None:
    assert api.streamed(**STRANGE, seed=seed) == api.text(**STRANGE, seed=seed)


@pytest.mark.parametrize("narrowed", [{"top_p": 0.0001}, {"top_k": 1}], ids=str)
def test_a_draw_from_one_token_is_greedy(api: Api, narrowed: Json) -> None:
    assert api.text(temperature=1, seed=7, **narrowed) == api.text(temperature=0)


@pytest.mark.parametrize("open_", [{"top_p": 1}, {"top_k": 1_000_000}], ids=str)
def test_keeping_everything_changes_nothing(api: Api, open_: Json) -> None:
    assert api.text(temperature=1, seed=7, **open_) == api.text(temperature=1, seed=7)
