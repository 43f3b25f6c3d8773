"""Reads between agents of one process, with faults on demand: for tests and for emulated fleets."""

import os
import threading
import time
from dataclasses import dataclass, field

from transfer.backends.base import ReadReport, Region
from transfer.backends.commands import Command, Commanding, Commands, Connect, Forget, Read
from transfer.backends.pieces import Runs, runs_of
from transfer.errors import BackendError, PeerLostError, ReadTimeoutError
from transfer.staging import host_view

READS_MAX = 1_024
"""Most reads under way in one backend."""

CLOSE_S = 1.0
# How often a read that is held is looked at.
HOLD_POLL_S = 2e-3


@dataclass(slots=True)
class LoopbackFaults:
    """What goes wrong on a network; set from any thread, and looked at when a backend gets to a command.

    Attributes:
        delay_s: how long each read takes at least.
        hold: reads neither move bytes nor end well until this is set; None holds none.
        lose_after_bytes: the next read moves this much, then its peer is lost to the reader; used up by it.
        corrupt_byte: index of a byte of the next read, which comes with all its bits turned; used up by it.
    """

    delay_s: float = 0.0
    hold: threading.Event | None = None
    lose_after_bytes: int | None = None
    corrupt_byte: int | None = None
    _failing: list[BackendError] = field(default_factory=list)
    _unreachable_count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail_next(self, count: int, error: BackendError | None = None) -> None:
        """Let so many reads fail before a byte has moved, with this error or a BackendError."""
        with self._lock:
            self._failing.extend([error or BackendError("a failure was asked for")] * count)

    def refuse_next(self, count: int) -> None:
        """Let so many connects fail with PeerLostError."""
        with self._lock:
            self._unreachable_count += count

    def take_failure(self) -> BackendError | None:
        with self._lock:
            return self._failing.pop(0) if self._failing else None

    def take_refusal(self) -> bool:
        with self._lock:
            self._unreachable_count -= 1 if (is_refused := self._unreachable_count > 0) else 0
            return is_refused

    def take_loss(self) -> int | None:
        with self._lock:
            taken, self.lose_after_bytes = self.lose_after_bytes, None
            return taken

    def take_corruption(self) -> int | None:
        with self._lock:
            taken, self.corrupt_byte = self.corrupt_byte, None
            return taken


class LoopbackNetwork:
    """Where backends of one process find each other; another network is another world."""

    def __init__(self) -> None:
        self.faults = LoopbackFaults()
        self._regions: dict[bytes, memoryview] = {}
        self._lock = threading.RLock()

    def add(self, region: memoryview) -> bytes:
        """Make a region readable; returns the name to find it by."""
        name = os.urandom(16)
        with self._lock:
            self._regions[name] = region
        return name

    def remove(self, name: bytes) -> None:
        """Make a region unreadable: when this returns nothing reads it any more. Unknown names are fine."""
        with self._lock:
            self._regions.pop(name, None)

    def length_bytes(self, name: bytes) -> int:
        """Size of a region.

        Raises:
            PeerLostError: if it is not there (any more).
        """
        with self._lock:
            return len(self._region(name))

    def copy(self, name: bytes, runs: Runs, target: memoryview, bytes_max: int) -> None:
        """Copy a region's runs, `bytes_max` of them at most.

        Raises:
            PeerLostError: if it is not there (any more).
        """
        with self._lock:
            source = self._region(name)
            left_bytes = bytes_max
            for remote, local, length in zip(runs.remote, runs.local, runs.lengths, strict=True):
                count = min(int(length), left_bytes)
                target[int(local) : int(local) + count] = source[int(remote) : int(remote) + count]
                left_bytes -= count

    def _region(self, name: bytes) -> memoryview:
        region = self._regions.get(name)
        if region is None:
            raise PeerLostError("the peer is gone")
        return region


@dataclass(slots=True)
class _Peer:
    region_name: bytes
    is_lost: bool = False


@dataclass(frozen=True, slots=True)
class _UnderWay:
    command: Read
    peer: _Peer
    runs: Runs
    begun_s: float
    due_s: float


