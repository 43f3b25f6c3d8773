"""The request of a stream: read as far as it must be, answered once it has a route; pure."""

from collections.abc import Iterator
from dataclasses import replace
from enum import Enum

from pdcoord.extproc.paths import path_of
from pdcoord.extproc.vocabulary import (
    CHUNK_BYTES_MAX,
    Action,
    Answer,
    AnswerBody,
    AnswerHead,
    AnswerTrailers,
    Ask,
    BodyMode,
    Headers,
    Immediate,
    Modes,
    RequestBody,
    RequestHead,
    Route,
)
from pdcoord.front.answers import bodies_full, body_too_large
from pdcoord.protocol.errors import Refusal, RefuseReason
from pdcoord.protocol.openai import APIS
from pdcoord.wire.room import ByteRoom

_WHOLE = frozenset({BodyMode.BUFFERED, BodyMode.BUFFERED_PARTIAL})


class Side(Enum):
    """How far one direction of a call has come: what may come next."""

    HEAD = "head"
    BODY = "body"
    TRAILERS = "trailers"
    NOTHING = "nothing"


def header(headers: Headers, name: bytes) -> bytes | None:
    """The first value of a header."""
    for each, value in headers:
        if each == name:
            return value
    return None


def chunks(data: bytes, *, is_request: bool, is_end: bool) -> Iterator[AnswerBody]:
    """A body, or a part of one, in parts that Envoy takes; the end stands in the last one alone."""
    if len(data) <= CHUNK_BYTES_MAX:
        yield AnswerBody(is_request, data, is_end, is_streamed=True)
        return
    view, last = memoryview(data), len(data) - CHUNK_BYTES_MAX
    for begin in range(0, len(data), CHUNK_BYTES_MAX):
        is_last = begin >= last
        part = view[begin : begin + CHUNK_BYTES_MAX]
        yield AnswerBody(is_request, part, is_end and is_last, is_streamed=True)


class RequestHalf:
    """The request of one call.

    Args:
        room: that the bodies of all calls share.

    Attributes:
        side: what may come next.
        is_reading: the body is awaited, to be planned with.
        route: once there is one; without its body, which was passed on with it.
    """

    __slots__ = (
        "_bytes",
        "_bytes_held",
        "_bytes_max",
        "_has_trailers",
        "_head",
        "_is_any",
        "_is_overridden",
        "_mode",
        "_parts",
        "_room",
        "is_reading",
        "modes",
        "route",
        "side",
    )

    def __init__(self, bytes_max: int, room: ByteRoom) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._room = room
        self._bytes_held = 0
        self._parts: list[bytes] = []
        self._mode = BodyMode.FULL_DUPLEX_STREAMED
        self._has_trailers = False
        self._is_any = False
        self._is_overridden = False
        self._head = RequestHead([])
        self.modes: Modes | None = None
        self.side = Side.HEAD
        self.is_reading = False
        self.route: Route | None = None

    def on_head(self, head: RequestHead) -> list[Action]:
        """Ask for a route at once, or read on."""
        if head.refusal is not None:
            return [Immediate(head.refusal)]
        self._head = head
        self.modes = head.modes
        modes = head.modes or Modes()
        mode = self._mode = modes.request_body
        self.side = Side.NOTHING if head.is_end else Side.BODY
        method, path = header(head.headers, b":method"), header(head.headers, b":path") or b""
        is_api = method == b"POST" and path_of(path) in APIS
        if head.is_end or mode is BodyMode.NONE or not is_api:
            if mode is BodyMode.NONE and not head.is_end:
                self.side = Side.TRAILERS
            self._is_any = True
            return [Ask(head, None)]
        if mode is BodyMode.GRPC:
            return [_misconfigured("request_body_mode of Envoy's ext_proc filter is GRPC")]
        length = header(head.headers, b"content-length")
        if length is not None and length.isdigit() and int(length[:20]) > self._bytes_max:
            return [Immediate(body_too_large(self._bytes_max))]
        self.is_reading = True
        if mode in _WHOLE:
            return [AnswerHead(is_request=True)]
        if mode is BodyMode.STREAMED and not modes.is_body_early:
            # Envoy sends the body only once its head is answered, and by then the route must be in it.
            self._is_overridden = True
            self._mode = BodyMode.BUFFERED
            return [AnswerHead(is_request=True, is_buffering=True)]
        return []

    def on_body(self, body: RequestBody) -> list[Action]:
        """Keep a part, or pass it on where the request has gone already; ask once all have come."""
        is_whole = body.is_end or (self._mode in _WHOLE and not self._is_any)
        if is_whole:
            self.side = Side.NOTHING if body.is_end else Side.TRAILERS
        if self._is_any:
            if self._mode is BodyMode.FULL_DUPLEX_STREAMED:
                return list(chunks(body.data, is_request=True, is_end=body.is_end))
            return [AnswerBody(is_request=True)]
        self._bytes += len(body.data)
        is_cut = self._mode is BodyMode.BUFFERED_PARTIAL and not body.is_end
        if self._bytes > self._bytes_max or is_cut:
            return [Immediate(body_too_large(min(self._bytes, self._bytes_max)))]
        if self._is_overridden and not body.is_end:
            return [_misconfigured("request_body_mode of Envoy's ext_proc filter is STREAMED")]
        if not self._room.take(len(body.data)):
            return [Immediate(bodies_full())]
        self._bytes_held += len(body.data)
        self._parts.append(body.data)
        return self._ask() if is_whole else []

    def on_trailers(self) -> list[Action]:
        """The end of a body in parts; else nothing but to be answered."""
        self.side = Side.NOTHING
        if not self.is_reading:
            return [AnswerTrailers(is_request=True)]
        self._has_trailers = True
        return self._ask()

    def on_route(self, route: Route) -> list[Action]:
        """Answer all that has come, head first."""
        self.route = replace(route, body=None)
        if self._is_any:
            return [AnswerHead(is_request=True, route=route)]
        body = route.body
        if self._mode in _WHOLE:
            return [AnswerBody(is_request=True, data=body, route=route)]
        answers: list[Action] = [AnswerHead(is_request=True, route=route)]
        if self._mode is BodyMode.FULL_DUPLEX_STREAMED:
            whole = body if body is not None else _joined(self._parts)
            if whole or not self._has_trailers:
                answers += chunks(whole, is_request=True, is_end=not self._has_trailers)
        else:
            answers += self._part_by_part(body)
        if self._has_trailers:
            answers.append(AnswerTrailers(is_request=True))
        return answers

    def let_go(self) -> None:
        """Keep nothing of the body any more, and give its room back; idempotent."""
        self._parts = []
        self._room.give(self._bytes_held)
        self._bytes_held = 0

    def _part_by_part(self, body: bytes | None) -> Iterator[Answer]:
        """One answer for each part that came; the first brings all of another body."""
        for index in range(len(self._parts)):
            data = body if index == 0 or body is None else b""
            yield AnswerBody(is_request=True, data=data)

    def _ask(self) -> list[Action]:
        self.is_reading = False
        return [Ask(self._head, _joined(self._parts))]


def _joined(parts: list[bytes]) -> bytes:
    """All parts as one, which is kept in their place."""
    if len(parts) != 1:
        return b"".join(parts)
    return parts[0]


def _misconfigured(what: str) -> Immediate:
    message = f"{what}, which cannot be routed by content; set FULL_DUPLEX_STREAMED or BUFFERED."
    return Immediate(Refusal(RefuseReason.INTERNAL, message))
