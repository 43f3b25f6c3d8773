"""The HTTP client against peers that misbehave, on real sockets of the loopback interface."""

import asyncio
import contextlib
import functools
import hashlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from pdcoord.protocol.headers import HostPort, format_host_port
from pdcoord.wire.client import Client
from pdcoord.wire.connection import HEAD_BYTES_MAX
from pdcoord.wire.errors import ConnectError, HeadTimeoutError, InvalidRequestError, ResetError, StreamError
from pdcoord.wire.response import BUFFERED_BYTES_MAX, Response

WAIT_S = 20.0
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ENDLESS_HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


def on_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on the event loop that the product runs on, bounded in time."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(WAIT_S):
                await test(**fixtures)

        uvloop.run(bounded())

    return run


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for a condition; the test's own time bounds it."""
    while not is_so():  # what is waited for has no event to offer
        await asyncio.sleep(0.005)


class Visit:
    """One connection as the peer sees it."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self.reader = reader
        self.writer = writer

    async def request(self) -> bytes:
        """The next request's head; its body, if it has a content-length, is read and counted out."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                await self.reader.readexactly(int(line.partition(b":")[2]))
        return head

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """Close with RST, whatever is unread or unsent."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.writer.transport.abort()

    async def closed(self) -> None:
        """Wait until the client has closed its side, cleanly or not."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65_536):
                pass


class Peer:
    """A server whose every connection is played by a script."""

    def __init__(self, script: Callable[[Visit], Awaitable[None]]) -> None:
        self.script = script
        self.visits = 0
        self.left: list[int] = []
        self.address = HostPort("")
        self.server: asyncio.Server | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.visits += 1
        visit = Visit(self.visits, reader, writer)
        try:
            await self.script(visit)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.left.append(visit.number)
            writer.close()


@asynccontextmanager
async def peer(script: Callable[[Visit], Awaitable[None]]) -> AsyncIterator[Peer]:
    each = Peer(script)
    each.server = await asyncio.start_server(each.serve, "127.0.0.1", 0)
    each.address = format_host_port("127.0.0.1", each.server.sockets[0].getsockname()[1])
    try:
        yield each
    finally:
        each.server.close()
        await until(lambda: len(each.left) == each.visits)


async def get(client: Client, address: HostPort, *, head_timeout_s: float = WAIT_S) -> Response:
    return await client.request("GET", address, "/", head_timeout_s=head_timeout_s)


async def get_all(client: Client, address: HostPort) -> bytes:
    async with await get(client, address) as response:
        return await response.read_all(timeout_s=WAIT_S)


async def always_ok(visit: Visit) -> None:
    while True:
        await visit.request()
        await visit.send(OK)


@on_uvloop
async def test_a_connection_is_kept_and_used_again() -> None:
    async with peer(always_ok) as engine, Client() as client:
        for _ in range(5):
            assert await get_all(client, engine.address) == b"ok"
        assert (engine.visits, client.connection_count, client.idle_count) == (1, 1, 1)


@on_uvloop
async def test_a_large_request_arrives_whole() -> None:
    body = bytes(range(256)) * 32_768

    async def script(visit: Visit) -> None:
        head = await visit.reader.readuntil(b"\r\n\r\n")
        assert b"content-length: 8388608\r\n" in head
        got = await visit.reader.readexactly(len(body))
        await visit.send(OK if got == body else b"HTTP/1.1 400 No\r\ncontent-length: 0\r\n\r\n")

    async with peer(script) as engine, Client() as client:
        response = await client.request("POST", engine.address, "/", body=body, head_timeout_s=WAIT_S)
        async with response:
            assert response.status == 200


@on_uvloop
async def test_a_reset_of_a_kept_connection_is_retried_on_a_fresh_one() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(OK)
        await visit.request()
        if visit.number == 1:
            visit.reset()
            return
        await visit.send(OK)

    async with peer(script) as engine, Client() as client:
        assert await get_all(client, engine.address) == b"ok"
        assert await get_all(client, engine.address) == b"ok"
        assert engine.visits == 2


@pytest.mark.parametrize("is_clean", [True, False])
@on_uvloop
async def test_a_fresh_connection_lost_before_any_byte_is_retried_once(is_clean: bool) -> None:  # a parameter
    async def script(visit: Visit) -> None:
        await visit.request()
        if visit.number == 1:
            if not is_clean:
                visit.reset()
            return
        await visit.send(OK)

    async with peer(script) as engine, Client() as client:
        assert await get_all(client, engine.address) == b"ok"
        assert engine.visits == 2


@on_uvloop
async def test_and_not_twice() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        visit.reset()

    async with peer(script) as engine, Client() as client:
        with pytest.raises(ResetError):
            await get(client, engine.address)
        await until(lambda: client.connection_count == 0)
        assert engine.visits == 2