class LoopbackBackend(Commanding):
    """The Backend over memory of one process."""

    def __init__(self, network: LoopbackNetwork) -> None:
        self._network = network
        self._own: memoryview | None = None
        self._name = b""
        self._commands = Commands()
        self._thread = threading.Thread(target=self._run, name="kv-loopback", daemon=True)
        self._peers: dict[str, _Peer] = {}
        self._reads: list[_UnderWay] = []

    @property
    def name(self) -> str:
        return "loopback"

    def start(self, region: Region) -> None:
        if self._own is not None:
            raise BackendError("the loopback backend was started before")
        self._own = host_view(region)
        self._name = self._network.add(self._own)
        self._thread.start()

    def metadata(self) -> bytes:
        self._running_commands()
        return self._name

    def transport(self, peer: str) -> str:  # noqa: ARG002  # every peer is reached in the same way
        return "loopback"

    def close(self) -> None:
        self._network.remove(self._name)
        self._commands.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_S)

    def _running_commands(self) -> Commands:
        if self._own is None:
            raise BackendError("the loopback backend has not been started")
        return self._commands

    # What follows runs in the thread.

    def _run(self) -> None:
        try:
            while not self._commands.is_closed:
                command = self._commands.take(self._wait_s())
                while command is not None:
                    self._obey(command)
                    command = self._commands.take(0)
                self._watch()
        finally:
            self._commands.close()
            self._commands.fail_all(BackendError("the backend is closed"))
            left, self._reads = self._reads, []
            for read in left:
                read.command.future.set_exception(PeerLostError("the backend is closed"))

    def _wait_s(self) -> float | None:
        if not self._reads:
            return None
        hold = self._network.faults.hold
        if hold is not None and not hold.is_set():
            return HOLD_POLL_S
        next_s = min(min(read.due_s, read.command.deadline_s) for read in self._reads)
        return max(next_s - time.monotonic(), 0.0)

    def _obey(self, command: Command) -> None:
        try:
            match command:
                case Connect():
                    self._connect(command)
                case Read():
                    self._begin(command)
                case Forget():
                    self._peers.pop(command.peer, None)
                    self._fail_reads(command.peer, PeerLostError("the peer was forgotten"))
                    command.future.set_result(None)
        except BackendError as error:
            command.future.set_exception(error)

    def _connect(self, command: Connect) -> None:
        if command.peer in self._peers:
            raise BackendError(f"a peer {command.peer} is connected already")
        if self._network.faults.take_refusal():
            raise PeerLostError("the peer cannot be reached, as was asked for")
        self._network.length_bytes(command.metadata)
        self._peers[command.peer] = _Peer(command.metadata)
        command.future.set_result(None)

    def _begin(self, command: Read) -> None:
        peer = self._peers.get(command.peer)
        if peer is None or peer.is_lost:
            raise PeerLostError("no such peer is connected" if peer is None else "the peer is lost")
        if len(self._reads) >= READS_MAX:
            raise BackendError(f"{READS_MAX} reads are under way already")
        now_s = time.monotonic()
        if now_s >= command.deadline_s:
            raise ReadTimeoutError("its time was up before it could begin")
        failure = self._network.faults.take_failure()
        if failure is not None:
            raise failure
        runs = runs_of(
            command.pieces,
            local_bytes=len(self._memory()),
            remote_bytes=self._network.length_bytes(peer.region_name),
        )
        self._reads.append(_UnderWay(command, peer, runs, now_s, now_s + self._network.faults.delay_s))

    def _memory(self) -> memoryview:
        assert self._own is not None
        return self._own

    def _watch(self) -> None:
        hold = self._network.faults.hold
        is_held = hold is not None and not hold.is_set()
        for read in list(self._reads):
            # A read before it may have lost the peer, and all its reads with it.
            if read not in self._reads:
                continue
            now_s = time.monotonic()
            if now_s >= read.command.deadline_s:
                self._reads.remove(read)
                read.command.future.set_exception(ReadTimeoutError("the read did not end in time"))
            elif not is_held and now_s >= read.due_s:
                self._reads.remove(read)
                self._move(read)

    def _move(self, read: _UnderWay) -> None:
        faults, runs, future = self._network.faults, read.runs, read.command.future
        loss, corrupt = faults.take_loss(), faults.take_corruption()
        try:
            self._network.copy(
                read.peer.region_name, runs, self._memory(), runs.total_bytes if loss is None else loss
            )
            if loss is not None:
                raise PeerLostError(f"the peer was lost after {loss} bytes, as was asked for")  # noqa: TRY301  # one way out
        except PeerLostError as error:
            read.peer.is_lost = True
            future.set_exception(error)
            self._fail_reads(read.command.peer, error)
            return
        if corrupt is not None:
            self._corrupt(runs, corrupt)
        asked_s = read.command.asked_s
        report = ReadReport(runs.total_bytes, runs.count, read.begun_s - asked_s, time.monotonic() - asked_s)
        future.set_result(report)

    def _corrupt(self, runs: Runs, index: int) -> None:
        memory = self._memory()
        for local, length in zip(runs.local, runs.lengths, strict=True):
            if index < length:
                memory[int(local) + index] ^= 0xFF
                return
            index -= int(length)

    def _fail_reads(self, peer: str, error: PeerLostError) -> None:
        failing = [read for read in self._reads if read.command.peer == peer]
        self._reads = [read for read in self._reads if read.command.peer != peer]
        for read in failing:
            read.command.future.set_exception(error)
