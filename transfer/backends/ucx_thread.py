"""The thread that owns a UCX worker: it answers asks from its region and asks peers for pieces of theirs.

It sleeps in poll() on UCX's event descriptor and on one of its own that commands write to, so an idle
backend costs nothing. A read posts receives for its pieces, then asks the peer to send them; where the
network can, UCX turns a large message into one RDMA read. A read that is given up ends by closing the
endpoint, which cancels its receives; its future ends when UCX has completed all of them.
"""

import hmac
import logging
import os
import secrets
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from transfer.backends.base import ReadReport
from transfer.backends.commands import Command, Commands, Connect, Read, obey
from transfer.backends.pieces import Runs, runs_of
from transfer.backends.ucx_library import endpoint_lanes
from transfer.backends.ucx_messages import (
    ASK_PIECES_MAX,
    CONTROL_BYTES_MAX,
    CONTROL_TAG,
    DATA_TAG_BIT,
    INDEX_BITS,
    TOKEN_BYTES,
    Ask,
    Bye,
    Control,
    Refused,
    UcxMetadata,
    decode_control,
    decode_metadata,
    pack_table,
    unpack_table,
)
from transfer.errors import BackendError, PeerLostError, ReadTimeoutError

_log = logging.getLogger(__name__)

READS_MAX = 1_024
READERS_MAX = 1_024
SENDS_MAX = 16_384
CONTROL_SENDS_MAX = 4_096
CONTROL_MESSAGES_PER_ROUND = 64
WAIT_GIVEN_UP_S = 5e-3
CLOSE_ENDPOINT_NS = 50_000_000
# A farewell is one small message: it is gone at once, or the peer is.
BYE_S = 0.02
CLOSE_S = 0.6


@dataclass(slots=True)
class _Peer:
    """A peer that is read from."""

    endpoint: Any
    metadata: UcxMetadata
    connection: bytes
    is_lost: bool = False
    has_read: bool = False


@dataclass(slots=True)
class _Reader:
    """A connection of a peer that reads from here."""

    endpoint: Any
    sends: deque[tuple[Any, Any]] = field(default_factory=deque)
    is_lost: bool = False


@dataclass(slots=True)
class _Watched:
    """A read under way; `next_index` is the first run that was not asked for yet."""

    command: Read
    peer: _Peer
    runs: Runs
    first_tag: int
    posted_s: float = 0.0
    next_index: int = 0
    receives: deque[tuple[Any, Any]] = field(default_factory=deque)
    failure: BackendError | None = None


