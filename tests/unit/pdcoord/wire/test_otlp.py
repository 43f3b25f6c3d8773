"""Spans on their way to a collector: bounded, counted, flushed within a deadline."""

import threading
import time
from collections import Counter
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Sampler
from structlog.testing import CapturingLogger

from pdcoord.protocol.trace import TraceContext
from pdcoord.wire.otlp import OtlpTracing, Outbox
from pdcoord.wire.tracing import Fate, Kind

WAIT_S = 20.0
PARENT = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", 1, "vendor=1")


class Collector(SpanExporter):
    """Takes spans; holds them up while `gate` is closed."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []
        self.gate = threading.Event()
        self.gate.set()
        self.asked = threading.Semaphore(0)
        self.is_good = True
        self.is_shut = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.release()
        while not self.gate.wait(0.01) and not self.is_shut.is_set():
            pass
        if not self.is_good:
            return SpanExportResult.FAILURE
        self.spans += spans
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self.is_shut.set()


class Counts:
    def __init__(self) -> None:
        self.by_fate: Counter[Fate] = Counter()

    def __call__(self, fate: Fate, count: int) -> None:
        self.by_fate[fate] += count


def make(
    collector: Collector, counts: Counts, *, sampler: Sampler | None = None, **bounds: float
) -> OtlpTracing:
    outbox = Outbox(collector, count=counts, log=CapturingLogger(), **bounds)  # type: ignore[arg-type]
    return OtlpTracing(TracerProvider(sampler=sampler, shutdown_on_exit=False), outbox, "0")


def end_some(tracing: OtlpTracing, count: int) -> None:
    for _ in range(count):
        tracing.begin("work", Kind.INTERNAL, parent=None, at_s=time.monotonic()).end(time.monotonic())


def test_a_span_keeps_its_parent_its_times_and_what_it_is_told() -> None:
    collector, counts = Collector(), Counts()
    tracing = make(collector, counts)
    began_s = time.monotonic() - 5.0
    call = tracing.begin("call", Kind.SERVER, parent=PARENT, at_s=began_s, attributes={"a": 1, "none": None})
    leg = tracing.begin("leg", Kind.CLIENT, parent=call.context, at_s=began_s + 1.0)
    leg.event("first", {"ms": 2.5}, began_s + 2.0)
    leg.end(began_s + 3.0, "timeout")
    call.set({"b": "two"})
    call.end(began_s + 4.0)
    tracing.close()
    first, second = collector.spans
    assert first.parent is not None
    assert second.parent is not None
    assert {first.context.trace_id, second.context.trace_id} == {int(PARENT.trace_id, 16)}
    assert first.parent.span_id == second.context.span_id
    assert second.parent.span_id == int(PARENT.span_id, 16)
    assert call.context.state == "vendor=1"
    assert dict(second.attributes or {}) == {"a": 1, "b": "two"}
    assert dict(first.attributes or {}) == {"error.type": "timeout"}
    assert not first.status.is_ok
    assert first.end_time is not None
    assert first.start_time is not None
    assert first.end_time - first.start_time == pytest.approx(2e9, rel=0.01)
    assert counts.by_fate == {Fate.EXPORTED: 2}


def test_what_is_not_sampled_still_names_a_trace_and_is_not_sent() -> None:
    collector, counts = Collector(), Counts()
    tracing = make(collector, counts, sampler=ALWAYS_OFF)
    span = tracing.begin("call", Kind.SERVER, parent=PARENT, at_s=0.0)
    assert span.context.trace_id == PARENT.trace_id
    assert span.context.span_id != PARENT.span_id
    assert not span.context.is_sampled
    span.set({"a": 1})
    span.event("e", {}, 0.0)
    span.end(0.0, "error")
    tracing.close()
    assert collector.spans == []
    assert counts.by_fate == {}


def test_the_line_is_bounded_and_what_finds_no_place_is_counted() -> None:
    collector, counts = Collector(), Counts()
    tracing = make(collector, counts, queue_max=4, batch_max=2)
    collector.gate.clear()
    end_some(tracing, 2)
    assert collector.asked.acquire(timeout=WAIT_S)  # The thread holds two and is kept there.
    end_some(tracing, 7)
    assert counts.by_fate[Fate.DROPPED] == 3
    collector.gate.set()
    tracing.close(WAIT_S)
    assert counts.by_fate == {Fate.DROPPED: 3, Fate.EXPORTED: 6}


def test_spans_that_come_after_the_end_are_dropped() -> None:
    collector, counts = Collector(), Counts()
    tracing = make(collector, counts)
    tracing.close()
    end_some(tracing, 1)
    assert counts.by_fate == {Fate.DROPPED: 1}


def test_a_collector_that_hangs_does_not_hold_up_the_end() -> None:
    collector, counts = Collector(), Counts()
    tracing = make(collector, counts, queue_max=8, batch_max=2)
    collector.gate.clear()
    end_some(tracing, 2)
    assert collector.asked.acquire(timeout=WAIT_S)
    end_some(tracing, 3)
    tracing.close(0.05)
    assert collector.is_shut.is_set()
    assert counts.by_fate[Fate.DROPPED] == 3


def test_a_collector_that_refuses_is_counted() -> None:
    collector, counts = Collector(), Counts()
    collector.is_good = False
    tracing = make(collector, counts)
    end_some(tracing, 3)
    tracing.close()
    assert counts.by_fate == {Fate.FAILED: 3}
