"""The server: listeners, bounds on what a client may do, the drain, and relaying from peer to client."""

import asyncio
import contextlib
import errno
import functools
import hashlib
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import uvloop

from pdcoord.protocol.headers import HostPort, format_host_port
from pdcoord.wire import protocol
from pdcoord.wire import server as wire_server
from pdcoord.wire.asgi import App, Receive, Scope, Send, read_body, send_head, send_json, watch_disconnect
from pdcoord.wire.client import Client
from pdcoord.wire.errors import StreamError
from pdcoord.wire.heads import end_to_end
from pdcoord.wire.relay import relay_body
from pdcoord.wire.server import Listener, serve

WAIT_S = 20.0
LAST: dict[str, Any] = {"type": "http.response.body", "body": b"", "more_body": False}


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


@dataclass
class Running:
    """Listeners that serve."""

    addresses: list[HostPort]
    stop: asyncio.Event
    task: "asyncio.Task[None]"

    async def ended(self) -> None:
        await asyncio.wait([self.task])


@asynccontextmanager
async def running(*apps: App, drain_s: float = 0.0) -> AsyncIterator[Running]:
    ports: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        serving = serve(
            [Listener(app) for app in apps], stop=stop, drain_s=drain_s, on_started=ports.set_result
        )
        task = group.create_task(serving)
        addresses = [format_host_port("127.0.0.1", port) for port in await ports]
        try:
            yield Running(addresses, stop, task)
        finally:
            stop.set()


async def open_raw(address: HostPort) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def get(client: Client, address: HostPort, target: str = "/") -> tuple[int, bytes]:
    async with await client.request("GET", address, target, head_timeout_s=WAIT_S) as response:
        return response.status, await response.read_all(timeout_s=WAIT_S)


def answering(body: bytes) -> App:
    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive, bytes_max=1 << 20, timeout_s=WAIT_S)
        await send_json(send, 200, body)

    return app


