"""The spans of one handoff: the request, its legs, the transfer between them, and the stream that follows.

Attribute names that begin with `http.`, `url.`, `server.` and `error.` are OpenTelemetry's semantic
conventions 1.44; the others are ours. No text of a prompt or an answer, no key and no ticket is in any.
"""

from collections.abc import Callable

from pdcoord.protocol.headers import HostPort, parse_host_port
from pdcoord.protocol.trace import Headers, TraceContext, read_trace, with_trace
from pdcoord.wire.tracing import Kind, Span, Tracing
from sidecar.legs import Legs
from sidecar.vocabulary import Leg, LegKind, Outcome

_GOOD = "ok"
_NOT_AT_FAULT = frozenset({Outcome.SERVED, Outcome.PASSED_ON, Outcome.CLIENT_LEFT})


class HandoffTrace:
    """Follows one handoff and turns what it records into spans; there is none where nothing is traced.

    Every leg's span is made when the leg is sent, since the engine is told of it; all else is read off the
    machine after each of its steps, so no rule of the handoff knows of traces.
    """

    def __init__(self, tracing: Tracing, now_s: Callable[[], float], span: Span) -> None:
        self._tracing = tracing
        self._now_s = now_s
        self._span = span
        self._began_s = now_s()
        self._legs: dict[int, Span] = {}
        self._closed: set[int] = set()
        self._transfer: Span | None = None
        self._transfer_attempt = 0
        self._stream: Span | None = None
        self._rung_count = 0

    @property
    def trace_id(self) -> str:
        return self._span.context.trace_id

    def leg_headers(self, headers: Headers, leg: Leg) -> Headers:
        """The headers of a leg, with its own span as the parent of what its engine does."""
        span = self._legs.get(leg.number)
        if span is None:
            span = self._legs[leg.number] = self._begin(
                str(leg.kind),
                Kind.CLIENT,
                leg.began_s,
                _of_target(leg.target) | {"pdcoord.attempt": leg.attempt},
            )
        return with_trace(headers, span.context)

    def follow(self, legs: Legs) -> None:
        """Take note of what the machine's last step has changed."""
        for taken in legs.rungs[self._rung_count :]:
            told = {
                "pdcoord.rung": str(taken.rung),
                "pdcoord.reason": str(taken.reason),
                "pdcoord.target": str(taken.target),
            }
            self._span.event("rung", told, self._now_s())
        self._rung_count = len(legs.rungs)
        for leg in legs.legs.values():
            if leg.ended_s is not None and leg.number not in self._closed:
                self._closed.add(leg.number)
                self._close(leg, leg.ended_s)
        if legs.first_output_s is not None and self._stream is None:
            self._commit(legs, self._began_s + legs.first_output_s)

    def end(self, legs: Legs, *, mode: str, outcome: str, status: int | None) -> None:
        """The request is over, however it ended."""
        self.follow(legs)
        now_s = self._now_s()
        error = "" if outcome in _NOT_AT_FAULT else outcome
        # A handoff that was cut from outside has legs that nobody closed.
        for number in self._legs.keys() - self._closed:
            self._legs[number].end(now_s, "cancelled")
        if self._transfer is not None:
            self._transfer.end(now_s, "cancelled")
        if self._stream is not None:
            self._stream.end(now_s, error)
        served = legs.served()
        self._span.set(
            {
                "http.response.status_code": status,
                "pdcoord.mode": mode,
                "pdcoord.outcome": outcome,
                "pdcoord.prefill": served.prefill,
                "pdcoord.prefill_ms": served.prefill_ms,
                "pdcoord.transfer_ms": served.transfer_ms,
                "pdcoord.rungs": len(served.rungs),
                "gen_ai.usage.cache_read.input_tokens": served.cached_tokens,
            }
        )
        self._span.end(now_s, error)

    def _close(self, leg: Leg, at_s: float) -> None:
        error = "" if leg.outcome == _GOOD else leg.outcome
        span = self._legs.get(leg.number)
        if span is not None:
            span.end(at_s, error)
        if leg.kind is LegKind.PREFILL and not error:
            # From here on what the decode leg waits for is the KV, and then its first step.
            self._transfer = self._begin("transfer", Kind.INTERNAL, at_s, {"pdcoord.attempt": leg.attempt})
            self._transfer_attempt = leg.attempt
        elif (
            leg.kind is LegKind.DECODE
            and leg.attempt == self._transfer_attempt
            and self._transfer is not None
        ):
            self._transfer.end(at_s, error)
            self._transfer = None

    def _commit(self, legs: Legs, at_s: float) -> None:
        ttft_ms = round((at_s - self._began_s) * 1e3, 3)
        self._span.event("first_output", {"pdcoord.first_output_ms": ttft_ms}, at_s)
        if self._transfer is not None:
            self._transfer.end(at_s)
            self._transfer = None
        decode = next((leg for leg in reversed(legs.legs.values()) if leg.kind is LegKind.DECODE), None)
        parent = self._legs.get(decode.number) if decode is not None else None
        self._stream = self._begin("stream", Kind.INTERNAL, at_s, parent=parent)

    def _begin(
        self,
        name: str,
        kind: Kind,
        at_s: float,
        attributes: dict[str, str | int] | None = None,
        parent: Span | None = None,
    ) -> Span:
        above = (parent or self._span).context
        return self._tracing.begin(name, kind, parent=above, at_s=at_s, attributes=attributes)


def begin_handoff(
    tracing: Tracing, now_s: Callable[[], float], headers: Headers, path: str, request_id: bytes
) -> HandoffTrace:
    """The trace of a generative call that was read whole."""
    parent = read_trace(headers)
    attributes = {"url.path": path, "pdcoord.request_id": request_id.decode("ascii")}
    span = tracing.begin("handoff", Kind.SERVER, parent=parent, at_s=now_s(), attributes=attributes)
    return HandoffTrace(tracing, now_s, span)


def trace_id_of(trace: HandoffTrace | None, headers: Headers) -> str | None:
    """Which trace a request belongs to, whether or not it is traced here."""
    if trace is not None:
        return trace.trace_id
    told: TraceContext | None = read_trace(headers)
    return None if told is None else told.trace_id


def _of_target(target: HostPort) -> dict[str, str | int]:
    host, port = parse_host_port(target)
    return {"server.address": host, "server.port": port}
