"""The table of metrics against the metrics, and against the page made of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from pdcoord.core.canary import CanaryBegan, CanaryJudged
from pdcoord.core.coordinator import Coordinator
from pdcoord.core.events import ModelsReplaced, Outcome, ResponseBegan, TimePassed
from pdcoord.core.fleet import EndpointId, EndpointSeen, Sample, SampleFailed, SampleTaken
from pdcoord.core.likeness import CanaryOutcome, Finding
from pdcoord.core.model import PrefixMode, Slo
from pdcoord.core.request import RequestId
from pdcoord.feeds.kubewatch import PageListed, Started, WatchTrouble
from pdcoord.feeds.kvevents import KvEventsFeed
from pdcoord.feeds.scrapes import ScrapeFailure
from pdcoord.feeds.tokens import TokensMissing, TokenSource
from pdcoord.front.keys import ApiKey, KeyRing
from pdcoord.front.ports import CallRecord
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.plans import RungKind, ServedHeader
from pdcoord.runtime.access import Access
from pdcoord.runtime.canaries import CanaryRecord
from pdcoord.runtime.catalog import METRICS, render_page
from pdcoord.runtime.control import Control
from pdcoord.runtime.metricspec import MetricType, bound_of
from pdcoord.runtime.observe import Metrics
from pdcoord.runtime.prefix_state import kv_events_samples
from pdcoord.runtime.process_metrics import task_samples
from pdcoord.runtime.secured import Secured, SecuredSettings
from pdcoord.runtime.settings import load_settings
from pdcoord.runtime.sources import Sources
from pdcoord.wire.validity import Validity

PAGE = Path(__file__).parents[4] / "docs" / "metrics-gateway.md"


def test_the_page_is_what_the_table_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_page(), (
        "docs/metrics-gateway.md is out of date: python -m pdcoord.runtime.catalog > docs/metrics-gateway.md"
    )


def test_names_are_unique_and_say_what_they_are() -> None:
    names = [spec.name for spec in METRICS]
    assert len(set(names)) == len(names)
    for spec in METRICS:
        assert spec.name.startswith("pdcoord_gateway_")
        assert spec.name.endswith("_total") == (spec.type is MetricType.COUNTER)
        assert bool(spec.buckets) == (spec.type is MetricType.HISTOGRAM)
        assert spec.meaning.endswith(".")
        assert spec.action.endswith(".")


def read_access(metrics: Metrics) -> None:
    """Have one key in force."""
    access = Access(load_settings(policy=Path("p")), structlog.get_logger())
    access.use_keys(KeyRing([ApiKey("a", bytes(32), "t", "g")], bytes(32)))
    metrics.read_state_from(access.samples)


def discover(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have pods followed, and let the API server answer once, badly."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    settings = load_settings(policy=Path("p"), kubernetes_pods=True, kubernetes_namespace="n")
    sources = Sources(settings, metrics, structlog.get_logger())
    for follower in sources.followers:
        follower.machine.handle(Started(), 0.0)
        follower.machine.handle(PageListed((), "1"), 0.0)
    metrics.kubernetes_troubles.labels("pods", WatchTrouble.TIMEOUT).inc()


def test_something_bounds_every_label() -> None:
    for spec in METRICS:
        for label in spec.labels:
            bound = bound_of(spec.name, label)
            assert bound is not None, f"{label} of {spec.name}"
            assert bound.why
            assert len(bound.values) <= 64


def judged_canaries(bench: Any) -> CanaryRecord:
    """Canaries of the bench's unlike pools, of which one has ended."""
    coordinator = Coordinator(has_canaries=True)
    coordinator.handle(ModelsReplaced(bench.coordinator.models()), 0.0)
    for state in bench.coordinator.fleet.states():
        coordinator.handle(EndpointSeen(state.endpoint), 0.0)
        coordinator.handle(SampleTaken(state.endpoint.id, Sample(0, 0, 0.0, 0.0)), 0.0)
    order = coordinator.canaries.due(1.0)[0]
    coordinator.handle(CanaryBegan(order), 1.0)
    coordinator.handle(CanaryJudged(order, Finding(CanaryOutcome.PASSED)), 2.0)
    return CanaryRecord(coordinator.canaries, lambda: 3.0, structlog.get_logger())


def test_the_process_has_the_metrics_of_the_table_and_no_others(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = bench.arrive()
    served = ServedHeader(mode=plan.mode, prefill_ms=1.0, transfer_ms=1.0)
    bench.loop.handle(ResponseBegan(plan.request_id, served))
    bench.loop.handle(SampleFailed(EndpointId("wide/d0"), "timeout"))
    bench.loop.report_failed(EndpointId("wide/d0"), ScrapeFailure.STATUS)
    bench.metrics.count_rung(RungKind.REFUSE, RungReason.DECODE_ERROR)
    record = CallRecord(
        RequestId("r"), "/v1/completions", 1.0, status=200, outcome=Outcome.OK, first_byte_s=2.0
    )
    record.has_unknown_objective = True
    record.is_stream, record.output_tokens, record.slo = True, 5, Slo(ttft_s=1.0)
    bench.metrics.count_call(record)
    bench.fill()
    assert bench.arrive("waits", 50_000) is None
    bench.now_s += 5.0
    bench.loop.handle(TimePassed())
    bench.fill(1)
    assert bench.arrive("waits too", 50_000) is None
    bench.arrive("shed", 50_000, priority=-1)
    bench.metrics.tokenized("m", TokenSource.NONE, TokensMissing.BUSY, 0.001)
    slo = Slo(ttft_s=1.0)
    precise = [
        replace(model, prefix_mode=PrefixMode.PRECISE, slo=slo) for model in bench.coordinator.models()
    ]
    bench.loop.handle(ModelsReplaced(tuple(precise)))
    feed = KvEventsFeed(bench.loop, bench.loop.precise_endpoints, lambda: 0.0)
    bench.metrics.read_state_from(lambda: kv_events_samples(feed))
    bench.metrics.read_state_from(Control(bench.coordinator).samples)
    secured = Secured(SecuredSettings(), structlog.get_logger())
    secured.watch("listener", lambda: Validity(1.0, 2.0))
    bench.metrics.read_state_from(secured.samples)
    bench.metrics.read_state_from(task_samples)
    bench.metrics.read_state_from(judged_canaries(bench).samples)
    read_access(bench.metrics)
    discover(bench.metrics, monkeypatch)
    found: dict[str, tuple[str, set[str]]] = {}
    for family in bench.metrics.registry.collect():
        suffix = "_total" if family.type == "counter" else ""
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        found[family.name + suffix] = (family.type, labels)
    assert found == {spec.name: (spec.type.value, set(spec.labels)) for spec in METRICS}