@on_uvloop
async def test_a_peer_that_is_gone_after_a_reset_may_have_seen_the_request() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        assert engine.server is not None
        engine.server.close()
        visit.reset()

    async with peer(script) as engine, Client() as client:
        with pytest.raises(ResetError, match="then"):
            await get(client, engine.address)
        assert engine.visits == 1


@on_uvloop
async def test_nobody_listening_is_a_connect_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = format_host_port("127.0.0.1", unused.getsockname()[1])
        async with Client() as client:
            with pytest.raises(ConnectError, match=address):
                await get(client, address)


@pytest.mark.parametrize("address", ["nonsense", "host:0", "a..b:80", "::1:80", ""])
@on_uvloop
async def test_an_address_that_is_none_is_a_connect_error(address: str) -> None:
    async with Client() as client:
        with pytest.raises(ConnectError):
            await get(client, HostPort(address))


@on_uvloop
async def test_a_peer_that_does_not_accept_is_given_up_in_time() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = format_host_port("127.0.0.1", full.getsockname()[1])
        waiting = []
        for _ in range(4):  # Past the backlog the kernel drops what would connect.
            each = socket.socket()
            each.setblocking(False)
            each.connect_ex(full.getsockname())
            waiting.append(each)
        async with Client(connect_timeout_s=0.1) as client:
            with pytest.raises(ConnectError, match=r"0\.1 s"):
                await get(client, address)
        for each in waiting:
            each.close()


@on_uvloop
async def test_a_head_that_does_not_come_times_out_and_the_peer_sees_it_end() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.closed()

    async with peer(script) as engine, Client() as client:
        with pytest.raises(HeadTimeoutError):
            await get(client, engine.address, head_timeout_s=0.05)
        await until(lambda: engine.left == [1])
        assert client.connection_count == 0


@on_uvloop
async def test_a_head_that_trickles_times_out() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(b"HTTP/1.1 200 OK\r\n")
        while not visit.reader.at_eof():
            await visit.send(b"x: y\r\n")
            await asyncio.sleep(0.01)

    async with peer(script) as engine, Client() as client:
        with pytest.raises(HeadTimeoutError):
            await get(client, engine.address, head_timeout_s=0.1)


@on_uvloop
async def test_a_head_without_end_is_cut_off() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(b"HTTP/1.1 200 OK\r\nx: " + b"y" * HEAD_BYTES_MAX)
        await visit.closed()

    async with peer(script) as engine, Client() as client:
        with pytest.raises(StreamError, match="longer than"):
            await get(client, engine.address)


@pytest.mark.parametrize("raw", [b"SSH-2.0-x\r\n", b"\0\0\0", b"HTTP/9.9 200 OK\r\n\r\n", b"HTTP/1.1 20"])
@on_uvloop
async def test_garbage_is_a_stream_error_and_not_retried(raw: bytes) -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(raw)

    async with peer(script) as engine, Client() as client:
        with pytest.raises(StreamError):
            await get(client, engine.address)
        assert engine.visits == 1


@pytest.mark.parametrize("head", [CHUNKED_HEAD + b"ff\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n"])
@pytest.mark.parametrize("is_clean", [True, False])
@on_uvloop
async def test_a_body_that_breaks_off_is_a_stream_error_after_what_came(head: bytes, is_clean: bool) -> None:
    gate = asyncio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(head + b"begun")
        await gate.wait()
        if not is_clean:
            visit.reset()

    async with peer(script) as engine, Client() as client:
        async with await get(client, engine.address) as response:
            assert await response.read_chunk(idle_timeout_s=WAIT_S) == b"begun"
            gate.set()
            with pytest.raises(StreamError, match="lost inside"):
                await response.read_chunk(idle_timeout_s=WAIT_S)
        assert engine.visits == 1


@pytest.mark.parametrize("is_pumped", [True, False])
@on_uvloop
async def test_a_body_that_falls_silent_fails_and_the_peer_sees_it_end(is_pumped: bool) -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(CHUNKED_HEAD + b"1\r\nx\r\n")
        await visit.closed()

    async def read(response: Response) -> None:
        if is_pumped:
            await response.pump(got.append, idle_timeout_s=0.05)
        while not is_pumped:
            got.append(await response.read_chunk(idle_timeout_s=0.05))

    got: list[bytes] = []
    async with peer(script) as engine, Client() as client, await get(client, engine.address) as response:
        with pytest.raises(StreamError, match="silent"):
            await read(response)
        assert got == [b"x"]
        await until(lambda: engine.left == [1])


