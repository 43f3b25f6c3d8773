"""Predicted waits are scaled by how long waits take, within bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.turnover import FACTOR_MAX, FACTOR_MIN, Turnover

seconds = st.floats(min_value=0.0, max_value=100.0)


def test_nothing_is_scaled_before_a_wait_was_seen() -> None:
    assert Turnover().factor("m") == 1.0


@pytest.mark.parametrize("real", [0.5, 1.0, 3.0])
def test_what_waits_take_is_learned_by_model(real: float) -> None:
    turnover = Turnover()
    for _ in range(200):
        turnover.note("m", 1.0, real)
    assert turnover.factor("m") == pytest.approx(real, rel=0.02)
    assert turnover.factor("other") == 1.0
    turnover.keep_only(("other",))
    assert turnover.factor("m") == 1.0


def test_a_bad_hour_is_forgotten() -> None:
    turnover = Turnover()
    for _ in range(50):
        turnover.note("m", 0.1, 20.0)
    assert turnover.factor("m") == FACTOR_MAX
    for _ in range(300):
        turnover.note("m", 1.0, 1.0)
    assert turnover.factor("m") == pytest.approx(1.0, abs=0.1)


def test_no_wait_is_learned_to_be_longer_than_twice_the_longest_that_was_seen() -> None:
    turnover = Turnover()
    assert turnover.wait_s("m", 3.0) == 3.0
    for _ in range(50):
        turnover.note("m", 0.1, 2.0)
    assert turnover.factor("m") == FACTOR_MAX
    assert turnover.wait_s("m", 0.1) == pytest.approx(0.8)
    assert turnover.wait_s("m", 2.0) == pytest.approx(4.0)
    assert turnover.wait_s("m", 30.0) == 30.0
    for _ in range(300):
        turnover.note("m", 2.0, 1.0)
    assert turnover.wait_s("m", 30.0) < 30.0


@given(st.lists(st.tuples(seconds, seconds), max_size=200))
def test_the_factor_is_bounded_whatever_is_seen(waits: list[tuple[float, float]]) -> None:
    turnover = Turnover()
    for predicted_s, waited_s in waits:
        turnover.note("m", predicted_s, waited_s)
        turnover.validate()
        assert FACTOR_MIN <= turnover.factor("m") <= FACTOR_MAX
