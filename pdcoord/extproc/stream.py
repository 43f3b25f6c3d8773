"""One call as Envoy tells of it: what is legal when, what is answered when, and when it has ended; pure.

The request is answered once it is whole and has a route, unless any endpoint may take it: then at its head.
The response passes through part by part. The two run side by side, each in an order of its own:

    request     head -> body* -> trailers?
    response    head -> body* -> trailers?      may begin at any time, and without a request where a filter
                                                before us answered
"""

from pdcoord.core.events import Outcome
from pdcoord.extproc.answering import ResponseHalf
from pdcoord.extproc.asking import RequestHalf, Side
from pdcoord.extproc.vocabulary import (
    Action,
    Ask,
    Closed,
    End,
    Event,
    FromEnvoy,
    Immediate,
    Refused,
    RequestBody,
    RequestHead,
    RequestTrailers,
    ResponseBody,
    ResponseHead,
    ResponseTrailers,
    Routed,
    TimedOut,
)
from pdcoord.front.answers import body_too_slow
from pdcoord.protocol.errors import Refusal, RefuseReason
from pdcoord.wire.room import ByteRoom

# What may come next, by direction; what is not here is a violation. Of a body that Envoy sends whole there
# is one part, so only trailers follow it.
_LEGAL: dict[type, frozenset[Side]] = {
    RequestHead: frozenset({Side.HEAD}),
    RequestBody: frozenset({Side.BODY}),
    RequestTrailers: frozenset({Side.BODY, Side.TRAILERS}),
    ResponseHead: frozenset({Side.HEAD}),
    ResponseBody: frozenset({Side.BODY}),
    ResponseTrailers: frozenset({Side.BODY}),
}
_OF_REQUEST = frozenset({RequestHead, RequestBody, RequestTrailers})


class Stream:
    """The machine of one stream.

    Args:
        body_timeout_s: only for the words of the answer to a body that does not end.
        room: that the bodies of all calls share; `let_go` gives back what this one took.

    Attributes:
        is_asking: an Ask has not been answered.
        is_over: an End was given; nothing that comes matters any more.
    """

    __slots__ = ("_body_timeout_s", "_request", "_response", "is_asking", "is_over")

    def __init__(self, *, body_bytes_max: int, body_timeout_s: float, room: ByteRoom) -> None:
        self._body_timeout_s = body_timeout_s
        self._request = RequestHalf(body_bytes_max, room)
        self._response = ResponseHalf()
        self.is_asking = False
        self.is_over = False

    @property
    def is_reading(self) -> bool:
        """Whether the request has not come as far as it must to be planned."""
        is_first = self._request.side is Side.HEAD and self._response.side is Side.HEAD
        return is_first or self._request.is_reading

    @property
    def is_routed(self) -> bool:
        """Whether the request has gone its way, so that the client can no longer be answered at once."""
        return self._request.route is not None

    @property
    def status(self) -> int:
        """Of the response; 0 before it."""
        return self._response.status

    def handle(self, event: Event) -> list[Action]:
        """Take one event in; what must be done comes out, in order."""
        if self.is_over:
            return []
        if type(event) is ResponseBody and self._response.side is Side.BODY:  # Most of all there is.
            actions = self._response.on_body(event)
        else:
            actions = self._handle(event)
        if self._response.side is Side.NOTHING and not self.is_over:
            actions += self._over()
        return actions

    def let_go(self) -> None:
        """Keep nothing of the request's body: what was to be done with it is done; idempotent."""
        self._request.let_go()

    def validate(self) -> None:
        """Assert what holds between events."""
        assert not (self.is_over and self._response.is_live), "the stream is over and its request is not"
        assert not (self.is_asking and self._request.is_reading), "asked before the request was whole"
        assert self._request.route is None or not self.is_asking, "asked for a route that is there"

    def _handle(self, event: Event) -> list[Action]:
        match event:
            case Routed(route):
                if not self.is_asking:
                    return []
                self.is_asking = False
                self._response.is_live = route.plan is not None
                return self._request.on_route(route)
            case Refused(refusal):
                if not self.is_asking:
                    return []
                self.is_asking = False
                self._response.is_live = False
                return [Immediate(refusal), *self._over()]
            case TimedOut():
                return self._time_out()
            case Closed():
                return [*self._response.on_closed(), *self._over()]
            case _:
                return self._take(event)

    def _take(self, event: FromEnvoy) -> list[Action]:
        of_request = type(event) in _OF_REQUEST
        side = self._request.side if of_request else self._response.side
        if side not in _LEGAL[type(event)]:
            return self._violated(f"{type(event).__name__} where the {_whose(of_request)} {_WORDS[side]}")
        match event:
            case RequestHead(is_watched=True):  # It takes no answers.
                return self._over()
            case RequestHead():
                actions = self._request.on_head(event)
            case RequestBody():
                actions = self._request.on_body(event)
            case RequestTrailers():
                actions = self._request.on_trailers()
            case ResponseHead():
                self.is_asking = False
                return self._response.on_head(event, self._request.modes, self._request.route)
            case ResponseBody():
                return self._response.on_body(event)
            case ResponseTrailers():
                return self._response.on_trailers()
        return self._note(actions)

    def _note(self, actions: list[Action]) -> list[Action]:
        """Note what the request's half wants done."""
        for action in actions:
            match action:
                case Ask(_, body):
                    self.is_asking = True
                    self._response.is_live = body is not None
                case Immediate():
                    return [action, *self._over()]
                case _:
                    pass
        return actions

    def _over(self, violation: str = "") -> list[Action]:
        self.is_over = True
        self.is_asking = False
        return [*self._response.give_up(Outcome.UPSTREAM_ERROR), End(violation)]

    def _violated(self, what: str) -> list[Action]:
        violation = f"ext_proc: {what}"
        if self._request.route is not None or self._response.side is not Side.HEAD:
            return self._over(violation)
        message = f"Envoy broke the protocol of its external processor: {what}."
        return [Immediate(Refusal(RefuseReason.INTERNAL, message)), *self._over(violation)]

    def _time_out(self) -> list[Action]:
        if self.is_reading:
            return [Immediate(body_too_slow(self._body_timeout_s)), *self._over()]
        if self.is_asking:
            refusal = Refusal(RefuseReason.UPSTREAM_TIMEOUT, "No endpoint was found in time; retry later.")
            return [Immediate(refusal), *self._over()]
        return self._over("ext_proc: the call did not end in time")


def _whose(of_request: bool) -> str:  # noqa: FBT001  # One word of a message.
    return "request" if of_request else "response"


_WORDS = {
    Side.HEAD: "has no head yet",
    Side.BODY: "has a body to come",
    Side.TRAILERS: "has nothing but trailers to come",
    Side.NOTHING: "has ended",
}
