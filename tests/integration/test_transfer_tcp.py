"""The tcp backend between processes: bytes, bounds, strangers, deaths, deadlines and the end."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest

from transfer.backends.base import Backend, Piece, Region
from transfer.backends.pieces import Runs
from transfer.backends.tcp import TcpBackend, cut
from transfer.backends.tcp_messages import (
    ASK,
    ASK_PIECES_MAX,
    HEAD,
    HELLO,
    MAGIC,
    MOVED,
    REFUSED,
    WELCOME,
    TcpMetadata,
    decode_metadata,
)
from transfer.errors import BackendError, PeerLostError, ReadTimeoutError, SettingError

MIB = 1 << 20
SIZE = 8 * MIB
WAIT_S = 20.0

OWNER = """
import sys
import numpy as np
from transfer.backends.base import Region
from transfer.backends.tcp import TcpBackend
port, lanes, size, seed = map(int, sys.argv[1:])
memory = np.random.default_rng(seed).integers(1, 255, size, dtype=np.uint8)
backend = TcpBackend("127.0.0.1", port=port, lanes=lanes)
backend.start(Region(memory.ctypes.data, size))
print(backend.metadata().hex(), flush=True)
sys.stdin.read()
backend.close()
"""


class Owner:
    """A process whose memory is read; `memory` is what it holds."""

    def __init__(self, *, port: int = 0, lanes: int = 1, seed: int = 1) -> None:
        command = [sys.executable, "-c", OWNER, *map(str, (port, lanes, SIZE, seed))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.metadata = bytes.fromhex(self.process.stdout.readline())
        self.decoded = decode_metadata(self.metadata)
        self.memory = np.random.default_rng(seed).integers(1, 255, SIZE, dtype=np.uint8)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)
        if number == signal.SIGSTOP:
            # The signal is on its way for a moment: only this tells that no thread runs any more.
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def end(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(WAIT_S)
        self.process.stdout.close()

    def dial(self, hello: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.decoded.port), WAIT_S)
        connection.sendall(hello)
        return connection


class Reader:
    """This process's side."""

    def __init__(self, lanes: int = 1) -> None:
        self.memory = np.zeros(SIZE, np.uint8)
        self.backend = TcpBackend("127.0.0.1", lanes=lanes)
        self.backend.start(Region(self.memory.ctypes.data, SIZE))


