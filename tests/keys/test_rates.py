"""Rate limits, on a clock that the test turns."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from masquerade.errors import RateLimited
from masquerade.keys import Key, Rates
from masquerade.keys.rates import Bucket
from tests.keys.making import make_key


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rates(clock: Clock) -> Rates:
    return Rates(clock)


def limited(tmp_path: Path, **limits: int) -> Key:
    return make_key(tmp_path, "chat", **limits)[1]


def test_a_minutes_requests_and_the_wait_for_the_next(tmp_path: Path, rates: Rates, clock: Clock) -> None:
    key = limited(tmp_path, rpm=3)
    for left in (2, 1, 0):
        rates.admit(key)
        assert rates.headers(key)["x-ratelimit-remaining-requests"] == str(left)
    with pytest.raises(RateLimited) as refused:
        rates.admit(key)
    assert (refused.value.retry_after, refused.value.kind, refused.value.status) == (20, "requests", 429)
    clock.now += 19.5
    with pytest.raises(RateLimited) as refused:
        rates.admit(key)
    assert refused.value.retry_after == 1  # whole seconds, and never none
    clock.now += 0.5
    rates.admit(key)
    with pytest.raises(RateLimited):
        rates.admit(key)


def test_tokens_are_charged_afterwards_and_a_debt_is_waited_for(tmp_path: Path, rates: Rates, clock: Clock) -> None:
    key = limited(tmp_path, tpm=600)
    rates.admit(key)
    rates.charge(key, 1200)
    assert rates.headers(key) == {
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "120.000s",
    }
    with pytest.raises(RateLimited) as refused:
        rates.admit(key)
    assert (refused.value.retry_after, refused.value.kind) == (61, "tokens")
    clock.now += 61
    rates.admit(key)


def test_a_refused_request_counts_for_nothing(tmp_path: Path, rates: Rates, clock: Clock) -> None:
    key = limited(tmp_path, rpm=2, tpm=60)
    rates.charge(key, 120)
    for _ in range(5):
        with pytest.raises(RateLimited):
            rates.admit(key)
    assert rates.headers(key)["x-ratelimit-remaining-requests"] == "2"


def test_keys_do_not_share_limits_and_those_without_have_no_headers(tmp_path: Path, rates: Rates) -> None:
    one, other, free = limited(tmp_path, rpm=1), limited(tmp_path, rpm=1), limited(tmp_path)
    rates.admit(one)
    rates.admit(other)
    for _ in range(100):
        rates.admit(free)
    rates.charge(free, 10**9)
    assert rates.headers(free) == {}


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 1000), st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=60))
def test_a_bucket_never_gives_more_than_a_minute_and_its_rate(rate: int, asks: list[tuple[float, int]]) -> None:
    clock = Clock()
    bucket, given_out = Bucket(rate, clock), 0
    for pause, amount in asks:
        clock.now += pause
        if not bucket.wait(amount):
            bucket.take(amount)
            given_out += amount
        assert given_out <= rate + rate * clock.now / 60 + 1e-6
