"""The thread that owns a NIXL agent: every call of NIXL is made here, and reads are watched until they end.

NIXL's own progress thread answers peers that read from here (a TCP or shared memory transport needs the
processor of both sides) and moves this side's reads on; it never takes Python's lock. Its delay decides what
it costs: with 0, which the Python binding of 1.5.1 sets, it keeps a core busy; with a delay it sleeps in
poll() on UCX's event descriptors and wakes at once when something comes. Measured with 100 ms on two cores of
an EPYC: 0.0-0.5 % of a core when idle, a 4 KiB read over TCP in 0.3 ms.

No call of NIXL ends a transfer that is under way: releasing its handle or removing the peer succeeds at once,
and the peer's answer is still written when it comes (seen with UCX over TCP and a peer that was stopped for a
while). So a read that was given up is watched until NIXL has ended it, and its future with it; the peer's
connection stays until then. A peer that died or a host that is lost ends it by UCX's own error handling.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from transfer.backends.base import ReadReport, Region
from transfer.backends.commands import Command, Commands, Connect, Read, obey
from transfer.backends.pieces import Runs, descriptor_rows, runs_of
from transfer.backends.ucx_library import boot_id, process_log
from transfer.errors import BackendError, PeerLostError, ReadTimeoutError

_log = logging.getLogger(__name__)
_config_lock = threading.Lock()

READS_MAX = 1_024
"""Most reads under way in one agent."""

METADATA_BYTES_MAX = 1 << 20
POLL_FIRST_S = 50e-6
POLL_LAST_S = 1e-3
# A read that was given up is looked at this often.
POLL_GIVEN_UP_S = 5e-3
# NIXL reports a failed transfer at the first of its requests that failed; UCX is then about to end the others
# of that connection.
SETTLE_S = 0.05
CLOSE_S = 0.6


class PeerMetadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a peer needs to read from an agent; msgpack over the side channel."""

    plugin: str
    agent: bytes
    address: int
    length_bytes: int
    memory: str
    device_index: int
    boot_id: str


def decode_metadata(data: bytes) -> PeerMetadata:
    """The metadata of a peer.

    Raises:
        BackendError: if it is none.
    """
    if len(data) > METADATA_BYTES_MAX:
        raise BackendError(
            f"the peer's metadata has {len(data)} bytes, at most {METADATA_BYTES_MAX} are taken"
        )
    try:
        found = msgspec.msgpack.decode(data, type=PeerMetadata)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BackendError(f"the peer's metadata is malformed: {error}") from error
    is_sane = 0 <= found.address < 1 << 63 and 0 <= found.length_bytes < 1 << 62 and found.device_index >= 0
    if not is_sane or found.memory not in {"DRAM", "VRAM"}:
        raise BackendError("the peer's metadata names no region")
    return found


@contextmanager
def patient_progress(api: Any, delay_us: int) -> Iterator[None]:
    """While it holds, agents are made with this delay of their progress thread instead of 0.

    NIXL 1.5.1's nixl_agent sets `pthrDelay` to 0 and takes no argument for it.
    """
    bindings = getattr(api, "nixlBind", None)
    stock = getattr(bindings, "nixlAgentConfig", None)
    if stock is None or not hasattr(stock, "pthrDelay"):
        _log.warning("this NIXL does not let its progress thread sleep: an idle agent may keep a core busy")
        yield
        return

    class PatientAgentConfig(stock):  # type: ignore[misc, valid-type]  # a class that is known at run time only
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, delay_us if name == "pthrDelay" else value)

    with _config_lock:
        bindings.nixlAgentConfig = PatientAgentConfig  # type: ignore[union-attr]  # it has nixlAgentConfig
        try:
            yield
        finally:
            bindings.nixlAgentConfig = stock  # type: ignore[union-attr]  # as above


def memory_of(device: str) -> tuple[str, int]:
    """NIXL's name for a device's memory, and the device's index."""
    kind, _, index = device.partition(":")
    return ("DRAM", 0) if kind == "cpu" else ("VRAM", int(index or 0))


@dataclass(slots=True)
class _Peer:
    agent_name: str
    metadata: PeerMetadata
    is_lost: bool = False


@dataclass(slots=True)
class _Watched:
    """A read under way; `failure` once it was given up or failed, `free_s` is when its memory is free."""

    command: Read
    agent_name: str
    descriptor_count: int
    read_bytes: int
    posted_s: float
    handles: list[Any] = field(default_factory=list)
    transfer: Any = None
    state: str = "PROC"
    failure: BackendError | None = None
    free_s: float = 0.0


def translated(error: Exception) -> BackendError:
    """A NIXL exception as one of ours."""
    if type(error).__name__ == "nixlRemoteDisconnectError":
        return PeerLostError("NIXL has lost the peer")
    return BackendError(f"NIXL: {type(error).__name__}: {error}")


