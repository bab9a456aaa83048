"""Log probabilities of prompts equal those of the plain model in float64, however a prompt is computed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence

import pytest
import torch

from masquerade.engine import Engine, PromptToken, Request, ScoredPrompt
from masquerade.engine.prompt_logprobs import ROWS, score_tokens
from masquerade.errors import InvalidValue
from masquerade.model import AppliedMask, Base, MaskManager
from tests import world
from tests.engine.asking import Listener, ask, finish, is_whole

TOP = 3
LIMITS: dict[str, dict[str, int]] = {
    "plain": {},
    "small chunks": {"max_batch_tokens": 33},
    "single positions": {"prefill_budget": 1},
    "few blocks": {"cache_bytes": 12 * 16 * 512},
}


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(6, 260) for _ in range(length)]


def scores_of(listener: Listener) -> Sequence[PromptToken]:
    """The scored prompt; there must be one, before every token."""
    first, *others = listener.events
    assert isinstance(first, ScoredPrompt)
    assert not any(isinstance(event, ScoredPrompt) for event in others)
    return first.tokens


@torch.no_grad()
def check(scores: Sequence[PromptToken], model: torch.nn.Module, prompt: list[int], top: int = TOP) -> None:
    """Compare scores with a model in float64."""
    logits = copy.deepcopy(model).double()(torch.tensor([prompt])).logits[0, :-1]
    logprobs = logits.log_softmax(-1)
    assert [score.id for score in scores] == prompt
    assert scores[0] == PromptToken(prompt[0])
    for score, row in zip(scores[1:], logprobs, strict=True):
        own = row[score.id]
        assert score.logprob == pytest.approx(float(own), abs=1e-4)
        sure = (row > own + 1e-4).sum() + 1, (row > own - 1e-4).sum()
        assert sure[0] <= score.rank <= max(sure)
        assert [logprob for _, logprob in score.top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)
        assert [float(row[token]) for token, _ in score.top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_they_equal_the_model_in_float64(
    tiny: Base, manager: MaskManager, make_engine: Callable[..., Engine], limits: dict[str, int]
) -> None:
    """Prompts of a base and a persona in both phases, with a common beginning, beside requests that score nothing."""
    mask = world.make_mask(tiny, 0.3, seed=1)
    applied, masked = AppliedMask(manager.fit(mask), 0.0), world.materialise(tiny.model, mask, 0.0)
    engine, trunk = make_engine(**limits), prompt_of(40, 0)
    asked = []
    for number in range(9):
        prompt = trunk + prompt_of(1 + 5 * number, number)
        worn, phase, model = [
            (None, "all", tiny.model),
            (applied, "all", masked),
            (applied, "decode", tiny.model),
        ][number % 3]
        request, listener = ask(prompt, 1 + number, applied=worn, phase=phase, prompt_logprobs=TOP)
        plain, unscored = ask(prompt, 1 + number, applied=worn, phase=phase)
        engine.submit(request, plain)
        asked.append((request, listener, unscored, model))
        if number % 2:
            engine.step()
    finish(engine)
    for request, listener, unscored, model in asked:
        check(scores_of(listener), model, request.prompt)
        assert [token.id for token in listener.tokens] == [token.id for token in unscored.tokens]
    assert is_whole(engine)


def test_a_cached_prompt_is_computed_again_for_its_scores_only(
    tiny: Base, manager: MaskManager, make_engine: Callable[..., Engine]
) -> None:
    engine, prompt = make_engine(), prompt_of(70, 3)
    first, _ = ask(prompt)
    scored, listener = ask(prompt, prompt_logprobs=TOP)
    again, _ = ask(prompt)
    answers = engine.generate([first]), engine.generate([scored]), engine.generate([again])
    assert answers[0] == answers[1] == answers[2]
    assert (scored.num_cached, again.num_cached) == (0, 69)
    check(scores_of(listener), tiny.model, prompt)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 33])
def test_an_answer_of_no_tokens_is_a_scored_prompt(
    tiny: Base, manager: MaskManager, make_engine: Callable[..., Engine], length: int
) -> None:
    engine, prompt = make_engine(max_running=2), prompt_of(length, 4)
    request, listener = ask(prompt, 0, prompt_logprobs=0)
    unscored, silent = ask(prompt, 0)
    assert engine.generate([request, unscored]) == [[], []]
    check(scores_of(listener), tiny.model, prompt, top=0)
    assert (listener.end.reason, silent.end.reason) == ("length", "length")
    assert silent.tokens == []
    assert is_whole(engine)


def test_a_preempted_prompt_is_not_scored_twice(
    tiny: Base, manager: MaskManager, make_engine: Callable[..., Engine]
) -> None:
    """The requests that rank first need the blocks of the one that is being scored."""
    engine = make_engine(cache_bytes=10 * 16 * 512, max_batch_tokens=20, max_running=4)
    scored, listener = ask(prompt_of(90, 5), 30, prompt_logprobs=TOP)
    first, _ = ask(prompt_of(60, 6), 90, priority=1)
    engine.submit(scored)
    engine.step()
    engine.step()
    engine.submit(first)
    finish(engine)
    assert engine.counts.preemptions
    check(scores_of(listener), tiny.model, scored.prompt)
    assert len(listener.tokens) == 30


def test_a_prompt_whose_scores_are_no_numbers_ends_with_an_error(
    tiny: Base, manager: MaskManager, make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine()
    with torch.no_grad():
        tiny.model.model.embed_tokens.weight[7] = float("nan")
    bad, told = ask([9, 7, 9], 0, prompt_logprobs=TOP)
    good, heard = ask([9, 8, 9], 0, prompt_logprobs=TOP)
    engine.generate([bad, good])
    assert told.end.reason == "error"
    assert heard.end.reason == "length"
    assert len(scores_of(heard)) == 3


def test_so_many_top_tokens_are_refused(make_engine: Callable[..., Engine]) -> None:
    for count in (-1, 21):
        with pytest.raises(InvalidValue) as refusal:
            make_engine().submit(Request([6], 1, lambda _: None, prompt_logprobs=count))
        assert refusal.value.param == "prompt_logprobs"


def test_ties_share_a_rank() -> None:
    rows = torch.zeros(ROWS + 3, 5, dtype=torch.bfloat16)
    rows[:, 2] = 1.0
    scores = score_tokens(rows, [2, 3, 4] + [0] * ROWS, 1)
    assert [score.rank for score in scores] == [1] + [2] * (ROWS + 2)
    assert {score.top[0][0] for score in scores} == {2}
