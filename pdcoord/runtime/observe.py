"""The gateway process's metrics and its log line per request."""

from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import cast

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from structlog.typing import FilteringBoundLogger

from pdcoord.core.events import Outcome
from pdcoord.feeds.declared import Reload, Source
from pdcoord.feeds.tokens import TokensMissing, TokenSource
from pdcoord.front.ports import CallRecord
from pdcoord.protocol.errors import RefuseReason, RungReason
from pdcoord.protocol.plans import RungKind, ServedHeader
from pdcoord.runtime import catalog, extproc_metrics
from pdcoord.runtime.metricspec import MetricSpec, MetricType
from pdcoord.runtime.objectives import OBJECTIVES, TPOT, objectives_met, tpot_s
from pdcoord.runtime.resume_metrics import ResumeMetrics, fields_of
from pdcoord.wire.tracing import Fate

_NONE = "none"

GaugeSample = tuple[tuple[str, ...], float]
"""Label values in the order of the spec, and the value."""
StateSource = Callable[[], Iterable[tuple[MetricSpec, Iterable[GaugeSample]]]]
"""Gauges that are read off the state when somebody asks, so that nothing has to keep them up to date."""


class _StateCollector(Collector):
    def __init__(self, source: StateSource) -> None:
        self._source = source

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        for spec, samples in self._source():
            made = CounterMetricFamily if spec.type is MetricType.COUNTER else GaugeMetricFamily
            family = made(spec.name, spec.meaning, labels=spec.labels)
            for labels, value in samples:
                family.add_metric(labels, value)
            yield family


class Metrics:
    """Counters and histograms of one process, in a registry of their own."""

    def __init__(self) -> None:
        # A second series for each, which nobody reads. The library has no types for this one.
        cast("Callable[[], None]", disable_created_metrics)()
        self.registry = CollectorRegistry(auto_describe=False)
        self.requests = self._counter(catalog.REQUESTS)
        self.ttft = self._histogram(catalog.TTFT)
        self.tpot = self._histogram(TPOT)
        self.objectives = self._counter(OBJECTIVES)
        self.duration = self._histogram(catalog.DURATION)
        self.refusals = self._counter(catalog.REFUSALS)
        self.shed = self._counter(catalog.SHED)
        self.wait_seconds = self._histogram(catalog.WAIT_SECONDS)
        self.unknown_objectives = self._counter(catalog.UNKNOWN_OBJECTIVES)
        self.rungs = self._counter(catalog.RUNGS)
        self.scrape_failures = self._counter(catalog.SCRAPE_FAILURES)
        self.path_report_failures = self._counter(catalog.PATH_REPORT_FAILURES)
        self.ttft_ratio = self._histogram(catalog.TTFT_RATIO)
        self.reloads = self._counter(catalog.RELOADS)
        self.kubernetes_troubles = self._counter(catalog.KUBERNETES_TROUBLES)
        self.tokens = self._counter(catalog.TOKENIZED)
        self.tokenize_seconds = self._histogram(catalog.TOKENIZE_SECONDS)
        self.decision_seconds = self._histogram(catalog.DECISION_SECONDS)
        self.spans = self._counter(catalog.SPANS)
        self.resumes = ResumeMetrics(self.registry)
        self.in_flight = self._gauge(catalog.IN_FLIGHT)
        self.extproc_streams = self._gauge(extproc_metrics.STREAMS)
        self.extproc_answers = self._counter(extproc_metrics.ANSWERS)
        self.extproc_body_bytes = self._counter(extproc_metrics.BODY_BYTES)
        self.extproc_violations = self._counter(extproc_metrics.VIOLATIONS)
        self._gauge(catalog.INFO).labels(version("pdcoord")).set(1)
        # A counter that is not there cannot be told from one that is 0, and `rate` misses its first step.
        for reason in RefuseReason:
            self.refusals.labels(_NONE, reason)
            self.extproc_answers.labels(reason)
        for direction in ("request", "response"):
            self.extproc_body_bytes.labels(direction)
        for fate in Fate:
            self.spans.labels(fate)
        for source in Source:
            for outcome in ("accepted", "refused"):
                self.reloads.labels(source, outcome)

    def read_state_from(self, source: StateSource) -> None:
        """Add the gauges that `source` yields whenever the metrics are asked for."""
        self.registry.register(_StateCollector(source))

    def render(self) -> bytes:
        """Prometheus' text format 0.0.4."""
        return generate_latest(self.registry)

    def count_rungs(self, served: ServedHeader | None) -> None:
        for taken in served.rungs if served is not None else ():
            self.rungs.labels(taken.rung, taken.reason).inc()

    def count_rung(self, rung: RungKind, reason: RungReason) -> None:
        self.rungs.labels(rung, reason).inc()

    def count_reload(self, reload: Reload) -> None:
        self.reloads.labels(reload.source, "accepted" if reload.is_accepted else "refused").inc()

    def count_spans(self, fate: Fate, count: int) -> None:
        """Spans went out or were lost; called from another thread."""
        self.spans.labels(fate).inc(count)

    def tokenized(
        self, model: str, source: TokenSource, missing: TokensMissing | None, seconds: float
    ) -> None:
        """A prompt's tokens were had, or were not."""
        self.tokens.labels(model, source, missing or "").inc()
        self.tokenize_seconds.labels(source).observe(seconds)

    def count_call(self, record: CallRecord) -> None:
        model, mode = record.model or _NONE, record.mode or _NONE
        why = record.plan.why if record.plan is not None else _NONE
        self.requests.labels(model, mode, why, record.outcome).inc()
        # There from a model's first call on, so that its first refusal is a step that `rate` sees.
        self.refusals.labels(model, RefuseReason.NO_ENDPOINTS)
        if record.has_unknown_objective:
            self.unknown_objectives.labels(model).inc()
        if record.reason is not None:
            self.refusals.labels(model, record.reason).inc()
        if record.first_byte_s is not None and record.status < 400:
            self.ttft.labels(model, mode).observe(record.first_byte_s - record.began_s)
            if record.outcome is Outcome.OK:
                self.duration.labels(model, mode).observe(record.ended_s - record.began_s)
                self._observe_tpot(record, model, mode)
        for broke in record.breaks:
            self.resumes.count(broke)
        for objective, is_met in objectives_met(record).items():
            self.objectives.labels(model, objective, "yes" if is_met else "no").inc()

    def _observe_tpot(self, record: CallRecord, model: str, mode: str) -> None:
        seconds = tpot_s(record)
        if seconds is not None:
            self.tpot.labels(model, mode).observe(seconds)

    def _counter(self, spec: MetricSpec) -> Counter:
        return Counter(spec.name, spec.meaning, spec.labels, registry=self.registry)

    def _gauge(self, spec: MetricSpec) -> Gauge:
        return Gauge(spec.name, spec.meaning, spec.labels, registry=self.registry)

    def _histogram(self, spec: MetricSpec) -> Histogram:
        return Histogram(spec.name, spec.meaning, spec.labels, buckets=spec.buckets, registry=self.registry)


