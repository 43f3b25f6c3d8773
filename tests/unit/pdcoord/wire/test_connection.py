"""A connection without a socket: what is made of the bytes, however they are cut, and of their end."""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdcoord.protocol.headers import HostPort
from pdcoord.wire.connection import HEAD_BYTES_MAX, Connection
from pdcoord.wire.errors import HeadTimeoutError, ResetError, StreamError
from pdcoord.wire.response import Response

ADDRESS = HostPort("engine:8000")
REQUEST = b"GET / HTTP/1.1\r\n\r\n"


class Transport:
    """As much of asyncio's as a connection uses; an abort is reported at once."""

    def __init__(self) -> None:
        self.written = b""
        self.is_aborted = False
        self.connection: Connection | None = None

    def get_extra_info(self, _name: str) -> None:
        return None

    def writelines(self, parts: list[bytes]) -> None:
        self.written += b"".join(parts)

    def is_closing(self) -> bool:
        return self.is_aborted

    def abort(self) -> None:
        if not self.is_aborted:
            self.is_aborted = True
            assert self.connection is not None
            self.connection.connection_lost(None)

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


@dataclass
class Rig:
    """A connection with what became of it."""

    transport: Transport = field(default_factory=Transport)
    freed: int = 0
    lost: int = 0

    def __post_init__(self) -> None:
        self.connection = Connection(ADDRESS, on_free=self._on_free, on_lost=self._on_lost)
        self.transport.connection = self.connection
        self.connection.connection_made(self.transport)  # type: ignore[arg-type]

    def _on_free(self, _connection: Connection) -> None:
        self.freed += 1

    def _on_lost(self, _connection: Connection) -> None:
        self.lost += 1

    async def exchange(self, feed: Callable[[Connection], None], *, method: str = "GET") -> Response:
        """Send a request, let `feed` play the peer, and wait for the head."""
        loop = asyncio.get_running_loop()
        loop.call_soon(feed, self.connection)
        return await self.connection.exchange(method, REQUEST, b"", deadline_s=loop.time() + 5.0)


def arriving(
    *parts: bytes, then_closed: bool = False, error: Exception | None = None
) -> Callable[[Connection], None]:
    def feed(connection: Connection) -> None:
        for part in parts:
            connection.data_received(part)
        if then_closed or error is not None:
            connection.connection_lost(error)

    return feed


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as each:
        yield each


def cut(data: bytes, places: set[int]) -> list[bytes]:
    edges = [0, *sorted(place for place in places if 0 < place < len(data)), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


LENGTH = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nX-Empty:\r\nContent-Length: 11\r\n\r\nhello world"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"6\r\nhello \r\n5;ext=1\r\nworld\r\n0\r\nTrailer: x\r\n\r\n"
)
INTERIM = b"HTTP/1.1 100 Continue\r\nX-Early: 1\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + LENGTH


@pytest.mark.parametrize("raw", [LENGTH, CHUNKED, INTERIM], ids=["content-length", "chunked", "interim"])
def test_a_response_cut_at_any_one_place_is_the_same(runner: asyncio.Runner, raw: bytes) -> None:
    async def check(place: int) -> None:
        rig = Rig()
        response = await rig.exchange(arriving(*cut(raw, {place})))
        assert response.status == 200
        assert response.header(b"x-early") is None
        assert await response.read_all(timeout_s=5.0) == b"hello world"
        assert (rig.freed, rig.lost) == (1, 0)

    for place in range(len(raw)):
        runner.run(check(place))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_body_in_any_chunks_cut_anywhere_comes_out_whole(
    runner: asyncio.Runner, data: st.DataObject
) -> None:
    parts = data.draw(st.lists(st.binary(min_size=1, max_size=40), max_size=8))
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    raw += b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    places = data.draw(st.sets(st.integers(1, len(raw) - 1), max_size=12))
    is_pumped = data.draw(st.booleans())

    async def check() -> bytes:
        rig = Rig()
        pieces = cut(raw, places)
        loop = asyncio.get_running_loop()

        def feed(connection: Connection) -> None:
            connection.data_received(pieces.pop(0))
            if pieces:
                loop.call_soon(feed, connection)

        response = await rig.exchange(feed)
        got: list[bytes] = []
        if is_pumped:
            await response.pump(got.append, idle_timeout_s=5.0)
        else:
            while chunk := await response.read_chunk(idle_timeout_s=5.0):
                got.append(chunk)
        assert response.has_ended
        assert rig.freed == 1
        return b"".join(got)

    assert runner.run(check()) == b"".join(parts)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_bytes_whatever_make_it_hang_or_escape_its_errors(
    runner: asyncio.Runner, data: st.DataObject
) -> None:
    raw = data.draw(st.sampled_from([LENGTH, CHUNKED, INTERIM, b"", b"\r\n", b"\0" * 9]))
    at = data.draw(st.integers(0, len(raw)))
    noise = data.draw(st.binary(max_size=12))
    garbled = raw[:at] + noise + raw[at + data.draw(st.integers(0, 12)) :]
    places = data.draw(st.sets(st.integers(1, max(1, len(garbled))), max_size=3))

    async def check() -> None:
        rig = Rig()
        try:
            response = await rig.exchange(arriving(*cut(garbled, places), then_closed=True))
            await response.read_all(timeout_s=5.0)
        except (ResetError, StreamError):
            pass

    runner.run(check())


