"""Which objectives a call met, and what counts as time per output token."""

from dataclasses import replace
from typing import Any

import pytest

from pdcoord.core.events import ModelsReplaced, Outcome
from pdcoord.core.fleet import EndpointDraining, EndpointId, SampleFailed
from pdcoord.core.model import Slo
from pdcoord.core.request import RequestId
from pdcoord.front.ports import CallRecord
from pdcoord.protocol.errors import RefuseReason
from pdcoord.runtime.objectives import objectives_met, tpot_s


def record(
    *, slo: Slo, outcome: Outcome = Outcome.OK, ttft_s: float = 0.5, tokens: int | None = 11
) -> CallRecord:
    return CallRecord(
        RequestId("r"),
        "/v1/completions",
        100.0,
        outcome=outcome,
        first_byte_s=100.0 + ttft_s,
        ended_s=100.0 + ttft_s + 1.0,
        is_stream=True,
        output_tokens=tokens,
        slo=slo,
    )


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(), {}),
        (Slo(ttft_s=0.5), {"ttft": True, "all": True}),
        (Slo(ttft_s=0.4), {"ttft": False, "all": False}),
        (Slo(tpot_s=0.1), {"tpot": True, "all": True}),
        (Slo(ttft_s=1.0, tpot_s=0.09), {"ttft": True, "tpot": False, "all": False}),
    ],
)
def test_an_objective_is_met_up_to_its_own_value(slo: Slo, met: dict[str, bool]) -> None:
    assert objectives_met(record(slo=slo)) == met


@pytest.mark.parametrize(
    ("outcome", "met"),
    [
        (Outcome.CLIENT_GONE, {}),
        (Outcome.CLIENT_ERROR, {}),
        (Outcome.REFUSED, {"ttft": False, "all": False}),
        (Outcome.UPSTREAM_ERROR, {"ttft": False, "all": False}),
    ],
)
def test_what_was_not_served_met_none_unless_it_is_the_client_s_doing(
    outcome: Outcome, met: dict[str, bool]
) -> None:
    assert objectives_met(record(slo=Slo(ttft_s=9.0), outcome=outcome)) == met


def test_time_per_token_is_between_tokens() -> None:
    assert tpot_s(record(slo=Slo())) == pytest.approx(0.1)
    assert tpot_s(record(slo=Slo(), tokens=1)) is None
    assert tpot_s(record(slo=Slo(), tokens=None)) is None
    whole = record(slo=Slo(tpot_s=0.001))
    whole.is_stream = False
    assert tpot_s(whole) is None
    assert objectives_met(whole) == {"tpot": True, "all": True}


def test_the_age_of_signals_goes_on_where_an_endpoint_falls_silent(bench: Any) -> None:
    series = 'pdcoord_gateway_signal_age_seconds{pool="wide"}'
    for _ in range(5):
        bench.now_s += 2.0
        bench.ready("wide/d1")
        bench.loop.handle(SampleFailed(EndpointId("wide/d0"), "timeout"))
    assert bench.coordinator.fleet.get(EndpointId("wide/d0")).sample is None
    assert bench.metric(series) == pytest.approx(10.0)
    bench.loop.handle(EndpointDraining(EndpointId("wide/d0")))
    assert bench.metric(series) == 0.0


def test_an_endpoint_that_never_answered_has_no_age(make_bench: Any) -> None:
    bench = make_bench()
    bench.load()
    bench.loop.handle(SampleFailed(EndpointId("wide/d0"), "unreachable"))
    bench.ready("fast/p0")
    shown = bench.metrics.render().decode()
    assert 'signal_age_seconds{pool="fast"} 0.0' in shown
    assert 'signal_age_seconds{pool="wide"}' not in shown


def test_calls_that_the_fallback_budget_refused_are_counted(make_bench: Any) -> None:
    bench = make_bench()
    bench.load()
    bench.ready("wide/d0")
    (model,) = bench.policy.models
    spent = replace(model, fallback=replace(model.fallback, colocated_share_max=0.0))
    bench.loop.handle(ModelsReplaced((spent,)))
    series = 'pdcoord_gateway_fallback_refused_total{model="m"}'
    assert bench.metric(series) == 0.0
    assert bench.arrive("r-1").reason is RefuseReason.SATURATED
    assert bench.metric(series) == 1.0
    no_rung = replace(model, fallback=replace(model.fallback, rungs=()))
    bench.loop.handle(ModelsReplaced((no_rung,)))
    assert bench.arrive("r-2").reason is RefuseReason.NO_ENDPOINTS
    assert bench.metric(series) == 1.0
