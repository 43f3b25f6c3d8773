"""Token buckets let through what a rate allows, over any window, and starve nobody who waits as told."""

import math
from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from pdcoord.front.rates import Bucket, KeyRates

STEPS = st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(0, 300), st.booleans()), min_size=1, max_size=60)


@given(per_minute=st.integers(1, 200), steps=STEPS)
def test_no_window_sees_more_than_the_rate_allows(
    per_minute: int, steps: list[tuple[float, int, bool]]
) -> None:
    bucket, now_s, taken = Bucket(per_minute), 1_000.0, []
    for pause_s, cost, _ in steps:
        now_s += pause_s
        if not bucket.wait_s(cost, now_s):
            bucket.charge(cost, now_s)
            taken.append((now_s, cost))
        bucket.validate()
    sums = [0, *accumulate(cost for _, cost in taken)]
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            window_s = taken[last][0] - taken[first][0]
            # What did not fit a whole bucket was let in by an untouched one, and is paid back.
            beyond = max(taken[last][1] - per_minute, 0)
            allowed = per_minute * (1.0 + window_s / 60.0) + beyond
            assert sums[last + 1] - sums[first] <= allowed + 1e-3


@given(per_minute=st.integers(1, 1_000_000), steps=STEPS)
def test_whoever_waits_as_told_is_let_in(per_minute: int, steps: list[tuple[float, int, bool]]) -> None:
    bucket, now_s = Bucket(per_minute), 0.0
    for pause_s, cost, is_forced in steps:
        now_s += pause_s
        if is_forced:
            bucket.charge(cost, now_s)
            continue
        now_s += math.ceil(bucket.wait_s(cost, now_s))
        assert bucket.wait_s(cost, now_s) == 0.0
        bucket.charge(cost, now_s)


@given(st.integers(1, 1_000))
def test_the_wait_is_no_longer_than_it_must_be(per_minute: int) -> None:
    bucket = Bucket(per_minute)
    for _ in range(per_minute):
        assert bucket.wait_s(1, 5.0) == 0.0
        bucket.charge(1, 5.0)
    wait_s = bucket.wait_s(1, 5.0)
    assert math.isclose(wait_s, 60.0 / per_minute)
    assert bucket.wait_s(1, 5.0 + 0.99 * wait_s) > 0.0


def test_a_clock_that_stands_or_steps_back_gives_nothing() -> None:
    bucket = Bucket(1)
    bucket.charge(1, 100.0)
    assert bucket.wait_s(1, 40.0) == bucket.wait_s(1, 100.0) == 60.0


def test_a_debt_is_paid_before_anything_is_let_in() -> None:
    rates = KeyRates(None, 60)
    assert rates.take_tokens(10, 0.0) == 0.0
    rates.charge_tokens(170, 0.0)
    assert rates.take_tokens(1, 0.0) == 121.0
    assert rates.take_tokens(1, 121.0) == 0.0


def test_a_prompt_larger_than_a_minutes_worth_is_served_from_a_whole_bucket() -> None:
    rates = KeyRates(None, 60)
    assert rates.take_tokens(100, 0.0) == 0.0
    assert rates.take_tokens(100, 0.0) == 100.0
    assert rates.take_tokens(100, 100.0) == 0.0


def test_a_request_that_must_wait_does_not_count() -> None:
    rates = KeyRates(1, None)
    assert rates.take_request(0.0) == 0.0
    for _ in range(5):
        assert rates.take_request(30.0) == 30.0
    assert rates.take_request(60.0) == 0.0


def test_the_wait_for_tokens_is_one_after_which_the_request_fits_too() -> None:
    rates = KeyRates(1, 60)
    rates.charge_tokens(60, 0.0)
    assert rates.take_request(0.0) == 0.0
    assert rates.take_tokens(1, 0.0) == 60.0
    assert rates.take_request(60.0) == 0.0
    assert rates.take_tokens(1, 60.0) == 0.0


def test_another_rate_leaves_what_is_used_used() -> None:
    rates = KeyRates(10, None)
    for _ in range(10):
        rates.take_request(0.0)
    rates.set(11, None)
    assert rates.take_request(0.0) == 0.0
    assert rates.take_request(0.0) > 0.0
    rates.set(None, None)
    assert rates.take_request(0.0) == 0.0
