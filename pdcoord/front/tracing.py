"""The spans of one call at a front: the call itself, its waits for a turn, and each attempt.

Attribute names that begin with `gen_ai.`, `http.`, `url.`, `server.` and `error.` are OpenTelemetry's
semantic conventions 1.44; the others are ours. No text of a prompt or an answer, and no key, is in any.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pdcoord.core.events import Outcome
from pdcoord.core.plan import Plan
from pdcoord.front.ports import Break, CallRecord
from pdcoord.protocol.headers import parse_host_port
from pdcoord.protocol.trace import Headers, read_trace, with_trace
from pdcoord.wire.tracing import Attributes, Kind, Span, Tracing

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""`gen_ai.operation.name` of those paths that it has a name for."""
PROVIDER = "pdcoord"
_AT_FAULT = frozenset({Outcome.UPSTREAM_ERROR, Outcome.REFUSED})


@dataclass(slots=True)
class AttemptTrace:
    """One attempt; set `error` if it failed."""

    span: Span
    error: str = ""

    def headers(self, client: Iterable[tuple[bytes, bytes]]) -> Headers:
        """The client's headers with this attempt as the parent of whatever is done for it."""
        return with_trace(client, self.span.context)


class CallTrace:
    """The spans of one call; there is none where nothing is traced."""

    def __init__(self, tracing: Tracing, clock: Callable[[], float], span: Span, record: CallRecord) -> None:
        self._tracing = tracing
        self._clock = clock
        self._span = span
        self._record = record

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A wait for the call's turn."""
        span = self._child("wait", Kind.INTERNAL)
        error = "cancelled"
        try:
            yield
            error = ""
        finally:
            if self._record.plan is None and not error:
                error = "refused"
            span.end(self._clock(), error)

    @contextmanager
    def attempt(self, plan: Plan) -> Iterator[AttemptTrace]:
        """One attempt at one decode endpoint, to the end of its answer."""
        host, port = parse_host_port(plan.decode.address)
        attempt = AttemptTrace(
            self._child(
                "attempt", Kind.CLIENT, _of_plan(plan) | {"server.address": host, "server.port": port}
            )
        )
        try:
            yield attempt
        except asyncio.CancelledError:
            attempt.error = "cancelled"
            raise
        except Exception as error:
            attempt.error = type(error).__name__
            raise
        finally:
            is_broken = self._record.outcome is Outcome.UPSTREAM_ERROR
            attempt.span.end(self._clock(), attempt.error or (str(self._record.outcome) if is_broken else ""))

    def end(self) -> None:
        """The call has ended: say of it what its record says."""
        record, span = self._record, self._span
        if record.first_byte_s is not None:
            ttft_s = record.first_byte_s - record.began_s
            span.event("first_byte", {"pdcoord.ttft_ms": round(ttft_s * 1e3, 3)}, record.first_byte_s)
            span.set({"gen_ai.response.time_to_first_chunk": ttft_s})
        for broke in record.breaks:
            span.event("break", _of_break(broke), broke.noticed_s)
        plan = record.plan
        span.set(_of_record(record) | ({} if plan is None else dict(_of_plan(plan))))
        if plan is not None:
            span.set({"pdcoord.attempts": plan.attempt + 1})
        at_fault = str(record.reason or record.outcome) if record.outcome in _AT_FAULT else ""
        span.end(record.ended_s, at_fault)

    def headers(self) -> Headers:
        """What names this call as the parent, for whoever relays it in our place."""
        return self._span.context.headers()

    def _child(self, name: str, kind: Kind, attributes: Attributes | None = None) -> Span:
        return self._tracing.begin(
            name, kind, parent=self._span.context, at_s=self._clock(), attributes=attributes
        )


def begin_call(
    tracing: Tracing | None,
    clock: Callable[[], float],
    headers: Iterable[tuple[bytes, bytes]],
    record: CallRecord,
) -> CallTrace | None:
    """The trace of a call whose head was just read; None where nothing is traced.

    Either way the record is told which trace the call belongs to, if any.
    """
    parent = read_trace(headers)
    if tracing is None:
        record.trace_id = None if parent is None else parent.trace_id
        return None
    operation = OPERATIONS.get(record.path)
    attributes = {
        "http.request.method": "POST",
        "url.path": record.path,
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": None if operation is None else PROVIDER,
        "pdcoord.request_id": record.id,
    }
    span = tracing.begin(
        f"POST {record.path}", Kind.SERVER, parent=parent, at_s=record.began_s, attributes=attributes
    )
    record.trace_id = span.context.trace_id
    return CallTrace(tracing, clock, span, record)


def _of_plan(plan: Plan) -> dict[str, str | int | None]:
    return {
        "pdcoord.why": str(plan.why),
        "pdcoord.prefill": None if plan.prefill is None else str(plan.prefill.id),
        "pdcoord.decode": str(plan.decode.id),
        "pdcoord.attempt": plan.attempt + 1,
    }


def _of_break(broke: Break) -> dict[str, str | int | float | None]:
    return {
        "pdcoord.reason": str(broke.reason),
        "pdcoord.decode": str(broke.decode),
        "pdcoord.outcome": str(broke.outcome),
        "pdcoord.why": None if broke.why is None else str(broke.why),
        "pdcoord.output_tokens": broke.output_tokens,
        "pdcoord.gap_ms": None if broke.gap_s is None else round(broke.gap_s * 1e3, 3),
    }


def _of_record(record: CallRecord) -> dict[str, str | int | None]:
    return {
        # The exact name of what answers: of a model that was tuned, not that of its base.
        "gen_ai.request.model": record.adapter or record.model,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "http.response.status_code": record.status,
        "pdcoord.mode": None if record.mode is None else str(record.mode),
        "pdcoord.base_model": None if record.adapter is None else record.model,
        "pdcoord.outcome": str(record.outcome),
        "pdcoord.reason": None if record.reason is None else str(record.reason),
        "pdcoord.served_by_prefill": record.prefill,
        "pdcoord.breaks": len(record.breaks) or None,
    }
