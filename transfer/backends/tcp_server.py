"""The side of the tcp backend that is read from: a few threads that answer all connections from the region.

No byte of the region passes through Python: the kernel copies it from there into the socket. While an answer
is under way nothing more is read from its connection, so a connection holds one table and one answer at most.
"""

import contextlib
import hmac
import logging
import selectors
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from transfer.backends.tcp_cursor import Cursor
from transfer.backends.tcp_messages import (
    HEAD,
    HELLO,
    MAGIC,
    MOVED,
    PIECE_BYTES,
    REASON_BYTES_MAX,
    REFUSED,
    WELCOME,
    check_ask,
    unpack_table,
)
from transfer.errors import BackendError, FrameError, SettingError

_log = logging.getLogger(__name__)

CONNECTIONS_MAX = 1_024
"""Most connections that have shown the token."""

STRANGERS_MAX = 64
"""Most connections that have not (yet); one more pushes the oldest out."""

HELLO_S = 2.0
# A reader that takes nothing of an answer for so long is gone; its own deadlines are shorter.
STALL_S = 30.0
TICK_S = 0.5
BACKLOG = 128
SOCKET_BUFFER_BYTES = 4 << 20


def tune(connection: socket.socket) -> None:
    """Options of a data socket; the system may give less than is asked for."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        SettingError: if there is no such address here, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tune(listener)  # What is accepted inherits the buffers; a window is agreed on before accept returns.
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except (OSError, OverflowError, UnicodeError) as error:
        listener.close()
        remedy = f"cannot be listened at ({error}): give an address of this node and a free tcp_port"
        raise SettingError("listen_host", f"{host} port {port}", remedy) from error
    return listener


@dataclass(slots=True, eq=False)
class _Connection:
    """A reader; `since_s` is when it came, then when it last took or sent something."""

    socket: socket.socket
    since_s: float
    inbox: bytearray = field(default_factory=lambda: bytearray(HELLO.size))
    filled_bytes: int = 0
    is_known: bool = False
    head: tuple[int, int] | None = None  # Count and number of the ASK whose table comes.
    answer: Cursor | None = None

    def expect(self, byte_count: int) -> None:
        self.inbox = bytearray(byte_count)
        self.filled_bytes = 0


class TcpServer:
    """Answers whoever has the token.

    Args:
        listener: from `listen`; closed by `close`.
        region: must outlive the server.
        thread_count: threads that share the connections.
    """

    def __init__(self, listener: socket.socket, token: bytes, region: memoryview, thread_count: int) -> None:
        self._listener = listener
        self._loops = [_Loop(self, token, region, index) for index in range(thread_count)]
        self._next_loop = 0
        self._loops[0].watch_listener(listener)
        self.known_count = 0
        self.lock = threading.Lock()

    def start(self) -> None:
        for loop in self._loops:
            loop.thread.start()

    def close(self, timeout_s: float) -> bool:
        """Stop; whether all threads have ended, and with them all reading of the region. Idempotent."""
        deadline_s = time.monotonic() + timeout_s
        for loop in self._loops:
            loop.stop()
        for loop in self._loops:
            if loop.thread.is_alive() and loop.thread is not threading.current_thread():
                loop.thread.join(max(deadline_s - time.monotonic(), 0.0))
        for loop in self._loops:
            loop.close_handed()  # The first thread may have handed one over after the other had ended.
        self._listener.close()
        return not any(loop.thread.is_alive() for loop in self._loops)

    def accept(self) -> None:
        """Take one connection and hand it to the next thread; called by the first one."""
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Such as too many open files: the connection stays in the backlog. Not at once again.
            _log.warning("the tcp backend cannot accept a connection: %s", error)
            time.sleep(0.05)
            return
        accepted.setblocking(False)
        self._loops[self._next_loop].hand(accepted)
        self._next_loop = (self._next_loop + 1) % len(self._loops)

    def may_know(self) -> bool:
        """Whether one more reader is taken, counting it."""
        with self.lock:
            if self.known_count >= CONNECTIONS_MAX:
                return False
            self.known_count += 1
            return True

    def unknow(self) -> None:
        with self.lock:
            self.known_count -= 1


class _Loop:
    """One thread and its connections."""

    def __init__(self, server: TcpServer, token: bytes, region: memoryview, index: int) -> None:
        self._server = server
        self._token = token
        self._region = region
        self._listener: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._connections: dict[_Connection, None] = {}  # Oldest first.
        self._handed: deque[socket.socket] = deque()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._is_stopping = False
        self.thread = threading.Thread(target=self._run, name=f"kv-tcp-server-{index}", daemon=True)

    def watch_listener(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ)

    def hand(self, accepted: socket.socket) -> None:
        self._handed.append(accepted)
        self._wake()

    def close_handed(self) -> None:
        while self._handed:
            self._handed.popleft().close()

    def stop(self) -> None:
        self._is_stopping = True
        self._wake()
        if not self.thread.ident:  # It was never started.
            self._end()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # Full: it wakes anyhow. Closed: it has ended.
            self._wake_in.send(b"w")

    # What follows runs in the thread.

    def _run(self) -> None:
        try:
            swept_s = time.monotonic()
            while not self._is_stopping:
                for key, _ in self._selector.select(TICK_S if self._connections else None):
                    self._serve(key.fileobj, key.data)
                while self._handed:
                    self._take(self._handed.popleft())
                if time.monotonic() - swept_s >= TICK_S:
                    swept_s = time.monotonic()
                    self._sweep(swept_s)
        finally:
            self._end()

    def _serve(self, source: object, connection: _Connection | None) -> None:
        if connection is not None:
            if connection in self._connections:
                self._move(connection)
        elif source is self._listener:
            self._server.accept()
        else:
            with contextlib.suppress(BlockingIOError):
                self._wake_out.recv(4096)

    def _take(self, accepted: socket.socket) -> None:
        strangers = [connection for connection in self._connections if not connection.is_known]
        if len(strangers) >= STRANGERS_MAX:
            self._drop(strangers[0])
        with contextlib.suppress(OSError):
            tune(accepted)
        connection = _Connection(accepted, time.monotonic())
        self._connections[connection] = None
        self._selector.register(accepted, selectors.EVENT_READ, connection)

    def _sweep(self, now_s: float) -> None:
        for connection in list(self._connections):
            is_late = not connection.is_known and now_s - connection.since_s > HELLO_S
            is_stuck = connection.answer is not None and now_s - connection.since_s > STALL_S
            if is_late or is_stuck:
                self._drop(connection)

    def _move(self, connection: _Connection) -> None:
        try:
            if connection.answer is not None:
                self._send(connection)
            else:
                self._receive(connection)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, FrameError) as error:
            _log.debug("the tcp backend drops a connection: %s", error)
            self._drop(connection)

    def _receive(self, connection: _Connection) -> None:
        view = memoryview(connection.inbox)[connection.filled_bytes :]
        count = connection.socket.recv_into(view)
        if not count:
            raise ConnectionResetError("the reader has gone")
        connection.filled_bytes += count
        if connection.filled_bytes < len(connection.inbox):
            return
        if not connection.is_known:
            self._greet(connection)
        elif connection.head is None:
            kind, piece_count, number = HEAD.unpack(connection.inbox)
            check_ask(kind, piece_count)
            connection.head = (piece_count, number)
            connection.expect(piece_count * PIECE_BYTES)
        else:
            self._answer(connection, connection.head[1])

    def _greet(self, connection: _Connection) -> None:
        magic, token = HELLO.unpack(connection.inbox)
        if magic != MAGIC:
            raise FrameError("what was dialled is spoken to in another way")
        reason = ""
        if not hmac.compare_digest(token, self._token):
            reason = "the token is not that of this life of the process"
        elif not self._server.may_know():
            reason = f"{CONNECTIONS_MAX} connections are open already"
        if reason:
            connection.socket.send(HEAD.pack(REFUSED, len(reason), 0) + reason.encode())
            raise FrameError(reason)
        connection.is_known = True
        connection.expect(HEAD.size)
        self._begin(connection, [HEAD.pack(WELCOME, 0, len(self._region))])

    def _answer(self, connection: _Connection, number: int) -> None:
        views: list[bytes | memoryview] = []
        try:
            table = unpack_table(connection.inbox, len(self._region))
        except BackendError as error:
            reason = str(error).encode()[:REASON_BYTES_MAX]
            views = [HEAD.pack(REFUSED, len(reason), number), reason]
        else:
            views = [HEAD.pack(MOVED, len(table), number)]
            views += [self._region[offset : offset + length] for offset, length in table]
        connection.head = None
        connection.expect(HEAD.size)
        self._begin(connection, views)

    def _begin(self, connection: _Connection, views: list[bytes | memoryview]) -> None:
        connection.answer = Cursor([memoryview(view) for view in views])
        connection.since_s = time.monotonic()
        self._selector.modify(connection.socket, selectors.EVENT_WRITE, connection)
        self._send(connection)

    def _send(self, connection: _Connection) -> None:
        answer = connection.answer
        assert answer is not None
        answer.advance(connection.socket.sendmsg(answer.window()))
        connection.since_s = time.monotonic()
        if answer.is_at_end:
            connection.answer = None
            self._selector.modify(connection.socket, selectors.EVENT_READ, connection)

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection]
        if connection.is_known:
            self._server.unknow()
        self._selector.unregister(connection.socket)
        connection.socket.close()

    def _end(self) -> None:
        for connection in list(self._connections):
            self._drop(connection)
        self.close_handed()
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()
