"""A small part of `make fuzz`: some random requests for every route."""

from __future__ import annotations

from tests.fuzzing.run import fuzz, start, summary


def test_no_request_is_answered_outside_of_the_description() -> None:
    with start() as (url, key):
        outcome = fuzz(url, key, 5, coverage=False)
    assert not outcome.failures, summary(outcome)
    assert outcome.total >= 100
    assert {200, 400, 404} <= outcome.answers.keys()
