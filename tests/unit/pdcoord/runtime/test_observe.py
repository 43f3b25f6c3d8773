"""A call's end as metrics and as one log line."""

from typing import Any

import pytest
import structlog
from structlog.testing import LogCapture

from pdcoord.core.events import Outcome
from pdcoord.core.request import RequestId
from pdcoord.feeds.declared import Reload, Source
from pdcoord.front.ports import CallRecord
from pdcoord.policy.errors import Problem
from pdcoord.protocol.errors import RefuseReason, RungReason
from pdcoord.protocol.plans import Mode, ServedHeader
from pdcoord.runtime.observe import Telemetry


@pytest.fixture
def lines() -> LogCapture:
    return LogCapture()


@pytest.fixture
def telemetry(bench: Any, lines: LogCapture) -> Telemetry:
    log = structlog.wrap_logger(
        None, processors=[lines], wrapper_class=structlog.make_filtering_bound_logger(0)
    )
    return Telemetry(bench.metrics, log)


def test_a_served_call_is_one_line_and_counted(bench: Any, telemetry: Telemetry, lines: LogCapture) -> None:
    plan = bench.arrive()
    telemetry.call_began()
    assert bench.metric("pdcoord_gateway_in_flight") == 1.0
    record = CallRecord(
        id=RequestId("r-1"),
        path="/v1/completions",
        began_s=10.0,
        model="m",
        plan=plan,
        served=ServedHeader(mode=Mode.SPLIT, prefill=plan.prefill.address),
        outcome=Outcome.OK,
        status=200,
        first_byte_s=10.25,
        ended_s=12.0,
    )
    telemetry.call_ended(record)
    (line,) = lines.entries
    assert line == {
        "event": "request.done",
        "log_level": "info",
        "id": "r-1",
        "trace_id": None,
        "path": "/v1/completions",
        "key_name": None,
        "model": "m",
        "mode": Mode.SPLIT,
        "why": plan.why,
        "prefill": plan.prefill.id,
        "decode": plan.decode.id,
        "attempts": 1,
        "prompt_tokens": plan.chosen.figures.uncached_tokens + plan.chosen.figures.cached_tokens,
        "cached_tokens": plan.chosen.figures.cached_tokens,
        "ttft_ms": 250.0,
        "duration_ms": 2_000.0,
        "outcome": Outcome.OK,
        "status": 200,
        "reason": None,
    }
    labels = 'mode="split",model="m",outcome="ok",why="split-faster"'
    assert bench.metric(f"pdcoord_gateway_requests_total{{{labels}}}") == 1.0
    assert bench.metric('pdcoord_gateway_ttft_seconds_sum{mode="split",model="m"}') == 0.25
    assert bench.metric('pdcoord_gateway_request_duration_seconds_sum{mode="split",model="m"}') == 2.0
    assert bench.metric("pdcoord_gateway_in_flight") == 0.0


def test_a_refused_call_counts_its_reason_and_no_times(
    bench: Any, telemetry: Telemetry, lines: LogCapture
) -> None:
    telemetry.call_began()
    record = CallRecord(RequestId("r"), "/v1/completions", 1.0, ended_s=1.5)
    record.status, record.outcome, record.reason = 400, Outcome.CLIENT_ERROR, RefuseReason.MALFORMED_JSON
    telemetry.call_ended(record)
    assert bench.metric('pdcoord_gateway_refusals_total{model="none",reason="malformed-json"}') == 1.0
    labels = 'mode="none",model="none",outcome="client-error",why="none"'
    assert bench.metric(f"pdcoord_gateway_requests_total{{{labels}}}") == 1.0
    assert "ttft_seconds_sum" not in bench.metrics.render().decode()
    assert lines.entries[0]["prefill"] is None


def test_a_line_names_the_adapter_that_was_asked_for(telemetry: Telemetry, lines: LogCapture) -> None:
    for adapter in ("sql", None):
        telemetry.call_began()
        telemetry.call_ended(CallRecord(RequestId("r"), "/v1/completions", 1.0, model="m", adapter=adapter))
    named, plain = lines.entries
    assert (named["model"], named["adapter"]) == ("m", "sql")
    assert "adapter" not in plain


def test_a_line_names_what_attempts_failed_of_and_an_answer_that_was_cut_short(
    telemetry: Telemetry, lines: LogCapture
) -> None:
    for failures, is_cut_short in (((RungReason.PLAN_REFUSED,), False), ((), True)):
        telemetry.call_began()
        record = CallRecord(RequestId("r"), "/v1/completions", 1.0, failures=failures)
        record.is_cut_short = is_cut_short
        telemetry.call_ended(record)
    refused, cut = lines.entries
    assert (refused["failures"], "cut_short" in refused) == (["plan-refused"], False)
    assert ("failures" in cut, cut["cut_short"]) == (False, True)


def test_a_refusal_is_counted_for_its_model_which_has_the_series_before(
    bench: Any, telemetry: Telemetry
) -> None:
    served = CallRecord(RequestId("r"), "/v1/completions", 1.0, model="m", outcome=Outcome.OK, status=200)
    telemetry.call_began()
    telemetry.call_ended(served)
    series = 'pdcoord_gateway_refusals_total{model="m",reason="no-endpoints"}'
    assert bench.metric(series) == 0.0
    refused = CallRecord(RequestId("s"), "/v1/completions", 1.0, model="m", outcome=Outcome.REFUSED)
    refused.status, refused.reason = 503, RefuseReason.NO_ENDPOINTS
    telemetry.call_began()
    telemetry.call_ended(refused)
    assert bench.metric(series) == 1.0


def test_an_errors_time_is_no_time_to_first_token(bench: Any, telemetry: Telemetry) -> None:
    telemetry.call_began()
    record = CallRecord(RequestId("r"), "/v1/completions", 1.0, model="m", status=429, first_byte_s=1.1)
    telemetry.call_ended(record)
    assert "ttft_seconds_sum" not in bench.metrics.render().decode()


def test_the_prefill_of_the_line_is_the_one_that_was_used(bench: Any) -> None:
    plan = bench.arrive()
    record = CallRecord(RequestId("r"), "/", 0.0, plan=plan)
    assert record.prefill == plan.prefill.id
    other = next(rung.prefill for rung in plan.rungs if rung.prefill is not None)
    record.served = ServedHeader(mode=Mode.SPLIT, prefill=other.address)
    assert record.prefill == other.id
    record.served = ServedHeader(mode=Mode.COLOCATED)
    assert (record.prefill, record.mode) == (None, Mode.COLOCATED)


def test_refusals_of_pages_defects_and_reloads(bench: Any, telemetry: Telemetry, lines: LogCapture) -> None:
    telemetry.refused(RefuseReason.PATH_UNKNOWN)
    assert bench.metric('pdcoord_gateway_refusals_total{model="none",reason="path-unknown"}') == 1.0
    telemetry.crashed(RuntimeError("x"), "r-9")
    assert (lines.entries[0]["event"], lines.entries[0]["id"]) == ("request.crashed", "r-9")
    bench.metrics.count_reload(Reload(Source.POLICY))
    bench.metrics.count_reload(Reload(Source.ENDPOINTS, (Problem("f", 1, (), "bad"),)))
    series = "pdcoord_gateway_policy_reloads_total"
    assert bench.metric(f'{series}{{outcome="accepted",source="policy"}}') == 1.0
    assert bench.metric(f'{series}{{outcome="refused",source="endpoints"}}') == 1.0