@pytest.fixture(params=[1, 3])
def lanes(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def process() -> Iterator[Owner]:
    made = Owner()
    yield made
    made.end()


@pytest.fixture
def owner(process: Owner) -> Iterator[Owner]:
    """The same for all tests, because a process takes long to start; a test may stop it, but not end it."""
    yield process
    process.signal(signal.SIGCONT)


@pytest.fixture
def reader(lanes: int) -> Iterator[Reader]:
    made = Reader(lanes)
    yield made
    made.backend.close()


@pytest.fixture
def backend(reader: Reader, owner: Owner) -> TcpBackend:
    reader.backend.connect("peer", owner.metadata).result(WAIT_S)
    return reader.backend


def until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def received(connection: socket.socket, byte_count: int) -> bytes:
    data = b""
    while len(data) < byte_count and (more := connection.recv(byte_count - len(data))):
        data += more
    return data


def long_read(backend: Backend, timeout_s: float = WAIT_S):  # noqa: ANN201  # a future of a report
    """A read that takes seconds: the same bytes over and over."""
    return backend.read("peer", [Piece(0, 0, MIB), Piece(2 * MIB, 2 * MIB, MIB)] * 4_000, timeout_s=timeout_s)


def test_scattered_pieces_land_where_they_belong(backend: TcpBackend, reader: Reader, owner: Owner) -> None:
    assert (backend.name, backend.transport("peer")) == ("tcp", "tcp")
    rng = np.random.default_rng(7)
    size = 2_048
    count = SIZE // size
    pieces = [
        Piece(int(theirs) * size, ours * size + 3, size - 5)
        for ours, theirs in enumerate(rng.permutation(count))
    ]
    assert count > 2 * ASK_PIECES_MAX
    report = backend.read("peer", pieces, timeout_s=WAIT_S).result(WAIT_S)
    assert report.read_bytes == count * (size - 5)
    assert report.descriptor_count == count
    assert 0 < report.posted_s <= report.moved_s
    expected = np.zeros(SIZE, np.uint8)
    for piece in pieces:
        end = piece.local_offset + piece.length_bytes
        expected[piece.local_offset : end] = owner.memory[piece.remote_offset :][: piece.length_bytes]
    assert (reader.memory == expected).all()


def test_neighbours_are_merged_and_nothing_is_a_read_too(
    backend: TcpBackend, reader: Reader, owner: Owner
) -> None:
    pieces = [Piece(at, at, MIB) for at in range(0, SIZE, MIB)]
    assert backend.read("peer", pieces, timeout_s=WAIT_S).result(WAIT_S).descriptor_count == 1
    assert (reader.memory == owner.memory).all()
    assert backend.read("peer", [Piece(0, 0, 0)], timeout_s=WAIT_S).result(WAIT_S).read_bytes == 0
    assert backend.read("peer", [], timeout_s=WAIT_S).result(WAIT_S).read_bytes == 0


def test_a_piece_outside_of_a_region_fails_that_read_only(backend: TcpBackend, reader: Reader) -> None:
    for piece in (Piece(SIZE - 1, 0, 2), Piece(0, SIZE, 1), Piece(-1, 0, 1), Piece(0, 0, -1)):
        with pytest.raises(BackendError, match="outside"):
            backend.read("peer", [Piece(0, 0, 8), piece], timeout_s=WAIT_S).result(WAIT_S)
    assert not reader.memory.any()
    assert backend.read("peer", [Piece(0, 0, 8)], timeout_s=WAIT_S).result(WAIT_S).read_bytes == 8


def test_the_owner_checks_every_piece_itself_and_stays_in_step(owner: Owner) -> None:
    outside = [(SIZE - 1, 2), (SIZE, 1), (-1, 1), (0, 0), (5, -1), (1 << 62, 1 << 62), (1, (1 << 63) - 1)]
    with owner.dial(HELLO.pack(MAGIC, owner.decoded.token)) as connection:
        assert HEAD.unpack(received(connection, HEAD.size)) == (WELCOME, 0, SIZE)
        for number, piece in enumerate(outside):
            table = np.array([(0, 8), piece], dtype="<i8").tobytes()
            connection.sendall(HEAD.pack(ASK, 2, number) + table)
            kind, size, echoed = HEAD.unpack(received(connection, HEAD.size))
            assert (kind, echoed) == (REFUSED, number)
            assert b"piece 1" in received(connection, size)
        connection.sendall(HEAD.pack(ASK, 1, 99) + np.array([(16, 8)], dtype="<i8").tobytes())
        assert HEAD.unpack(received(connection, HEAD.size)) == (MOVED, 1, 99)
        assert received(connection, 8) == owner.memory[16:24].tobytes()


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        secrets.token_bytes(4_096),
        HELLO.pack(MAGIC, bytes(16)),
        b"",
    ],
    ids=["http", "noise", "wrong-token", "silence"],
)
def test_strangers_get_no_byte_of_the_region(backend: TcpBackend, owner: Owner, words: bytes) -> None:
    with owner.dial(words) as connection:
        try:
            answer = received(connection, 65_536)
        except ConnectionResetError:
            answer = b""
    # A wrong token is told so; else the connection is just closed, be it for want of words.
    assert answer == b"" or HEAD.unpack(answer[: HEAD.size])[0] == REFUSED
    assert backend.read("peer", [Piece(0, 0, 8)], timeout_s=WAIT_S).result(WAIT_S).read_bytes == 8


@pytest.mark.parametrize(
    "head", [(ASK, ASK_PIECES_MAX + 1, 0), (ASK, 0, 0), (77, 1, 0), (ASK, 0xFFFF_FFFF, 0)]
)
def test_a_frame_past_its_bounds_ends_the_connection(owner: Owner, head: tuple[int, int, int]) -> None:
    with owner.dial(HELLO.pack(MAGIC, owner.decoded.token)) as connection:
        received(connection, HEAD.size)
        connection.sendall(HEAD.pack(*head))
        assert received(connection, 1) == b""


