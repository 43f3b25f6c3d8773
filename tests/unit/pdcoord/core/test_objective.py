"""The order of candidates: violation, then time past the noise, then price, then time, then turn."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.model import AdmissionRules, Disaggregation, Model, Slo
from pdcoord.core.objective import Objective
from transfer.verdict import Connector, Side

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


def pool(name: str, priority_max: int | None) -> Pool:
    return Pool(
        name=PoolName(name),
        model=ModelName("m"),
        role=Role.BOTH,
        vendor="v",
        engine=EngineKind.VLLM,
        side=Side(Connector.NONE, None),
        speed=SpeedFigures(0.01, 1e-4, 0.01),
        kv_bytes_per_token=1,
        link_bytes_per_s=0.0,
        priority_max=priority_max,
    )


OLD, OLDEST, NEW = pool("old", 0), pool("oldest", -5), pool("new", None)
KEPT = replace(MODEL, pools=(OLD, OLDEST, NEW))


@pytest.mark.parametrize(
    ("priority", "expected"), [(5, (2, 2, 0)), (0, (0, 2, 2)), (-1, (0, 2, 2)), (-5, (0, 0, 2))]
)
def test_pools_kept_for_low_priorities_take_those_first(
    priority: int, expected: tuple[int, int, int]
) -> None:
    objective = Objective(KEPT, priority)
    assert tuple(objective.unfit(0.5, each) for each in KEPT.pools) == expected


def test_a_pair_counts_each_leg() -> None:
    objective = Objective(KEPT, 0)
    assert [
        objective.unfit(0.5, OLD, NEW),
        objective.unfit(0.5, NEW, OLD),
        objective.unfit(0.5, OLD, OLD),
    ] == [
        1,
        1,
        0,
    ]


def test_past_the_objective_no_pool_is_preferred() -> None:
    assert {Objective(KEPT, 0).unfit(1.1, each) for each in KEPT.pools} == {2}
    free = replace(KEPT, slo=Slo(), admission=AdmissionRules(queue_s_max=3.0))
    assert [Objective(free, 0).unfit(2.9, OLD), Objective(free, 0).unfit(3.1, OLD)] == [0, 2]


def test_without_such_pools_all_are_fit() -> None:
    objective = Objective(replace(MODEL, pools=(NEW,)), -7)
    assert (objective.has_unfit, objective.unfit(9.0, NEW)) == (False, 0)


def test_a_fit_pool_outweighs_time_but_no_violation() -> None:
    assert OBJECTIVE.rank(0.9, 0.01, 0.0, 9.0, 0) < OBJECTIVE.rank(0.1, 0.01, 0.0, 0.0, 0, unfit=1)
    assert OBJECTIVE.rank(0.9, 0.01, 0.0, 9.0, 0, unfit=2) < OBJECTIVE.rank(1.2, 0.01, 0.0, 0.0, 0)
