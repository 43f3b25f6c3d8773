"""The short way for body parts does what uvicorn's `send` does, byte for byte, or leaves it to `send`."""

import asyncio
from typing import Any, cast

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.server import ServerState

from pdcoord.wire import protocol
from pdcoord.wire.asgi import Message, Receive, Scope, Send
from pdcoord.wire.protocol import BodyWriter, ServerProtocol
from pdcoord.wire.relay import BODY_EXTENSION

LAST: Message = {"type": "http.response.body", "body": b"", "more_body": False}


class Transport:
    """A client's end; refuses nothing and remembers everything."""

    def __init__(self) -> None:
        self.written = b""
        self.is_closed = False

    def get_extra_info(self, _name: str) -> None:
        return None

    def write(self, data: bytes) -> None:
        assert not self.is_closed
        self.written += data

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Rig:
    """One server connection whose app hands out what it was called with."""

    def __init__(self) -> None:
        self.lost_count = 0
        self.called: asyncio.Future[tuple[Scope, Receive, Send]] = asyncio.get_running_loop().create_future()
        self.done = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            self.called.set_result((scope, receive, send))
            await self.done.wait()

        config = uvicorn.Config(
            cast("Any", app), http="httptools", ws="none", lifespan="off", log_config=None
        )
        config.load()
        self.protocol = ServerProtocol(config, ServerState(), self)
        self.transport = Transport()
        self.protocol.connection_made(cast("asyncio.Transport", self.transport))

    def admits(self, _connection: ServerProtocol) -> bool:
        return True

    def is_leaving(self) -> bool:
        return False

    def lost(self, _connection: ServerProtocol) -> None:
        self.lost_count += 1

    async def begin(
        self, method: bytes = b"GET", headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> BodyWriter:
        """A request whose response head has been sent."""
        self.protocol.data_received(method + b" / HTTP/1.1\r\nhost: x\r\n\r\n")
        scope, _, self.send = await self.called
        await self.send({"type": "http.response.start", "status": 200, "headers": list(headers)})
        self.transport.written = b""
        writer = scope["extensions"][BODY_EXTENSION]
        assert isinstance(writer, BodyWriter)
        return writer

    async def end(self) -> None:
        self.done.set()
        if not self.lost_count:
            self.protocol.connection_lost(None)
        await asyncio.sleep(0)


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=5))
def test_parts_are_framed_as_send_frames_them(parts: list[bytes]) -> None:
    async def written(*, is_short: bool) -> bytes:
        rig = Rig()
        writer = await rig.begin()
        for part in parts:
            if is_short:
                assert writer.write(part) is None
            else:
                await rig.send({"type": "http.response.body", "body": part, "more_body": True})
        await rig.send(LAST)
        await rig.end()
        return rig.transport.written

    assert asyncio.run(written(is_short=True)) == asyncio.run(written(is_short=False))


@pytest.mark.parametrize(
    ("method", "headers", "sent"),
    [(b"HEAD", (), b""), (b"GET", ((b"content-length", b"2"),), b"ok")],
    ids=["head", "content-length"],
)
async def test_what_is_not_chunked_is_left_to_send(
    method: bytes, headers: tuple[tuple[bytes, bytes], ...], sent: bytes
) -> None:
    rig = Rig()
    writer = await rig.begin(method, headers)
    pause = writer.write(b"ok")
    assert pause is not None
    await pause
    assert rig.transport.written == sent
    await rig.end()


async def test_a_full_buffer_asks_for_a_pause_that_ends_when_there_is_room() -> None:
    rig = Rig()
    writer = await rig.begin()
    assert writer.write(b"a") is None
    real_write = writer._write

    def write_and_fill(data: Any) -> None:
        real_write(data)
        rig.protocol.pause_writing()

    writer._write = write_and_fill
    pause = writer.write(b"b")
    assert pause is not None
    later = writer.write(b"c")
    assert later is not None
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(cast("Any", each)) for each in (pause, later)]
        for _ in range(3):
            await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)
        assert b"c" not in rig.transport.written
        rig.protocol.resume_writing()
    assert rig.transport.written == b"1\r\na\r\n1\r\nb\r\n1\r\nc\r\n"
    writer._write = real_write
    assert writer.write(b"d") is None
    await rig.end()