def test_many_strangers_do_not_keep_a_peer_out(owner: Owner, reader: Reader) -> None:
    strangers = [owner.dial(b"") for _ in range(100)]
    try:
        reader.backend.connect("peer", owner.metadata).result(WAIT_S)
        until(lambda: bool(_closed(strangers[0])))
    finally:
        for stranger in strangers:
            stranger.close()


def _closed(connection: socket.socket) -> bool:
    connection.settimeout(0)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_a_wrong_token_and_malformed_metadata_are_refused(owner: Owner, reader: Reader) -> None:
    connect = reader.backend.connect
    forged = msgspec.msgpack.encode(msgspec.structs.replace(owner.decoded, token=bytes(16)))
    with pytest.raises(PeerLostError, match="token"):
        connect("forged", forged).result(WAIT_S)
    with pytest.raises(PeerLostError):
        reader.backend.read("forged", [Piece(0, 0, 8)], timeout_s=WAIT_S).result(WAIT_S)
    foreign = msgspec.structs.replace(owner.decoded, boot_id="another host")
    with pytest.raises(BackendError, match="advertise_host"):
        connect("foreign", msgspec.msgpack.encode(foreign)).result(WAIT_S)
    for bad in (
        b"",
        b"noise",
        bytes(10_000),
        msgspec.msgpack.encode(TcpMetadata(("h",), 0, bytes(16), 1, "")),
    ):
        with pytest.raises(BackendError):
            connect("bad", bad).result(WAIT_S)
    connect("peer", owner.metadata).result(WAIT_S)
    with pytest.raises(BackendError, match="already"):
        connect("peer", owner.metadata).result(WAIT_S)


def test_a_killed_peer_is_lost_and_its_next_life_is_another_peer(reader: Reader) -> None:
    first = Owner()
    second: Owner | None = None
    backend = reader.backend
    try:
        backend.connect("peer", first.metadata).result(WAIT_S)
        future = long_read(backend)
        until(lambda: bool(reader.memory[0]))
        assert not future.done()
        first.signal(signal.SIGKILL)
        with pytest.raises(PeerLostError):
            future.result(WAIT_S)
        with pytest.raises(PeerLostError):
            backend.read("peer", [Piece(0, 0, 8)], timeout_s=WAIT_S).result(WAIT_S)
        first.process.wait(WAIT_S)
        second = Owner(port=first.decoded.port, seed=2)
        with pytest.raises(PeerLostError, match="token"):
            backend.read("peer", [Piece(0, 0, 8)], timeout_s=WAIT_S).result(WAIT_S)
        backend.forget("peer").result(WAIT_S)
        backend.connect("next", second.metadata).result(WAIT_S)
        backend.read("next", [Piece(0, 0, SIZE)], timeout_s=WAIT_S).result(WAIT_S)
        assert (reader.memory == second.memory).all()
    finally:
        first.end()
        if second is not None:
            second.end()


def test_a_read_ends_with_its_time_and_the_next_one_works(
    backend: TcpBackend, reader: Reader, owner: Owner
) -> None:
    owner.signal(signal.SIGSTOP)
    first = backend.read("peer", [Piece(0, 0, 4 * MIB)], timeout_s=0.5)
    behind = [backend.read("peer", [Piece(0, 0, 4 * MIB)], timeout_s=0.1) for _ in range(3)]
    for future in (*behind, first):
        with pytest.raises(ReadTimeoutError):
            future.result(WAIT_S)
    reader.memory[:] = 0
    owner.signal(signal.SIGCONT)
    tail = slice(SIZE - MIB, SIZE)
    backend.read("peer", [Piece(tail.start, tail.start, MIB)], timeout_s=WAIT_S).result(WAIT_S)
    assert (reader.memory[tail] == owner.memory[tail]).all()
    assert not reader.memory[: tail.start].any(), "an ended read has written"


