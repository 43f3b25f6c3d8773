"""Online estimators: what they converge to, what throws them off, and that nothing makes them absurd."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.estimators import (
    SCALE_MAX,
    SCALE_MIN,
    LinearTime,
    Mean,
    MedianTime,
    PathBandwidth,
    RobustScale,
    Slowness,
)

REFERENCE = (1.0, 4_096.0, 4_096.0**2)


def row(tokens: float) -> tuple[float, float, float]:
    return 1.0, tokens, tokens * tokens


def test_a_line_begins_with_its_seed() -> None:
    line = LinearTime((0.01, 1e-4, 1e-9), REFERENCE)
    assert line.coefficients == pytest.approx((0.01, 1e-4, 1e-9))
    assert line.time_s(row(2_000)) == pytest.approx(0.01 + 0.2 + 0.004)


def test_a_line_finds_the_coefficients_behind_what_it_is_told() -> None:
    rng = random.Random(1)
    line = LinearTime((0.01, 1e-4, 0.0), REFERENCE)
    for _ in range(200):
        x = row(rng.uniform(100, 16_000))
        seen_s = 0.03 + 2e-4 * x[1] + 5e-9 * x[2]
        line.learn(x, math.log(seen_s / line.time_s(x)), 1.0)
    for tokens in (100, 1_000, 5_000, 16_000):
        true_s = 0.03 + 2e-4 * tokens + 5e-9 * tokens * tokens
        assert line.time_s(row(tokens)) == pytest.approx(true_s, rel=0.05)


@given(
    st.tuples(st.floats(0, 1), st.floats(0, 1e-2), st.floats(0, 1e-6)),
    st.lists(st.tuples(st.floats(0, 1e9), st.floats(-100, 100), st.floats(0.01, 1)), max_size=80),
)
def test_a_line_is_finite_never_negative_and_grows_whatever_it_is_told(
    seed: tuple[float, float, float], told: list[tuple[float, float, float]]
) -> None:
    line = LinearTime(seed, REFERENCE)
    for tokens, residual, weight in told:
        line.learn(row(tokens), residual, weight)
        assert all(math.isfinite(c) and c >= 0.0 for c in line.coefficients)
        times = [line.time_s(row(x)) for x in (1, 100, 5_000, 1e6)]
        assert times == sorted(times)
        assert all(math.isfinite(t) and t > 0.0 for t in times)


def test_a_line_that_heard_the_same_for_long_neither_freezes_nor_blows_up() -> None:
    line = LinearTime((0.01, 1e-4, 0.0), REFERENCE)
    for _ in range(20_000):
        line.learn(row(4_096), 0.0, 1.0)
    line.learn(row(16_000), 1.0, 1.0)
    assert line.time_s(row(16_000)) < 3.0 * (0.01 + 1e-4 * 16_000)
    for _ in range(200):
        line.learn(row(4_096), math.log(1.0 / line.time_s(row(4_096))), 1.0)
    assert line.time_s(row(4_096)) == pytest.approx(1.0, rel=0.1)


def test_a_scale_shrinks_to_the_noise_and_does_not_mind_outliers() -> None:
    rng, scale = random.Random(2), RobustScale()
    assert scale.spread == 0.0
    for index in range(400):
        scale.learn(5.0 if index % 20 == 0 else rng.gauss(0.0, 0.1), 1.0)
    assert 0.07 < scale.scale < 0.18
    assert 0.07 < scale.spread < 0.18
    assert scale.clip(5.0) == scale.limit == -scale.clip(-5.0)
    assert scale.clip(0.01) == 0.01


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(0.01, 1.0)), max_size=100))
def test_a_scale_stays_within_its_bounds(told: list[tuple[float, float]]) -> None:
    scale = RobustScale()
    for residual, weight in told:
        scale.learn(residual, weight)
        assert SCALE_MIN <= scale.scale <= SCALE_MAX
        assert 0.0 <= scale.spread <= SCALE_MAX


def test_two_outliers_are_chance_and_three_in_a_row_are_a_change() -> None:
    own = Slowness()
    assert not own.learn(0.7, 0.25, 1.0)
    assert not own.is_changing
    assert not own.learn(0.7, 0.25, 1.0)
    assert own.is_changing
    assert abs(own.log_factor) < 0.06
    assert own.learn(-0.02, 0.25, 1.0)
    for _ in range(12):
        own.learn(0.7 - own.log_factor, 0.25, 1.0)
    assert own.log_factor == pytest.approx(0.7, abs=0.05)
    assert own.learn(0.0, 0.25, 1.0)


def test_outliers_on_both_sides_are_noise() -> None:
    own = Slowness()
    for index in range(50):
        own.learn(0.7 if index % 2 else -0.7, 0.25, 1.0)
    assert abs(own.log_factor) < 0.1


@given(st.lists(st.floats(-1e6, 1e6), max_size=60))
def test_slowness_is_bounded(told: list[float]) -> None:
    own = Slowness()
    for residual in told:
        own.learn(residual, 0.25, 1.0)
        assert 1 / 21 < math.exp(own.log_factor) < 21


def test_a_path_falls_slowly_and_rises_fast() -> None:
    path = PathBandwidth(1e10)
    path.learn(1e8, 1e10)
    assert path.bytes_per_s > 7e9
    for _ in range(40):
        path.learn(1e8, 1e10)
    assert path.bytes_per_s == pytest.approx(1e8, rel=0.1)
    for _ in range(5):
        path.learn(1e10, 1e10)
    assert path.bytes_per_s > 8e9


@given(st.lists(st.floats(1e-6, 1e18), max_size=60))
def test_a_path_carries_something_and_no_more_than_its_links(told: list[float]) -> None:
    path = PathBandwidth(1e10)
    for bytes_per_s in told:
        path.learn(bytes_per_s, 1e10)
        assert 1.0 <= path.bytes_per_s <= 1e10


def test_a_median_does_not_mind_how_far_off_a_few_are() -> None:
    latency = MedianTime(0.002, 0.001, 0.25)
    for index in range(200):
        latency.learn(100.0 if index % 5 == 0 else 0.01)
    assert latency.time_s == pytest.approx(0.01, rel=0.25)


@given(st.lists(st.floats(-1e9, 1e9), max_size=100))
def test_a_median_stays_within_its_bounds(told: list[float]) -> None:
    latency = MedianTime(0.002, 0.001, 0.25)
    for seen_s in told:
        latency.learn(seen_s)
        assert 0.001 <= latency.time_s <= 0.25


def test_a_mean_is_of_all_at_first_and_of_the_last_ones_later() -> None:
    mean = Mean(memory=10)
    for value in (1.0, 2.0, 6.0):
        mean.learn(value)
    assert (mean.value, mean.count) == (3.0, 3)
    for _ in range(100):
        mean.learn(50.0)
    assert mean.value == pytest.approx(50.0, rel=0.01)
    assert mean.count == 10
