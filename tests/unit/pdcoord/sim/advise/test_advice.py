"""Advice: roles that fit the strengths, what one more engine buys, what tokens cost, when there is none."""

from collections.abc import Callable
from typing import Any

import pytest

from pdcoord.core.fleet import Role
from pdcoord.sim.advise.advice import advise
from pdcoord.sim.advise.kinds import AdviceError

Make = Callable[..., Any]


def test_the_engine_that_is_short_of_is_worth_most(kind: Make, traffic: Make, demand: Make) -> None:
    kinds = [
        kind("compute", 1, prefill_s_per_token=5e-5, step_s_per_sequence=4e-3, cost_per_hour=2.0),
        kind("bandwidth", 4, prefill_s_per_token=1e-3, step_s_per_sequence=2e-4, cost_per_hour=4.0),
    ]
    advice = advise(kinds, traffic(demand(tpot_s_max=0.05), rate_per_s=10.0))
    roles = {(group.kind, group.role) for group in advice.best.counts}
    assert (0, Role.PREFILL) in roles
    assert advice.best.good_per_s >= advice.written.good_per_s
    compute, bandwidth = advice.one_more
    assert compute.adds_per_s > bandwidth.adds_per_s >= 0.0
    assert compute.adds_per_cost == pytest.approx(compute.adds_per_s / 2.0)
    assert sum(compute.counts.values()) == 6
    assert advice.good_at_offered_per_s == pytest.approx(10.0)


def test_tokens_cost_what_the_fleet_costs_over_what_it_serves(kind: Make, traffic: Make) -> None:
    advice = advise([kind("a", 2, cost_per_hour=3.0)], traffic())
    assert advice.costs is not None
    per_hour = advice.best.rate_per_s * 3_600
    assert advice.costs.per_hour == 6.0
    assert advice.costs.per_million_tokens == pytest.approx(6.0 / (per_hour * 1_100) * 1e6)
    assert advice.costs.per_million_output_tokens == pytest.approx(6.0 / (per_hour * 100) * 1e6)
    assert advise([kind("a", 1)], traffic()).costs is None


def test_roles_that_are_as_good_are_left_alone(kind: Make, traffic: Make) -> None:
    roles = (Role.BOTH, Role.DECODE)
    advice = advise([kind("a", 2, roles=roles)], traffic())
    assert {group.role: count for group, count in advice.best.counts.items()} == {
        Role.BOTH: 1,
        Role.DECODE: 1,
    }


def test_calls_that_are_late_in_any_case_are_not_good(kind: Make, traffic: Make, demand: Make) -> None:
    advice = advise([kind()], traffic(demand(uncached=(1_000, 50_000), ttft_s_max=1.0), rate_per_s=0.01))
    assert advice.good_share == pytest.approx(0.5)
    assert advice.good_at_offered_per_s == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("engine", "calls", "message"),
    [
        ({"step_base_s": 0.06}, {"tpot_s_max": 0.05}, "slo.tpot_ms is 50, no more than the 60 ms of the"),
        ({}, {"ttft_s_max": 0.05}, "no call can begin in time with any roles; raise slo.ttft_ms"),
        (
            {"kv_tokens": 1_008, "context_tokens_max": 1_000},
            {},
            'part "d" needs 1050 tokens of KV for one call, more than any engine',
        ),
    ],
)
def test_there_is_no_advice_where_nothing_can_be_served(
    kind: Make, traffic: Make, demand: Make, engine: dict[str, Any], calls: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdviceError, match=message):
        advise([kind(**engine)], traffic(demand(**calls)))