def test_a_read_that_waits_ends_with_its_time_though_another_is_under_way(owner: Owner) -> None:
    reader = Reader()
    reader.backend.connect("peer", owner.metadata).result(WAIT_S)
    owner.signal(signal.SIGSTOP)
    first = long_read(reader.backend, timeout_s=60)
    behind = [reader.backend.read("peer", [Piece(0, 0, 8)], timeout_s=0.2) for _ in range(4)]
    for future in behind:
        with pytest.raises(ReadTimeoutError):
            future.result(WAIT_S)
    assert not first.done()
    reader.backend.close()
    with pytest.raises(PeerLostError):
        first.result(0)


def test_forget_fails_a_read_under_way(backend: TcpBackend, reader: Reader) -> None:
    future = long_read(backend)
    until(lambda: bool(reader.memory[0]))
    assert not future.cancel()
    backend.forget("peer").result(WAIT_S)
    with pytest.raises(PeerLostError):
        future.result(0)
    with pytest.raises(PeerLostError):
        backend.read("peer", [Piece(0, 0, 8)], timeout_s=WAIT_S).result(WAIT_S)
    backend.forget("peer").result(WAIT_S)
    backend.forget("never seen").result(WAIT_S)


def test_many_reads_at_a_time_each_get_their_own_bytes(
    backend: TcpBackend, reader: Reader, owner: Owner
) -> None:
    size = SIZE // 256
    order = np.random.default_rng(3).permutation(256)
    backend.connect("twin", owner.metadata).result(WAIT_S)
    futures = [
        backend.read(
            ("peer", "twin")[ours % 2], [Piece(int(theirs) * size, ours * size, size)], timeout_s=WAIT_S
        )
        for ours, theirs in enumerate(order)
    ]
    for future in futures:
        assert future.result(WAIT_S).read_bytes == size
    assert (reader.memory.reshape(256, size) == owner.memory.reshape(256, size)[order]).all()


