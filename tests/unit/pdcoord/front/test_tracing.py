"""The spans of one call, as its record and its plans make them."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import Outcome
from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.plan import Candidate, Figures, Plan, Why
from pdcoord.core.request import RequestId
from pdcoord.front.ports import CallRecord
from pdcoord.front.tracing import CallTrace, begin_call
from pdcoord.protocol.errors import RefuseReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName
from pdcoord.protocol.trace import TraceContext, read_trace
from pdcoord.wire.tracing import Attributes, Kind
from transfer.verdict import Connector, Side

CHAT = "/v1/chat/completions"
PARENT = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", 1)


@dataclass
class Recorded:
    """A span that is only remembered."""

    name: str
    kind: Kind
    parent: TraceContext | None
    context: TraceContext
    began_s: float
    attributes: dict[str, object]
    events: list[tuple[str, Mapping[str, object], float]] = field(default_factory=list)
    ended_s: float | None = None
    error: str = ""

    def set(self, attributes: Attributes) -> None:
        self.attributes |= {name: value for name, value in attributes.items() if value is not None}

    def event(self, name: str, attributes: Attributes, at_s: float) -> None:
        self.events.append((name, attributes, at_s))

    def end(self, at_s: float, error: str = "") -> None:
        assert self.ended_s is None, "ended twice"
        self.ended_s, self.error = at_s, error


class Recorder:
    def __init__(self) -> None:
        self.spans: list[Recorded] = []

    def begin(
        self,
        name: str,
        kind: Kind,
        *,
        parent: TraceContext | None,
        at_s: float,
        attributes: Attributes | None = None,
    ) -> Recorded:
        trace_id = "f" * 32 if parent is None else parent.trace_id
        context = TraceContext(trace_id, f"{len(self.spans) + 1:016x}", 1)
        self.spans.append(Recorded(name, kind, parent, context, at_s, {}))
        self.spans[-1].set(attributes or {})
        return self.spans[-1]

    def close(self, deadline_s: float = 0.0) -> None:
        pass


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def make_plan(attempt: int = 0) -> Plan:
    pool = Pool(
        name=PoolName("d"),
        model=ModelName("org/model"),
        role=Role.BOTH,
        vendor="vendor",
        engine=EngineKind.VLLM,
        side=Side(Connector.NIXL, None),
        speed=SpeedFigures(0.008, 0.0001, 0.008),
        kv_bytes_per_token=1_024,
        link_bytes_per_s=1e10,
    )
    figures = Figures(
        queue_s=0.0,
        prefill_s=0.1,
        transfer_s=0.0,
        step_s=0.01,
        stall_s=0.0,
        slo_excess=0.0,
        cost=0.0,
        uncached_tokens=900,
        cached_tokens=100,
        transfer_bytes=0,
    )
    endpoint = Endpoint(EndpointId("d/0"), pool, HostPort("10.0.0.2:8000"))
    chosen = Candidate(decode=endpoint, prefill=None, verdict=None, figures=figures)
    return Plan(
        request_id=RequestId("r"),
        chosen=chosen,
        why=Why.COLOCATED_FASTER,
        dialect=DialectName.NIXLV2,
        rungs=(),
        attempt=attempt,
    )


def begin(headers: list[tuple[bytes, bytes]]) -> tuple[Recorder, CallRecord, CallTrace]:
    recorder, record = Recorder(), CallRecord(id=RequestId("r"), path=CHAT, began_s=100.0)
    trace = begin_call(recorder, Clock(), headers, record)
    assert trace is not None
    return recorder, record, trace


def test_where_it_is_off_only_the_client_s_own_trace_is_noted() -> None:
    record = CallRecord(id=RequestId("r"), path=CHAT, began_s=0.0)
    assert begin_call(None, Clock(), PARENT.headers(), record) is None
    assert record.trace_id == PARENT.trace_id
    assert begin_call(None, Clock(), [], record) is None
    assert record.trace_id is None


def test_a_call_s_spans_hang_together() -> None:
    recorder, record, trace = begin([(b"authorization", b"Bearer key"), *PARENT.headers()])
    record.model = "org/model"
    with trace.waiting():
        record.plan = make_plan()
    with trace.attempt(record.plan) as first:
        first.error = "decode-timeout"
    record.plan = make_plan(attempt=1)
    with trace.attempt(record.plan) as second:
        sent = second.headers([(b"authorization", b"Bearer key"), *PARENT.headers()])
        record.outcome, record.status, record.first_byte_s, record.output_tokens = Outcome.OK, 200, 100.25, 7
    record.ended_s = 110.0
    trace.end()
    call, wait, *attempts = recorder.spans
    assert call.parent == PARENT
    assert call.context.trace_id == record.trace_id == PARENT.trace_id
    assert [span.parent for span in (wait, *attempts)] == [call.context] * 3
    assert [span.name for span in recorder.spans] == [
        "POST /v1/chat/completions",
        "wait",
        "attempt",
        "attempt",
    ]
    assert [span.error for span in recorder.spans] == ["", "", "decode-timeout", ""]
    assert all(span.ended_s is not None for span in recorder.spans)
    assert read_trace(sent) == attempts[1].context
    assert (b"authorization", b"Bearer key") in sent
    assert call.events == [("first_byte", {"pdcoord.ttft_ms": 250.0}, 100.25)]
    assert call.attributes == {
        "http.request.method": "POST",
        "url.path": "/v1/chat/completions",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "pdcoord",
        "gen_ai.request.model": "org/model",
        "gen_ai.response.time_to_first_chunk": 0.25,
        "gen_ai.usage.input_tokens": 1_000,
        "gen_ai.usage.cache_read.input_tokens": 100,
        "gen_ai.usage.output_tokens": 7,
        "http.response.status_code": 200,
        "pdcoord.request_id": "r",
        "pdcoord.mode": "colocated",
        "pdcoord.why": "colocated-faster",
        "pdcoord.decode": "d/0",
        "pdcoord.attempt": 2,
        "pdcoord.attempts": 2,
        "pdcoord.outcome": "ok",
    }
    assert attempts[0].attributes["server.address"] == "10.0.0.2"
    assert attempts[0].attributes["server.port"] == 8000


def test_an_adapter_is_the_model_that_is_asked_and_its_base_is_named() -> None:
    recorder, record, trace = begin([])
    record.model, record.adapter = "org/model", "sql"
    trace.end()
    attributes = recorder.spans[0].attributes
    assert attributes["gen_ai.request.model"] == "sql"
    assert attributes["pdcoord.base_model"] == "org/model"


def test_whoever_relays_in_our_place_is_told_of_the_call_itself() -> None:
    recorder, _, trace = begin(PARENT.headers())
    assert read_trace(trace.headers()) == recorder.spans[0].context


def test_a_refusal_is_an_error_of_its_reason() -> None:
    recorder, record, trace = begin([])
    record.outcome, record.reason, record.status = Outcome.REFUSED, RefuseReason.SATURATED, 429
    trace.end()
    (call,) = recorder.spans
    assert call.parent is None
    assert call.error == "saturated"
    assert call.events == []


def test_what_is_cancelled_ends_and_says_so() -> None:
    recorder, _, trace = begin([])
    with pytest.raises(asyncio.CancelledError), trace.waiting():
        raise asyncio.CancelledError
    with pytest.raises(asyncio.CancelledError), trace.attempt(make_plan()):
        raise asyncio.CancelledError
    assert [span.error for span in recorder.spans[1:]] == ["cancelled", "cancelled"]
    assert all(span.ended_s is not None for span in recorder.spans[1:])


def test_a_stream_that_broke_off_fails_its_attempt() -> None:
    recorder, record, trace = begin([])
    with trace.attempt(make_plan()):
        record.outcome = Outcome.UPSTREAM_ERROR
    assert recorder.spans[-1].error == "upstream-error"
