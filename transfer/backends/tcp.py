"""Reads over TCP: needs nothing but sockets, for nodes without RDMA and as the last choice."""

import ipaddress
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
import numpy as np

from transfer.backends.base import Piece, ReadReport, Region
from transfer.backends.commands import running_future
from transfer.backends.pieces import Runs, runs_of
from transfer.backends.tcp_lane import Lane, ReadJob, Share
from transfer.backends.tcp_messages import TOKEN_BYTES, TcpMetadata, decode_metadata
from transfer.backends.tcp_server import TcpServer, listen
from transfer.backends.ucx_library import boot_id
from transfer.errors import BackendError, PeerLostError, ReadTimeoutError, SettingError
from transfer.staging import host_view

_log = logging.getLogger(__name__)

PEERS_MAX = 1_024
LANES_MAX = 16
CLOSE_S = 0.9
# A read is shared among connections if each gets this much; a smaller one is over before they have begun.
READ_BYTES_EACH_MIN = 1 << 20


class _Peer:
    """A peer's lanes; `gone` ends when all their threads have."""

    def __init__(self, name: str, metadata: TcpMetadata, region: memoryview, lane_count: int) -> None:
        self.length_bytes = metadata.length_bytes
        self.gone: Future[None] = running_future()
        self._left_count = lane_count
        self._lock = threading.Lock()
        self.lanes = [
            Lane(metadata, region, f"kv-tcp-{name[:32]}-{index}", self._lane_ended)
            for index in range(lane_count)
        ]
        for lane in self.lanes:
            lane.thread.start()

    def end(self) -> None:
        for lane in self.lanes:
            lane.end()

    def _lane_ended(self) -> None:
        with self._lock:
            self._left_count -= 1
            if self._left_count:
                return
        self.gone.set_result(None)


