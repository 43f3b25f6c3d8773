"""The project's HTTP client: HTTP/1.1, in clear or over TLS, in a bounded pool of keep-alive connections."""

import asyncio
import contextlib
from collections.abc import Collection, Iterable
from types import TracebackType
from typing import Any, Self

from pdcoord.protocol.headers import HostPort, parse_host_port
from pdcoord.wire.connection import Connection
from pdcoord.wire.errors import ConnectError, ResetError
from pdcoord.wire.heads import Headers, encode_request_head
from pdcoord.wire.pool import IdlePool
from pdcoord.wire.response import Response
from pdcoord.wire.tls import SHUTDOWN_S_MAX, ClientTls

__all__ = ["Client", "Headers", "Response"]

_CLOSE_S_MAX = 1.0


class Client:
    """A pool of connections to any number of origins.

    Used as `async with Client() as client`; leaving it closes every connection, busy or idle.
    """

    def __init__(
        self,
        *,
        idle_s_max: float = 4.0,
        idle_per_origin_max: int = 1_024,
        idle_max: int = 8_192,
        connect_timeout_s: float = 3.0,
        tls: ClientTls | None = None,
        plain: Collection[HostPort] = (),
    ) -> None:
        """Opens nothing yet.

        Args:
            idle_s_max: a connection idle for longer is closed; below the peer's own keep-alive (vLLM: 5 s),
                so that it is not the peer who closes it under a request.
            idle_per_origin_max, idle_max: idle connections kept; past them the longest unused is closed.
            connect_timeout_s: longest wait for a name, a connection and its handshake together.
            tls: for every origin but those in `plain`; None for none at all.
        """
        self._pool: IdlePool[Connection] = IdlePool(
            idle_s_max=idle_s_max, per_origin_max=idle_per_origin_max, total_max=idle_max
        )
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        self._plain = frozenset(plain)
        self._connections: set[Connection] = set()
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._all_lost = asyncio.Event()
        self._is_entered = False

    async def __aenter__(self) -> Self:
        self._is_entered = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_entered = False
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
            self._expiry_timer = None
        for connection in list(self._connections):
            connection.close()
        if self._connections:
            self._all_lost.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S_MAX):
                    await self._all_lost.wait()

    @property
    def connection_count(self) -> int:
        """Open connections, busy and idle."""
        return len(self._connections)

    @property
    def idle_count(self) -> int:
        return len(self._pool)

    async def request(
        self,
        method: str,
        address: HostPort,
        target: str,
        *,
        headers: Iterable[tuple[bytes, bytes]] = (),
        body: bytes = b"",
        head_timeout_s: float,
    ) -> Response:
        """Send a request and wait for the head of its response.

        `host` and `content-length` are ours; hop-by-hop headers are not sent. A connection lost before
        any response byte is retried once, on a fresh one. Cancelling this closes the connection, which
        is what aborts the request inside an engine.

        Args:
            target: path with query, as it goes on the wire.
            head_timeout_s: from sending to the end of the response's head, the retry included.

        Raises:
            InvalidRequestError, ConnectError: nothing was sent.
            ResetError, HeadTimeoutError: no response byte came, or no whole head.
            StreamError: what came is not the head of a response.
        """
        head = encode_request_head(method, target, address, headers, len(body))
        loop = asyncio.get_running_loop()
        connection = self._pool.take(address, loop.time()) or await self._connect(address)
        deadline_s = loop.time() + head_timeout_s
        try:
            return await connection.exchange(method, head, body, deadline_s=deadline_s)
        except ResetError as first:
            try:
                connection = await self._connect(address)
            except ConnectError as error:
                # The first connection may have carried the request, so this is not "nothing was sent".
                raise ResetError(f"{first}; then: {error}") from error
            return await connection.exchange(method, head, body, deadline_s=deadline_s)

    async def _connect(self, address: HostPort) -> Connection:
        if not self._is_entered:
            raise RuntimeError("the client is not open: use it inside `async with`")
        loop = asyncio.get_running_loop()
        try:
            host, port = parse_host_port(address)
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(address, on_free=self._on_free, on_lost=self._on_lost),
                    host,
                    port,
                    **self._secured(address, host),
                )
        except TimeoutError as error:
            raise ConnectError(f"{address}: not connected within {self._connect_timeout_s:g} s") from error
        except (OSError, ValueError) as error:
            raise ConnectError(f"{address}: {error}") from error
        if connection.is_open:
            self._connections.add(connection)
        return connection

    def _secured(self, address: HostPort, host: str) -> dict[str, Any]:
        """What makes a connection a TLS one."""
        if self._tls is None or address in self._plain:
            return {}
        return {
            "ssl": self._tls.context,
            "server_hostname": self._tls.peer_name or host,
            "ssl_shutdown_timeout": SHUTDOWN_S_MAX,
        }

    def _on_free(self, connection: Connection) -> None:
        if not self._is_entered:
            connection.close()
            return
        loop = asyncio.get_running_loop()
        for dropped in self._pool.put(connection, loop.time()):
            dropped.close()
        if self._expiry_timer is None:
            self._arm_expiry_timer(loop)

    def _on_lost(self, connection: Connection) -> None:
        self._pool.remove(connection)
        self._connections.discard(connection)
        if not self._connections:
            self._all_lost.set()

    def _arm_expiry_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        next_expiry_s = self._pool.next_expiry_s()
        if next_expiry_s is not None:
            self._expiry_timer = loop.call_at(next_expiry_s, self._on_expiry_timer)

    def _on_expiry_timer(self) -> None:
        self._expiry_timer = None
        loop = asyncio.get_running_loop()
        for connection in self._pool.expire(loop.time()):
            connection.close()
        self._arm_expiry_timer(loop)
