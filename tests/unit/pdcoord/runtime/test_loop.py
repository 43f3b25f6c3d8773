"""The coordinator with its clock bound: what it remembers, shows and counts."""

from typing import Any

import pytest

from pdcoord.core import pathview
from pdcoord.core.events import DecodeFailed, Outcome, PathProbed, RequestEnded, ResponseBegan, StreamBroke
from pdcoord.core.fleet import EndpointDraining, EndpointId, SampleFailed
from pdcoord.core.plan import Plan
from pdcoord.core.probes import Probe
from pdcoord.feeds.scrapes import ScrapeFailure
from pdcoord.protocol.errors import RefuseReason, RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, RungKind, RungTaken, ServedHeader


def test_a_request_is_remembered_from_arrival_to_end(bench: Any) -> None:
    plan = bench.arrive()
    assert isinstance(plan, Plan)
    assert plan.prefill is not None
    bench.now_s += 0.5
    taken = RungTaken(
        rung=RungKind.OTHER_PREFILL, reason=RungReason.PREFILL_TIMEOUT, target=plan.prefill.address
    )
    served = ServedHeader(mode=Mode.COLOCATED, rungs=(taken,), transfer_ms=3.0)
    bench.loop.handle(ResponseBegan(plan.request_id, served))
    bench.now_s += 1.0
    bench.loop.handle(RequestEnded(plan.request_id, Outcome.OK))
    bench.now_s += 2.0
    view = bench.loop.decision_view("r-1")
    assert (view.model, view.prompt_tokens, view.output_tokens_max) == ("m", 4_000, 64)
    assert (view.outcome, view.refusal) == ("ok", None)
    assert view.first_byte_ms == pytest.approx(500.0)
    assert view.duration_ms == pytest.approx(1_500.0)
    assert view.age_ms == pytest.approx(3_500.0)
    (attempt,) = view.attempts
    assert (attempt.mode, attempt.why) == ("split", "split-faster")
    assert attempt.chosen.prefill == plan.prefill.id
    assert attempt.chosen.figures.ttft_ms == pytest.approx(plan.chosen.figures.ttft_s * 1e3)
    assert attempt.runner_up.mode == "colocated"
    assert [(r.rung, r.target, r.reason) for r in attempt.served.rungs] == [
        ("other-prefill", plan.prefill.id, "prefill-timeout")
    ]
    assert bench.loop.decisions_view(10).decisions[0].mode == "colocated"
    assert bench.metric('pdcoord_gateway_rungs_total{reason="prefill-timeout",rung="other-prefill"}') == 1.0
    assert bench.metric("pdcoord_gateway_decision_seconds_count") == 1.0
    assert bench.coordinator.ledger.open_count == 0


def test_a_failover_is_two_attempts_and_a_rung(bench: Any) -> None:
    plan = bench.arrive()
    bench.loop.handle(DecodeFailed(plan.request_id, RungReason.DECODE_UNREACHABLE))
    first, second = bench.loop.decision_view("r-1").attempts
    assert (first.failure, second.failure) == ("decode-unreachable", None)
    assert first.chosen.decode != second.chosen.decode
    assert bench.metric('pdcoord_gateway_rungs_total{reason="decode-unreachable",rung="other-decode"}') == 1.0


def test_a_stream_that_breaks_off_is_two_attempts_and_a_rung(bench: Any) -> None:
    plan = bench.arrive()
    bench.loop.handle(ResponseBegan(plan.request_id, None))
    assert bench.loop.silence_s_max(plan.request_id) >= 10.0
    (action,) = bench.loop.handle(StreamBroke(plan.request_id, RungReason.DECODE_STALLED, 70))
    assert action.plan.decode != plan.decode
    first_byte_ms = bench.loop.decision_view("r-1").first_byte_ms
    bench.loop.handle(ResponseBegan(plan.request_id, None))
    view = bench.loop.decision_view("r-1")
    assert view.first_byte_ms == first_byte_ms, "the client has had its first byte before"
    first, second = view.attempts
    assert (first.failure, first.broke_after_tokens) == ("decode-stalled", 70)
    assert (second.failure, second.broke_after_tokens) == (None, None)
    assert bench.metric('pdcoord_gateway_rungs_total{reason="decode-stalled",rung="resume"}') == 1.0
    bench.loop.handle(RequestEnded(plan.request_id, Outcome.OK, 90))
    assert bench.coordinator.ledger.open_count == 0


