"""The response of a stream: passed through part by part, and what it tells of the request's fate; pure."""

from pdcoord.core.events import Outcome
from pdcoord.extproc.asking import Side, chunks, header
from pdcoord.extproc.vocabulary import (
    Action,
    AnswerBody,
    AnswerHead,
    AnswerTrailers,
    Began,
    BodyMode,
    Ended,
    Failed,
    Headers,
    Modes,
    Moved,
    ResponseBody,
    ResponseHead,
    Route,
)
from pdcoord.front.outputs import OutputCounter
from pdcoord.front.upstream import decision_header, failure_of_answer, served_of
from pdcoord.protocol import headers as names
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.plans import ServedHeader
from pdcoord.resume.failure import tells_failure
from pdcoord.resume.opening import names_event_stream

_CONFORMANCE_SERVED = b"x-conformance-test-served-endpoint"
# Envoy's response code details (Envoy 1.37, source/common/stream_info/utility).
_NO_ANSWER = "upstream_reset_before_response_started"
_NO_CONNECTION = ("connection_failure", "connection_termination", "no_healthy_upstream")
_TOO_LATE = ("response_timeout", "per_try_timeout", "connection_timeout")


class ResponseHalf:
    """The response of one call, and the request's account as far as the response settles it.

    Attributes:
        side: what may come next.
        is_live: the request has an account, and its end has not been told.
        status: of the response; 0 before it.
    """

    __slots__ = ("_counter", "_is_begun", "_is_body_seen", "_modes", "_served", "is_live", "side", "status")

    def __init__(self) -> None:
        self._modes: Modes | None = None
        self._served: ServedHeader | None = None
        self._counter: OutputCounter | None = None
        self._is_begun = False
        self._is_body_seen = False
        self.side = Side.HEAD
        self.is_live = False
        self.status = 0

    def on_head(self, head: ResponseHead, modes: Modes | None, route: Route | None) -> list[Action]:
        """Settle what the head settles, and answer it."""
        self._modes = modes or head.modes
        self.side = Side.NOTHING if head.is_end else Side.BODY
        status = header(head.headers, b":status") or b""
        self.status = int(status[:3]) if status.isdigit() else 0
        self._served = served_of(header(head.headers, names.SERVED))
        actions: list[Action] = []
        if self.is_live:
            actions += self._settle(head, route)
        actions.append(_answer(head, route, self._served))
        if head.is_end:
            actions += self._end()
        return actions

    def on_body(self, body: ResponseBody) -> list[Action]:
        """Pass a part on; the first one says that the response has begun, the last that it has ended."""
        actions: list[Action] = []
        self._is_body_seen = True
        if self._counter is not None:
            self._counter(body.data)
        if self.is_live and not self._is_begun:
            actions.append(self._begin())
        if self._modes is None or self._modes.response_body is BodyMode.FULL_DUPLEX_STREAMED:
            actions += chunks(body.data, is_request=False, is_end=body.is_end)
        else:
            actions.append(AnswerBody(is_request=False))
        if body.is_end:
            self.side = Side.NOTHING
            actions += self._end()
        return actions

    def on_trailers(self) -> list[Action]:
        self.side = Side.NOTHING
        return [AnswerTrailers(is_request=False), *self._end()]

    def on_closed(self) -> list[Action]:
        """Envoy is gone. That ends a response well where it shows no bodies, else it was cut off."""
        if not self.is_live:
            return []
        is_unseen = self._modes is None or self._modes.response_body is BodyMode.NONE
        if self.side is Side.BODY and is_unseen and not self._is_body_seen:
            return self._end()
        return self.give_up(Outcome.CLIENT_GONE)

    def give_up(self, outcome: Outcome) -> list[Action]:
        """End the account, if there is one, without a whole response."""
        if not self.is_live:
            return []
        self.is_live = False
        return [Ended(outcome, self._tokens())]

    def _settle(self, head: ResponseHead, route: Route | None) -> list[Action]:
        if route is None or route.plan is None:
            # Envoy answers itself what has no route yet.
            return self.give_up(Outcome.UPSTREAM_ERROR if self.status >= 500 else Outcome.CLIENT_ERROR)
        actions: list[Action] = []
        if head.served_by is not None and head.served_by != route.plan.decode.address:
            actions.append(Moved(head.served_by))
        reason = _failure(self.status, head)
        if reason is not None:
            self.is_live = False
            return [*actions, Failed(self.status, reason, self._served)]
        is_body_seen = self._modes is not None and self._modes.response_body is not BodyMode.NONE
        if head.is_end or self.status >= 400 or not is_body_seen:
            actions.append(self._begin())
        if not head.is_end and header(head.headers, b"content-encoding") is None:
            is_stream = names_event_stream(header(head.headers, b"content-type"))
            self._counter = OutputCounter(b"", is_stream=is_stream)
        return actions

    def _begin(self) -> Began:
        self._is_begun = True
        return Began(self.status, self._served)

    def _end(self) -> list[Action]:
        if not self.is_live:
            return []
        self.is_live = False
        begun: list[Action] = [] if self._is_begun else [self._begin()]
        outcome = Outcome.OK if self.status < 400 else Outcome.CLIENT_ERROR
        if self._counter is not None and tells_failure(self._counter.tail):
            outcome = Outcome.UPSTREAM_ERROR
        return [*begun, Ended(outcome, self._tokens())]

    def _tokens(self) -> int | None:
        return self._counter.count() if self._counter is not None else None


def _failure(status: int, head: ResponseHead) -> RungReason | None:
    """Why a response counts as a failure of the endpoint; None if it is an answer."""
    reason = failure_of_answer(status, header(head.headers, names.REASON))
    if reason is None or not head.details:
        return reason
    if any(word in head.details for word in _TOO_LATE):
        return RungReason.DECODE_TIMEOUT
    if any(word in head.details for word in _NO_CONNECTION):
        return RungReason.DECODE_UNREACHABLE
    return RungReason.DECODE_ERROR if head.details.startswith(_NO_ANSWER) else reason


def _answer(head: ResponseHead, route: Route | None, served: ServedHeader | None) -> AnswerHead:
    """The client is told the decision and its request's id, and none of what is between us and a sidecar."""
    removed = [name for name, _ in head.headers if name.startswith(names.PREFIX) and name != names.REASON]
    headers: Headers = []
    if route is not None:
        headers.append((names.REQUEST_ID, route.request_id))
        if route.plan is not None:
            headers.append((names.DECISION, decision_header(route.plan, served)))
            removed = [name for name in removed if name != names.DECISION]
        if route.is_conformance and head.served_by is not None:
            headers.append((_CONFORMANCE_SERVED, head.served_by.encode()))
    return AnswerHead(is_request=False, headers=headers, removed=removed)