def test_two_backends_read_each_other(lanes: int) -> None:
    ends = [Reader(lanes), Reader(lanes)]
    ends[0].memory[: SIZE // 2] = 7
    ends[1].memory[SIZE // 2 :] = 9
    for end, other in (ends, ends[::-1]):
        end.backend.connect("other", other.backend.metadata()).result(WAIT_S)
    upper = [Piece(SIZE // 2, SIZE // 2, SIZE // 2)]
    futures = [
        ends[0].backend.read("other", upper, timeout_s=WAIT_S),
        ends[1].backend.read("other", [Piece(0, 0, SIZE // 2)], timeout_s=WAIT_S),
    ]
    for future in futures:
        future.result(WAIT_S)
    assert (ends[0].memory == ends[1].memory).all()
    for end in ends:
        end.backend.close()


def test_close_ends_everything(backend: TcpBackend, reader: Reader) -> None:
    future = long_read(backend)
    until(lambda: bool(reader.memory[0]))
    port = decode_metadata(backend.metadata()).port
    backend.close()
    with pytest.raises(PeerLostError):
        future.result(0)
    reader.memory[:] = 0
    backend.close()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-tcp")] == []
    assert not reader.memory.any()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), WAIT_S)
    for failing in (backend.connect("late", backend.metadata()), backend.read("peer", [], timeout_s=1.0)):
        with pytest.raises(BackendError, match="closed"):
            failing.result(0)
    backend.forget("peer").result(0)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_read_is_cut_into_parts_that_hold_each_byte_once(count: int) -> None:
    runs = Runs(np.array([50, 0, 900]), np.array([1_000, 2_000, 3_000]), np.array([30, 1, 70]))
    parts = cut(runs, count)
    assert len(parts) == count
    assert max(part.total_bytes for part in parts) - min(part.total_bytes for part in parts) <= 1
    joined = [pair for part in parts for pair in _each_byte(part)]
    assert joined == _each_byte(runs)


def _each_byte(runs: Runs) -> list[tuple[int, int]]:
    rows = zip(runs.remote.tolist(), runs.local.tolist(), runs.lengths.tolist(), strict=True)
    return [(theirs + index, ours + index) for theirs, ours, length in rows for index in range(length)]


class FakeOwner:
    """Answers one connection after the hello with what it is told, an answer for each ASK of one piece."""

    def __init__(self, answers: list[tuple[int, int, int, bytes]]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        port = self.listener.getsockname()[1]
        self.metadata = msgspec.msgpack.encode(TcpMetadata(("127.0.0.1",), port, bytes(16), SIZE, ""))
        self.thread = threading.Thread(target=self._run, args=(answers,))
        self.thread.start()

    def _run(self, answers: list[tuple[int, int, int, bytes]]) -> None:
        connection, _ = self.listener.accept()
        with self.listener, connection:
            received(connection, HELLO.size)
            connection.sendall(HEAD.pack(WELCOME, 0, SIZE))
            for kind, size, shift, data in answers:
                _, _, number = HEAD.unpack(received(connection, HEAD.size))
                received(connection, 16)
                connection.sendall(HEAD.pack(kind, size, number + shift) + data)


def test_a_refusal_fails_one_read_and_the_connection_goes_on() -> None:
    reader = Reader()
    fake = FakeOwner([(REFUSED, 6, 0, b"not so"), (MOVED, 1, 0, b"12345678")])
    reader.backend.connect("peer", fake.metadata).result(WAIT_S)
    with pytest.raises(BackendError, match="not so") as caught:
        reader.backend.read("peer", [Piece(0, 0, 8)], timeout_s=WAIT_S).result(WAIT_S)
    assert type(caught.value) is BackendError
    reader.backend.read("peer", [Piece(0, 0, 8)], timeout_s=WAIT_S).result(WAIT_S)
    assert reader.memory[:8].tobytes() == b"12345678"
    fake.thread.join(WAIT_S)
    reader.backend.close()


@pytest.mark.parametrize(
    "answer",
    [(MOVED, 1, 1, b"12345678"), (WELCOME, 1, 0, b""), (REFUSED, 1 << 20, 0, b""), (MOVED, 1, 0, b"123")],
)
def test_an_answer_out_of_step_ends_the_connection(answer: tuple[int, int, int, bytes]) -> None:
    reader = Reader()
    fake = FakeOwner([answer])
    reader.backend.connect("peer", fake.metadata).result(WAIT_S)
    with pytest.raises(PeerLostError):
        reader.backend.read("peer", [Piece(0, 0, 8)], timeout_s=WAIT_S).result(WAIT_S)
    fake.thread.join(WAIT_S)
    reader.backend.close()


def test_an_unreachable_address_is_a_lost_peer(reader: Reader, owner: Owner) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    gone = msgspec.msgpack.encode(msgspec.structs.replace(owner.decoded, port=port))
    with pytest.raises(PeerLostError, match="reached"):
        reader.backend.connect("gone", gone).result(WAIT_S)


def test_settings_that_cannot_work_are_refused() -> None:
    memory = np.zeros(4_096, np.uint8)
    region = Region(memory.ctypes.data, 4_096)
    for values in ({"port": 70_000}, {"lanes": 0}, {"lanes": 17}):
        with pytest.raises(SettingError):
            TcpBackend("127.0.0.1", **values)
    with pytest.raises(SettingError, match="host memory"):
        TcpBackend("127.0.0.1").start(Region(4_096, 4_096, "cuda:0"))
    with pytest.raises(SettingError, match="listen_host"):
        TcpBackend("192.0.2.1").start(region)
    unstarted = TcpBackend()
    with pytest.raises(BackendError, match="not been started"):
        unstarted.metadata()
    unstarted.close()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SettingError, match="port"):
        TcpBackend("127.0.0.1", port=taken.getsockname()[1]).start(region)


def test_a_wildcard_or_advertised_host_is_what_peers_are_told() -> None:
    memory = np.zeros(4_096, np.uint8)
    for backend, expected in (
        (TcpBackend(), "127.0.0.1"),
        (TcpBackend("127.0.0.1"), "127.0.0.1"),
        (TcpBackend(advertise_host="node-7.example"), "node-7.example"),
    ):
        backend.start(Region(memory.ctypes.data, 4_096))
        assert decode_metadata(backend.metadata()).hosts == (expected,)
        with pytest.raises(BackendError, match="before"):
            backend.start(Region(memory.ctypes.data, 4_096))
        backend.close()