async def test_a_client_that_has_gone_is_written_nothing() -> None:
    rig = Rig()
    writer = await rig.begin()
    assert writer.write(b"a") is None
    rig.transport.is_closed = True
    rig.protocol.connection_lost(ConnectionResetError())
    assert writer.write(b"b") is None
    assert rig.lost_count == 1
    await rig.end()


async def test_after_the_last_part_a_write_is_an_error_as_with_send() -> None:
    rig = Rig()
    writer = await rig.begin()
    assert writer.write(b"a") is None
    await rig.send(LAST)
    late = writer.write(b"b")
    assert late is not None
    with pytest.raises(RuntimeError, match="already completed"):
        await late
    assert rig.protocol._writers == [], "a kept connection must not keep what served it"
    await rig.end()


async def closed(transport: Transport) -> None:
    async with asyncio.timeout(5.0):
        while not transport.is_closed:  # the fake has no event to offer
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("begun", [b"", b"\r\n", b"GET /"], ids=["nothing", "newlines", "half a line"])
async def test_a_connection_on_which_no_request_comes_is_closed(
    begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_S_MAX", 0.02)
    rig = Rig()
    if begun:
        rig.protocol.data_received(begun)
    await closed(rig.transport)
    await rig.end()


@pytest.mark.parametrize("begun", [b"\r\n", b"GET /"])
async def test_so_is_one_on_which_no_other_request_comes(
    begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_S_MAX", 0.02)
    rig = Rig()
    await rig.begin()
    await asyncio.sleep(0.05)  # Longer than the bound: a request that is being answered is under none.
    assert not rig.transport.is_closed
    await rig.send(LAST)
    rig.protocol.data_received(begun)  # Which stops uvicorn's own keep-alive timer.
    await closed(rig.transport)
    await rig.end()


async def test_a_pipelined_request_does_not_keep_the_first_from_pausing() -> None:
    rig = Rig()
    writer = await rig.begin()
    assert writer.write(b"a") is None
    rig.protocol.data_received(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    rig.protocol.pause_writing()
    pause = writer.write(b"b")
    assert pause is not None
    rig.protocol.resume_writing()
    await pause
    assert rig.transport.written == b"1\r\na\r\n1\r\nb\r\n"
    await rig.end()


async def test_a_head_that_waits_behind_a_pipelined_request_is_not_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "HEAD_S_MAX", 0.02)
    rig = Rig()
    await rig.begin()
    rig.protocol.data_received(b"GET / HTTP/1.1\r\nhost: x\r\n\r\nGET /")
    await asyncio.sleep(0.05)  # Longer than the bound; the server itself has stopped reading.
    assert not rig.transport.is_closed
    await rig.end()


@pytest.mark.parametrize("step", [1_000, 60_000, 250_000])
async def test_a_head_without_end_is_refused_once_it_is_too_long(step: int) -> None:
    rig = Rig()
    rig.protocol.data_received(b"GET / HTTP/1.1\r\nx: ")
    sent = 0
    while not rig.transport.is_closed:
        rig.protocol.data_received(b"y" * step)
        sent += step
        assert sent <= protocol.HEAD_BYTES_MAX + step
    assert rig.transport.written.startswith(b"HTTP/1.1 431 ")
    await rig.end()


@pytest.mark.parametrize(("spare_bytes", "is_served"), [(64, True), (0, False)])
async def test_a_head_that_comes_in_one_read_is_held_to_the_bound_too(
    spare_bytes: int, *, is_served: bool
) -> None:
    rig = Rig()
    value = b"y" * (protocol.HEAD_BYTES_MAX - spare_bytes)
    rig.protocol.data_received(b"GET / HTTP/1.1\r\nhost: x\r\nx: " + value + b"\r\n\r\n")
    assert rig.transport.written.startswith(b"HTTP/1.1 431 ") is not is_served
    await rig.end()


async def test_a_long_body_is_not_a_long_head() -> None:
    rig = Rig()
    length = 4 * protocol.HEAD_BYTES_MAX
    rig.protocol.data_received(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % length)
    for _ in range(8):
        rig.protocol.data_received(b"y" * (length // 8))
    assert not rig.transport.is_closed
    await rig.end()
