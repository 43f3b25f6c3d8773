"""Stages that are made of advice: roles, figures and verdicts as the advice reckoned with."""

from collections.abc import Callable
from typing import Any

import pytest

from pdcoord.core.fleet import Role
from pdcoord.core.model import Slo
from pdcoord.sim.advise.advice import advise
from pdcoord.sim.advise.assignment import group_of
from pdcoord.sim.advise.check import CHECK_CALLS, CHECK_S_MIN, factor_for, stage_of, until
from pdcoord.sim.workload.call import Call, CallId
from pdcoord.sim.workload.content import Content

Make = Callable[..., Any]


class Even:
    """Calls at even times."""

    key_tokens = 64

    def __init__(self, rate_per_s: float) -> None:
        self.rate_per_s = rate_per_s
        self.call_count = 10_000

    def calls(self) -> Any:
        content = Content(64).then(1, 100)
        return (Call(CallId(n), n / self.rate_per_s, 100, 5, content.keys) for n in range(self.call_count))

    def after(self, call: Call, ended_s: float) -> None:
        return None


def test_every_engine_is_in_its_role_under_a_name_of_its_own(kind: Make, traffic: Make) -> None:
    kinds = [kind("a", 3, cost_per_hour=2.0), kind("b", 2)]
    advice = advise(kinds, traffic())
    counts = {
        group_of(kinds, 0, Role.PREFILL): 2,
        group_of(kinds, 0, Role.BOTH): 1,
        group_of(kinds, 1, Role.DECODE): 2,
    }
    stage = stage_of(advice, counts, Slo(ttft_s=2.0))
    endpoints = [place.endpoint for place in stage.scene.places]
    assert [endpoint.pool.role for endpoint in endpoints] == [
        Role.PREFILL,
        Role.PREFILL,
        Role.BOTH,
        Role.DECODE,
        Role.DECODE,
    ]
    assert len({endpoint.id for endpoint in endpoints}) == len({each.address for each in endpoints}) == 5
    assert [settings.role for settings in stage.scene.settings] == [each.pool.role for each in endpoints]
    assert [pool.cost_per_hour for pool in stage.model.pools] == [2.0, 2.0, 0.0]
    assert stage.model.slo.ttft_s == 2.0


def test_a_check_is_long_enough_for_both_calls_and_seconds() -> None:
    assert until(1.0) == CHECK_CALLS
    assert until(1e6) == CHECK_S_MIN


def test_the_factor_is_found_that_gives_the_rate() -> None:
    factor = factor_for(lambda factor: Even(3.0 * factor), 40.0, 5.0)
    assert 3.0 * factor == pytest.approx(40.0, rel=0.02)
