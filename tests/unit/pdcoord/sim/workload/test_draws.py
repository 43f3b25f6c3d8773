"""Draws are numbers that look drawn, and depend on nothing but what they are made from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.sim.workload.draws import Shares, mix, unit, zipf

numbers = st.integers(0, (1 << 64) - 1)


@given(numbers, numbers)
def test_a_mix_is_of_63_bits_and_a_unit_leaves_both_ends_out(state: int, value: int) -> None:
    assert 0 <= mix(state, value) < 1 << 63
    assert 0.0 < unit(state, value) < 1.0


def test_small_numbers_do_not_collide_and_are_spread_evenly() -> None:
    mixed = {mix(state, value) for state in range(200) for value in range(200)}
    assert len(mixed) == 40_000
    draws = [unit(7, value) for value in range(20_000)]
    tenths = [sum(low / 10 <= draw < (low + 1) / 10 for draw in draws) for low in range(10)]
    assert all(1_850 < count < 2_150 for count in tenths)  # Three standard deviations are 130.


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20).filter(any), st.floats(0, 1, exclude_max=True))
def test_a_share_is_one_of_positive_weight(weights: list[float], draw: float) -> None:
    assert weights[Shares(weights).at(draw)] > 0.0


def test_shares_follow_their_weights() -> None:
    shares = Shares([1.0, 0.0, 3.0])
    counts = [0, 0, 0]
    for value in range(10_000):
        counts[shares.at(unit(1, value))] += 1
    assert counts[1] == 0
    assert counts[2] / counts[0] == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("weights", [[], [0.0], [-1.0, 2.0]])
def test_weights_that_choose_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="expected none below 0"):
        Shares(weights)


def test_zipf_prefers_the_first() -> None:
    shares = zipf(100, 1.0)
    assert shares.at(0.0) == 0
    assert shares.at(0.19) == 0  # 1 / (1 + 1/2 + ... + 1/100) is 0.193.
    assert shares.at(0.20) == 1
    assert zipf(4, 0.0).at(0.74) == 2
