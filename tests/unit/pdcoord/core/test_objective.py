"""The order of candidates: violation, then time past the noise, then price, then time, then turn."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.fleet import ModelName
from pdcoord.core.model import Disaggregation, Model, Slo
from pdcoord.core.objective import Objective

MODEL = Model(ModelName("m"), (), disaggregation=Disaggregation(saving_s_min=0.005), slo=Slo(1.0, 0.05))
OBJECTIVE = Objective(MODEL)
seconds = st.floats(0.0, 10.0)
figures = st.tuples(seconds, seconds, seconds, seconds, st.integers(0, 100))


@given(figures, figures)
def test_what_is_no_worse_in_any_figure_is_no_worse_in_rank(
    one: tuple[float, float, float, float, int], two: tuple[float, float, float, float, int]
) -> None:
    best = tuple(map(min, one, two))
    assert OBJECTIVE.rank(*best) <= OBJECTIVE.rank(*one)
    assert OBJECTIVE.rank(*best) <= OBJECTIVE.rank(*two)


def rank(ttft_s: float, step_s: float = 0.01, stall_s: float = 0.0, cost: float = 0.0, turn: int = 0):  # noqa: ANN201
    return OBJECTIVE.rank(ttft_s, step_s, stall_s, cost, turn)


def test_a_violation_outweighs_time() -> None:
    # The second is within the objectives but makes others wait.
    assert rank(0.9, stall_s=50.0) < rank(1.1)


def test_time_outweighs_price_past_the_noise_and_price_within_it() -> None:
    assert rank(0.100, cost=9.0) < rank(0.200, cost=1.0)
    assert rank(0.1010, cost=9.0) > rank(0.1049, cost=1.0)


def test_equals_in_all_else_take_turns() -> None:
    assert rank(0.1, turn=3) < rank(0.1, turn=4)
    assert rank(0.1010, turn=4) < rank(0.1012, turn=3)


@pytest.mark.parametrize(
    ("ttft_s", "step_s", "expected"),
    [(0.5, 0.01, 0.0), (1.0, 0.05, 0.0), (1.5, 0.05, 0.5), (0.5, 0.1, 1.0), (2.0, 0.1, 2.0)],
)
def test_excess_is_the_sum_of_both_ratios_past_their_objective(
    ttft_s: float, step_s: float, expected: float
) -> None:
    assert OBJECTIVE.excess(ttft_s, step_s) == pytest.approx(expected)


def test_without_objectives_nothing_is_violated() -> None:
    free = Objective(replace(MODEL, slo=Slo()))
    assert free.excess(1e9, 1e9) == 0.0
    assert free.rank(1e6, 1.0, 0.0, 0.0, 0)[0] == 0.0


def test_one_objective_alone_counts() -> None:
    assert Objective(replace(MODEL, slo=Slo(ttft_s=1.0))).excess(2.0, 9.0) == pytest.approx(1.0)
    assert Objective(replace(MODEL, slo=Slo(tpot_s=1.0))).excess(9.0, 2.0) == pytest.approx(1.0)


def test_no_noise_means_time_decides_alone() -> None:
    exact = Objective(replace(MODEL, disaggregation=Disaggregation(saving_s_min=0.0), slo=Slo()))
    assert exact.rank(0.1, 0.0, 0.0, 9.0, 0) < exact.rank(0.101, 0.0, 0.0, 1.0, 0)
