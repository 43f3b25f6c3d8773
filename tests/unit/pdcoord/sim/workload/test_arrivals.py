"""Arrivals: in order, as many in each stage as its rate says, and evenly or by chance."""

from itertools import pairwise
from statistics import fmean, pstdev
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pdcoord.sim.workload.arrivals import DealtTimes, LoadSpec, StagedTimes, StageSpec

stages = st.lists(
    st.builds(StageSpec, rate=st.floats(0, 20), duration=st.floats(0.1, 30)), min_size=1, max_size=6
).filter(lambda found: sum(stage.rate * stage.duration for stage in found) >= 1)


def load(*found: tuple[float, float], kind: Literal["poisson", "constant"] = "poisson") -> LoadSpec:
    return LoadSpec(type=kind, stages=tuple(StageSpec(rate=rate, duration=length) for rate, length in found))


@given(stages, st.sampled_from(["poisson", "constant"]), st.integers(0, 1 << 60), st.floats(0.5, 3))
def test_each_stage_has_what_its_rate_says_within_its_time(
    found: list[StageSpec], kind: Literal["poisson", "constant"], seed: int, factor: float
) -> None:
    times = StagedTimes(LoadSpec(type=kind, stages=tuple(found)), seed, factor)
    drawn = list(times)
    assert len(drawn) == len(times)
    assert drawn == sorted(drawn) == list(times)
    end_s = 0.0
    for stage in found:
        start_s, end_s = end_s, end_s + stage.duration
        mine = [at_s for at_s in drawn if start_s <= at_s < end_s]
        assert abs(len(mine) - stage.rate * factor * stage.duration) <= 1.0 + 1e-6 * len(mine)


def test_constant_arrivals_are_even_and_others_are_not() -> None:
    even = list(StagedTimes(load((10, 100), kind="constant"), 1))
    gaps = [later - earlier for earlier, later in pairwise(even)]
    assert gaps == pytest.approx([0.1] * 999)
    chance = list(StagedTimes(load((10, 1_000)), 1))
    gaps = [later - earlier for earlier, later in pairwise(chance)]
    # The gaps of a Poisson process vary as much as they are long.
    assert fmean(gaps) == pytest.approx(0.1, rel=0.03)
    assert pstdev(gaps) == pytest.approx(0.1, rel=0.06)


def test_another_seed_gives_other_times() -> None:
    assert list(StagedTimes(load((5, 10)), 1)) != list(StagedTimes(load((5, 10)), 2))


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.integers(0, 1 << 60))
def test_arrivals_are_dealt_out_completely_and_once(weights: list[float], seed: int) -> None:
    times = StagedTimes(load((20, 10)), 3)
    dealt = [DealtTimes(times, weights, taker, seed) for taker in range(len(weights))]
    assert sum(len(each) for each in dealt) == 200
    assert sorted(at_s for each in dealt for at_s in each) == list(times)


def test_arrivals_are_dealt_out_by_weight() -> None:
    times = StagedTimes(load((100, 100)), 3)
    assert len(DealtTimes(times, [3.0, 1.0], 0, 9)) == pytest.approx(7_500, rel=0.03)


@pytest.mark.parametrize(
    ("rate", "message"), [(0.0, "has no arrival; raise a rate"), (1e6, "arrivals, expected at most 10000000")]
)
def test_loads_of_nothing_and_of_too_much_are_refused(rate: float, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        load((rate, 100.0))
