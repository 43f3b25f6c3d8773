"""uvicorn's HTTP/1.1 protocol with the bounds that it lacks, and a short way for body parts."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from pdcoord.wire.asgi import Scope
from pdcoord.wire.relay import BODY_EXTENSION

# Bounds on a request's head, against clients that never end one. A read of the event loop (256 KiB) may
# come on top of the first; the second runs from the first byte, or from connecting.
HEAD_BYTES_MAX = 64 * 1024
HEAD_S_MAX = 15.0
_HEAD_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
)

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


_UPGRADE_LINE = re.compile(rb"^upgrade:[^\r\n]*\r\n", re.IGNORECASE | re.MULTILINE)


def _without_upgrade(data: bytes) -> bytes:
    """The bytes of a head without an offer to upgrade, which a server may ignore (RFC 9110 section 7.8).

    The parser would take everything behind such a head for another protocol, and a client that offers
    h2c with its POST (curl --http2) would lose its body.
    """
    end = data.find(b"\r\n\r\n")
    head, rest = (data[: end + 2], data[end + 2 :]) if end >= 0 else (data, b"")
    return _UPGRADE_LINE.sub(b"", head) + rest


class ServerProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the two bounds that it lacks: on the size of a head and on its time."""

    def __init__(
        self, config: uvicorn.Config, state: ServerState, on_lost: Callable[["ServerProtocol"], None]
    ) -> None:
        super().__init__(config=config, server_state=state, app_state={})
        self._on_lost = on_lost
        self._is_in_head = True
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        # More than one only when requests are pipelined; the first is the one that is being answered.
        self._writers: list[BodyWriter] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._arm_head_timer()

    def data_received(self, data: bytes) -> None:
        if self._is_in_head and b"pgrade" in data:
            data = _without_upgrade(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._is_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self.transport.write(_HEAD_TOO_LARGE)
                self.transport.close()
        cycle = cast("RequestResponseCycle | None", self.cycle)
        is_answering = cycle is not None and not cycle.response_complete
        if self._head_timer is None and self.timeout_keep_alive_task is None and not is_answering:
            # uvicorn has stopped its keep-alive timer for bytes that begin no request.
            self._arm_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_head_timer()
        self._hold_writers()
        super().connection_lost(exc)
        self._on_lost(self)

    def on_message_begin(self) -> None:
        self._is_in_head = True
        self._head_bytes = 0
        if self._head_timer is None:
            self._arm_head_timer()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._cancel_head_timer()
        super().on_headers_complete()
        # The app's task only starts when this callback has returned.
        writer = BodyWriter(self.cycle)
        self._writers.append(writer)
        cast("Scope", self.scope)["extensions"] = {BODY_EXTENSION: writer}

    def pause_writing(self) -> None:
        super().pause_writing()
        self._hold_writers()

    def on_response_complete(self) -> None:
        if self._writers:
            self._writers.pop(0).hold()
        super().on_response_complete()

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
