"""The table of metrics against the metrics, and against the page made of it."""

from pathlib import Path
from typing import Any

from pdcoord.core.events import Outcome
from pdcoord.core.fleet import EndpointId, SampleFailed
from pdcoord.core.request import RequestId
from pdcoord.feeds.scrapes import ScrapeFailure
from pdcoord.gateway.ports import CallRecord
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.plans import RungKind
from pdcoord.runtime.catalog import METRICS, MetricType, render_page

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


def test_the_process_has_the_metrics_of_the_table_and_no_others(bench: Any) -> None:
    bench.arrive()
    bench.loop.handle(SampleFailed(EndpointId("wide/d0"), "timeout"))
    bench.loop.report_failed(EndpointId("wide/d0"), ScrapeFailure.STATUS)
    bench.metrics.count_rung(RungKind.REFUSE, RungReason.DECODE_ERROR)
    record = CallRecord(
        RequestId("r"), "/v1/completions", 1.0, status=200, outcome=Outcome.OK, first_byte_s=2.0
    )
    bench.metrics.count_call(record)
    found: dict[str, tuple[str, set[str]]] = {}
    for family in bench.metrics.registry.collect():
        suffix = "_total" if family.type == "counter" else ""
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        found[family.name + suffix] = (family.type, labels)
    assert found == {spec.name: (spec.type.value, set(spec.labels)) for spec in METRICS}
