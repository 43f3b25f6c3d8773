"""Breaks of streams as metrics and in the log line of their call."""

from prometheus_client import CollectorRegistry

from pdcoord.core.fleet import EndpointId
from pdcoord.core.request import RequestId
from pdcoord.front.ports import Break, BreakOutcome, CallRecord
from pdcoord.protocol.errors import RungReason
from pdcoord.resume.continuation import Unresumable
from pdcoord.runtime.resume_metrics import REASONS, RESUME_METRICS, ResumeMetrics, fields_of

D = EndpointId("d/0")
CONTINUED = Break(RungReason.DECODE_STALLED, D, 7, 1.0, BreakOutcome.CONTINUED, gap_s=0.25)
LOST = Break(RungReason.DECODE_ERROR, D, 9, 2.0, BreakOutcome.UNRESUMABLE, Unresumable.TOOL_CALLS)


def record(*breaks: Break) -> CallRecord:
    return CallRecord(id=RequestId("r"), path="/v1/completions", began_s=0.0, breaks=breaks)


def test_a_break_is_counted_by_its_reason_and_what_became_of_it() -> None:
    registry = CollectorRegistry()
    metrics = ResumeMetrics(registry)
    for broke in (CONTINUED, LOST):
        metrics.count(broke)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"pdcoord_gateway_{name}", labels)

    assert value("resumes_total", reason="decode-stalled", outcome="continued") == 1.0
    assert value("resumes_total", reason="decode-error", outcome="unresumable") == 1.0
    assert value("unresumable_total", why="tool-calls") == 1.0
    assert value("resume_gap_seconds_count") == 1.0
    assert value("resume_gap_seconds_sum") == 0.25


def test_every_series_is_there_before_the_first_break() -> None:
    registry = CollectorRegistry()
    ResumeMetrics(registry)
    for reason in REASONS:
        for outcome in BreakOutcome:
            labels = {"reason": str(reason), "outcome": str(outcome)}
            assert registry.get_sample_value("pdcoord_gateway_resumes_total", labels) == 0.0
    assert {spec.name for spec in RESUME_METRICS} == {
        "pdcoord_gateway_resumes_total",
        "pdcoord_gateway_unresumable_total",
        "pdcoord_gateway_resume_gap_seconds",
    }


def test_a_calls_line_tells_of_its_breaks_and_nothing_where_there_were_none() -> None:
    assert fields_of(record()) == {}
    assert fields_of(record(CONTINUED)) == {
        "resumes": 1,
        "resume_gap_ms": 250.0,
        "broke": "decode-stalled",
        "break_outcome": "continued",
        "unresumable": None,
    }
    last = fields_of(record(CONTINUED, LOST))
    assert (last["resumes"], last["break_outcome"], last["unresumable"]) == (1, "unresumable", "tool-calls")
