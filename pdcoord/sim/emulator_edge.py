"""What an emulated engine does to its connections that a well-behaved server does not."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from pdcoord.wire.asgi import Receive, Send, watch_disconnect

# vLLM 0.32 leaves uvicorn's default: an idle connection is closed after 5 s.
KEEP_ALIVE_S = 5
SILENCE_S_MAX = 3_600.0
"""Longest silence inside an answer; the model's own deadlines are shorter."""
_GONE_S_MAX = 1.0


def _protocol(receive: Receive) -> Any:
    """The connection of uvicorn's request, whose bound method `receive` is (uvicorn 0.54)."""
    cycle = getattr(receive, "__self__", None)
    return getattr(getattr(cycle, "on_response", None), "__self__", None)


def close_idle_as_vllm_does(receive: Receive) -> None:
    """Let this connection be closed after 5 s without a request, not after the server's own time."""
    protocol = _protocol(receive)
    if protocol is not None:
        protocol.timeout_keep_alive = KEEP_ALIVE_S


def abort_connection(receive: Receive) -> None:
    """Drop a request's connection without a word: what was not sent yet is lost."""
    protocol = _protocol(receive)
    if protocol is not None:
        protocol.transport.abort()


async def reset(receive: Receive, _send: Send) -> None:
    """Drop the connection and wait until the server has noticed, so that it does not answer by itself."""
    abort_connection(receive)
    async with asyncio.timeout(_GONE_S_MAX):
        await watch_disconnect(receive)


async def stall(receive: Receive) -> None:
    """Send nothing until the client leaves."""
    async with asyncio.timeout(SILENCE_S_MAX):
        await watch_disconnect(receive)


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Run `work` to its end or until the client leaves; whether it got to its end.

    Call it after the body has been read.
    """
    has_ended = False

    async def run() -> None:
        nonlocal has_ended
        await work
        has_ended = True

    async def watch() -> None:
        await watch_disconnect(receive)
        runner.cancel()

    async with asyncio.TaskGroup() as group:
        runner = group.create_task(run())
        watcher = group.create_task(watch())
        runner.add_done_callback(lambda _: watcher.cancel())
    return has_ended
