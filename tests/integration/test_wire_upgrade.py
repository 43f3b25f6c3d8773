"""An offer to upgrade is ignored, and the request behind it is served whole."""

import asyncio
from typing import Any

import pytest

from pdcoord.wire.asgi import read_body, send_json
from pdcoord.wire.server import Listener, serve


@pytest.mark.parametrize("cut", [None, 20])
async def test_a_post_that_offers_h2c_keeps_its_body(cut: int | None) -> None:
    stop = asyncio.Event()
    ports: asyncio.Queue[list[int]] = asyncio.Queue()

    async def echo(_scope: Any, receive: Any, send: Any) -> None:
        await send_json(send, 200, await read_body(receive, bytes_max=100, timeout_s=5.0))

    request = (
        b"POST / HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABk\r\ncontent-length: 18\r\n\r\nupgrade: the body\n"
    )
    async with asyncio.timeout(20.0), asyncio.TaskGroup() as group:
        group.create_task(serve([Listener(echo)], stop=stop, drain_s=0.1, on_started=ports.put_nowait))
        (port,) = await ports.get()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request[:cut])
        await writer.drain()
        if cut is not None:
            writer.write(request[cut:])
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert await reader.readexactly(18) == b"upgrade: the body\n"
        writer.close()
        await writer.wait_closed()
        stop.set()
