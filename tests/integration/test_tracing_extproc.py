"""The endpoint picker takes a trace over and has Envoy pass it on in its own name."""

import time
from typing import Any

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.testing import CapturingLogger

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import Dispatch, RequestArrived
from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.model import Model
from pdcoord.core.plan import Candidate, Figures, Plan, Why
from pdcoord.extproc.calls import Picker
from pdcoord.extproc.vocabulary import RequestHead, Routed
from pdcoord.front.ports import CallRecord, Limits
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName
from pdcoord.protocol.trace import TraceContext, read_trace
from pdcoord.wire.otlp import OtlpTracing, Outbox
from transfer.verdict import Connector, Side

PARENT = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", 1)
POOL = Pool(
    name=PoolName("p"),
    model=ModelName("org/model"),
    role=Role.BOTH,
    vendor="vendor",
    engine=EngineKind.VLLM,
    side=Side(Connector.NIXL, None),
    speed=SpeedFigures(0.008, 0.0001, 0.008),
    kv_bytes_per_token=1_024,
    link_bytes_per_s=1e10,
)
FIGURES = Figures(
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


class Coordination:
    """Sends everything to one endpoint."""

    def handle(self, event: Any) -> list[Any]:
        if not isinstance(event, RequestArrived):
            return []
        endpoint = Endpoint(EndpointId("p/0"), POOL, HostPort("10.0.0.2:8000"))
        return [
            Dispatch(
                Plan(
                    request_id=event.request.id,
                    chosen=Candidate(decode=endpoint, prefill=None, verdict=None, figures=FIGURES),
                    why=Why.COLOCATED_FASTER,
                    dialect=DialectName.NIXLV2,
                    rungs=(),
                )
            )
        ]

    def model(self, name: str) -> Model:
        return Model(name=ModelName("org/model"), pools=(POOL,))

    def alternatives(self, *_: Any) -> tuple[Endpoint, ...]:
        return ()


class Observer:
    def __init__(self) -> None:
        self.records: list[CallRecord] = []

    def call_began(self) -> None:
        pass

    def call_ended(self, record: CallRecord) -> None:
        self.records.append(record)


def test_a_picked_call_is_a_span_below_the_client_s_and_above_the_sidecar_s() -> None:
    exporter, observer = InMemorySpanExporter(), Observer()
    outbox = Outbox(exporter, count=lambda *_: None, log=CapturingLogger())
    coordination: Any = Coordination()
    counted: Any = observer
    picker = Picker(
        coordination=coordination,
        observer=counted,
        limits=Limits(),
        clock=time.monotonic,
        new_id=lambda: "made",
    )
    picker.tracing = OtlpTracing(TracerProvider(shutdown_on_exit=False), outbox, "0")
    head = RequestHead(
        headers=[(b":method", b"POST"), (b":path", b"/v1/completions"), *PARENT.headers()], is_end=False
    )
    call = picker.open(head)
    routed = call.ask(head, b'{"model":"org/model","prompt":"hi"}')
    assert isinstance(routed, Routed)
    call.close()
    picker.tracing.close()
    (span,) = exporter.get_finished_spans()
    told = read_trace(routed.route.headers)
    assert told is not None
    assert told.trace_id == PARENT.trace_id == observer.records[0].trace_id
    assert told.span_id == f"{span.context.span_id:016x}"
    assert b"traceparent" not in routed.route.removed
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT.span_id
    assert (span.attributes or {})["pdcoord.decode"] == "p/0"
