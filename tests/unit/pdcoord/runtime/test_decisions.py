"""Decisions are kept in a bound, the last ones."""

from typing import Any

from pdcoord.core.events import DecodeFailed, Outcome, RequestEnded, ResponseBegan, StreamBroke
from pdcoord.core.request import RequestId
from pdcoord.protocol.errors import RungReason
from pdcoord.runtime.decisions import DecisionLog


def test_no_more_than_the_capacity_is_kept(make_bench: Any) -> None:
    bench = make_bench(decisions_max=3)
    bench.load()
    for number in range(10):
        bench.arrive(f"r-{number}")
    assert len(bench.decisions) == 3
    assert [row.id for row in bench.loop.decisions_view(10).decisions] == ["r-9", "r-8", "r-7"]
    assert [row.id for row in bench.loop.decisions_view(1).decisions] == ["r-9"]
    assert bench.loop.decision_view("r-6") is None


def test_an_id_used_again_shows_its_later_call(bench: Any) -> None:
    for request_id, tokens in (("r", 4_000), ("other", 4_000), ("r", 5_000)):
        plan = bench.arrive(request_id, tokens)
        bench.loop.handle(RequestEnded(plan.request_id, Outcome.OK))
    assert bench.loop.decision_view("r").prompt_tokens == 5_000
    assert [row.id for row in bench.loop.decisions_view(10).decisions] == ["r", "other"]


def test_events_of_forgotten_requests_are_ignored() -> None:
    log = DecisionLog(1)
    gone = RequestId("gone")
    log.began(gone, None, now_s=1.0)
    log.failed(DecodeFailed(gone, RungReason.DECODE_ERROR), [], now_s=1.0)
    log.broke(StreamBroke(gone, RungReason.DECODE_ERROR, 1), [], now_s=1.0)
    log.ended(gone, Outcome.OK, now_s=1.0)
    assert len(log) == 0


def test_a_live_request_has_neither_outcome_nor_duration(bench: Any) -> None:
    plan = bench.arrive()
    bench.loop.handle(ResponseBegan(plan.request_id, None))
    view = bench.loop.decision_view("r-1")
    assert (view.outcome, view.duration_ms, view.first_byte_ms) == (None, None, 0.0)
    assert view.attempts[0].served is None


def test_an_adapter_is_named_where_one_was_asked_for(bench: Any) -> None:
    bench.arrive("plain")
    bench.arrive("tuned", adapter="sql")
    assert bench.loop.decision_view("plain").adapter is None
    assert bench.loop.decision_view("tuned").adapter == "sql"
