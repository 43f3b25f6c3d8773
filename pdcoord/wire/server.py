"""ASGI apps on listeners of one process: uvicorn's protocol, one stop event, a bounded drain."""

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, cast

import uvicorn
import uvloop
from uvicorn.server import ServerState

from pdcoord.wire.asgi import App
from pdcoord.wire.protocol import ServerProtocol
from pdcoord.wire.tls import HANDSHAKE_S_MAX, SHUTDOWN_S_MAX, ServerTls

# Longer than any client of ours keeps an idle connection (client.py: 4 s), so that the server is not the
# one who closes it while a request is on its way.
KEEP_ALIVE_S = 15
BACKLOG = 2_048
# Of one listener; past them a connection is closed as it comes.
CONNECTIONS_MAX = 16_384
# After the drain has run out: how long a cancelled request may take to clean up.
CANCEL_S_MAX = 5.0
# A client that does not take what it was sent for so long is dropped by the kernel, zero window included
# (tcp(7), TCP_USER_TIMEOUT), so that a stalled reader cannot hold a stream, and its KV, for ever.
SEND_STALL_MS_MAX = 60_000
_ACCEPTED_S = 1e-9


class ListenError(OSError):
    """An address that cannot be listened on; the message names it."""

    def __str__(self) -> str:
        return str(self.strerror)


@dataclass(frozen=True, slots=True)
class Listener:
    """One address with the ASGI app behind it; port 0 lets the kernel pick one; in clear without `tls`.

    Attributes:
        is_leaving: once it says so each connection is closed behind its next answer, which tells of that. One
            that is still kept when the listener is closed may have a request on its way just then.
    """

    app: App
    host: str = "127.0.0.1"
    port: int = 0
    tls: ServerTls | None = None
    connections_max: int = CONNECTIONS_MAX
    is_leaving: Callable[[], bool] = lambda: False


class _Service:
    """One listener while it runs."""

    def __init__(self, listener: Listener, listening: socket.socket) -> None:
        self._socket = listening
        self._tls = listener.tls
        self._connections_max = listener.connections_max
        self._is_stopping = False
        self._is_leaving = listener.is_leaving
        # ws and lifespan off: our apps have neither. No handler, no log set up: that is the caller's.
        self._config = uvicorn.Config(
            cast("Any", listener.app),
            http="httptools",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self._config.load()
        self._state = ServerState()
        self._server: asyncio.Server | None = None
        self._no_connections = asyncio.Event()

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        secured: dict[str, Any] = {}
        if self._tls is not None:
            secured = {
                "ssl": self._tls.context,
                "ssl_handshake_timeout": HANDSHAKE_S_MAX,
                "ssl_shutdown_timeout": SHUTDOWN_S_MAX,
            }
        self._server = await loop.create_server(
            self._make_protocol, sock=self._socket, backlog=BACKLOG, **secured
        )

    def _make_protocol(self) -> ServerProtocol:
        return ServerProtocol(self._config, self._state, self)

    @property
    def _connections(self) -> set[ServerProtocol]:
        """Those that have a transport, as uvicorn keeps them: from when it is made until it is lost."""
        return cast("set[ServerProtocol]", self._state.connections)

    def admits(self, _connection: ServerProtocol) -> bool:
        """Whether a connection that is made now may stay; a handshake may end when the listener is closed."""
        return not self._is_stopping and len(self._connections) <= self._connections_max

    def is_leaving(self) -> bool:
        return self._is_stopping or self._is_leaving()

    def lost(self, _connection: ServerProtocol) -> None:
        """Called once a connection that was made is gone."""
        if not self._connections:
            self._no_connections.set()

    async def stop(self, *, drain_s: float) -> None:
        """Accept no more, close what is idle, let requests finish for drain_s, then cancel them."""
        # A timer fires after a turn's accepts, and whom it wakes runs after the tasks these have begun: by
        # then what was accepted is attached. asyncio 3.11 drops a socket, open, that finds the server closed.
        try:
            await asyncio.sleep(_ACCEPTED_S)
        finally:
            if self._server is not None:
                self._server.close()
        await asyncio.sleep(0)  # What was attached in this turn of the loop has its transport in the next.
        self._is_stopping = True
        for connection in list(self._connections):
            connection.shutdown()
        try:
            await self._wait_until_quiet(drain_s)
        finally:
            for connection in self._connections:
                connection.silence()
            for task in self._state.tasks:
                task.cancel()
            await self._wait_until_quiet(CANCEL_S_MAX if self._state.tasks else 0.0)
            for connection in list(self._connections):
                connection.transport.abort()

    async def _wait_until_quiet(self, wait_s: float) -> None:
        """Wait until every request has ended and what it sent has left, but for wait_s at most."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + wait_s
        # More than one turn: a pipelined request begins when the one before it ends.
        while self._state.tasks and (left_s := deadline_s - loop.time()) > 0:
            await asyncio.wait(self._state.tasks, timeout=left_s)
        if self._connections:
            self._no_connections.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline_s):
                    await self._no_connections.wait()


async def serve(
    listeners: Sequence[Listener],
    *,
    stop: asyncio.Event,
    drain_s: float,
    on_started: Callable[[list[int]], None] | None = None,
) -> None:
    """Serve until `stop` is set, then let requests under way finish for drain_s before they are cancelled.

    Args:
        on_started: called once all listeners accept, with their ports in order.

    Raises:
        ListenError: naming the address, if one cannot be listened on; none is served then.
    """
    services: list[_Service] = []
    sockets: list[socket.socket] = []
    try:
        for listener in listeners:
            sockets.append(_listen(listener))
            services.append(_Service(listener, sockets[-1]))
        for service in services:
            await service.start()
        if on_started is not None:
            on_started([each.getsockname()[1] for each in sockets])
        await stop.wait()
    finally:
        async with asyncio.TaskGroup() as group:
            for service in services:
                group.create_task(service.stop(drain_s=drain_s if stop.is_set() else 0.0))
        for each in sockets:
            each.close()


def _listen(listener: Listener) -> socket.socket:
    family = socket.AF_INET6 if ":" in listener.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SEND_STALL_MS_MAX)
        listening.setblocking(False)
        listening.bind((listener.host, listener.port))
    except OSError as error:
        listening.close()
        where = f"{listener.host}:{listener.port}"
        raise ListenError(
            error.errno or errno.EINVAL, f"cannot listen on {where}: {error.strerror or error}"
        ) from error
    return listening


def stop_on_signals() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; the second one has its default effect."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop


def run(main: Coroutine[Any, Any, int]) -> int:
    """Run a process's main coroutine on uvloop; its exit status, or 130 after a second SIGINT."""
    try:
        return uvloop.run(main)
    except KeyboardInterrupt:
        return 130