@dataclass
class Gated:
    """Streams one part, then another when the gate opens."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    begun: int = 0
    cancelled: int = 0

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive, bytes_max=1 << 20, timeout_s=WAIT_S)
        await send_head(send, 200, [])
        await send({"type": "http.response.body", "body": b"first ", "more_body": True})
        self.begun += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        await send({"type": "http.response.body", "body": b"second", "more_body": True})
        await send(LAST)


@on_uvloop
async def test_several_listeners_serve_with_the_ports_they_were_given() -> None:
    async with running(answering(b"one"), answering(b"two")) as here, Client() as client:
        assert len(set(here.addresses)) == 2
        for address, body in zip(here.addresses, (b"one", b"two"), strict=True):
            assert await get(client, address) == (200, body)
            assert await get(client, address) == (200, body)
        assert client.connection_count == 2


@on_uvloop
async def test_an_address_in_use_is_named_and_nothing_is_left_open() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        listeners = [Listener(answering(b"x")), Listener(answering(b"x"), "127.0.0.1", port)]
        with pytest.raises(OSError, match=f"127.0.0.1:{port}") as caught:
            await serve(listeners, stop=asyncio.Event(), drain_s=0.0)
        assert caught.value.errno == errno.EADDRINUSE


@on_uvloop
async def test_draining_finishes_streams_accepts_nobody_and_closes_what_is_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire_server, "KEEP_ALIVE_S", 3_600)
    app = Gated()
    async with Client(idle_s_max=3_600.0) as client, running(app, answering(b"x"), drain_s=WAIT_S) as here:
        assert await get(client, here.addresses[1]) == (200, b"x")
        async with await client.request("GET", here.addresses[0], "/", head_timeout_s=WAIT_S) as response:
            assert await response.read_chunk(idle_timeout_s=WAIT_S) == b"first "
            here.stop.set()
            await until(lambda: client.connection_count == 1)
            with pytest.raises(OSError, match=r"refused|reset|Connect"):
                await open_raw(here.addresses[0])
            assert not here.task.done()
            app.gate.set()
            assert await response.read_all(timeout_s=WAIT_S) == b"second"
        await here.ended()
        assert app.cancelled == 0


@on_uvloop
async def test_who_leaves_tells_clients_to_come_back_on_another_connection() -> None:
    ports: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
    stop, leaving = asyncio.Event(), asyncio.Event()
    listener = Listener(answering(b"x"), is_leaving=leaving.is_set)
    async with asyncio.TaskGroup() as group, Client(idle_s_max=3_600.0) as client:
        group.create_task(serve([listener], stop=stop, drain_s=WAIT_S, on_started=ports.set_result))
        address = format_host_port("127.0.0.1", (await ports)[0])
        for is_told in (False, False, True, True):
            if is_told:
                leaving.set()
            async with await client.request("GET", address, "/", head_timeout_s=WAIT_S) as response:
                assert (response.header(b"connection") == b"close") == is_told
                assert await response.read_all(timeout_s=WAIT_S) == b"x", "who leaves goes on serving"
            assert client.idle_count == (not is_told)
        stop.set()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("drain_s", [0.0, WAIT_S])
def test_a_connection_that_is_being_accepted_when_the_stop_comes_is_closed(
    run: Callable[[Coroutine[Any, Any, None]], None], drain_s: float
) -> None:
    async def stop_beside(connect_turn: int, stop_turn: int) -> None:
        async with asyncio.timeout(WAIT_S), running(answering(b"x"), drain_s=drain_s) as here:
            host, _, port = here.addresses[0].rpartition(":")
            with socket.socket() as client:
                is_connected = False
                for turn in range(max(connect_turn, stop_turn) + 1):
                    if turn == connect_turn:
                        is_connected = client.connect_ex((host, int(port))) == 0
                    if turn == stop_turn:
                        here.stop.set()
                    await asyncio.sleep(0)
                await here.ended()
                here.task.result()
                client.settimeout(WAIT_S)
                with contextlib.suppress(ConnectionResetError):
                    assert not is_connected or client.recv(1) == b""

    for turn in range(8):  # Between the kernel's accept and the transport lie some turns of the loop.
        run(stop_beside(0, turn))
        run(stop_beside(turn, 0))


@on_uvloop
async def test_what_a_drain_does_not_see_the_end_of_is_cancelled_and_its_client_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = Gated()
    async with Client() as client, running(app, drain_s=0.05) as here:
        async with await client.request("GET", here.addresses[0], "/", head_timeout_s=WAIT_S) as response:
            assert await response.read_chunk(idle_timeout_s=WAIT_S) == b"first "
            here.stop.set()
            with pytest.raises(StreamError):
                await response.read_all(timeout_s=WAIT_S)
        await here.ended()
        assert app.cancelled == 1
        assert caplog.records == [], "a drain that runs out is no failure of the app"


@on_uvloop
async def test_cancelling_the_server_cancels_what_it_serves() -> None:
    app = Gated()
    async with Client() as client, running(app, drain_s=WAIT_S) as here:
        async with await client.request("GET", here.addresses[0], "/", head_timeout_s=WAIT_S) as response:
            await response.read_chunk(idle_timeout_s=WAIT_S)
            here.task.cancel()
            await here.ended()
        assert app.cancelled == 1


@on_uvloop
async def test_an_answer_that_is_still_on_its_way_when_the_drain_begins_arrives_whole() -> None:
    body = b"x" * (8 << 20)
    async with running(answering(body), drain_s=WAIT_S) as here:
        reader, writer = await open_raw(here.addresses[0])
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-length: 8388608" in head
        here.stop.set()
        await asyncio.sleep(0.05)  # The request has ended for the app; only the socket still has work.
        assert await reader.readexactly(len(body)) == body
        writer.close()
        await here.ended()


@pytest.mark.parametrize("part", [b"x" * 1_000, b"y" * 300_000])
@on_uvloop
async def test_a_request_head_without_end_is_refused(part: bytes) -> None:
    async with running(answering(b"x")) as here:
        reader, writer = await open_raw(here.addresses[0])
        writer.write(b"GET / HTTP/1.1\r\nx: ")
        answer = b""
        with contextlib.suppress(ConnectionError):
            for _ in range(2 * protocol.HEAD_BYTES_MAX // len(part) + 2):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
            answer = await reader.read()
        assert not answer or answer.startswith(b"HTTP/1.1 431 ")
        writer.close()


@on_uvloop
async def test_a_long_but_bounded_head_is_served() -> None:
    async with running(answering(b"x")) as here, Client() as client:
        headers = [(b"x", b"y" * (protocol.HEAD_BYTES_MAX - 1_000))]
        async with await client.request(
            "GET", here.addresses[0], "/", headers=headers, head_timeout_s=WAIT_S
        ) as response:
            assert response.status == 200


@pytest.mark.parametrize(
    "begun", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n", b"GET / HTTP/1.1\r\nhost: x\r\n\r\nGET /"]
)
@on_uvloop
async def test_a_client_that_does_not_finish_its_head_is_closed(
    begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_S_MAX", 0.05)
    async with running(answering(b"x")) as here:
        reader, writer = await open_raw(here.addresses[0])
        writer.write(begun)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200") is (b"\r\n\r\n" in begun)
        writer.close()


@on_uvloop
async def test_a_slow_answer_is_not_a_slow_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_S_MAX", 0.05)
    app = Gated()
    async with (
        Client() as client,
        running(app) as here,
        await client.request("GET", here.addresses[0], "/", head_timeout_s=WAIT_S) as response,
    ):
        await asyncio.sleep(0.15)  # Past the bound on heads: this is what is tested.
        app.gate.set()
        assert await response.read_all(timeout_s=WAIT_S) == b"first second"


@on_uvloop
async def test_nothing_is_added_to_a_response_but_its_framing() -> None:
    async with (
        running(answering(b"{}")) as here,
        Client() as client,
        await client.request("GET", here.addresses[0], "/", head_timeout_s=WAIT_S) as response,
    ):
        assert [name for name, _ in response.headers] == [b"content-type", b"content-length"]


# Relaying.


@dataclass
class Upstream:
    """A raw peer: answers each request with these bytes, counting what the socket took."""

    head: bytes
    parts: list[bytes]
    is_held_open: bool = False
    sent: int = 0
    left: int = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self.head)
            for part in self.parts:
                writer.write(part)
                await writer.drain()
                self.sent += 1
            if self.is_held_open:
                await reader.read()
        self.left += 1
        writer.close()


class RelayApp:
    """Relays everything to one upstream, as gateway and sidecar do."""

    def __init__(self, client: Client, upstream: HostPort) -> None:
        self.client = client
        self.upstream = upstream
        self.left = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(receive, bytes_max=1 << 20, timeout_s=WAIT_S)
        try:
            async with asyncio.TaskGroup() as group:
                pump = group.create_task(self._pump(scope, send, body))
                await watch_disconnect(receive)
                pump.cancel()
        finally:
            self.left += 1

    async def _pump(self, scope: Scope, send: Send, body: bytes) -> None:
        async with await self.client.request(
            scope["method"], self.upstream, scope["path"], body=body, head_timeout_s=WAIT_S
        ) as response:
            await send_head(send, response.status, end_to_end(response.headers))
            await relay_body(scope, send, response, idle_timeout_s=WAIT_S)
        await send(LAST)


@asynccontextmanager
async def relaying(upstream: Upstream) -> AsyncIterator[tuple[RelayApp, HostPort]]:
    server = await asyncio.start_server(upstream, "127.0.0.1", 0)
    address = format_host_port("127.0.0.1", server.sockets[0].getsockname()[1])
    async with Client() as client:
        app = RelayApp(client, address)
        async with running(app) as here:
            yield app, here.addresses[0]
    server.close()


def chunked(*parts: bytes) -> list[bytes]:
    return [b"%x\r\n%b\r\n" % (len(part), part) for part in parts] + [b"0\r\n\r\n"]


CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "parts"),
    [
        (CHUNKED_HEAD, chunked(b"a" * 250, b"b", b"c" * 70_000)),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 70251\r\n\r\n", [b"a" * 250, b"b", b"c" * 70_000]),
        (b"HTTP/1.1 200 OK\r\n\r\n", [b"a" * 250, b"b", b"c" * 70_000]),
    ],
    ids=["chunked", "content-length", "until-close"],
)
@on_uvloop
async def test_a_body_is_relayed_whole_however_it_is_framed(head: bytes, parts: list[bytes]) -> None:
    async with relaying(Upstream(head, parts)) as (_, address), Client() as client:
        status, body = await get(client, address)
        assert (status, body) == (200, b"a" * 250 + b"b" + b"c" * 70_000)


@on_uvloop
async def test_the_answer_to_head_is_relayed_without_a_body() -> None:
    upstream = Upstream(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", [])
    async with (
        relaying(upstream) as (_, address),
        Client() as client,
        await client.request("HEAD", address, "/", head_timeout_s=WAIT_S) as response,
    ):
        assert response.header(b"content-length") == b"5"
        assert await response.read_all(timeout_s=WAIT_S) == b""


@on_uvloop
async def test_an_answer_that_breaks_off_does_not_look_whole_to_the_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("CRITICAL")  # The relay of this test lets the error reach the server, which logs it.
    upstream = Upstream(CHUNKED_HEAD, [b"5\r\nhel"])
    async with (
        relaying(upstream) as (_, address),
        Client() as client,
        await client.request("GET", address, "/", head_timeout_s=WAIT_S) as response,
    ):
        with pytest.raises(StreamError, match="lost inside"):
            await response.read_all(timeout_s=WAIT_S)


@on_uvloop
async def test_a_client_that_stops_reading_stops_the_upstream_and_then_gets_everything() -> None:
    part = bytes(range(256)) * 256
    count = 800  # 50 MiB, far past every buffer on the way.
    upstream = Upstream(CHUNKED_HEAD, chunked(*[part] * count))
    async with relaying(upstream) as (_, address), Client() as client:
        async with await client.request("GET", address, "/", head_timeout_s=WAIT_S) as response:
            before = -1
            while before != upstream.sent:  # Until nothing has moved for a while: every buffer is full.
                before = upstream.sent
                await asyncio.sleep(0.2)
            assert upstream.sent < count / 2
            digest, received = hashlib.sha256(), 0
            while chunk := await response.read_chunk(idle_timeout_s=WAIT_S):
                digest.update(chunk)
                received += len(chunk)
        assert received == len(part) * count
        assert digest.digest() == hashlib.sha256(part * count).digest()


@on_uvloop
async def test_a_client_that_leaves_ends_the_relay_and_the_upstreams_connection() -> None:
    upstream = Upstream(CHUNKED_HEAD, [b"2\r\nhi\r\n"], is_held_open=True)
    async with relaying(upstream) as (app, address):
        reader, writer = await open_raw(address)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readuntil(b"hi\r\n")).endswith(b"2\r\nhi\r\n")
        writer.close()
        await until(lambda: (app.left, upstream.left) == (1, 1))


@on_uvloop
async def test_a_client_that_never_reads_is_dropped_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_server, "SEND_STALL_MS_MAX", 300)
    upstream = Upstream(CHUNKED_HEAD, chunked(*[b"x" * 65_536] * 800))
    async with relaying(upstream) as (app, address):
        _, writer = await open_raw(address)
        cast("asyncio.ReadTransport", writer.transport).pause_reading()
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await until(lambda: (app.left, upstream.left) == (1, 1))
        assert upstream.sent < 800
        writer.close()


# The process.

PROGRAM = """
import asyncio
from pdcoord.wire.asgi import send_json
from pdcoord.wire.server import Listener, run, serve, stop_on_signals