class NixlThread:
    """Runs an agent from its first command to its end.

    Args:
        agent: the nixl_agent, made by the caller and not touched by it again.
        registered: what register_memory returned.
    """

    def __init__(self, agent: Any, plugin: str, region: Region, registered: Any) -> None:
        self.commands = Commands()
        self._agent = agent
        self._plugin = plugin
        self._region = region
        self._memory, self._device_index = memory_of(region.device)
        self._registered = registered
        self._peers: dict[str, _Peer] = {}
        self._reads: list[_Watched] = []
        # Agents to remove as soon as no read of theirs is under way, and those of them that NIXL has lost.
        self._leaving: set[str] = set()
        self._lost: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="kv-nixl", daemon=True)
        self._boot_id = boot_id()
        # Whether a peer is on this host, for whoever asks from another thread; replaced, never changed.
        self.same_host: dict[str, bool] = {}
        self.metadata = msgspec.msgpack.encode(
            PeerMetadata(
                plugin=plugin,
                agent=agent.get_agent_metadata(),
                address=region.address,
                length_bytes=region.length_bytes,
                memory=self._memory,
                device_index=self._device_index,
                boot_id=self._boot_id,
            )
        )

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float) -> bool:
        """Stop; whether the thread has ended, and with it everything that NIXL does."""
        self.commands.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # What follows runs in the thread.

    def _run(self) -> None:
        try:
            while not self.commands.is_closed:
                command = self.commands.take(self._wait_s())
                while command is not None:
                    self._obey(command)
                    command = self.commands.take(0)
                self._watch()
        finally:
            self.commands.close()
            self.commands.fail_all(BackendError("the backend is closed"))
            self._end()

    def _wait_s(self) -> float | None:
        if not self._reads:
            return None
        moving = [read for read in self._reads if read.failure is None]
        if not moving:
            return POLL_GIVEN_UP_S
        youngest_s = time.monotonic() - max(read.posted_s for read in moving)
        return min(max(youngest_s / 16, POLL_FIRST_S), POLL_LAST_S)

    def _obey(self, command: Command) -> None:
        obey(command, self._connect, self._read, self._forget, translated)

    def _connect(self, command: Connect) -> None:
        if command.peer in self._peers:
            raise BackendError(f"a peer {command.peer} is connected already")
        metadata = decode_metadata(command.metadata)
        if metadata.plugin != self._plugin:
            raise BackendError(f"the peer speaks NIXL's {metadata.plugin}, this side {self._plugin}")
        name = self._agent.add_remote_agent(metadata.agent)
        agent_name = name.decode() if isinstance(name, bytes) else str(name)
        if agent_name in self._lost:
            raise PeerLostError("the peer was lost and its last read has not ended yet")
        self._leaving.discard(agent_name)
        try:
            self._agent.make_connection(agent_name, [self._plugin])
        except Exception as error:
            self._leaving.add(agent_name)
            self._remove_leaving()
            raise PeerLostError(f"cannot connect to the peer: {error}") from error
        self._peers[command.peer] = _Peer(agent_name, metadata)
        is_same_host = bool(self._boot_id) and metadata.boot_id == self._boot_id
        self.same_host = {**self.same_host, command.peer: is_same_host}
        command.future.set_result(None)

    def _forget(self, name: str) -> None:
        peer = self._peers.pop(name, None)
        if peer is None:
            return
        self.same_host = {other: here for other, here in self.same_host.items() if other != name}
        for read in self._reads:
            if read.command.peer == name and read.failure is None:
                read.failure = PeerLostError("the peer was forgotten")
        self._leaving.add(peer.agent_name)
        self._remove_leaving()
        process_log.tables()

    def _read(self, command: Read) -> None:
        peer = self._peers.get(command.peer)
        if peer is None or peer.is_lost:
            raise PeerLostError("no such peer is connected" if peer is None else "the peer is lost")
        if len(self._reads) >= READS_MAX:
            raise BackendError(f"{READS_MAX} reads are under way already")
        if time.monotonic() >= command.deadline_s:
            raise ReadTimeoutError("its time was up before it could begin")
        runs = runs_of(
            command.pieces,
            local_bytes=self._region.length_bytes,
            remote_bytes=peer.metadata.length_bytes,
        )
        if not runs.count:
            command.future.set_result(ReadReport(0, 0, 0.0, 0.0))
            return
        read = _Watched(command, peer.agent_name, runs.count, runs.total_bytes, 0.0)
        self._reads.append(read)
        try:
            self._post(read, peer, runs)
        except Exception as error:  # noqa: BLE001  # as in _obey; what was posted must end first
            self._lose(read, translated(error))
        read.posted_s = time.monotonic()
        # A copy within the host is over when it has been posted.
        self._look_at(read)

    def _post(self, read: _Watched, peer: _Peer, runs: Runs) -> None:
        agent, remote = self._agent, peer.metadata
        rows = descriptor_rows(runs.local, runs.lengths, self._region.address, self._device_index)
        ours = agent.prep_xfer_dlist("NIXL_INIT_AGENT", rows, self._memory, [self._plugin])
        read.handles.append(ours)
        rows = descriptor_rows(runs.remote, runs.lengths, remote.address, remote.device_index)
        theirs = agent.prep_xfer_dlist(peer.agent_name, rows, remote.memory, [self._plugin])
        read.handles.append(theirs)
        indices = np.arange(runs.count, dtype=np.int32)
        read.transfer = agent.make_prepped_xfer("READ", ours, indices, theirs, indices, b"", [self._plugin])
        read.state = agent.transfer(read.transfer)

    def _watch(self) -> None:
        for read in list(self._reads):
            self._look_at(read)

    def _look_at(self, read: _Watched) -> None:
        now_s = time.monotonic()
        if read.transfer is not None and read.state == "PROC":
            try:
                read.state = self._agent.check_xfer_state(read.transfer)
            except Exception as error:  # noqa: BLE001  # as in _obey
                self._lose(read, translated(error))
        if read.failure is None:
            if read.state == "ERR":
                self._lose(read, BackendError("NIXL reports that the read failed"))
            elif read.state == "PROC" and now_s >= read.command.deadline_s:
                read.failure = ReadTimeoutError("the read did not end in time")
                self._mark_lost(lambda name, _: name == read.command.peer)
        is_ended = read.state != "PROC" or read.transfer is None
        if is_ended and now_s >= read.free_s and self._release(read):
            self._reads.remove(read)
            self._report(read, now_s)
            self._remove_leaving()

    def _lose(self, read: _Watched, failure: BackendError) -> None:
        """NIXL has ended the read."""
        read.state = "ERR"
        read.failure = read.failure or failure
        read.free_s = time.monotonic() + SETTLE_S
        if isinstance(failure, PeerLostError):
            self._lost.add(read.agent_name)
            self._leaving.add(read.agent_name)
            self._mark_lost(lambda _, peer: peer.agent_name == read.agent_name)

    def _mark_lost(self, is_meant: Callable[[str, _Peer], bool]) -> None:
        """Have no more reads of peers until they are forgotten and connected anew."""
        for name, peer in self._peers.items():
            if is_meant(name, peer):
                peer.is_lost = True

    def _remove_leaving(self) -> None:
        """Remove agents that nobody uses; not under a read, whose end NIXL would then no longer tell."""
        for agent_name in list(self._leaving):
            is_used = any(peer.agent_name == agent_name and not peer.is_lost for peer in self._peers.values())
            if is_used:
                self._leaving.discard(agent_name)
            elif not any(read.agent_name == agent_name for read in self._reads):
                self._leaving.discard(agent_name)
                self._lost.discard(agent_name)
                self._remove(agent_name)

    def _remove(self, agent_name: str) -> None:
        try:
            self._agent.remove_remote_agent(agent_name)
        except Exception as error:  # noqa: BLE001  # as in _obey; it may be gone already
            _log.debug("NIXL did not remove an agent: %s", error)

    def _release(self, read: _Watched) -> bool:
        """Free a read's handles; False while NIXL cannot let go of the transfer."""
        try:
            if read.transfer is not None:
                read.transfer.release()
                read.transfer = None
            while read.handles:
                read.handles[-1].release()
                read.handles.pop()
        except Exception as error:  # noqa: BLE001  # as in _obey
            _log.debug("NIXL does not release a read yet: %s", error)
            read.free_s = time.monotonic() + POLL_GIVEN_UP_S
            return False
        return True

    def _report(self, read: _Watched, now_s: float) -> None:
        asked_s = read.command.asked_s
        if read.failure is not None:
            read.command.future.set_exception(read.failure)
            return
        report = ReadReport(read.read_bytes, read.descriptor_count, read.posted_s - asked_s, now_s - asked_s)
        read.command.future.set_result(report)

    def _end(self) -> None:
        """Fail what is under way, let NIXL go."""
        closed = PeerLostError("the backend is closed")
        for name in list(self._peers):
            self._forget(name)
        # Those whose peer is silent end with the agent: its UCX worker goes, and nothing can write then.
        deadline_s = time.monotonic() + CLOSE_S
        while self._reads and time.monotonic() < deadline_s:
            self._watch()
            if self._reads:
                time.sleep(POLL_GIVEN_UP_S)
        try:
            self._agent.deregister_memory(self._registered)
        except Exception as error:  # noqa: BLE001  # as in _obey; the agent's end frees it too
            _log.debug("NIXL did not deregister the region: %s", error)
        left, self._reads = self._reads, []
        for read in left:
            read.handles.clear()
            read.transfer = None
        self._registered = self._agent = None
        for read in left:
            read.command.future.set_exception(read.failure or closed)