def _rarities_of(record: CallRecord) -> dict[str, list[str] | bool | str]:
    """What few calls' log lines tell: an adapter, attempts that failed, an answer that was not whole."""
    rarities: dict[str, list[str] | bool | str] = {}
    if record.adapter is not None:
        rarities["adapter"] = record.adapter
    if record.failures:
        rarities["failures"] = [str(reason) for reason in record.failures]
    if record.is_cut_short:
        rarities["cut_short"] = True
    return rarities


class Telemetry:
    """Hears of every call and turns it into metrics and one log line."""

    def __init__(self, metrics: Metrics, log: FilteringBoundLogger) -> None:
        self._metrics = metrics
        self._log = log

    def call_began(self) -> None:
        self._metrics.in_flight.inc()

    def call_ended(self, record: CallRecord) -> None:
        self._metrics.in_flight.dec()
        self._metrics.count_call(record)
        plan = record.plan
        first_byte_s = record.first_byte_s
        self._log.info(
            "request.done",
            id=record.id,
            trace_id=record.trace_id,
            path=record.path,
            key_name=record.key_name,
            model=record.model,
            mode=record.mode,
            why=plan.why if plan is not None else None,
            prefill=record.prefill,
            decode=plan.decode.id if plan is not None else None,
            attempts=plan.attempt + 1 if plan is not None else 0,
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            ttft_ms=None if first_byte_s is None else round((first_byte_s - record.began_s) * 1e3, 2),
            duration_ms=round((record.ended_s - record.began_s) * 1e3, 2),
            outcome=record.outcome,
            status=record.status,
            reason=record.reason,
            **_rarities_of(record),
            **fields_of(record),
        )

    def refused(self, reason: RefuseReason) -> None:
        self._metrics.refusals.labels(_NONE, reason).inc()

    def crashed(self, error: Exception, request_id: str) -> None:
        self._log.error("request.crashed", id=request_id, exc_info=error)
