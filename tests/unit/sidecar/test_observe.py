"""Metrics: every one is documented, and a request's record reaches the right ones."""

from prometheus_client.parser import text_string_to_metric_families

from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName, PrefillTarget
from pdcoord.protocol.tickets import Ticket
from sidecar.handoff import Handoff
from sidecar.observe import METRICS, MODE_UNREAD, TARGETS_SHOWN_MAX, Metrics, log_fields
from sidecar.vocabulary import (
    Begun,
    DecodeEnded,
    DecodeOpened,
    Event,
    Fault,
    Order,
    PrefillAnswered,
    PrefillLost,
)

Samples = dict[tuple[str, tuple[str, ...]], float]


def samples(metrics: Metrics) -> Samples:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def handoff_after(*events: Event) -> Handoff:
    targets = tuple(PrefillTarget(address=HostPort(f"p{n}:1")) for n in (1, 2))
    handoff = Handoff(
        Order(dialect=DialectName.NIXLV2, engine=HostPort("e:1"), prefills=targets, is_stream=True)
    )
    for second, event in enumerate((Begun(), *events)):
        handoff.handle(event, float(second))
    return handoff


SERVED_AFTER_ONE_RUNG = (
    PrefillLost(1, Fault.UNREACHABLE),
    PrefillAnswered(2, Ticket(b'{"secret":1}'), 5),
    DecodeOpened(3),
    DecodeEnded(3),
)


def test_a_request_is_recorded_leg_by_leg_and_rung_by_rung() -> None:
    metrics = Metrics()
    handoff = handoff_after(*SERVED_AFTER_ONE_RUNG)
    metrics.record(handoff, mode="split", outcome="served", seconds=4.0, now_s=4.0)
    seen = samples(metrics)
    prefix = "pdcoord_sidecar_"
    assert seen[prefix + "requests_total", ("split", "served")] == 1
    assert seen[prefix + "rungs_total", ("prefill-unreachable", "other-prefill")] == 1
    assert seen[prefix + "leg_seconds_sum", ("prefill", "prefill-unreachable")] == 1
    assert seen[prefix + "leg_seconds_sum", ("prefill", "ok")] == 1
    assert seen[prefix + "leg_seconds_sum", ("decode", "ok")] == 2
    assert seen[prefix + "first_output_seconds_sum", ("split",)] == 3
    assert seen[prefix + "transfer_seconds_sum", ()] == 1
    assert seen[prefix + "request_seconds_sum", ("split", "served")] == 4


def test_what_was_not_read_counts_as_a_request_only() -> None:
    metrics = Metrics()
    metrics.record(handoff_after(), mode=MODE_UNREAD, outcome="served", seconds=1.0, now_s=1.0)
    names = {name for name, labels in samples(metrics) if labels}
    assert names == {
        "pdcoord_sidecar_requests_total",
        "pdcoord_sidecar_request_seconds_count",
        "pdcoord_sidecar_request_seconds_sum",
    }


def test_a_leg_without_an_end_counts_as_cancelled() -> None:
    metrics = Metrics()
    metrics.record(handoff_after(), mode="split", outcome="error", seconds=9.0, now_s=9.0)
    assert samples(metrics)["pdcoord_sidecar_leg_seconds_sum", ("prefill", "cancelled")] == 9


def test_every_metric_is_exposed_under_its_documented_name_and_none_beside() -> None:
    families = {
        family.name: family.type
        for family in text_string_to_metric_families(Metrics().exposition().decode())
        if not family.name.endswith("_created")
    }
    documented = {each.full_name.removesuffix("_total"): each.kind for each in METRICS}
    assert families == documented


def test_every_metric_says_what_it_means_and_what_to_do() -> None:
    for each in METRICS:
        assert each.meaning.endswith(".")
        assert each.action.endswith(".")


def test_the_log_line_has_no_ticket() -> None:
    handoff = handoff_after(*SERVED_AFTER_ONE_RUNG)
    fields = log_fields(handoff.served(), handoff)
    assert fields == {
        "leg_count": 3,
        "prefill": "p2:1",
        "rungs": ["other-prefill prefill-unreachable p1:1"],
        "prefill_ms": 1000.0,
        "transfer_ms": 1000.0,
        "cached_tokens": 5,
        "first_output_ms": 3000.0,
    }


def test_targets_beyond_the_bound_share_one_series_and_make_room_when_they_go() -> None:
    metrics = Metrics()
    for number in range(TARGETS_SHOWN_MAX + 3):
        metrics.set("path_usable", 1.0, f"10.0.0.1:{number}")
    series = metrics.exposition().decode().count("pdcoord_sidecar_path_usable{")
    assert series == TARGETS_SHOWN_MAX + 1
    assert 'pdcoord_sidecar_path_usable{target="other"} 1.0' in metrics.exposition().decode()
    metrics.drop(("path_usable",), "10.0.0.1:0")
    metrics.set("path_usable", 0.0, "10.0.0.2:1")
    assert 'pdcoord_sidecar_path_usable{target="10.0.0.2:1"} 0.0' in metrics.exposition().decode()
