"""What the coordinator is told and what it asks for: the only way in and out of the core."""

from dataclasses import dataclass
from enum import StrEnum

from pdcoord.core.canary import CanaryBegan, CanaryJudged
from pdcoord.core.fleet import EndpointId, Signal
from pdcoord.core.kvcache import KvSignal
from pdcoord.core.model import Model
from pdcoord.core.plan import Plan
from pdcoord.core.probes import Probe
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.control import Events, Snapshot
from pdcoord.protocol.errors import Refusal, RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import ServedHeader


class Outcome(StrEnum):
    """How a request ended; closed, and the outcome label of metrics."""

    OK = "ok"
    CLIENT_GONE = "client-gone"
    CLIENT_ERROR = "client-error"
    UPSTREAM_ERROR = "upstream-error"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class ModelsReplaced:
    """A policy was accepted: these are all models from now on."""

    models: tuple[Model, ...]


@dataclass(frozen=True, slots=True)
class PathProbed:
    """The sidecar of a decode endpoint probed the path from a prefill address."""

    prefill: HostPort
    decode: EndpointId
    probe: Probe


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A client's call was read. Answered with one Dispatch, Refuse or Wait."""

    request: Request


@dataclass(frozen=True, slots=True)
class ResponseBegan:
    """The decode endpoint's response head arrived.

    Attributes:
        served: what the sidecar says it did; None from an endpoint that has no sidecar of ours.
        has_output: the first output is there, too. Not told beside `served`: a sidecar of ours holds the
            head back until it is; an engine of its own does not.
    """

    id: RequestId
    served: ServedHeader | None
    has_output: bool = False


@dataclass(frozen=True, slots=True)
class DecodeFailed:
    """The planned decode endpoint failed before a byte reached the client.

    Answered with a Dispatch to another one or a Refuse, as the ladder and its bounds say.

    Attributes:
        served: what a sidecar that still answered says it did.
        is_final: no other one can be tried, since the client is being told; answered with a Refuse.
    """

    id: RequestId
    reason: RungReason
    served: ServedHeader | None = None
    is_final: bool = False


@dataclass(frozen=True, slots=True)
class StreamBroke:
    """A stream broke off behind its first byte, or made no progress, and could be continued elsewhere.

    Answered with a Dispatch of what is left of it or a Refuse, as the ladder and its bounds say. After that
    Dispatch a DecodeFailed is one continuation that failed, and answered likewise.

    Attributes:
        output_tokens: that the client has had by now, of this attempt and those before.
    """

    id: RequestId
    reason: RungReason
    output_tokens: int


@dataclass(frozen=True, slots=True)
class StreamStalled:
    """A stream stands still and cannot be continued elsewhere, so it is waited for; may be told again."""

    id: RequestId


@dataclass(frozen=True, slots=True)
class HedgeAsked:
    """A request shows no output for its plan's `hedge_after_s` or longer: may another endpoint be asked too?

    Answered with the Dispatch of a second attempt, under an id of its own, or with nothing: ask again later.
    While there are two, all that is told of the request is of its first; HedgeOver leaves one of them.
    """

    id: RequestId


@dataclass(frozen=True, slots=True)
class HedgeOver:
    """One of two attempts is given up; the request goes on with the other.

    Attributes:
        id: of the request, not of the second attempt.
        is_won: it goes on with the second one.
        reason: why the one that is given up failed; None where it was merely slower.
        served: what its sidecar says it did.
    """

    id: RequestId
    is_won: bool
    reason: RungReason | None = None
    served: ServedHeader | None = None


@dataclass(frozen=True, slots=True)
class DecodeMoved:
    """Whoever sent the request on went to another endpoint than the plan's, before any response.

    The request is accounted there from now on. An address that is none of its model's changes nothing.
    """

    id: RequestId
    address: HostPort


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """Nothing more will happen to this request. Sent exactly once for each one dispatched or waiting.

    Attributes:
        output_tokens: as far as they were counted; None where they were not.
    """

    id: RequestId
    outcome: Outcome
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class SidecarReported:
    """A sidecar told of requests that other coordinators, or none, sent to it.

    Attributes:
        sidecar: its address, as endpoints name it.
        epoch: of this life of its process; what another told is void.
    """

    sidecar: HostPort
    epoch: str
    report: Snapshot | Events


@dataclass(frozen=True, slots=True)
class SidecarLost:
    """Nobody tells of that sidecar's requests any more."""

    sidecar: HostPort


@dataclass(frozen=True, slots=True)
class TimePassed:
    """It is the time that `Coordinator.next_event_s` named, or later."""


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send the request to plan.decode."""

    plan: Plan

    @property
    def id(self) -> RequestId:
        return self.plan.request_id


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer the client so. The request has ended: no RequestEnded follows."""

    id: RequestId
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Wait:
    """Keep the request: a Dispatch or Refuse of it follows, in answer to any later event."""

    id: RequestId


Event = (
    Signal
    | KvSignal
    | PathProbed
    | CanaryBegan
    | CanaryJudged
    | ModelsReplaced
    | RequestArrived
    | ResponseBegan
    | DecodeFailed
    | StreamBroke
    | StreamStalled
    | HedgeAsked
    | HedgeOver
    | DecodeMoved
    | RequestEnded
    | SidecarReported
    | SidecarLost
    | TimePassed
)
Action = Dispatch | Refuse | Wait
