"""Spans as OpenTelemetry makes them, sent over OTLP/HTTP from a thread with a bounded line.

Written against opentelemetry-sdk 1.45. The SDK's own batch processor says neither how many spans it threw
away nor ends within a deadline, so the line is ours; sampling, limits and the exporter are the SDK's.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Self

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
    set_span_in_context,
)
from opentelemetry.trace import Span as SdkSpan
from structlog.typing import FilteringBoundLogger

from pdcoord.protocol.trace import TraceContext
from pdcoord.wire.tracing import (
    FLUSH_S_MAX,
    Attributes,
    CountSpans,
    Fate,
    Kind,
    Span,
    TracingError,
    without_none,
)

_KINDS = {Kind.SERVER: SpanKind.SERVER, Kind.CLIENT: SpanKind.CLIENT, Kind.INTERNAL: SpanKind.INTERNAL}
# The defaults of OpenTelemetry's specification of a batch processor.
_QUEUE_MAX = 2_048
_BATCH_MAX = 512
_DELAY_MS = 5_000
_LAST_WORDS_S = 1.0
"""After the deadline of a flush, for the exporter to notice that it is to stop."""


class Outbox(SpanProcessor):
    """Sampled spans that ended, on their way to a collector; what finds no place is counted and let go.

    Args:
        queue_max: spans that may wait.
        batch_max: spans sent at a time.
        delay_s: longest wait of a span while a batch is not full.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        *,
        count: CountSpans,
        log: FilteringBoundLogger,
        queue_max: int = _QUEUE_MAX,
        batch_max: int = _BATCH_MAX,
        delay_s: float = _DELAY_MS / 1e3,
    ) -> None:
        self._exporter = exporter
        self._count = count
        self._log = log
        self._queue_max = queue_max
        self._batch_max = min(batch_max, queue_max)
        self._delay_s = delay_s
        self._waiting: deque[ReadableSpan] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_failing = False
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    def on_end(self, span: ReadableSpan) -> None:
        context = span.get_span_context()
        if context is None or not context.trace_flags.sampled:
            return
        with self._changed:
            if len(self._waiting) >= self._queue_max or self._is_closing:
                self._count(Fate.DROPPED, 1)
                return
            self._waiting.append(span)
            if len(self._waiting) >= self._batch_max:
                self._changed.notify()

    def close(self, deadline_s: float) -> None:
        """Send what waits, for at most `deadline_s`; the rest counts as dropped."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(deadline_s)
        with self._changed:
            rest = len(self._waiting)
            self._waiting.clear()
        if rest:
            self._count(Fate.DROPPED, rest)
        self._exporter.shutdown()
        self._thread.join(_LAST_WORDS_S)

    def shutdown(self) -> None:
        """As the SDK asks for it."""
        self.close(FLUSH_S_MAX)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:  # noqa: ARG002  # the SDK's signature
        """Spans go when their time comes; nobody here asks."""
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._must_send, timeout=self._delay_s)
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._batch_max))]
                if not batch and self._is_closing:
                    return
            if batch:
                self._send(batch)

    def _must_send(self) -> bool:
        return self._is_closing or len(self._waiting) >= self._batch_max

    def _send(self, batch: list[ReadableSpan]) -> None:
        why = "the collector refused them or did not answer"
        try:
            is_good = self._exporter.export(batch) is SpanExportResult.SUCCESS
        except Exception as error:  # noqa: BLE001  # the edge: a span that cannot be sent must cost no more
            is_good, why = False, type(error).__name__
        self._count(Fate.EXPORTED if is_good else Fate.FAILED, len(batch))
        if is_good == self._is_failing:
            self._is_failing = not is_good
            if is_good:
                self._log.info("traces.recovered")
            else:
                self._log.warning("traces.failing", spans=len(batch), why=why)


class OtlpSpan:
    """One span of the SDK, or of none if it is not sampled: then only its ids are used."""

    __slots__ = ("_span", "context")

    def __init__(self, span: SdkSpan) -> None:
        self._span = span
        told = span.get_span_context()
        trace_id, span_id, state = f"{told.trace_id:032x}", f"{told.span_id:016x}", told.trace_state
        self.context = TraceContext(trace_id, span_id, int(told.trace_flags), state.to_header())

    def set(self, attributes: Attributes) -> None:
        if self._span.is_recording():
            self._span.set_attributes(without_none(attributes))

    def event(self, name: str, attributes: Attributes, at_s: float) -> None:
        if self._span.is_recording():
            self._span.add_event(name, without_none(attributes), _unix_ns(at_s))

    def end(self, at_s: float, error: str = "") -> None:
        if not self._span.is_recording():
            return
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(_unix_ns(at_s))


class OtlpTracing:
    """Makes spans with the SDK's sampler and sends them through an outbox."""

    def __init__(self, provider: TracerProvider, outbox: Outbox, version: str) -> None:
        provider.add_span_processor(outbox)
        self._outbox = outbox
        self._tracer: Tracer = provider.get_tracer("pdcoord", version)

    @classmethod
    def of(
        cls,
        environment: Mapping[str, str],
        service: str,
        *,
        version: str,
        count: CountSpans,
        log: FilteringBoundLogger,
    ) -> Self:
        """As OTEL_* variables say.

        Raises:
            TracingError: for a variable that is no number.
        """
        # What it would say per batch is said once by the outbox, and as JSON.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        names = {"service.version": version}
        if "service.name=" not in environment.get("OTEL_RESOURCE_ATTRIBUTES", ""):
            names["service.name"] = environment.get("OTEL_SERVICE_NAME") or service
        outbox = Outbox(
            OTLPSpanExporter(),
            count=count,
            log=log,
            queue_max=_whole(environment, "OTEL_BSP_MAX_QUEUE_SIZE", _QUEUE_MAX),
            batch_max=_whole(environment, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", _BATCH_MAX),
            delay_s=_whole(environment, "OTEL_BSP_SCHEDULE_DELAY", _DELAY_MS) / 1e3,
        )
        provider = TracerProvider(resource=Resource.create(names), shutdown_on_exit=False)
        return cls(provider, outbox, version)

    def begin(
        self,
        name: str,
        kind: Kind,
        *,
        parent: TraceContext | None,
        at_s: float,
        attributes: Attributes | None = None,
    ) -> Span:
        context = None
        if parent is not None:
            # Ours or another process's makes no difference: what counts is whose child this is.
            remote = SpanContext(
                int(parent.trace_id, 16),
                int(parent.span_id, 16),
                is_remote=kind is Kind.SERVER,
                trace_flags=TraceFlags(parent.flags),
                trace_state=TraceState.from_header([parent.state]) if parent.state else None,
            )
            context = set_span_in_context(NonRecordingSpan(remote))
        given: Any = without_none(attributes)
        return OtlpSpan(
            self._tracer.start_span(
                name, context, kind=_KINDS[kind], attributes=given, start_time=_unix_ns(at_s)
            )
        )

    def close(self, deadline_s: float = FLUSH_S_MAX) -> None:
        self._outbox.close(deadline_s)


def _unix_ns(at_s: float) -> int:
    """A moment of the monotonic clock as nanoseconds since 1970."""
    return time.time_ns() - int((time.monotonic() - at_s) * 1e9)


def _whole(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip() or str(default)
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1_000_000):
        raise TracingError(f"{name} is {text!r}, expected a whole number in 1..1000000")
    return int(text)