def test_what_a_draining_endpoint_gives_back_is_called_so(bench: Any) -> None:
    plan = bench.arrive()
    bench.loop.handle(ResponseBegan(plan.request_id, None))
    bench.loop.handle(EndpointDraining(plan.decode.id))
    assert bench.loop.blamed(plan.request_id, RungReason.DECODE_ERROR) is RungReason.DECODE_DRAINING
    bench.loop.handle(StreamBroke(plan.request_id, RungReason.DECODE_ERROR, 7))
    assert bench.loop.decision_view("r-1").attempts[0].failure == "decode-draining"
    assert bench.metric('pdcoord_gateway_rungs_total{reason="decode-draining",rung="resume"}') == 1.0
    assert 'reason="decode-error",rung=' not in bench.metrics.render().decode()
    assert bench.loop.blamed("gone", RungReason.DECODE_ERROR) is RungReason.DECODE_ERROR


def test_a_stream_that_cannot_go_on_is_a_refusal(bench: Any) -> None:
    plan = bench.arrive()
    for _ in range(4):
        bench.loop.handle(ResponseBegan(plan.request_id, None))
        (action,) = bench.loop.handle(StreamBroke(plan.request_id, RungReason.DECODE_ERROR, 7))
    view = bench.loop.decision_view("r-1")
    assert (view.outcome, action.refusal.reason) == ("upstream-error", "stream-lost")
    assert bench.metric('pdcoord_gateway_rungs_total{reason="decode-error",rung="refuse"}') == 1.0


def test_the_last_failure_is_a_refusal(bench: Any) -> None:
    plan = bench.arrive()
    for _ in range(2):
        bench.loop.handle(DecodeFailed(plan.request_id, RungReason.DECODE_UNREACHABLE))
    view = bench.loop.decision_view("r-1")
    assert view.outcome == "upstream-error"
    assert view.refusal.startswith("ladder-exhausted: ")
    assert bench.metric('pdcoord_gateway_rungs_total{reason="decode-unreachable",rung="refuse"}') == 1.0
    assert bench.coordinator.ledger.open_count == 0


def test_a_refused_arrival_is_remembered_without_a_plan(make_bench: Any) -> None:
    bench = make_bench()
    bench.load()
    assert bench.arrive().reason is RefuseReason.NO_ENDPOINTS
    view = bench.loop.decision_view("r-1")
    assert (view.outcome, view.attempts) == ("refused", [])
    (summary,) = bench.loop.decisions_view(5).decisions
    assert (summary.mode, summary.why, summary.outcome) == (None, None, "refused")


@pytest.mark.parametrize(
    ("ready", "reason"),
    [
        ((), RefuseReason.NO_ENDPOINTS),
        (("fast/p0",), RefuseReason.NO_ENDPOINTS),
        (("wide/d0",), None),
        (("fast/p0", "wide/d0"), None),
    ],
)
def test_ready_is_when_every_model_can_be_served(
    make_bench: Any, ready: tuple[str, ...], reason: RefuseReason | None
) -> None:
    bench = make_bench()
    bench.load()
    bench.ready(*ready)
    refusal = bench.loop.unready()
    assert (refusal and refusal.reason) == reason
    if refusal is not None:
        assert refusal.status == 503
        assert "can serve m;" in refusal.message


