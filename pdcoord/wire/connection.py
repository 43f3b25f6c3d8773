"""One HTTP/1.1 connection to a peer: one exchange at a time, kept alive between them."""

import asyncio
import socket
from collections.abc import Callable
from typing import Protocol, cast

import httptools

from pdcoord.protocol.headers import HostPort
from pdcoord.wire.errors import HeadTimeoutError, ResetError, StreamError, WireError
from pdcoord.wire.heads import HEADERS_MAX, are_codings_plain
from pdcoord.wire.response import Response

# Interim answers included. An engine's head is under 1 KiB; ours adds a plan of a few KiB.
HEAD_BYTES_MAX = 64 * 1024


# How far the response of the exchange has come: plain numbers, compared for every read.
_IN_HEAD = 0
_IN_BODY = 1
_ENDED = 2


class _Parser(Protocol):
    def feed_data(self, data: bytes) -> None: ...
    def get_http_version(self) -> str: ...
    def get_status_code(self) -> int: ...
    def should_keep_alive(self) -> bool: ...


class _MalformedError(Exception):
    """Raised inside a parser callback to stop the parser; its text says what is wrong."""


class Connection(asyncio.Protocol):
    """A connection as asyncio's protocol and httptools' callbacks at once.

    Attributes:
        address: the origin, as the pool keys it.
    """

    __slots__ = (
        "_ends_at_close",
        "_head_bytes",
        "_head_waiter",
        "_is_head_request",
        "_is_interim",
        "_is_reusable",
        "_is_tls",
        "_loop",
        "_on_free",
        "_on_lost",
        "_parser",
        "_response",
        "_state",
        "_transport",
        "address",
        "on_body",
    )

    def __init__(
        self,
        address: HostPort,
        *,
        on_free: Callable[["Connection"], None],
        on_lost: Callable[["Connection"], None],
    ) -> None:
        """Not connected yet: `loop.create_connection` is given this as its protocol.

        Args:
            address: the origin that is dialled.
            on_free: called when an exchange has ended and another may begin.
            on_lost: called once, when the connection is gone for whatever reason.
        """
        self.address = address
        self._on_free = on_free
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._is_tls = False
        self._parser: _Parser | None = None
        self._response: Response | None = None
        self._head_waiter: asyncio.Future[WireError | None] | None = None
        self._state = _ENDED

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, method: str, head: bytes, body: bytes, *, deadline_s: float) -> Response:
        """Send one request and wait for the head of its response, until the loop's time deadline_s.

        Cancelling it closes the connection.

        Raises:
            ResetError: if the connection is lost before the first byte of a response.
            HeadTimeoutError, StreamError: as their names say; the connection is closed.
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            raise ResetError(f"{self.address}: the connection was closed before the request was sent")
        response = self._begin(method, transport)
        waiter = self._head_waiter = self._loop.create_future()
        try:
            transport.writelines((head, body) if body else (head,))
            async with asyncio.timeout_at(deadline_s):
                failure = await waiter
        except BaseException as error:
            await response.aclose()
            if isinstance(error, TimeoutError):
                raise HeadTimeoutError(f"{self.address}: no response head within the timeout") from error
            raise
        # From here on the connection may already serve another exchange: the response can have ended, and
        # the pool can have lent it on, before this task woke.
        if failure is not None:
            raise failure
        return response

    def close(self) -> None:
        """Close at once; an exchange under way fails with StreamError."""
        self._fail(StreamError(f"{self.address}: the connection was closed by its owner"))

    def abort(self) -> None:
        """Close at once; what is unsent is dropped, and the peer sees the connection end."""
        self._response = None
        self._parser = None
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have asyncio's methods without being its subclasses.
        self._transport = cast("asyncio.Transport", transport)
        self._is_tls = transport.get_extra_info("ssl_object") is not None
        peer_socket = transport.get_extra_info("socket")
        if peer_socket is not None:
            peer_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        parser, response = self._parser, self._response
        if parser is None or response is None:
            self.abort()  # Bytes that nobody asked for: whatever they are, they are not the next response.
            return
        try:
            parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._on_malformed(response, error)
            return
        if self._state == _IN_BODY:
            response.fed(len(data))
        elif self._state == _ENDED:
            self._end(response)
        else:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self._fail(
                    StreamError(f"{self.address}: the response head is longer than {HEAD_BYTES_MAX} bytes")
                )

    def connection_lost(self, exc: Exception | None) -> None:
        if self._response is not None:
            if self._state == _IN_BODY and self._ends_at_close and exc is None:
                self._response.end()
                self._response = None
            elif self._state == _IN_HEAD and self._head_bytes == 0:
                self._fail(
                    ResetError(f"{self.address}: the connection was lost before the first response byte")
                )
            else:
                self._fail(StreamError(f"{self.address}: the connection was lost inside the response"))
        self._parser = None
        self._on_lost(self)

    # httptools callbacks; on_body is the response's own list.append, set for each exchange.

    def on_message_begin(self) -> None:
        if self._state != _IN_HEAD:
            raise _MalformedError("bytes after the end of the response")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._state == _IN_HEAD and self._response is not None:
            if len(self._response.headers) >= HEADERS_MAX:
                raise _MalformedError(f"its head has more than {HEADERS_MAX} fields")
            self._response.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser, response = self._parser, self._response
        assert parser is not None
        assert response is not None
        status = parser.get_status_code()
        if not 100 <= status <= 599 or status == 101:
            raise _MalformedError(f"status {status} is not one that was asked for")
        if not are_codings_plain(parser.get_http_version(), response.headers):
            raise _MalformedError("transfer-encoding is not chunked alone")
        if status < 200:
            self._is_interim = True
            response.headers.clear()
            return
        response.status = status
        is_framed = response.header(b"content-length") is not None or _is_chunked(response)
        self._ends_at_close = not (is_framed or self._is_head_request or status in {204, 304})
        if self._ends_at_close and self._is_tls:
            # Whoever is between can end a connection, and so would choose where the body ends.
            raise _MalformedError("over TLS its body has neither a length nor chunks")
        self._is_reusable = parser.should_keep_alive() and not self._is_head_request
        # llhttp cannot be told that this is the answer to HEAD, which has no body whatever it announces.
        self._state = _ENDED if self._is_head_request else _IN_BODY
        self._wake_head_waiter(None)

    def on_message_complete(self) -> None:
        if self._is_interim:
            self._is_interim = False
        else:
            self._state = _ENDED

    # Inside.

    def _begin(self, method: str, transport: asyncio.Transport) -> Response:
        assert self._response is None, "a connection carries one exchange at a time"
        response = self._response = Response(self._loop, transport, self.abort)
        self.on_body = response.chunks.append
        self._head_bytes = 0
        self._is_head_request = method == "HEAD"
        self._is_interim = False
        self._is_reusable = False
        self._ends_at_close = False
        self._state = _IN_HEAD
        self._parser = httptools.HttpResponseParser(self)
        return response

    def _end(self, response: Response) -> None:
        self._parser = None
        self._response = None
        response.end()
        if self._is_reusable and self.is_open:
            self._on_free(self)
        else:
            self.abort()

    def _on_malformed(self, response: Response, error: Exception) -> None:
        if self._state == _ENDED:
            # The response itself came whole; what follows it only costs the connection.
            self._is_reusable = False
            self._end(response)
            return
        cause = error.__context__ if isinstance(error.__context__, _MalformedError) else error
        self._fail(StreamError(f"{self.address}: malformed response: {cause}"))

    def _fail(self, error: WireError) -> None:
        response = self._response
        self.abort()
        if self._state == _IN_HEAD:
            self._wake_head_waiter(error)
        if response is not None:
            response.fail(error if isinstance(error, StreamError) else StreamError(str(error)))

    def _wake_head_waiter(self, failure: WireError | None) -> None:
        waiter, self._head_waiter = self._head_waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(failure)


def _is_chunked(response: Response) -> bool:
    codings = response.header(b"transfer-encoding")
    return codings is not None and codings.lower().rpartition(b",")[2].strip() == b"chunked"