class UcxThread:
    """Runs a worker from its first command to its end.

    Args:
        api: the module ucxx._lib.libucxx.
        worker: made by the caller in blocking progress mode, and not touched by it again.
        slice_of: an ucxx Array over (offset, length) of the own region.
    """

    def __init__(self, api: Any, worker: Any, region_bytes: int, slice_of: Callable[[int, int], Any]) -> None:
        self._wake_file = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.commands = Commands(self._wake)
        self._api = api
        self._worker = worker
        self._region_bytes = region_bytes
        self._slice_of = slice_of
        self._address: bytes = worker.address.tobytes()
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self.metadata = msgspec.msgpack.encode(UcxMetadata(self._address, self._token, region_bytes))
        self._peers: dict[str, _Peer] = {}
        self._readers: dict[bytes, _Reader] = {}
        self._reads: list[_Watched] = []
        self._control_sends: deque[tuple[Any, Any]] = deque()
        self._control_receives: list[tuple[Any, Any]] = []
        # Lanes by peer, for whoever asks from another thread; replaced, never changed.
        self.lanes: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="kv-ucx", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float) -> bool:
        """Stop; whether the thread has ended, and with it everything that UCX does."""
        self.commands.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _wake(self) -> None:
        try:
            os.eventfd_write(self._wake_file, 1)
        except OSError as error:
            _log.debug("the UCX thread is gone: %s", error)

    # What follows runs in the thread.

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._wake_file, select.POLLIN)
        poller.register(self._worker.epoll_file_descriptor, select.POLLIN)
        try:
            while not self.commands.is_closed:
                # Looking again without a wait, while bytes move, was measured to bring nothing.
                if not self._round() and self._worker.arm():
                    poller.poll(self._wait_ms())
                    self._clear_wake()
        finally:
            self.commands.close()
            self.commands.fail_all(BackendError("the backend is closed"))
            self._end()

    def _clear_wake(self) -> None:
        try:
            os.eventfd_read(self._wake_file)
        except BlockingIOError:
            return

    def _is_moving(self) -> bool:
        return bool(self._reads) or any(reader.sends for reader in self._readers.values())

    def _wait_ms(self) -> float | None:
        if any(read.failure for read in self._reads):
            return WAIT_GIVEN_UP_S * 1e3
        if not self._reads:
            return None
        left_s = min(read.command.deadline_s for read in self._reads) - time.monotonic()
        return max(left_s, 0.0) * 1e3 + 1.0

    def _round(self) -> bool:
        """Do what can be done now; whether anything was."""
        is_busy = False
        while (command := self.commands.take(0)) is not None:
            is_busy = True
            self._obey(command)
        self._worker.progress()
        is_busy |= self._hear()
        is_busy |= self._settle_sends()
        for read in list(self._reads):
            is_busy |= self._look_at(read)
        return is_busy

    def _obey(self, command: Command) -> None:
        obey(command, self._connect, self._read, self._forget, _translated)

    def _connect(self, command: Connect) -> None:
        if command.peer in self._peers:
            raise BackendError(f"a peer {command.peer} is connected already")
        metadata = decode_metadata(command.metadata)
        peer = _Peer(None, metadata, secrets.token_bytes(8))
        try:
            peer.endpoint = self._endpoint_to(metadata.worker)
        except Exception as error:
            raise PeerLostError(f"cannot connect to the peer: {error}") from error
        peer.endpoint.set_close_callback(_mark_lost, (peer,))
        self._peers[command.peer] = peer
        self._tell_lanes(command.peer, peer)
        command.future.set_result(None)

    def _endpoint_to(self, worker_address: bytes) -> Any:
        address = self._api.UCXAddress.create_from_buffer(worker_address)
        return self._api.UCXEndpoint.create_from_worker_address(self._worker, address, True)

    def _tell_lanes(self, name: str, peer: _Peer) -> None:
        if peer.endpoint is not None and peer.endpoint.alive:
            self.lanes = {**self.lanes, name: " ".join(endpoint_lanes(peer.endpoint.handle))}

    def _forget(self, name: str) -> None:
        peer = self._peers.pop(name, None)
        if peer is None:
            return
        self.lanes = {other: lanes for other, lanes in self.lanes.items() if other != name}
        for read in self._reads:
            if read.peer is peer and read.failure is None:
                read.failure = PeerLostError("the peer was forgotten")
        self._leave(peer)

    def _leave(self, peer: _Peer) -> None:
        """Tell a peer that nothing it sends is wanted any more, then cut it."""
        if not peer.is_lost:
            try:
                bye = self._say(peer.endpoint, Bye(peer.metadata.token, peer.connection))
                deadline_s = time.monotonic() + BYE_S
                while not bye.completed and time.monotonic() < deadline_s:
                    self._worker.progress()
            except Exception as error:  # noqa: BLE001  # as in _obey
                _log.debug("no farewell to a peer: %s", error)
        self._cut(peer)

    def _cut(self, peer: _Peer | _Reader) -> None:
        """Close an endpoint, which cancels what it receives and sends."""
        peer.is_lost = True
        endpoint, peer.endpoint = peer.endpoint, None
        if endpoint is None:
            return
        endpoint.remove_close_callback()
        try:
            endpoint.close_blocking(CLOSE_ENDPOINT_NS, 1)
        except Exception as error:  # noqa: BLE001  # as in _obey; a dead endpoint may say so
            _log.debug("UCX did not close an endpoint: %s", error)

    def _read(self, command: Read) -> None:
        peer = self._peers.get(command.peer)
        if peer is None or peer.is_lost:
            raise PeerLostError("no such peer is connected" if peer is None else "the peer is lost")
        if len(self._reads) >= READS_MAX:
            raise BackendError(f"{READS_MAX} reads are under way already")
        if time.monotonic() >= command.deadline_s:
            raise ReadTimeoutError("its time was up before it could begin")
        runs = runs_of(
            command.pieces, local_bytes=self._region_bytes, remote_bytes=peer.metadata.length_bytes
        )
        if not runs.count:
            command.future.set_result(ReadReport(0, 0, 0.0, 0.0))
            return
        first_tag = DATA_TAG_BIT | secrets.randbits(63 - INDEX_BITS) << INDEX_BITS
        read = _Watched(command, peer, runs, first_tag)
        self._reads.append(read)
        self._ask(read)
        read.posted_s = time.monotonic()

    def _ask(self, read: _Watched) -> None:
        """Post the receives of the next pieces and ask for them."""
        begin = read.next_index
        end = min(begin + ASK_PIECES_MAX, read.runs.count)
        endpoint = read.peer.endpoint
        try:
            for index in range(begin, end):
                piece = self._slice_of(int(read.runs.local[index]), int(read.runs.lengths[index]))
                tag = self._api.UCXXTag(read.first_tag + index)
                read.receives.append((endpoint.tag_recv(piece, tag), piece))
            read.next_index = end
            table = pack_table(read.runs.remote[begin:end], read.runs.lengths[begin:end])
            metadata = read.peer.metadata
            ask = Ask(metadata.token, read.peer.connection, self._address, read.first_tag + begin, table)
            self._say(endpoint, ask)
        except Exception as error:  # noqa: BLE001  # as in _obey; what was posted must end first
            read.failure = _translated(error)
            self._leave(read.peer)

    def _say(self, endpoint: Any, message: Control) -> Any:
        if len(self._control_sends) >= CONTROL_SENDS_MAX:
            raise BackendError(f"{CONTROL_SENDS_MAX} control messages wait already")
        data = self._api.array_of(np.frombuffer(msgspec.msgpack.encode(message), dtype=np.uint8))
        request = endpoint.tag_send(data, self._api.UCXXTag(CONTROL_TAG))
        self._control_sends.append((request, data))
        return request

    def _look_at(self, read: _Watched) -> bool:
        before = len(read.receives)
        while read.receives and read.receives[0][0].completed:
            request, _ = read.receives.popleft()
            try:
                request.check_error()
            except Exception as error:  # noqa: BLE001  # as in _obey
                read.failure = read.failure or _translated(error)
        if read.failure is None and read.peer.is_lost:
            read.failure = PeerLostError("UCX has lost the peer")
        if read.failure is None and time.monotonic() >= read.command.deadline_s and read.receives:
            read.failure = ReadTimeoutError("the read did not end in time")
        if read.failure is not None:
            self._leave(read.peer)
        elif not read.receives and read.next_index < read.runs.count:
            self._ask(read)
            return True
        if not read.receives:
            self._reads.remove(read)
            self._report(read)
        return before != len(read.receives)

    def _report(self, read: _Watched) -> None:
        command = read.command
        if read.failure is not None:
            command.future.set_exception(read.failure)
            return
        posted_s, moved_s = read.posted_s - command.asked_s, time.monotonic() - command.asked_s
        if not read.peer.has_read:
            # Only by now have both sides agreed on all lanes.
            read.peer.has_read = True
            self._tell_lanes(command.peer, read.peer)
        command.future.set_result(ReadReport(read.runs.total_bytes, read.runs.count, posted_s, moved_s))

    def _hear(self) -> bool:
        """Take control messages of peers."""
        tag = self._api.UCXXTag(CONTROL_TAG)
        is_busy = False
        for _ in range(CONTROL_MESSAGES_PER_ROUND):
            found = self._worker.tag_probe(tag, remove=True)
            if not found.matched:
                break
            is_busy = True
            # A longer one is cut, which UCX reports as an error of the receive.
            data = np.empty(min(found.length, CONTROL_BYTES_MAX), dtype=np.uint8)
            array = self._api.array_of(data)
            self._control_receives.append((self._worker.tag_recv_with_handle(array, found), data))
        waiting = []
        for request, data in self._control_receives:
            if not request.completed:
                waiting.append((request, data))
                continue
            is_busy = True
            try:
                request.check_error()
                self._take(decode_control(data.tobytes()))
            except Exception as error:  # noqa: BLE001  # as in _obey; a peer's mistake must not end the thread
                _log.warning("a control message of a peer was dropped: %s", type(error).__name__)
        self._control_receives = waiting
        return is_busy

    def _take(self, message: Control) -> None:
        match message:
            case Ask():
                self._answer(message)
            case Bye():
                reader = self._readers.get(message.connection)
                if reader is not None and hmac.compare_digest(message.token, self._token):
                    self._cut(reader)
            case Refused():
                for read in self._reads:
                    if 0 <= message.first_tag - read.first_tag < read.runs.count and read.failure is None:
                        read.failure = BackendError(f"the peer refused: {message.reason}")

    def _answer(self, ask: Ask) -> None:
        if not hmac.compare_digest(ask.token, self._token):
            raise BackendError("an ask has a wrong token")
        reader = self._reader_of(ask)
        try:
            table = self._admitted(ask)
        except BackendError as error:
            self._say(reader.endpoint, Refused(ask.first_tag, str(error)))
            return
        for index, (offset, length) in enumerate(table):
            piece = self._slice_of(offset, length)
            tag = self._api.UCXXTag(ask.first_tag + index)
            reader.sends.append((reader.endpoint.tag_send(piece, tag), piece))

    def _admitted(self, ask: Ask) -> list[tuple[int, int]]:
        table = unpack_table(ask, self._region_bytes)
        if sum(len(reader.sends) for reader in self._readers.values()) + len(table) > SENDS_MAX:
            raise BackendError(f"{SENDS_MAX} pieces are being sent already")
        return table

    def _reader_of(self, ask: Ask) -> _Reader:
        reader = self._readers.get(ask.connection)
        if reader is None:
            if len(self._readers) >= READERS_MAX:
                self._drop_an_idle_reader()
            reader = _Reader(self._endpoint_to(ask.worker))
            reader.endpoint.set_close_callback(_mark_lost, (reader,))
            self._readers[ask.connection] = reader
        if reader.is_lost:
            raise BackendError("the reader is gone")
        return reader

    def _drop_an_idle_reader(self) -> None:
        for connection, reader in self._readers.items():
            if not reader.sends:
                self._cut(reader)
                del self._readers[connection]
                return
        raise BackendError(f"{READERS_MAX} connections read from here already")

    def _settle_sends(self) -> bool:
        is_busy = False
        while self._control_sends and self._control_sends[0][0].completed:
            self._control_sends.popleft()
        for connection, reader in list(self._readers.items()):
            before = len(reader.sends)
            while reader.sends and reader.sends[0][0].completed:
                reader.sends.popleft()
            is_busy |= before != len(reader.sends)
            if reader.is_lost:
                self._cut(reader)
                if not reader.sends:
                    del self._readers[connection]
        return is_busy

    def _end(self) -> None:
        """Fail what is under way, let UCX go."""
        for name in list(self._peers):
            self._forget(name)
        for reader in self._readers.values():
            self._cut(reader)
        deadline_s = time.monotonic() + CLOSE_S
        while (self._reads or self._is_moving()) and time.monotonic() < deadline_s:
            self._worker.progress()
            self._settle_sends()
            for read in list(self._reads):
                self._look_at(read)
        left, self._reads = self._reads, []
        for read in left:
            read.receives.clear()
        self._readers.clear()
        self._control_receives.clear()
        self._control_sends.clear()
        # Without its worker UCX has nothing that could write.
        self._worker = None
        os.close(self._wake_file)
        for read in left:
            read.command.future.set_exception(read.failure or PeerLostError("the backend is closed"))


def _mark_lost(peer: _Peer | _Reader) -> None:
    peer.is_lost = True


def _translated(error: Exception) -> BackendError:
    """An ucxx exception as one of ours; a closed or reset connection is a lost peer."""
    name = type(error).__name__
    is_lost = any(
        word in name for word in ("Cancel", "Reset", "Close", "NotConnected", "Unreachable", "Timeout")
    )
    if isinstance(error, BackendError):
        return error
    return (
        PeerLostError(f"UCX has lost the peer ({name})") if is_lost else BackendError(f"UCX: {name}: {error}")
    )
