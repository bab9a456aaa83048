"""Tokens are drawn from the distribution that was asked for, and a seed decides them."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from masquerade.engine import Engine, Request, SamplingParams
from masquerade.engine.sampler import SampledToken, Sampler
from masquerade.errors import InvalidValue
from tests.devices import EmulatedDevices

DRAWS = 20_000
LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.0, 1.9, -3.0])


def request(**how: object) -> Request:
    return Request([1], 1, lambda _: None, sampling=SamplingParams(**how))  # type: ignore[arg-type]


def pick(logits: torch.Tensor, requests: list[Request]) -> list[SampledToken]:
    return Sampler().sample(logits, requests)


def sample(logits: torch.Tensor, requests: list[Request]) -> list[int | None]:
    return [chosen.token for chosen in pick(logits, requests)]


def expected(
    temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, logits: torch.Tensor = LOGITS
) -> torch.Tensor:
    """The distribution by definition, in float64, one token at a time."""
    probability = (logits.double() / temperature).softmax(0)
    order = sorted(range(len(logits)), key=lambda token: -float(probability[token]))
    kept = order[: top_k or len(order)]
    total, nucleus = float(probability[kept].sum()), []
    for token in kept:
        if sum(float(probability[t]) for t in nucleus) / total >= top_p:
            break
        nucleus.append(token)
    only = torch.zeros_like(probability)
    nucleus = [token for token in nucleus if probability[token] >= min_p * probability[order[0]]]
    only[nucleus] = probability[nucleus]
    return only / only.sum()


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"top_p": 0.7},
        {"top_p": 0.05},
        {"top_k": 4, "top_p": 0.8, "temperature": 1.3},
        {"top_k": 100},
        {"min_p": 0.3},
        {"min_p": 0.05, "temperature": 1.7, "top_p": 0.95},
        {"min_p": 1.0},
    ],
    ids=str,
)
def test_shares_match_the_distribution(how: dict[str, float]) -> None:
    tokens = sample(LOGITS.expand(DRAWS, -1), [request(seed=seed, **how) for seed in range(DRAWS)])
    shares = torch.bincount(torch.tensor(tokens), minlength=len(LOGITS)) / DRAWS
    wanted = expected(**how)  # type: ignore[arg-type]
    assert (shares[wanted == 0] == 0).all()
    assert (shares - wanted).abs().max() < 5 * (0.25 / DRAWS) ** 0.5  # five standard deviations at most


FLAT = torch.linspace(0.0, 1.0, 1000)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    "how",
    [
        {"top_p": 0.9},
        {"top_p": 0.1},
        {"top_k": 600, "top_p": 0.5},
        {"top_k": 600, "min_p": 0.9},
        {"min_p": 0.5, "top_p": 0.97},
        {"top_p": 0.9999},
    ],
    ids=str,
)
def test_a_wide_distribution_is_cut_at_the_same_place(how: dict[str, float]) -> None:
    """More tokens remain than are looked at first."""
    wanted = expected(**how, logits=FLAT)  # type: ignore[arg-type]
    tokens = sample(FLAT.expand(3000, -1), [request(seed=seed, **how) for seed in range(3000)])
    drawn = torch.bincount(torch.tensor(tokens), minlength=1000)
    assert drawn[wanted == 0].sum() <= 1  # the last one may round to either side
    halves = (wanted * (torch.arange(1000) < 500)).sum() * 3000
    assert abs(float(drawn[:500].sum() - halves)) < 5 * 0.5 * 3000**0.5


@pytest.mark.parametrize("seed", range(40))
def test_the_token_at_the_drawn_place_of_the_ranking_is_chosen(seed: int) -> None:
    """Most likely first, equals by their number; also where more tokens remain than are looked at first."""
    rng = random.Random(seed)
    logits = torch.randn(600, generator=torch.Generator().manual_seed(seed)) * rng.choice([0.01, 0.5, 3])
    logits = (logits * 20).round() / 20 if seed % 2 else logits  # full of equals
    how = {"top_p": rng.choice([0.5, 0.9, 0.99]), "top_k": rng.choice([0, 300, 450]), "min_p": rng.choice([0, 0.2])}
    shares = expected(**how, logits=logits)
    order = shares.argsort(descending=True, stable=True)
    reached = shares[order].cumsum(0)
    asked = [request(seed=number, **how) for number in range(20)]
    for one, chosen in zip(asked, sample(logits.expand(20, -1), asked), strict=True):
        place = int((reached <= one.draw()).sum())
        near = (reached - one.draw()).abs().min() < 1e-5  # rounding decides
        assert near or logits[chosen] == logits[order[place]]
        if not near and (shares > 0).sum() > 256:
            assert chosen == order[place]


def penalised(logits: torch.Tensor, asked: Request) -> torch.Tensor:
    """Penalties and bias by their definitions, one token at a time."""
    how, answer = asked.sampling, asked.ids[len(asked.prompt) :]
    out = []
    for token, logit in enumerate(logits.tolist()):
        if token in asked.ids:
            logit = logit / how.repetition_penalty if logit > 0 else logit * how.repetition_penalty
        logit -= how.frequency_penalty * answer.count(token) + how.presence_penalty * (token in answer)
        out.append(logit + how.bias.get(token, 0.0))
    return torch.tensor(out)


def test_penalties_and_bias_follow_their_definitions_in_any_company() -> None:
    rng = random.Random(0)
    sampler = Sampler()
    requests = []
    for number in range(12):
        how = SamplingParams(
            temperature=0,
            repetition_penalty=rng.choice([1.0, 1.3, 0.7]),
            presence_penalty=rng.choice([0.0, 1.1, -0.5]),
            frequency_penalty=rng.choice([0.0, 0.8, -0.3]),
            bias=rng.choice([{}, {3: 2.0, 0: -1.5}]),
        )
        requests.append(Request([number % 7, 2], 99, lambda _: None, sampling=how))
    for step in range(20):
        logits = torch.randn(12, 7, generator=torch.Generator().manual_seed(step))
        chosen = requests if step % 3 else requests[::2]  # the batch changes, the tallies do not
        rows = logits if step % 3 else logits[::2]
        before = rows.clone()
        tokens = [picked.token for picked in sampler.sample(rows, chosen)]
        assert tokens == [int(penalised(row, one).argmax()) for row, one in zip(rows, chosen, strict=True)]
        assert torch.equal(rows, before)
        for one, token in zip(chosen, tokens, strict=True):
            one.accept(token)  # type: ignore[arg-type]


def test_what_was_said_is_forgotten_with_the_request() -> None:
    """Else a server would grow by every answer with a penalty."""
    sampler = Sampler()
    request = Request([3], 8, emit=lambda *_: None, sampling=SamplingParams(frequency_penalty=0.5, temperature=0.0))
    sampler.sample(torch.zeros(1, 9), [request])
    other = Request([3], 8, emit=lambda *_: None, sampling=SamplingParams(temperature=0.0))
    gone = weakref.ref(request)
    del request
    sampler.sample(torch.zeros(1, 9), [other])
    gc.collect()
    assert gone() is None


def test_an_end_is_impossible_before_the_least_length() -> None:
    logits = torch.tensor([[0.0, 9.0, 8.0, 1.0]])
    asked = Request(
        [1], 9, lambda _: None, sampling=SamplingParams(temperature=0), ends=frozenset({1, 2}), min_tokens=2
    )
    sampler, said = Sampler(), []
    while not said or said[-1] not in asked.ends:
        said.append(sampler.sample(logits, [asked])[0].token)
        asked.accept(said[-1])  # type: ignore[arg-type]
    assert said == [3, 3, 1]


class TestLogprobs:
    def test_they_are_the_models_own(self) -> None:
        """Whatever was done to the logits before the choice."""
        how = {"logprobs": 3, "temperature": 0.5, "top_k": 2, "bias": {6: 50.0}, "seed": 1}
        (picked,) = pick(LOGITS.unsqueeze(0), [request(**how)])
        logprobs = LOGITS.double().log_softmax(0)
        assert picked.token == 6
        assert picked.logprob == pytest.approx(float(logprobs[6]), abs=1e-5)
        best = logprobs.topk(3)
        assert [token for token, _ in picked.top] == best.indices.tolist()
        assert [logprob for _, logprob in picked.top] == pytest.approx(best.values.tolist(), abs=1e-5)

    def test_each_gets_as_many_as_it_asked_for(self) -> None:
        picks = pick(LOGITS.expand(4, -1), [request(logprobs=count) for count in (None, 0, 2, 5)])
        assert [len(picked.top) for picked in picks] == [0, 0, 2, 5]
        assert [picked.logprob is None for picked in picks] == [True, False, False, False]


def test_a_row_that_is_no_number_has_no_token_and_its_neighbours_have() -> None:
    rows = LOGITS.repeat(4, 1)
    rows[1, 3], rows[2] = float("nan"), float("-inf")
    tokens = sample(rows, [request(temperature=0), request(), request(temperature=0), request(top_k=1)])
    assert tokens == [1, None, None, 1]
    wide = torch.randn(4, 1000)
    wide[1, 3], wide[2] = float("nan"), float("-inf")
    tokens = sample(wide, [request(top_p=0.99) for _ in range(4)])
    assert [token is None for token in tokens] == [False, True, True, False]


def test_a_draw_depends_on_seed_and_place_only() -> None:
    first, second = request(seed=1), request(seed=1)
    assert first.draw() == first.draw() == second.draw()
    second.accept(3)
    assert first.draw() != second.draw()
    draws = [request(seed=seed).draw() for seed in range(2000)]
    assert all(0 <= draw < 1 for draw in draws)
    assert sum(draws) / 2000 == pytest.approx(0.5, abs=5 * (1 / 12 / 2000) ** 0.5)


def test_temperature_zero_is_greedy_beside_any_neighbour() -> None:
    rows = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])
    tokens = sample(rows, [request(temperature=0), request(temperature=1.5), request(temperature=0)])
    assert (tokens[0], tokens[2]) == (1, 1)


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert sample(LOGITS.unsqueeze(0) * 1e4, [request(temperature=1e-6, seed=1)]) == [1]


def test_a_seed_decides_the_answer_whatever_the_neighbours(make_engine: Callable[..., Engine]) -> None:
    def seeded(seed: int | None) -> Request:
        return Request([1, 20, 30], 30, lambda _: None, sampling=SamplingParams(temperature=1.0, top_p=0.9, seed=seed))

    engine = make_engine()
    alone = engine.generate([seeded(7)])[0]
    crowd = engine.generate([seeded(None), seeded(8), seeded(7), seeded(None), seeded(7)])
    assert crowd[2] == crowd[4] == alone
    assert crowd[1] != alone


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InvalidValue, match=field) as refusal:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert refusal.value.param == field


@pytest.mark.parametrize("how", [{"bias": {1: 101.0}}, {"bias": {1: float("nan")}}, {"logprobs": 21}, {"logprobs": -1}])
def test_what_is_out_of_range_is_refused_by_its_name_in_the_interface(how: dict[str, object]) -> None:
    with pytest.raises(InvalidValue) as refusal:
        SamplingParams(**how)  # type: ignore[arg-type]
    assert refusal.value.param in ("logit_bias", "top_logprobs")


class Reads(TorchFunctionMode):
    """Counts what the host reads of tensors on a device, which it has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reading = (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.__bool__, torch.Tensor.to)
        self.count += func in reading and args[0].device.type != "cpu"
        return func(*args, **(kwargs or {}))


def test_greedy_rows_are_read_from_a_device_at_once() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0), torch.full_like(LOGITS, float("nan"))])
    with EmulatedDevices("xpu"), Reads() as reads:
        on_device = logits.to("xpu")
        found = sample(on_device, [request(temperature=0) for _ in logits])
    assert found == [1, 5, None]
    assert reads.count == 1