@on_uvloop
async def test_a_slow_reader_bounds_what_is_held_and_loses_nothing() -> None:
    part = bytes(range(256)) * 256
    parts = 400  # 25 MiB, far past every buffer on the way.
    sent = 0

    async def script(visit: Visit) -> None:
        nonlocal sent
        await visit.request()
        await visit.send(CHUNKED_HEAD)
        for _ in range(parts):
            await visit.send(b"%x\r\n%b\r\n" % (len(part), part))
            sent += 1
        await visit.send(b"0\r\n\r\n")

    async with peer(script) as engine, Client() as client:
        async with await get(client, engine.address) as response:
            await until(lambda: response._is_paused)
            assert sum(map(len, response.chunks)) < BUFFERED_BYTES_MAX + 300_000
            assert sent < parts
            digest, count = hashlib.sha256(), 0
            while chunk := await response.read_chunk(idle_timeout_s=WAIT_S):
                digest.update(chunk)
                count += len(chunk)
                await asyncio.sleep(0)
        assert count == len(part) * parts
        assert digest.digest() == hashlib.sha256(part * parts).digest()
        assert client.idle_count == 1


@pytest.mark.parametrize("stage", ["head", "read", "pump", "read_all"])
@on_uvloop
async def test_cancelling_closes_the_connection_at_whatever_stage(stage: str) -> None:
    has_request = asyncio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        has_request.set()
        if stage != "head":
            await visit.send(CHUNKED_HEAD)
        await visit.closed()

    async def use(client: Client, address: HostPort) -> None:
        async with await get(client, address) as response:
            match stage:
                case "read":
                    await response.read_chunk(idle_timeout_s=WAIT_S)
                case "pump":
                    await response.pump(lambda _data: None, idle_timeout_s=WAIT_S)
                case _:
                    await response.read_all(timeout_s=WAIT_S)

    async with peer(script) as engine, Client() as client:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(use(client, engine.address))
            await has_request.wait()
            task.cancel()
        assert task.cancelled()
        await until(lambda: engine.left == [1])
        assert client.connection_count == 0


@on_uvloop
async def test_leaving_a_response_unread_closes_its_connection() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(CHUNKED_HEAD)
        await visit.closed()

    async with peer(script) as engine, Client() as client:
        async with await get(client, engine.address):
            pass
        await until(lambda: engine.left == [1])


@on_uvloop
async def test_an_idle_connection_that_the_peer_closes_is_not_used_again() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(OK)

    async with peer(script) as engine, Client() as client:
        assert await get_all(client, engine.address) == b"ok"
        await until(lambda: client.connection_count == 0)
        assert client.idle_count == 0
        assert await get_all(client, engine.address) == b"ok"
        assert engine.visits == 2


@on_uvloop
async def test_a_connection_idle_for_too_long_is_closed() -> None:
    async with peer(always_ok) as engine, Client(idle_s_max=0.05) as client:
        assert await get_all(client, engine.address) == b"ok"
        assert client.idle_count == 1
        await until(lambda: engine.left == [1])
        assert (client.idle_count, client.connection_count) == (0, 0)
        assert await get_all(client, engine.address) == b"ok"


@on_uvloop
async def test_only_so_many_idle_connections_are_kept() -> None:
    together = asyncio.Barrier(3)

    async def script(visit: Visit) -> None:
        while True:
            await visit.request()
            await together.wait()
            await visit.send(OK)

    async with peer(script) as engine, Client(idle_per_origin_max=1) as client:
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(get_all(client, engine.address))
        await until(lambda: client.connection_count == 1)
        assert (engine.visits, client.idle_count) == (3, 1)


@on_uvloop
async def test_leaving_the_client_ends_what_is_under_way() -> None:
    has_request = asyncio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        has_request.set()
        await visit.closed()

    async def use(client: Client, address: HostPort) -> None:
        with pytest.raises(StreamError, match="closed by its owner"):
            await get(client, address)

    async with peer(script) as engine:
        client = Client()
        async with asyncio.TaskGroup() as group, client:
            group.create_task(use(client, engine.address))
            await has_request.wait()
        await until(lambda: engine.left == [1])
        with pytest.raises(RuntimeError, match="async with"):
            await get(client, engine.address)


@on_uvloop
async def test_what_would_be_two_requests_is_never_sent() -> None:
    async with peer(always_ok) as engine, Client() as client:
        with pytest.raises(InvalidRequestError):
            await client.request(
                "GET",
                engine.address,
                "/",
                headers=[(b"x", b"a\r\n\r\nGET / HTTP/1.1")],
                head_timeout_s=WAIT_S,
            )
        assert (engine.visits, client.connection_count) == (0, 0)


@on_uvloop
async def test_a_body_until_close_is_whole_when_the_peer_closes() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(ENDLESS_HEAD + b"a" * 100_000)

    async with peer(script) as engine, Client() as client:
        assert await get_all(client, engine.address) == b"a" * 100_000
        assert client.idle_count == 0


@on_uvloop
async def test_small_requests_are_not_delayed() -> None:
    """TCP_NODELAY is set: without it a head and a body in two writes may wait for an acknowledgement."""
    async with peer(always_ok) as engine, Client() as client:
        await get_all(client, engine.address)
        connection = next(iter(client._connections))
        assert connection._transport is not None
        raw = connection._transport.get_extra_info("socket")
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
