"""What Envoy tells the endpoint picker of a call, and what the picker answers; plain data, no protobuf.

Source: envoy.service.ext_proc.v3 (Envoy 1.37) and the endpoint-picker protocol 1.0.0.
"""

from dataclasses import dataclass, field
from enum import IntEnum

from pdcoord.core.events import Outcome
from pdcoord.core.plan import Plan
from pdcoord.protocol.errors import Refusal, RungReason
from pdcoord.protocol.plans import ServedHeader

Headers = list[tuple[bytes, bytes]]
"""Header fields in order, names in lower case, Envoy's pseudo headers (`:path`, `:status`) among them."""

CHUNK_BYTES_MAX = 62_000
"""Longest body of one answer: Envoy takes 64 KB, of which the message around it needs some."""


class BodyMode(IntEnum):
    """How Envoy sends a body; values of ProcessingMode.BodySendMode."""

    NONE = 0
    STREAMED = 1
    BUFFERED = 2
    BUFFERED_PARTIAL = 3
    FULL_DUPLEX_STREAMED = 4
    GRPC = 5


# None of these is frozen, though nobody changes them: that would double what making them costs each chunk.
@dataclass(slots=True)
class Modes:
    """How Envoy is set up, as its first message says.

    Attributes:
        is_body_early: a STREAMED request body comes before the head was answered.
    """

    request_body: BodyMode = BodyMode.FULL_DUPLEX_STREAMED
    response_body: BodyMode = BodyMode.FULL_DUPLEX_STREAMED
    is_body_early: bool = False


@dataclass(slots=True)
class RequestHead:
    """A call begins.

    Attributes:
        is_end: it has no body and no trailers.
        subset: addresses that may be picked, as Envoy was told by its own subsetting; None for all.
        modes: None if Envoy does not say.
        is_watched: Envoy only watches (observability_mode): no answer is taken.
        refusal: why nobody is let in by this head; None if somebody is.
    """

    headers: Headers
    is_end: bool = False
    subset: frozenset[str] | None = None
    modes: Modes | None = None
    is_watched: bool = False
    refusal: Refusal | None = None


@dataclass(slots=True)
class RequestBody:
    """A part of the request's body."""

    data: bytes
    is_end: bool


@dataclass(slots=True)
class RequestTrailers:
    """The request ends with trailers."""


@dataclass(slots=True)
class ResponseHead:
    """A response begins, the endpoint's or one of Envoy's own.

    Attributes:
        served_by: the endpoint that answered, as Envoy says; None if it does not.
        details: Envoy's response code details, where it was told to send that attribute; else "".
        modes: told where this is the first message; None elsewhere.
    """

    headers: Headers
    is_end: bool = False
    served_by: str | None = None
    details: str = ""
    modes: Modes | None = None


@dataclass(slots=True)
class ResponseBody:
    """A part of the response's body."""

    data: bytes
    is_end: bool


@dataclass(slots=True)
class ResponseTrailers:
    """The response ends with trailers."""


@dataclass(slots=True)
class Route:
    """Where a request goes.

    Attributes:
        destination: `host:port` of the primary, then those of the fallbacks, with commas between.
        headers: to be set on the request, the destination's own not among them.
        removed: names to be removed from it.
        body: in place of the client's; None to leave it.
        plan: by which it goes; None where any endpoint would do and the core knows nothing of the request.
        request_id: what the client is told.
        is_conformance: tell in a response header which endpoint answered.
    """

    destination: str
    headers: Headers = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    body: bytes | None = None
    plan: Plan | None = None
    request_id: bytes = b""
    is_conformance: bool = False


@dataclass(slots=True)
class Routed:
    """The answer to Ask."""

    route: Route


@dataclass(slots=True)
class Refused:
    """The answer to Ask: the call is not served."""

    refusal: Refusal


@dataclass(slots=True)
class TimedOut:
    """The time for the body has run out, or that for the whole call."""


@dataclass(slots=True)
class Closed:
    """Envoy ended the stream, or was cut off."""


FromEnvoy = RequestHead | RequestBody | RequestTrailers | ResponseHead | ResponseBody | ResponseTrailers
Event = FromEnvoy | Routed | Refused | TimedOut | Closed


@dataclass(slots=True)
class Ask:
    """Have the request planned; answered with a Routed or a Refused.

    Attributes:
        body: whole; None for a call that any ready endpoint may take.
    """

    head: RequestHead
    body: bytes | None


@dataclass(slots=True)
class AnswerHead:
    """The answer to a head.

    Attributes:
        route: where the request goes; only in the answer to a request's head.
        is_buffering: ask Envoy to send the request's body whole, where it allows that.
        headers, removed: to be set on and removed from a response.
    """

    is_request: bool
    route: Route | None = None
    is_buffering: bool = False
    headers: Headers = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class AnswerBody:
    """The answer to a part of a body.

    Attributes:
        data: None to leave the part as it is.
        is_streamed: this is a part of the body that goes on, not the answer to any one part that came.
        route: where the request goes, where a body is answered whole.
    """

    is_request: bool
    data: bytes | memoryview | None = None
    is_end: bool = False
    is_streamed: bool = False
    route: Route | None = None


@dataclass(slots=True)
class AnswerTrailers:
    """The answer to trailers."""

    is_request: bool


@dataclass(slots=True)
class Immediate:
    """Answer the client at once."""

    refusal: Refusal


@dataclass(slots=True)
class Moved:
    """Envoy sent the request to another endpoint than the primary."""

    address: str


@dataclass(slots=True)
class Began:
    """The response began."""

    status: int
    served: ServedHeader | None


@dataclass(slots=True)
class Failed:
    """The endpoint failed, and the client is told; the request has ended."""

    status: int
    reason: RungReason
    served: ServedHeader | None


@dataclass(slots=True)
class Ended:
    """The request has ended."""

    outcome: Outcome
    output_tokens: int | None = None


@dataclass(slots=True)
class End:
    """The stream is over.

    Attributes:
        violation: what Envoy did that the protocol forbids; "" if nothing.
    """

    violation: str = ""


Answer = AnswerHead | AnswerBody | AnswerTrailers | Immediate
Action = Ask | Answer | Moved | Began | Failed | Ended | End