class TcpBackend:
    """The Backend over TCP.

    Args:
        listen_host: address of this node, or a wildcard.
        port: 0 takes a free one.
        lanes: connections to each peer, over which large reads are shared, and threads that answer peers.
        advertise_host: what peers dial; empty: `listen_host`, or the loopback address if that is a wildcard.

    Raises:
        SettingError: if a value is out of its range.
    """

    def __init__(
        self,
        listen_host: str = "0.0.0.0",  # noqa: S104  # nobody reads without the token
        port: int = 0,
        lanes: int = 1,
        advertise_host: str = "",
    ) -> None:
        if not 0 <= port <= 65_535:
            raise SettingError("tcp_port", port, "give a number in 0..65535")
        if not 1 <= lanes <= LANES_MAX:
            raise SettingError("tcp_lanes", lanes, f"give a number in 1..{LANES_MAX}")
        self._listen_host = listen_host
        self._port = port
        self._lane_count = lanes
        self._advertise_host = advertise_host
        self._region: memoryview | None = None
        self._server: TcpServer | None = None
        self._metadata = b""
        self._peers: dict[str, _Peer] = {}
        self._ending: list[_Peer] = []
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def name(self) -> str:
        return "tcp"

    def start(self, region: Region) -> None:
        if self._server is not None:
            raise BackendError("the tcp backend was started before")
        self._region = host_view(region)
        listener = listen(self._listen_host, self._port)
        token = os.urandom(TOKEN_BYTES)
        host = self._advertise_host or _dialled_host(self._listen_host)
        self._metadata = msgspec.msgpack.encode(
            TcpMetadata((host,), listener.getsockname()[1], token, region.length_bytes, boot_id())
        )
        self._server = TcpServer(listener, token, self._region, self._lane_count)
        self._server.start()

    def metadata(self) -> bytes:
        self._running()
        return self._metadata

    def transport(self, peer: str) -> str:  # noqa: ARG002  # every peer is reached in the same way
        return "tcp"

    def connect(self, peer: str, metadata: bytes) -> "Future[None]":
        region = self._running()
        try:
            found = self._add(peer, metadata, region)
        except BackendError as error:
            return _failed(error)
        return _unless_refused(found.lanes[0].open(), lambda: self.forget(peer))

    def read(self, peer: str, pieces: Sequence[Piece], *, timeout_s: float) -> "Future[ReadReport]":
        asked_s = time.monotonic()
        region = self._running()
        found = self._peers.get(peer)
        try:
            if found is None:
                why = "the backend is closed" if self._is_closed else "no such peer is connected"
                raise PeerLostError(why)
            if timeout_s <= 0:
                raise ReadTimeoutError("its time was up before it could begin")
            runs = runs_of(pieces, local_bytes=len(region), remote_bytes=found.length_bytes)
        except BackendError as error:
            return _failed(error)
        cuts = cut(runs, min(self._lane_count, max(1, runs.total_bytes // READ_BYTES_EACH_MIN)))
        job = ReadJob(runs, asked_s, asked_s + timeout_s, max(1, len(cuts)))
        if not cuts:
            job.end_share(None)
        lanes = sorted(found.lanes, key=lambda lane: lane.waiting_count)
        for lane, part in zip(lanes, cuts, strict=False):
            lane.submit(Share(job, part))
        return job.future

    def forget(self, peer: str) -> "Future[None]":
        with self._lock:
            found = self._peers.pop(peer, None)
            self._ending = [other for other in self._ending if not other.gone.done()]
            if found is not None:
                self._ending.append(found)
        if found is None:
            done: Future[None] = running_future()
            done.set_result(None)
            return done
        found.end()
        return found.gone

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            ending = [*self._ending, *self._peers.values()]
            self._peers = {}
            self._ending = ending
        for peer in ending:
            peer.end()
        deadline_s = time.monotonic() + CLOSE_S
        is_ended = self._server is None or self._server.close(CLOSE_S)
        for lane in (lane for peer in ending for lane in peer.lanes):
            if lane.thread is not threading.current_thread():
                lane.thread.join(max(deadline_s - time.monotonic(), 0.0))
                is_ended = is_ended and not lane.thread.is_alive()
        if not is_ended:
            _log.warning("the tcp backend's threads did not end within %g s", CLOSE_S)

    def _add(self, name: str, metadata: bytes, region: memoryview) -> _Peer:
        decoded = decode_metadata(metadata)
        _refuse_foreign_loopback(decoded)
        with self._lock:
            if self._is_closed:
                raise BackendError("the backend is closed")
            if name in self._peers:
                raise BackendError(f"a peer {name} is connected already")
            if len(self._peers) >= PEERS_MAX:
                raise BackendError(f"{PEERS_MAX} peers are connected already")
            self._peers[name] = peer = _Peer(name, decoded, region, self._lane_count)
        return peer

    def _running(self) -> memoryview:
        if self._region is None or self._server is None:
            raise BackendError("the tcp backend has not been started")
        return self._region


def cut(runs: Runs, count: int) -> list[Runs]:
    """Runs cut into so many parts of about equal bytes, fewer if there are fewer bytes; order kept."""
    total_bytes = runs.total_bytes
    ends = np.cumsum(runs.lengths)
    starts = ends - runs.lengths
    parts = []
    for index in range(count):
        low, high = total_bytes * index // count, total_bytes * (index + 1) // count
        if low == high:
            continue
        chosen = slice(int(np.searchsorted(ends, low, "right")), int(np.searchsorted(starts, high, "left")))
        skipped = np.maximum(low - starts[chosen], 0)
        lengths = np.minimum(ends[chosen], high) - starts[chosen] - skipped
        parts.append(Runs(runs.remote[chosen] + skipped, runs.local[chosen] + skipped, lengths))
    return parts


def _dialled_host(listen_host: str) -> str:
    try:
        address = ipaddress.ip_address(listen_host)
    except ValueError:
        return listen_host
    if not address.is_unspecified:
        return listen_host
    return "127.0.0.1" if address.version == 4 else "::1"


def _refuse_foreign_loopback(metadata: TcpMetadata) -> None:
    """Keep a token from being shown to whoever listens at this host's own loopback address.

    Raises:
        BackendError: if the peer is of another host and names a loopback address only.
    """
    if not metadata.boot_id or not boot_id() or metadata.boot_id == boot_id():
        return
    for host in metadata.hosts:
        try:
            is_loopback = ipaddress.ip_address(host).is_loopback
        except ValueError:
            is_loopback = host == "localhost"
        if not is_loopback:
            return
    raise BackendError("the peer, of another host, names a loopback address: set its advertise_host")


def _failed(error: BackendError) -> "Future[Any]":
    future: Future[Any] = running_future()
    future.set_exception(error)
    return future


def _unless_refused(opened: "Future[None]", drop: Callable[[], object]) -> "Future[None]":
    """The same, but a peer that could not be reached is dropped first."""
    outcome: Future[None] = running_future()

    def tell(ended: "Future[None]") -> None:
        error = ended.exception()
        if error is None:
            outcome.set_result(None)
        else:
            drop()
            outcome.set_exception(error)

    opened.add_done_callback(tell)
    return outcome
