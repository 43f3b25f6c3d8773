"""uvicorn's HTTP/1.1 protocol with the bounds and refusals that it lacks, and a short way for body parts."""

import asyncio
import logging
from collections.abc import Awaitable
from typing import NoReturn, Protocol, cast

import httptools
import uvicorn
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from pdcoord.protocol.errors import Refusal, RefuseReason
from pdcoord.wire.asgi import App, Message, Receive, Scope, Send
from pdcoord.wire.heads import HEADERS_MAX, head_too_large, request_fault
from pdcoord.wire.relay import BODY_EXTENSION

# Bounds on a request's head, against clients that never end one. A read of the event loop (256 KiB) may
# have come on top of the first when it is noticed; the second runs from the first byte, or from connecting.
HEAD_BYTES_MAX = 64 * 1024
_FIELD_FRAME_BYTES = 4  # Colon, space, end of line.
HEAD_S_MAX = 15.0
# What a client may send beside the bytes of a body: frames of chunks with their extensions, trailers, blank
# lines. A chunk of one byte takes five more; one read of the event loop may hold a head.
FRAMING_BYTES_MAX = 512 * 1024
FRAMING_PER_BODY_BYTE_MAX = 8
# A request that was answered before its body had come whole. So much of it is still read for the sake of the
# connection; a longer one ends it.
UNREAD_BYTES_MAX = 64 * 1024
# A close with bytes unread is a reset, which may take the answer from a client that is still sending. So they
# are read and dropped for a while before it (RFC 9112 section 9.6).
LINGER_S_MAX = 2.0
LINGER_BYTES_MAX = 16 << 20

# Of no hierarchy: a library that configures logging, as NIXL's Python API does, enables what is in one.
_silent = logging.Logger("pdcoord.wire.silent", logging.CRITICAL + 1)  # noqa: LOG001  # as said above


class BodyWriter:
    """`relay.BodyWriter` over uvicorn's cycle: what its `send` does for a chunked body part, and no more.

    The protocol says when the transport's buffer is full and when the client has gone, so that a write
    need not look for either.
    """

    __slots__ = ("_cycle", "_is_direct", "_write")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._write = cycle.transport.write
        self._is_direct = False

    def write(self, data: bytes) -> Awaitable[None] | None:
        if self._is_direct:
            self._write(b"%x\r\n%b\r\n" % (len(data), data))
            # The write may have filled the buffer, in which case `hold` was called meanwhile.
            if self._is_direct:
                return None
            return self._cycle.flow.drain()
        cycle = self._cycle
        if cycle.disconnected:
            return None
        is_chunked = (
            cycle.response_started and cycle.chunked_encoding is True and cycle.scope["method"] != "HEAD"
        )
        if not is_chunked or cycle.response_complete or cycle.flow.write_paused:
            return cycle.send({"type": "http.response.body", "body": data, "more_body": True})
        self._is_direct = True
        return self.write(data)

    def hold(self) -> None:
        """Something has changed: look again before the next write."""
        self._is_direct = False


class _Soft:
    """A transport as uvicorn's cycle uses it, that is closed without a reset."""

    __slots__ = ("_protocol", "_transport")

    def __init__(self, protocol: "ServerProtocol") -> None:
        self._protocol = protocol
        self._transport = protocol.transport

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._protocol.linger()


class _RefusedError(Exception):
    """Raised inside a parser callback to stop the parser."""


class Gate(Protocol):
    """The listener that connections come in by."""

    def admits(self, connection: "ServerProtocol") -> bool:
        """Whether a connection that was just made may stay."""
        ...

    def is_leaving(self) -> bool:
        """Whether answers that begin now tell their client to come back on another connection."""
        ...

    def lost(self, connection: "ServerProtocol") -> None:
        """Called once for each connection that was made."""
        ...


class ServerProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds on a head's size and time, on a body's framing, and a strict reading.

    The parser is llhttp in its strict mode, which refuses most of what one reader takes for one request and
    another for two; `heads.request_fault` refuses the rest. An offer to upgrade is ignored (RFC 9110 section
    7.8), trailers are dropped.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState, gate: Gate) -> None:
        super().__init__(config=config, server_state=state, app_state={})
        self._gate = gate
        self._is_in_head = True
        self._is_upgrade_offered = False
        self._head_bytes = 0
        self._body_bytes = 0
        self._raw_bytes = 0
        self._fault: Refusal | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._lingered_bytes = 0
        # More than one only when requests are pipelined; the first is the one that is being answered.
        self._writers: list[BodyWriter] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        if self._gate.admits(self):
            self._arm_head_timer()
        else:
            transport.close()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._linger_timer is not None:
            self._lingered_bytes += len(data)
            if self._lingered_bytes > LINGER_BYTES_MAX:
                self.transport.close()
            return
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            self._refuse(self._fault or _malformed(error))
            return
        if self._is_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self._refuse(head_too_large(f"it is longer than {HEAD_BYTES_MAX} bytes"))
                return
        else:
            self._raw_bytes += len(data)
            if self._raw_bytes - self._body_bytes > (
                FRAMING_BYTES_MAX + FRAMING_PER_BODY_BYTE_MAX * self._body_bytes
            ):
                self._refuse(
                    Refusal(RefuseReason.MALFORMED_HTTP, "The body has far more framing than content.")
                )
                return
        if self._head_timer is None and self.timeout_keep_alive_task is None and not self._is_answering:
            # uvicorn has stopped its keep-alive timer for bytes that begin no request.
            self._arm_head_timer()

    @property
    def _is_answering(self) -> bool:
        cycle = cast("RequestResponseCycle | None", self.cycle)
        return cycle is not None and not cycle.response_complete

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            # The parser takes what follows for another protocol; begin the message anew without the offer.
            (end,) = offer.args
            version = self.parser.get_http_version().encode("ascii")
            head = [b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, version)]
            head += [b"%b: %b\r\n" % pair for pair in self.headers if pair[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self._is_upgrade_offered = False
            self.parser.feed_data(b"".join([*head, b"\r\n", data[end:]]))

    def _refuse(self, refusal: Refusal) -> None:
        """Close the connection, with an answer where none is under way that it would end up inside."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is None or cycle.response_complete or not (cycle.response_started or self.pipeline):
            body = refusal.body()
            fields = [*refusal.headers(), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
            head = b"".join([b"%b: %b\r\n" % field for field in fields])
            self.transport.write(STATUS_LINE[refusal.status] + head + b"\r\n" + body)
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            self._hold_writers()
        self.transport.close()

    def linger(self) -> None:
        """Close the connection once the client has what it was sent, or has had time for that."""
        if self._linger_timer is not None or self.transport.is_closing():
            return
        self._linger_timer = self.loop.call_later(LINGER_S_MAX, self.transport.close)
        if self.transport.can_write_eof():  # TLS cannot; there the answer's own length is its end.
            self.transport.write_eof()
        self.flow.resume_reading()

    def shutdown(self) -> None:
        if self._linger_timer is None:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_head_timer()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        self._hold_writers()
        super().connection_lost(exc)
        self._gate.lost(self)

    def on_message_begin(self) -> None:
        self._is_in_head = True
        self._head_bytes = 0
        if self._head_timer is None:
            self._arm_head_timer()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_head:
            return  # A trailer: taken for a header it would be one that nobody has looked at.
        if len(self.headers) >= HEADERS_MAX:
            self._stop_parser(head_too_large(f"it has more than {HEADERS_MAX} fields"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        fault = request_fault(
            self.parser.get_http_version(), self.parser.get_method(), self.url, self.headers
        )
        if fault is not None:
            self._stop_parser(fault)
        # What came of it in one read with its end has not been counted by then.
        fields_bytes = sum(len(name) + len(value) + _FIELD_FRAME_BYTES for name, value in self.headers)
        if fields_bytes + len(self.url) > HEAD_BYTES_MAX:
            self._stop_parser(head_too_large(f"it is longer than {HEAD_BYTES_MAX} bytes"))
        if self.parser.should_upgrade():
            self._is_upgrade_offered = True
            return
        self._is_in_head = False
        self._body_bytes = 0
        self._raw_bytes = 0
        self._cancel_head_timer()
        super().on_headers_complete()
        # The app's task only starts when this callback has returned.
        writer = BodyWriter(self.cycle)
        self._writers.append(writer)
        cast("Scope", self.scope)["extensions"] = {BODY_EXTENSION: writer}

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_upgrade_offered:
            super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._hold_writers()

    def on_response_complete(self) -> None:
        if self._writers:
            self._writers.pop(0).hold()
        if self._linger_timer is None:
            super().on_response_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        async def announcing(scope: Scope, receive: Receive, send: Send) -> None:
            async def announce(message: Message) -> None:
                if not cycle.response_started:
                    if self._gate.is_leaving():
                        cycle.keep_alive = False
                    if cycle.more_body:
                        self._answer_early(cycle)
                await send(message)

            await cast("App", app)(scope, receive, announce)

        super()._start_asgi_task(cycle, cast("ASGI3Application", announcing))

    def _answer_early(self, cycle: RequestResponseCycle) -> None:
        """The body of a request that is about to be answered has not come whole."""
        length = next((value for name, value in self.headers if name == b"content-length"), None)
        if length is None or int(length) - self._body_bytes > UNREAD_BYTES_MAX:
            cycle.keep_alive = False
        cycle.transport = cast("asyncio.Transport", _Soft(self))

    def _stop_parser(self, refusal: Refusal) -> NoReturn:
        self._fault = refusal
        raise _RefusedError

    def _hold_writers(self) -> None:
        for writer in self._writers:
            writer.hold()

    def _arm_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S_MAX, self._on_head_timer)

    def _on_head_timer(self) -> None:
        self._head_timer = None
        if self.flow.read_paused:
            self._arm_head_timer()  # The rest of the head waits with us, behind a pipelined request.
        else:
            self.transport.close()

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def silence(self) -> None:
        """Let no stack be logged for the request that is about to be cancelled; the app has its own word."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is not None:
            cycle.logger = _silent


def _malformed(error: httptools.HttpParserError) -> Refusal:
    """The parser's own words are its own: none of them is a client's bytes."""
    return Refusal(RefuseReason.MALFORMED_HTTP, f"This is no HTTP/1.1 request: {error}.")
