"""A drain that runs out tells those who still wait, and gets the books right."""

import asyncio
from typing import Any

from pdcoord.wire.asgi import send_json
from pdcoord.wire.client import Client
from pdcoord.wire.server import Listener, serve


async def test_what_a_drain_cuts_may_still_answer() -> None:
    """The server cancels, the app answers in its last moment, and the client has the answer."""
    stop, begun = asyncio.Event(), asyncio.Event()
    ports: asyncio.Queue[list[int]] = asyncio.Queue()

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await send_json(send, 503, b"{}")
            raise

    async with asyncio.timeout(20.0), asyncio.TaskGroup() as group, Client() as client:
        group.create_task(serve([Listener(app)], stop=stop, drain_s=0.1, on_started=ports.put_nowait))
        (port,) = await ports.get()
        call = group.create_task(client.request("GET", f"127.0.0.1:{port}", "/", head_timeout_s=10.0))
        await begun.wait()
        stop.set()
        async with await call as response:
            assert response.status == 503
            assert await response.read_all(timeout_s=5.0) == b"{}"