async def app(scope, receive, send):
    await send_json(send, 200, b"{}")

async def main():
    stop = stop_on_signals()
    await serve([Listener(app)], stop=stop, drain_s=1.0, on_started=lambda ports: print(ports[0], flush=True))
    return 7

raise SystemExit(run(main()))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_process_with_its_mains_status(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0
        process.send_signal(number)
        assert process.wait(timeout=WAIT_S) == 7


async def refusing(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Answers without a look at the body."""
    await send_json(send, 413, b"too long")


def upload(length: int) -> bytes:
    return b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % length


@on_uvloop
async def test_whoever_sends_a_long_body_on_still_reads_why_it_was_refused() -> None:
    length = 8 << 20
    async with running(refusing) as here:
        reader, writer = await open_raw(here.addresses[0])
        writer.write(upload(length) + b"x" * length)
        await writer.drain()
        answer = await reader.read()  # To its end: the server says no more, though this side is open.
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"\r\nconnection: close\r\n" in answer
        assert answer.endswith(b"too long")
        writer.close()


@pytest.mark.parametrize("bound", ["LINGER_S_MAX", "LINGER_BYTES_MAX"])
def test_a_body_that_goes_on_after_its_refusal_is_not_read_for_long(
    monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    for name in ("HEAD_S_MAX", "LINGER_S_MAX", "LINGER_BYTES_MAX"):
        monkeypatch.setattr(protocol, name, 1 << 40 if name == "LINGER_BYTES_MAX" else 1_000.0)
    monkeypatch.setattr(protocol, bound, 0.05 if bound == "LINGER_S_MAX" else 1 << 20)

    @on_uvloop
    async def sent_on() -> None:
        async with running(refusing) as here:
            _, writer = await open_raw(here.addresses[0])
            writer.write(upload(1 << 40))
            with pytest.raises(ConnectionError):
                while True:
                    writer.write(b"x" * 4_096)
                    await writer.drain()
                    await asyncio.sleep(0)

    sent_on()


@on_uvloop
async def test_a_drain_lets_a_refused_client_read_its_answer() -> None:
    length = 8 << 20
    async with running(refusing, drain_s=WAIT_S) as here:
        reader, writer = await open_raw(here.addresses[0])
        writer.write(upload(length))
        head = await reader.readuntil(b"\r\n\r\n")
        here.stop.set()
        writer.write(b"x" * length)
        await writer.drain()
        assert (head[:12], await reader.read()) == (b"HTTP/1.1 413", b"too long")
        writer.close()


@on_uvloop
async def test_a_short_body_that_nobody_reads_costs_no_connection() -> None:
    async with running(refusing) as here:
        reader, writer = await open_raw(here.addresses[0])
        for _ in range(2):
            writer.write(upload(3))
            answer = await reader.readuntil(b"too long")
            assert b"connection" not in answer
            writer.write(b"abc")
        writer.close()
