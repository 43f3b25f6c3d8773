"""What the gateway asks of the process it runs in, and what it tells it; the runtime implements these."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from pdcoord.core.events import Dispatch, Outcome, Refuse
from pdcoord.core.fleet import Endpoint, EndpointId
from pdcoord.core.model import Model, Slo
from pdcoord.core.plan import Plan
from pdcoord.core.ports import Handler
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.errors import Refusal, RefuseReason, RungReason
from pdcoord.protocol.openai import Call
from pdcoord.protocol.plans import Mode, ServedHeader
from pdcoord.resume.continuation import Unresumable

Decided = Callable[[Dispatch | Refuse], None]
"""Hears what became of a request that was told to wait."""


class Coordination(Handler, Protocol):
    """The coordinator with its clock bound, and what may be read of it.

    `handle` answers with the actions of the request that the event is of. Those of requests that wait go
    to whoever expects them.
    """

    def expect(self, request_id: RequestId, decided: Decided) -> None:
        """Have `decided` called, once, when this request is dispatched or refused; not after its end.

        Asked for at once when `handle` has answered with a Wait.
        """
        ...

    def model(self, name: str) -> Model | None:
        """The model of this name, alias or adapter."""
        ...

    def models(self) -> tuple[Model, ...]: ...

    def unready(self) -> Refusal | None:
        """Why no traffic should be sent here; None when ready."""
        ...


class Relaying(Coordination, Protocol):
    """What a front asks that sends calls on itself, and can have a stream go on elsewhere."""

    def silence_s_max(self, request_id: RequestId) -> float | None:
        """How long the request's stream may go without a token before it is better off elsewhere.

        None where it could not go on elsewhere, and so must be waited for.
        """
        ...

    def blamed(self, request_id: RequestId, reason: RungReason) -> RungReason:
        """What the request's decode endpoint is held against for: one that drains gives back what it has."""
        ...


class Picking(Coordination, Protocol):
    """What a front asks that does not send calls on itself, but says where they go."""

    def alternatives(self, plan: Plan, allowed: frozenset[str] | None, count_max: int) -> Sequence[Endpoint]:
        """Endpoints that could stand in for a plan's decode endpoint, best first."""
        ...

    def any_endpoint(self, allowed: frozenset[str] | None) -> Endpoint | None:
        """A ready endpoint for a call that names no model; None if there is none."""
        ...

    def endpoints(self) -> Iterable[Endpoint]:
        """Every endpoint of the fleet."""
        ...


class Tokens(Protocol):
    """Tells the token ids of prompts, for models whose prefixes are precise."""

    async def tokens(self, call: Call, model: Model) -> Sequence[int] | None:
        """The prompt's token ids, within the model's own deadline; None if they are not to be had."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one call. Each wait ends; none of them is a hope.

    Attributes:
        body_bytes_max: longest request body.
        bodies_bytes_max: bodies of all calls together that are being read or have no answer yet.
        body_timeout_s: longest wait for a request body to arrive whole.
        head_timeout_s: longest wait for a stream's head, and again for its first byte, queueing and the
            sidecar's ladder included: more than the sidecar's own wait for an answer (600 s).
        answer_timeout_s: the same for an answer that comes whole, which is all of the generation.
        stream_idle_s: longest silence inside an answer; more than the sidecar's own, which knows more.
        request_deadline_s: longest life of a call.
        attempts_max: decode endpoints tried for one call, whatever the policy says.
        live_max: calls being read or served at a time; one more is refused before its body is read.
        held_bytes_max: longest answer of a failed attempt that is kept to be relayed if nothing is left.
        resume_bytes_max: of all streams, kept so that they can be continued; past it the next cannot.
        resume_stream_bytes_max: of one stream and its request likewise.
        count_timeout_s: longest wait for an engine to count the tokens of a text.
    """

    body_bytes_max: int = 32 << 20
    bodies_bytes_max: int = 256 << 20
    body_timeout_s: float = 60.0
    head_timeout_s: float = 900.0
    answer_timeout_s: float = 1_800.0
    stream_idle_s: float = 90.0
    request_deadline_s: float = 3_600.0
    attempts_max: int = 16
    held_bytes_max: int = 1 << 20
    live_max: int = 16_384
    resume_bytes_max: int = 256 << 20
    resume_stream_bytes_max: int = 4 << 20
    count_timeout_s: float = 5.0


class BreakOutcome(StrEnum):
    """What became of a stream that broke off in its middle; closed, and a label of metrics."""

    CONTINUED = "continued"
    FINISHED = "finished"
    """Nothing was left to generate: the gateway ended the stream itself."""
    UNRESUMABLE = "unresumable"
    REFUSED = "refused"
    """The policy or the fleet had no way to go on, or all that were tried failed."""
    LEFT = "left"
    """The client left, or the call's time ran out, before any of these."""