def test_no_policy_and_draining_are_not_ready(make_bench: Any, bench: Any) -> None:
    assert make_bench().loop.unready().reason is RefuseReason.NO_ENDPOINTS
    bench.loop.is_draining = True
    assert bench.loop.unready().reason is RefuseReason.DRAINING


def test_nothing_is_ready_before_every_listener_is_open(bench: Any) -> None:
    bench.load()
    bench.ready("fast/p0", "wide/d0")
    bench.loop.is_starting = True
    assert "listeners" in bench.loop.unready().message
    bench.loop.is_starting = False
    assert bench.loop.unready() is None


def test_the_fleet_is_shown_with_signals_and_account(bench: Any) -> None:
    plan = bench.arrive()
    bench.loop.handle(EndpointDraining(EndpointId("wide/d1")))
    bench.now_s += 0.25
    shown = {endpoint.id: endpoint for endpoint in bench.loop.fleet_view().endpoints}
    assert sorted(shown) == ["fast/p0", "fast/p1", "wide/d0", "wide/d1"]
    prefill = shown[plan.prefill.id]
    assert (prefill.vendor, prefill.role, prefill.health) == ("intel-gaudi", "prefill", "ready")
    assert (prefill.running, prefill.kv_usage, prefill.requests) == (1, 0.25, 1)
    assert prefill.sample_age_ms == pytest.approx(250.0)
    assert prefill.bytes_in_flight == plan.chosen.figures.transfer_bytes
    assert shown["wide/d1"].health == "draining"


def test_paths_are_shown_up_to_a_limit(bench: Any) -> None:
    view = bench.loop.paths_view(limit=3)
    assert (view.total, len(view.paths)) == (4, 3)
    assert {(p.verdict, p.breaker, p.bandwidth_gbit_per_s) for p in view.paths} == {
        ("native", "closed", 100.0)
    }


