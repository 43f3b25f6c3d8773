"""A listener that can be shut and opened again, and whose connections can be dropped."""

import asyncio
import contextlib

from pdcoord.sim.emulator_edge import abort_connection
from pdcoord.wire.asgi import App, Receive, Scope, Send
from pdcoord.wire.server import Listener, serve

# Requests that run when a door is shut go on; none is longer than this.
_RUNNING_S_MAX = 3_600.0
_DROPPED_S_MAX = 1.0


class Door:
    """One address that an engine listens on.

    Attributes:
        port: the one that is listened on, once `opened` is set.
        opened: set while connections are taken.
    """

    def __init__(self, app: App, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.opened = asyncio.Event()
        self._app = app
        self._is_meant_open = True
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._calls: set[Receive] = set()

    def open(self) -> None:
        self._is_meant_open = True
        self._changed.set()

    def shut(self) -> None:
        """Refuse new connections; requests under way go on."""
        self._is_meant_open = False
        self._changed.set()

    def drop_all(self) -> None:
        """Drop the connection of every request under way."""
        for receive in list(self._calls):
            abort_connection(receive)

    async def run(self) -> None:
        """Listen until cancelled; then nothing is left open.

        Raises:
            OSError: naming the address, if it cannot be listened on.
        """
        serving: list[asyncio.Task[None]] = []
        stop: asyncio.Event | None = None
        async with asyncio.TaskGroup() as group:
            try:
                while True:
                    self._changed.clear()
                    if self._is_meant_open and stop is None:
                        stop = asyncio.Event()
                        serving = [task for task in serving if not task.done()]
                        serving.append(group.create_task(self._serve(stop)))
                    elif not self._is_meant_open and stop is not None:
                        self.opened.clear()
                        stop.set()
                        stop = None
                    await self._changed.wait()
            finally:
                self.opened.clear()
                self.drop_all()
                await self.wait_until_idle(_DROPPED_S_MAX)
                for task in serving:
                    task.cancel()

    async def wait_until_idle(self, wait_s: float) -> None:
        """Let requests come to their own end, for wait_s at most."""
        self._idle.clear()
        if self._calls:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._idle.wait()

    async def _serve(self, stop: asyncio.Event) -> None:
        listener = Listener(self._tracked, self.host, self.port)
        await serve([listener], stop=stop, drain_s=_RUNNING_S_MAX, on_started=self._on_started)

    def _on_started(self, ports: list[int]) -> None:
        self.port = ports[0]
        self.opened.set()

    async def _tracked(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._calls.add(receive)
        try:
            await self._app(scope, receive, send)
        finally:
            self._calls.discard(receive)
            if not self._calls:
                self._idle.set()