@dataclass(slots=True)
class Break:
    """One time that a stream broke off.

    Attributes:
        decode: where it did.
        output_tokens: that the client had by then.
        why: what of the call or its answer cannot be continued; None unless it is unresumable.
        gap_s: from when it was noticed to the first byte that came of it elsewhere; None if none did.
    """

    reason: RungReason
    decode: EndpointId
    output_tokens: int
    noticed_s: float
    outcome: BreakOutcome = BreakOutcome.LEFT
    why: Unresumable | None = None
    gap_s: float | None = None


@dataclass(slots=True)
class CallRecord:
    """One call from its head to its end, for the log line and the metrics of it.

    Times are those of the clock that the relay was given.

    Attributes:
        id: unique among live calls; the client's own x-request-id wherever that is.
        model: the policy's name, so that labels made of it are bounded; None where none was found.
        plan: the last one, if any was made.
        reason: set when pdcoord itself answered.
        status: what the client got; 499 when it left before an answer began.
        began_s: when the call's head had been read.
        first_byte_s: when the first byte of the answer's body was there.
        has_unknown_objective: it named an objective that the policy does not have, or its key.
        trace_id: of the trace that the call belongs to, the client's or our own; None if there is none.
        output_tokens: as counted in the answer; None before its end, and where they cannot be counted.
        slo: the call's own objectives, or the model's.
        began_plan: the plan that was in force when the answer began; None before.
        breaks: times that its stream broke off, in order.
        is_cut_short: its stream ended well for HTTP, but without what such a stream ends with.
        failures: why attempts were given up before they gave the client anything, in order.
        key_name: of the API key it came with; None where none is asked for.
        adapter: of the model, that it asked for; None for the model itself.
    """

    id: RequestId
    path: str
    began_s: float
    model: str | None = None
    plan: Plan | None = None
    served: ServedHeader | None = None
    outcome: Outcome = Outcome.CLIENT_GONE
    reason: RefuseReason | None = None
    status: int = 499
    first_byte_s: float | None = None
    has_unknown_objective: bool = False
    ended_s: float = 0.0
    trace_id: str | None = None
    output_tokens: int | None = None
    is_stream: bool = False
    slo: Slo = field(default_factory=Slo)
    began_plan: Plan | None = None
    breaks: tuple[Break, ...] = ()
    failures: tuple[RungReason, ...] = ()
    is_cut_short: bool = False
    key_name: str | None = None
    adapter: str | None = None

    def note_request(self, call: Call, request: Request, model: Model) -> None:
        """What was read of the call, before anything is decided."""
        own, usual = request.slo, model.slo
        self.is_stream = call.is_stream
        self.adapter = request.adapter or None
        self.slo = Slo(
            ttft_s=usual.ttft_s if own.ttft_s is None else own.ttft_s,
            tpot_s=usual.tpot_s if own.tpot_s is None else own.tpot_s,
        )

    @property
    def mode(self) -> Mode | None:
        """How the call was served in the end, which a fallback may have made other than planned."""
        if self.served is not None:
            return self.served.mode
        plan = self._plan
        return plan.mode if plan is not None else None

    @property
    def _plan(self) -> Plan | None:
        """What `served` is of; where a stream went on later, its breaks tell."""
        return self.began_plan or self.plan

    @property
    def prefill(self) -> str | None:
        """The endpoint whose KV was used, or would be; its address if it is none of the plan's."""
        plan = self._plan
        if plan is None:
            return None
        if self.served is None:
            return plan.prefill.id if plan.prefill is not None else None
        for endpoint in (plan.prefill, *(rung.prefill for rung in plan.rungs)):
            if endpoint is not None and endpoint.address == self.served.prefill:
                return endpoint.id
        return self.served.prefill

    @property
    def prompt_tokens(self) -> int | None:
        """Counted or estimated, as the decision was made on; what a replay of the log needs."""
        plan = self._plan
        return (
            None if plan is None else plan.chosen.figures.cached_tokens + plan.chosen.figures.uncached_tokens
        )

    @property
    def cached_tokens(self) -> int | None:
        """As the sidecar saw it, else as it was predicted."""
        if self.served is not None and self.served.cached_tokens is not None:
            return self.served.cached_tokens
        plan = self._plan
        return None if plan is None else plan.chosen.figures.cached_tokens


class Observer(Protocol):
    """Hears of every call once at its start and once at its end."""

    def call_began(self) -> None: ...

    def call_ended(self, record: CallRecord) -> None: ...

    def refused(self, reason: RefuseReason) -> None:
        """An answer outside the relayed calls: an unknown path, a wrong method, an unknown model's page."""
        ...

    def crashed(self, error: Exception, request_id: str) -> None:
        """A defect of ours: the client has been told nothing of it but its existence."""
        ...
