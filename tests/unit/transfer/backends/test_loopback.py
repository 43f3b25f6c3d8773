"""The loopback backend keeps the contract of backends, and its faults are what they say."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest

from transfer.backends.base import Backend, Piece, Region
from transfer.backends.loopback import LoopbackBackend, LoopbackNetwork
from transfer.errors import BackendError, PeerLostError, ReadTimeoutError, SettingError

SIZE = 4_096
WAIT_S = 10.0


class Pair:
    """A reader with zeroed memory that is connected to an owner with a pattern."""

    def __init__(self) -> None:
        self.network = LoopbackNetwork()
        self.theirs = np.random.default_rng(1).integers(1, 255, SIZE, dtype=np.uint8)
        self.ours = np.zeros(SIZE, np.uint8)
        self.owner = LoopbackBackend(self.network)
        self.owner.start(Region(self.theirs.ctypes.data, SIZE))
        self.reader = LoopbackBackend(self.network)
        self.reader.start(Region(self.ours.ctypes.data, SIZE))
        self.reader.connect("peer", self.owner.metadata()).result(WAIT_S)

    def read(self, *pieces: Piece, timeout_s: float = WAIT_S) -> Future:
        return self.reader.read("peer", pieces or (Piece(0, 0, SIZE),), timeout_s=timeout_s)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.reader.close()
    made.owner.close()


def test_it_is_a_backend(pair: Pair) -> None:
    backend: Backend = pair.reader
    assert (backend.name, backend.transport("peer")) == ("loopback", "loopback")


def test_scattered_pieces_land_where_they_belong(pair: Pair) -> None:
    report = pair.read(Piece(0, 100, 10), Piece(10, 110, 10), Piece(50, 5, 7), Piece(9, 9, 0)).result(WAIT_S)
    assert (report.read_bytes, report.descriptor_count) == (27, 2)
    assert 0 <= report.posted_s <= report.moved_s
    expected = np.zeros(SIZE, np.uint8)
    expected[100:120], expected[5:12] = pair.theirs[:20], pair.theirs[50:57]
    assert (pair.ours == expected).all()


@pytest.mark.parametrize(
    "piece", [Piece(SIZE - 1, 0, 2), Piece(0, SIZE, 1), Piece(-1, 0, 1), Piece(1 << 70, 0, 1)]
)
def test_a_piece_outside_of_a_region_moves_nothing_and_hurts_nothing(pair: Pair, piece: Piece) -> None:
    with pytest.raises(BackendError):
        pair.read(Piece(0, 0, 8), piece).result(WAIT_S)
    assert not pair.ours.any()
    assert pair.read().result(WAIT_S).read_bytes == SIZE


def test_futures_end_in_a_thread_of_the_backend(pair: Pair) -> None:
    told: list[str] = []
    ended = threading.Event()
    pair.network.faults.hold = hold = threading.Event()
    future = pair.read()
    future.add_done_callback(lambda _: (told.append(threading.current_thread().name), ended.set()))
    assert not future.cancel()
    hold.set()
    assert ended.wait(WAIT_S)
    assert told == ["kv-loopback"]


def test_a_held_read_writes_nothing_until_it_is_let_go(pair: Pair) -> None:
    pair.network.faults.hold = hold = threading.Event()
    future = pair.read()
    with pytest.raises(TimeoutError):
        future.result(0.02)
    assert not pair.ours.any()
    hold.set()
    future.result(WAIT_S)
    assert (pair.ours == pair.theirs).all()


def test_a_held_read_ends_with_its_time_or_its_peer(pair: Pair) -> None:
    pair.network.faults.hold = hold = threading.Event()
    with pytest.raises(ReadTimeoutError):
        pair.read(timeout_s=0.02).result(WAIT_S)
    forgotten = pair.read()
    pair.reader.forget("peer").result(WAIT_S)
    with pytest.raises(PeerLostError):
        forgotten.result(0)
    hold.set()
    with pytest.raises(PeerLostError):
        pair.read().result(WAIT_S)
    assert not pair.ours.any()


def test_a_delay_does_not_hold_up_other_commands(pair: Pair) -> None:
    pair.network.faults.delay_s = 0.02
    assert pair.read().result(WAIT_S).moved_s >= 0.02
    pair.network.faults.delay_s = 60.0
    slow = pair.read(timeout_s=120.0)
    pair.reader.connect("other", pair.owner.metadata()).result(WAIT_S)
    assert not slow.done()


def test_so_many_reads_fail_as_were_asked_to(pair: Pair) -> None:
    pair.network.faults.fail_next(1)
    pair.network.faults.fail_next(1, ReadTimeoutError("asked for"))
    with pytest.raises(BackendError, match="was asked for"):
        pair.read().result(WAIT_S)
    with pytest.raises(ReadTimeoutError):
        pair.read().result(WAIT_S)
    assert pair.read().result(WAIT_S).read_bytes == SIZE


def test_a_peer_lost_halfway_leaves_half_of_the_bytes(pair: Pair) -> None:
    pair.network.faults.lose_after_bytes = 150
    with pytest.raises(PeerLostError):
        pair.read(Piece(0, 0, 100), Piece(200, 200, 100)).result(WAIT_S)
    expected = np.zeros(SIZE, np.uint8)
    expected[:100], expected[200:250] = pair.theirs[:100], pair.theirs[200:250]
    assert (pair.ours == expected).all()
    with pytest.raises(PeerLostError):
        pair.read().result(WAIT_S)
    pair.reader.forget("peer").result(WAIT_S)
    pair.reader.connect("peer again", pair.owner.metadata()).result(WAIT_S)
    again = pair.reader.read("peer again", [Piece(0, 0, SIZE)], timeout_s=WAIT_S)
    assert again.result(WAIT_S).read_bytes == SIZE


def test_one_byte_can_come_wrong(pair: Pair) -> None:
    pair.network.faults.corrupt_byte = 12
    pair.read(Piece(0, 0, 10), Piece(100, 100, 10)).result(WAIT_S)
    assert pair.ours[102] == pair.theirs[102] ^ 0xFF
    pair.read(Piece(0, 0, 10), Piece(100, 100, 10)).result(WAIT_S)
    assert (pair.ours[100:110] == pair.theirs[100:110]).all()


def test_connects_can_be_refused(pair: Pair) -> None:
    pair.network.faults.refuse_next(1)
    with pytest.raises(PeerLostError):
        pair.reader.connect("other", pair.owner.metadata()).result(WAIT_S)
    pair.reader.connect("other", pair.owner.metadata()).result(WAIT_S)
    with pytest.raises(BackendError, match="already"):
        pair.reader.connect("other", pair.owner.metadata()).result(WAIT_S)


def test_a_closed_peer_is_lost(pair: Pair) -> None:
    pair.owner.close()
    with pytest.raises(PeerLostError):
        pair.read().result(WAIT_S)
    with pytest.raises(PeerLostError):
        pair.reader.connect("late", pair.owner.metadata()).result(WAIT_S)


def test_close_fails_what_is_under_way(pair: Pair) -> None:
    pair.network.faults.hold = threading.Event()
    future = pair.read()
    pair.reader.close()
    pair.reader.close()
    with pytest.raises(BackendError):
        future.result(0)
    with pytest.raises(BackendError):
        pair.read().result(0)
    assert not pair.ours.any()


def test_it_takes_host_memory_once() -> None:
    backend = LoopbackBackend(LoopbackNetwork())
    with pytest.raises(BackendError, match="not been started"):
        backend.metadata()
    with pytest.raises(SettingError):
        backend.start(Region(4096, SIZE, "cuda:0"))
    memory = np.zeros(SIZE, np.uint8)
    backend.start(Region(memory.ctypes.data, SIZE))
    with pytest.raises(BackendError, match="before"):
        backend.start(Region(memory.ctypes.data, SIZE))
    backend.forget("never seen").result(WAIT_S)
    backend.close()
