"""One connection to a peer of the tcp backend, and the thread that reads over it."""

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from transfer.backends.base import ReadReport
from transfer.backends.commands import running_future
from transfer.backends.pieces import Runs
from transfer.backends.tcp_cursor import Cursor
from transfer.backends.tcp_messages import (
    ASK,
    ASK_PIECES_MAX,
    HEAD,
    HELLO,
    MAGIC,
    MOVED,
    REASON_BYTES_MAX,
    REFUSED,
    WELCOME,
    TcpMetadata,
    pack_table,
)
from transfer.backends.tcp_server import tune
from transfer.errors import BackendError, FrameError, PeerLostError, ReadTimeoutError

SHARES_MAX = 1_024
"""Most reads that wait for one connection."""

CONNECT_S = 2.0
ASKS_AHEAD = 2
# While a read is under way its thread looks this often after those that wait behind it.
LOOK_S = 0.1


class ReadJob:
    """A read that one lane or several work on, each at a share; its future ends with the last share."""

    def __init__(self, runs: Runs, asked_s: float, deadline_s: float, share_count: int) -> None:
        self.future: Future[ReadReport] = running_future()
        self.deadline_s = deadline_s
        self.failure: BackendError | None = None
        self._runs = runs
        self._asked_s = asked_s
        self._posted_s = asked_s
        self._left_count = share_count
        self._lock = threading.Lock()

    def post(self) -> None:
        """Note that a share has been asked for."""
        with self._lock:
            self._posted_s = time.monotonic()

    def end_share(self, failure: BackendError | None) -> None:
        """Note that nothing writes for a share any more."""
        with self._lock:
            self.failure = self.failure or failure
            self._left_count -= 1
            if self._left_count:
                return
        if self.failure is not None:
            self.future.set_exception(self.failure)
            return
        moved_s = time.monotonic() - self._asked_s
        posted_s = self._posted_s - self._asked_s
        self.future.set_result(ReadReport(self._runs.total_bytes, self._runs.count, posted_s, moved_s))


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one lane reads of a job."""

    job: ReadJob
    runs: Runs


@dataclass(frozen=True, slots=True)
class _Ask:
    number: int
    views: list[memoryview]


class _AbandonedError(BackendError):
    """Another share of the same read has failed."""


class Lane:
    """Reads one share after the other over one connection, which is opened at need.

    While a connection is being opened, reads that wait behind may end late, by CONNECT_S at most.

    Args:
        region: where reads land; it must outlive the lane's thread.
        on_end: called in the thread at its end.
    """

    def __init__(
        self, metadata: TcpMetadata, region: memoryview, name: str, on_end: Callable[[], None]
    ) -> None:
        self._metadata = metadata
        self._region = region
        self._on_end = on_end
        self._waiting: deque[Share | Future[None]] = deque()
        self._condition = threading.Condition()
        self._socket: socket.socket | None = None
        self._is_ended = False
        self._number = 0
        self._looked_s = 0.0
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    def open(self) -> "Future[None]":
        """Connect now; else the first read does."""
        future: Future[None] = running_future()
        if not self._put(future):
            future.set_exception(PeerLostError("the peer was forgotten"))
        return future

    def submit(self, share: Share) -> None:
        """Take a share; where that is impossible it ends at once."""
        if self.waiting_count >= SHARES_MAX:
            share.job.end_share(BackendError(f"{SHARES_MAX} reads wait already"))
        elif not self._put(share):
            share.job.end_share(PeerLostError("the peer was forgotten"))

    def end(self) -> None:
        """Fail what is under way and what waits, soon; from any thread. Idempotent."""
        with self._condition:
            self._is_ended = True
            self._condition.notify_all()
            if self._socket is not None:
                # It wakes the thread from whatever it waits for; closing is the thread's own.
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def _put(self, item: "Share | Future[None]") -> bool:
        with self._condition:
            if self._is_ended:
                return False
            self._waiting.append(item)
            self._condition.notify_all()
            return True

    # What follows runs in the thread.

    def _run(self) -> None:
        try:
            while (item := self._take()) is not None:
                if isinstance(item, Share):
                    item.job.end_share(self._failure_of(item))
                else:
                    self._open_now(item)
        finally:
            self.end()
            self._close()
            lost = PeerLostError("the peer was forgotten")
            while self._waiting:
                item = self._waiting.popleft()
                if isinstance(item, Share):
                    item.job.end_share(lost)
                else:
                    item.set_exception(lost)
            self._on_end()

    def _take(self) -> "Share | Future[None] | None":
        with self._condition:
            self._condition.wait_for(lambda: self._waiting or self._is_ended)
            return None if self._is_ended else self._waiting.popleft()

    def _open_now(self, future: "Future[None]") -> None:
        try:
            self._connection(time.monotonic() + CONNECT_S)
        except Exception as error:  # noqa: BLE001  # whatever it is, the future must end
            self._close()
            future.set_exception(self._translated(error))
        else:
            future.set_result(None)

    def _failure_of(self, share: Share) -> BackendError | None:
        """Read a share; why it failed, if it did."""
        if share.job.failure is not None:
            return share.job.failure
        if time.monotonic() >= share.job.deadline_s:
            return ReadTimeoutError("its time was up before it could begin")
        try:
            refusal = self._exchange(share)
        except Exception as error:  # noqa: BLE001  # as in _open_now
            # What the peer still sends must not be taken for an answer to the next read.
            self._close()
            is_late = isinstance(error, TimeoutError) or isinstance(error.__cause__, TimeoutError)
            if is_late and not self._is_ended and time.monotonic() >= share.job.deadline_s:
                return ReadTimeoutError("its time was up before the peer could be reached")
            return self._translated(error)
        return BackendError(f"the peer refuses: {refusal}") if refusal else None

    def _translated(self, error: Exception) -> BackendError:
        if self._is_ended:
            return PeerLostError("the peer was forgotten")
        if isinstance(error, BackendError):
            return error
        if isinstance(error, OSError | FrameError):
            return PeerLostError(f"the connection to the peer failed: {error}")
        return BackendError(f"the read failed: {type(error).__name__}: {error}")

    def _exchange(self, share: Share) -> str:
        """Ask and receive; the peer's reason if it refused, after which the connection is still in step."""
        connection = self._connection(min(share.job.deadline_s, time.monotonic() + CONNECT_S))
        runs, refusal = share.runs, ""
        starts = deque(range(0, runs.count, ASK_PIECES_MAX))
        asked: deque[_Ask] = deque()
        while True:
            while starts and not refusal and len(asked) < ASKS_AHEAD:
                asked.append(self._ask(connection, share, starts.popleft()))
            if not asked:
                return refusal
            refusal = self._receive(connection, share, asked.popleft()) or refusal

    def _ask(self, connection: socket.socket, share: Share, start: int) -> _Ask:
        cut = slice(start, start + ASK_PIECES_MAX)
        local, lengths = share.runs.local[cut], share.runs.lengths[cut]
        self._number += 1
        head = HEAD.pack(ASK, len(lengths), self._number)
        connection.settimeout(self._left_s(share))
        try:
            connection.sendall(head + pack_table(share.runs.remote[cut], lengths))
        except TimeoutError:
            raise ReadTimeoutError("the peer takes no request in time") from None
        share.job.post()
        ends = (local + lengths).tolist()
        views = [self._region[first:end] for first, end in zip(local.tolist(), ends, strict=True)]
        return _Ask(self._number, views)

    def _receive(self, connection: socket.socket, share: Share, ask: _Ask) -> str:
        head = bytearray(HEAD.size)
        self._fill(connection, share, [memoryview(head)])
        kind, size, number = HEAD.unpack(head)
        if number != ask.number or kind not in {MOVED, REFUSED}:
            raise FrameError("an answer is none to what was asked")
        if kind == MOVED:
            self._fill(connection, share, ask.views)
            return ""
        if not 1 <= size <= REASON_BYTES_MAX:
            raise FrameError("a refusal is too long")
        reason = bytearray(size)
        self._fill(connection, share, [memoryview(reason)])
        return reason.decode(errors="replace")

    def _fill(self, connection: socket.socket, share: Share, views: list[memoryview]) -> None:
        cursor = Cursor(views)
        while not cursor.is_at_end:
            connection.settimeout(min(self._left_s(share), LOOK_S))
            try:
                count = connection.recvmsg_into(cursor.window())[0]
            except TimeoutError:
                self._look()
                continue
            if not count:
                raise ConnectionResetError("it has closed it")
            cursor.advance(count)
            if time.monotonic() - self._looked_s >= LOOK_S:
                self._look()

    def _left_s(self, share: Share) -> float:
        if self._is_ended:
            raise PeerLostError("the peer was forgotten")
        if share.job.failure is not None:
            raise _AbandonedError("another connection failed the read")
        left_s = share.job.deadline_s - time.monotonic()
        if left_s <= 0:
            raise ReadTimeoutError("the read did not end in time")
        return left_s

    def _look(self) -> None:
        """Fail the waiting reads whose time is up."""
        self._looked_s = now_s = time.monotonic()
        with self._condition:
            shares = [item for item in self._waiting if isinstance(item, Share)]
            late = [share for share in shares if share.job.deadline_s <= now_s]
            for share in late:
                self._waiting.remove(share)
        for share in late:
            share.job.end_share(ReadTimeoutError("its time was up before it could begin"))

    def _connection(self, deadline_s: float) -> socket.socket:
        """The connection, opened if there is none that works."""
        if self._socket is not None:
            if _is_quiet(self._socket):
                return self._socket
            self._close()
        error: OSError | None = None
        for host in self._metadata.hosts:
            try:
                connection = self._dial(host, deadline_s)
            except (OSError, UnicodeError) as caught:
                error = caught if isinstance(caught, OSError) else OSError(str(caught))
                self._close()
                continue
            self._greet(connection, deadline_s)
            return connection
        raise PeerLostError(f"the peer cannot be reached: {error}") from error

    def _dial(self, host: str, deadline_s: float) -> socket.socket:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, self._metadata.port, type=socket.SOCK_STREAM
        )[0]
        connection = socket.socket(family, kind, protocol)
        with self._condition:
            self._socket = connection
            if self._is_ended:
                raise PeerLostError("the peer was forgotten")
        tune(connection)
        connection.settimeout(max(deadline_s - time.monotonic(), 1e-3))
        connection.connect(address)
        return connection

    def _greet(self, connection: socket.socket, deadline_s: float) -> None:
        connection.sendall(HELLO.pack(MAGIC, self._metadata.token))
        head = _received(connection, HEAD.size, deadline_s)
        kind, size, number = HEAD.unpack(head)
        if kind == REFUSED and 1 <= size <= REASON_BYTES_MAX:
            reason = _received(connection, size, deadline_s).decode(errors="replace")
            raise PeerLostError(f"the peer refuses the connection: {reason}")
        if kind != WELCOME or number != self._metadata.length_bytes:
            raise PeerLostError("what was dialled is not the peer of this metadata")

    def _close(self) -> None:
        with self._condition:
            connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()


def _is_quiet(connection: socket.socket) -> bool:
    """Whether an idle connection is neither closed nor says what it was not asked."""
    try:
        connection.settimeout(0)
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _received(connection: socket.socket, byte_count: int, deadline_s: float) -> bytes:
    data = b""
    while len(data) < byte_count:
        connection.settimeout(max(deadline_s - time.monotonic(), 1e-3))
        more = connection.recv(byte_count - len(data))
        if not more:
            raise ConnectionResetError("it has closed it")
        data += more
    return data