@pytest.mark.parametrize(
    ("raw", "method", "status"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", "GET", 204),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", "GET", 304),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "POST", 200),
    ],
)
async def test_a_response_without_a_body_ends_with_its_head(raw: bytes, method: str, status: int) -> None:
    rig = Rig()
    response = await rig.exchange(arriving(raw), method=method)
    assert response.status == status
    assert await response.read_chunk(idle_timeout_s=5.0) == b""
    assert rig.freed == 1


async def test_the_answer_to_head_has_no_body_whatever_it_announces() -> None:
    rig = Rig()
    response = await rig.exchange(arriving(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"), method="HEAD")
    assert await response.read_all(timeout_s=5.0) == b""
    assert (rig.freed, rig.transport.is_aborted) == (0, True)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ],
)
async def test_a_connection_that_the_peer_will_close_is_not_kept(head: bytes) -> None:
    rig = Rig()
    response = await rig.exchange(arriving(head))
    assert await response.read_all(timeout_s=5.0) == b"ok"
    assert (rig.freed, rig.lost) == (0, 1)


async def test_a_body_without_length_ends_with_the_connection() -> None:
    rig = Rig()
    response = await rig.exchange(arriving(b"HTTP/1.1 200 OK\r\n\r\nab", b"cd", then_closed=True))
    assert await response.read_all(timeout_s=5.0) == b"abcd"
    assert rig.freed == 0


async def test_but_not_with_a_reset() -> None:
    rig = Rig()
    response = await rig.exchange(arriving(b"HTTP/1.1 200 OK\r\n\r\nab", error=ConnectionResetError()))
    assert await response.read_chunk(idle_timeout_s=5.0) == b"ab"
    with pytest.raises(StreamError, match="lost inside"):
        await response.read_chunk(idle_timeout_s=5.0)


@pytest.mark.parametrize("raw", [LENGTH[:-3], CHUNKED[:-20], CHUNKED[:-2]])
async def test_a_body_that_breaks_off_gives_what_came_and_then_the_error(raw: bytes) -> None:
    rig = Rig()
    response = await rig.exchange(arriving(raw, then_closed=True))
    got: list[bytes] = []
    with pytest.raises(StreamError, match="lost inside"):
        await response.pump(got.append, idle_timeout_s=5.0)
    assert b"hello world".startswith(b"".join(got))
    assert got


async def test_lost_before_the_first_byte_is_a_reset() -> None:
    with pytest.raises(ResetError, match="engine:8000"):
        await Rig().exchange(arriving(then_closed=True))


async def test_lost_inside_the_head_is_not() -> None:
    with pytest.raises(StreamError):
        await Rig().exchange(arriving(b"HTTP/1.1 2", then_closed=True))


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 700 What\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 099 What\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\0c\r\n\r\n",
    ],
)
async def test_what_is_not_a_response_is_an_error_and_closes(raw: bytes) -> None:
    rig = Rig()
    with pytest.raises(StreamError, match="malformed"):
        await rig.exchange(arriving(raw))
    assert (rig.transport.is_aborted, rig.freed, rig.lost) == (True, 0, 1)


async def test_a_chunk_size_that_is_none_breaks_the_body() -> None:
    rig = Rig()
    response = await rig.exchange(arriving(CHUNKED[:58], b"zz\r\n"))
    with pytest.raises(StreamError, match="malformed"):
        await response.read_all(timeout_s=5.0)