def test_no_more_paths_are_looked_at_closely_than_are_shown(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    look = pathview._view

    def counting(*of: Any) -> Any:
        seen.append(of)
        return look(*of)

    monkeypatch.setattr(pathview, "_view", counting)
    assert bench.loop.paths_view(limit=1).total == 4
    assert len(seen) == 1


def test_the_policy_is_shown_as_compiled(bench: Any) -> None:
    (model,) = bench.loop.policy_view().models
    assert (model["name"], list(model["aliases"])) == ("m", ["alias"])
    assert model["disaggregation"]["mode"] == "auto"


def test_gauges_are_read_off_the_state(bench: Any) -> None:
    bench.arrive()
    bench.loop.handle(EndpointDraining(EndpointId("wide/d1")))
    assert bench.metric('pdcoord_gateway_endpoints{health="ready",pool="wide"}') == 1.0
    assert bench.metric('pdcoord_gateway_endpoints{health="draining",pool="wide"}') == 1.0
    assert bench.metric('pdcoord_gateway_endpoints{health="unreachable",pool="fast"}') == 0.0
    assert bench.metric("pdcoord_gateway_ledger_open") == 1.0
    assert bench.metric('pdcoord_gateway_fallback_share{model="m"}') == 0.0
    assert bench.metric('pdcoord_gateway_path_breakers{state="open"}') == 0.0
    assert bench.metric('pdcoord_gateway_policy_stale{source="policy"}') == 0.0


def test_an_open_breaker_is_counted(bench: Any) -> None:
    plan = bench.arrive()
    taken = RungTaken(
        rung=RungKind.COLOCATED, reason=RungReason.PREFILL_UNREACHABLE, target=plan.prefill.address
    )
    bench.loop.handle(ResponseBegan(plan.request_id, ServedHeader(mode=Mode.COLOCATED, rungs=(taken,))))
    assert bench.metric('pdcoord_gateway_path_breakers{state="open"}') == 1.0


def test_paths_that_are_not_closed_are_shown_first(bench: Any) -> None:
    last = bench.loop.paths_view(limit=4).paths[-1]
    path = (last.prefill, last.decode)
    bench.coordinator.paths.fail(path, RungReason.PREFILL_UNREACHABLE, "r", bench.now_s)
    (row,) = bench.loop.paths_view(limit=1).paths
    assert (row.prefill, row.decode, row.breaker) == (last.prefill, last.decode, "open")


def probed(bench: Any, decode: str, **more: Any) -> None:
    probe = Probe(bench.now_s, 30.0, **more)
    bench.loop.handle(PathProbed(HostPort("10.0.0.1:8000"), EndpointId(decode), probe))


def test_the_last_probe_of_a_path_is_shown_and_what_it_shuts_comes_first(bench: Any) -> None:
    probed(
        bench, "wide/d0", verdict="native", transport="rc_mlx5", latency_s=0.001, bandwidth_bytes_per_s=1e9
    )
    probed(bench, "wide/d1", failure="unreachable", detail="refused")
    bench.now_s += 2.0
    rows = bench.loop.paths_view(limit=4).paths
    assert (rows[0].prefill, rows[0].decode, rows[0].breaker) == ("fast/p0", "wide/d1", "open")
    assert rows[0].fault == rows[0].probe.failure == "unreachable"
    assert not rows[0].probe.is_usable
    by_pair = {(row.prefill, row.decode): row for row in rows}
    good = by_pair["fast/p0", "wide/d0"]
    assert (good.breaker, good.fault, good.bandwidth_gbit_per_s) == ("closed", "", pytest.approx(8.0))
    assert (good.probe.is_fresh, good.probe.is_usable, good.probe.transport) == (True, True, "rc_mlx5")
    assert (good.probe.latency_ms, good.probe.age_ms) == (pytest.approx(1.0), pytest.approx(2_000.0))
    assert by_pair["fast/p1", "wide/d0"].probe is None
    bench.now_s += 100.0
    assert not any(row.probe.is_fresh for row in bench.loop.paths_view(limit=4).paths if row.probe)
    assert {row.breaker for row in bench.loop.paths_view(limit=4).paths} == {"closed"}


def test_probed_paths_and_their_breakers_are_counted(bench: Any) -> None:
    probed(bench, "wide/d0", bandwidth_bytes_per_s=1e9)
    probed(bench, "wide/d1", failure="unreachable")
    assert bench.metric('pdcoord_gateway_probed_paths{state="slow"}') == 1.0
    assert bench.metric('pdcoord_gateway_probed_paths{state="shut"}') == 1.0
    assert bench.metric('pdcoord_gateway_probed_paths{state="good"}') == 0.0
    assert bench.metric('pdcoord_gateway_path_breakers{state="open"}') == 1.0


def test_reports_that_could_not_be_had_are_counted_by_pool(bench: Any) -> None:
    bench.loop.report_failed(EndpointId("wide/d0"), ScrapeFailure.STATUS)
    bench.loop.report_failed(EndpointId("gone/x"), ScrapeFailure.STATUS)
    assert bench.metric('pdcoord_gateway_path_report_failures_total{pool="wide",why="status"}') == 1.0


def test_failed_scrapes_are_counted_by_pool(bench: Any) -> None:
    bench.loop.handle(SampleFailed(EndpointId("wide/d0"), ScrapeFailure.TIMEOUT))
    bench.loop.handle(SampleFailed(EndpointId("gone/x"), ScrapeFailure.TIMEOUT))
    assert bench.metric('pdcoord_gateway_scrape_failures_total{pool="wide",why="timeout"}') == 1.0


def test_models_are_found_by_alias(bench: Any) -> None:
    assert bench.loop.model("alias").name == "m"
    assert bench.loop.model("other") is None
    assert [endpoint.id for endpoint in bench.loop.endpoints()] == [
        "fast/p0",
        "fast/p1",
        "wide/d0",
        "wide/d1",
    ]
