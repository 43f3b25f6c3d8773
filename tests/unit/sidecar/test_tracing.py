"""The spans of a handoff, read off the machine as it goes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName, PrefillTarget
from pdcoord.protocol.tickets import Ticket
from pdcoord.protocol.trace import TraceContext, read_trace
from pdcoord.wire.tracing import Attributes, Kind
from sidecar.handoff import Handoff
from sidecar.tracing import HandoffTrace, begin_handoff, trace_id_of
from sidecar.vocabulary import (
    Begun,
    ClientLeft,
    DecodeEnded,
    DecodeLost,
    DecodeOpened,
    Event,
    Fault,
    Order,
    PrefillAnswered,
    PrefillLost,
    SendDecode,
    SendPrefill,
)

PARENT = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", 1)
TARGETS = tuple(PrefillTarget(address=HostPort(f"10.0.0.{n}:8000")) for n in (1, 2))


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


class Story:
    """A handoff whose events are told one a second."""

    def __init__(
        self, *, dialect: DialectName = DialectName.NIXLV2, is_colocated_allowed: bool = True
    ) -> None:
        self.now_s = 10.0
        self.spans: list[Recorded] = []
        self.sent: list[list[tuple[bytes, bytes]]] = []
        self.trace: HandoffTrace = begin_handoff(
            self, lambda: self.now_s, PARENT.headers(), "/v1/completions", b"r"
        )
        self.handoff = Handoff(
            Order(
                dialect=dialect,
                engine=HostPort("127.0.0.1:8200"),
                prefills=TARGETS,
                is_stream=True,
                is_colocated_allowed=is_colocated_allowed,
            )
        )

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
        self.spans.append(
            Recorded(name, kind, parent, TraceContext(trace_id, f"{len(self.spans) + 1:016x}", 1), at_s, {})
        )
        self.spans[-1].set(attributes or {})
        return self.spans[-1]

    def close(self, deadline_s: float = 0.0) -> None:
        pass

    def tell(self, *events: Event) -> None:
        for event in events:
            self.now_s += 1.0
            actions = self.handoff.handle(event, self.now_s)
            self.trace.follow(self.handoff)
            for action in actions:
                if isinstance(action, SendPrefill | SendDecode):
                    leg = self.handoff.legs[action.leg]
                    self.sent.append(self.trace.leg_headers(PARENT.headers(), leg))

    def end(self, mode: str = "split") -> list[Recorded]:
        self.now_s += 1.0
        outcome = str(self.handoff.outcome or "broken-off")
        self.trace.end(self.handoff, mode=mode, outcome=outcome, status=200)
        assert all(span.ended_s is not None for span in self.spans), "a span is left open"
        assert {span.context.trace_id for span in self.spans} == {PARENT.trace_id}
        return self.spans


def names(spans: list[Recorded]) -> list[tuple[str, str]]:
    return [(span.name, span.error) for span in spans]


def test_a_split_request_shows_both_legs_the_transfer_and_the_stream() -> None:
    story = Story()
    story.tell(Begun(), PrefillAnswered(1, Ticket(b"{}"), 5), DecodeOpened(2), DecodeEnded(2))
    root, prefill, transfer, decode, stream = story.end()
    assert names(story.spans) == [(n, "") for n in ("handoff", "prefill", "transfer", "decode", "stream")]
    assert root.parent == PARENT
    assert prefill.parent == transfer.parent == decode.parent == root.context
    assert stream.parent == decode.context
    assert [read_trace(headers) for headers in story.sent] == [prefill.context, decode.context]
    assert (prefill.began_s, prefill.ended_s) == (11.0, 12.0)
    assert (transfer.began_s, transfer.ended_s) == (12.0, pytest.approx(13.0, abs=1.0))
    assert stream.ended_s == 15.0
    assert prefill.attributes["server.address"] == "10.0.0.1"
    assert [name for name, _, _ in root.events] == ["first_output"]
    assert root.attributes["gen_ai.usage.cache_read.input_tokens"] == 5
    assert root.attributes["pdcoord.outcome"] == "served"


def test_each_rung_is_an_event_with_its_reason() -> None:
    story = Story()
    story.tell(Begun(), PrefillLost(1, Fault.UNREACHABLE), PrefillAnswered(2, Ticket(b"{}")))
    story.tell(DecodeLost(3, Fault.LOST_IN_BODY), DecodeOpened(4), DecodeEnded(4))
    root, *rest = story.end("colocated")
    rungs = [told for name, told, _ in root.events if name == "rung"]
    assert next((told["pdcoord.rung"], told["pdcoord.target"]) for told in rungs) == (
        "other-prefill",
        "10.0.0.1:8000",
    )
    assert len(rungs) == len(story.handoff.rungs) == root.attributes["pdcoord.rungs"]
    assert next(span.error for span in rest if span.name == "prefill") == str(rungs[0]["pdcoord.reason"])
    assert [span.error != "" for span in rest if span.name == "transfer"] == [True]


@pytest.mark.parametrize("dialect", [DialectName.SGLANG, DialectName.PDCOORD])
def test_both_legs_at_once_have_a_transfer_after_the_prefill(dialect: DialectName) -> None:
    story = Story(dialect=dialect)
    ticket = Ticket(b"{}") if dialect is DialectName.PDCOORD else None
    story.tell(Begun(), PrefillAnswered(1, ticket), DecodeOpened(2), DecodeEnded(2))
    assert names(story.end()) == [(n, "") for n in ("handoff", "prefill", "decode", "transfer", "stream")]


def test_a_client_that_leaves_ends_every_span() -> None:
    story = Story()
    story.tell(Begun(), PrefillAnswered(1, Ticket(b"{}")), ClientLeft())
    assert ("handoff", "") in names(story.end())
    assert ("decode", "cancelled") in names(story.spans)
    assert ("transfer", "cancelled") in names(story.spans)


def test_a_handoff_that_is_cut_from_outside_ends_every_span() -> None:
    story = Story()
    story.tell(Begun(), PrefillAnswered(1, Ticket(b"{}")))
    assert ("handoff", "broken-off") in names(story.end())


def test_the_log_line_knows_the_trace_even_where_nothing_is_traced_here() -> None:
    assert trace_id_of(None, PARENT.headers()) == PARENT.trace_id
    assert trace_id_of(None, []) is None
    assert trace_id_of(Story().trace, []) == PARENT.trace_id