@pytest.mark.parametrize("step", [1_000, 30_000, 200_000])
async def test_a_head_without_end_is_cut_off(step: int) -> None:
    rig = Rig()

    def feed(connection: Connection) -> None:
        connection.data_received(b"HTTP/1.1 200 OK\r\nX: ")
        sent = 0
        while not rig.transport.is_aborted:
            connection.data_received(b"y" * step)
            sent += step
            assert sent <= HEAD_BYTES_MAX + step

    with pytest.raises(StreamError, match="longer than"):
        await rig.exchange(feed)


async def test_interim_answers_without_end_are_cut_off_too() -> None:
    rig = Rig()

    def feed(connection: Connection) -> None:
        for _ in range(HEAD_BYTES_MAX):
            if rig.transport.is_aborted:
                return
            connection.data_received(b"HTTP/1.1 102 Processing\r\n\r\n")

    with pytest.raises(StreamError, match="longer than"):
        await rig.exchange(feed)


@pytest.mark.parametrize("extra", [b"x", LENGTH, b"\r\n\r\n"])
async def test_bytes_after_a_response_leave_it_whole_but_cost_the_connection(extra: bytes) -> None:
    rig = Rig()
    response = await rig.exchange(arriving(LENGTH + extra))
    assert await response.read_all(timeout_s=5.0) == b"hello world"
    if extra.strip():
        assert (rig.freed, rig.lost) == (0, 1)


async def test_bytes_on_an_idle_connection_close_it() -> None:
    rig = Rig()
    await rig.exchange(arriving(LENGTH))
    rig.connection.data_received(LENGTH)
    assert (rig.transport.is_aborted, rig.lost) == (True, 1)
    with pytest.raises(ResetError, match="before the request was sent"):
        await rig.exchange(arriving())


async def test_a_kept_connection_serves_the_next_exchange() -> None:
    rig = Rig()
    for raw in (LENGTH, CHUNKED, LENGTH):
        response = await rig.exchange(arriving(raw))
        assert await response.read_all(timeout_s=5.0) == b"hello world"
    assert (rig.freed, rig.lost) == (3, 0)
    assert rig.transport.written == REQUEST * 3


async def test_a_connection_lent_on_before_its_last_user_has_woken_serves_both() -> None:
    rig = Rig()
    loop = asyncio.get_running_loop()

    async def exchange() -> bytes:
        response = await rig.connection.exchange("GET", REQUEST, b"", deadline_s=loop.time() + 5.0)
        return await response.read_all(timeout_s=5.0)

    async with asyncio.TaskGroup() as group:
        first = group.create_task(exchange())
        await asyncio.sleep(0)
        second = group.create_task(exchange())
        rig.connection.data_received(LENGTH)  # Frees the connection; the second task runs before the first.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        rig.connection.data_received(CHUNKED)
    assert first.result() == second.result() == b"hello world"


async def test_a_head_that_does_not_come_in_time_closes() -> None:
    rig = Rig()
    loop = asyncio.get_running_loop()
    with pytest.raises(HeadTimeoutError):
        await rig.connection.exchange("GET", REQUEST, b"", deadline_s=loop.time() + 0.01)
    assert rig.transport.is_aborted


async def test_cancelling_the_wait_for_the_head_closes() -> None:
    rig = Rig()

    def cancel(_connection: Connection) -> None:
        task.cancel()

    async with asyncio.TaskGroup() as group:
        task: asyncio.Task[Any] = group.create_task(rig.exchange(cancel))
    assert task.cancelled()
    assert rig.transport.is_aborted


async def test_a_cancel_that_comes_with_the_end_of_the_response_spares_the_kept_connection() -> None:
    rig = Rig()

    def feed(connection: Connection) -> None:
        connection.data_received(LENGTH)
        task.cancel()

    async with asyncio.TaskGroup() as group:
        task: asyncio.Task[Any] = group.create_task(rig.exchange(feed))
    assert task.cancelled()
    assert (rig.freed, rig.transport.is_aborted) == (1, False)


async def test_closing_a_busy_connection_fails_its_exchange() -> None:
    rig = Rig()
    with pytest.raises(StreamError, match="closed by its owner"):
        await rig.exchange(lambda connection: connection.close())
    rig = Rig()
    response = await rig.exchange(arriving(LENGTH[:-3]))
    rig.connection.close()
    assert await response.read_chunk(idle_timeout_s=5.0) == b"hello wo"
    with pytest.raises(StreamError, match="closed by its owner"):
        await response.read_chunk(idle_timeout_s=5.0)
