"""Processes of the demo: started in groups of their own, watched until ready, ended by process id."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pdcoord.protocol.headers import HostPort
from pdcoord.wire.client import Client
from pdcoord.wire.errors import WireError

READY_S_MAX = 60.0
POLL_S = 0.1
STOP_S_MAX = 10.0


class DemoError(Exception):
    """The demo cannot go on; the message says why and where to look."""


@dataclass(slots=True)
class Process:
    """One started program with its log."""

    name: str
    log: Path
    handle: asyncio.subprocess.Process

    @property
    def pid(self) -> int:
        return self.handle.pid

    @property
    def has_ended(self) -> bool:
        return self.handle.returncode is not None

    def kill(self) -> None:
        """SIGKILL: the process gets no chance to say goodbye."""
        self.handle.kill()

    def log_tail(self, line_count: int = 20) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-line_count:])


class Processes:
    """All processes of one demo; leaving it ends them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: dict[str, Process] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        running = [process for process in self._started.values() if not process.has_ended]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.handle.send_signal(signal.SIGTERM)
        for process in running:
            await _wait_or_kill(process)

    def __getitem__(self, name: str) -> Process:
        return self._started[name]

    async def start(
        self, name: str, module_or_script: Sequence[str], env: Mapping[str, str] | None = None
    ) -> Process:
        """Start one of our own commands, `["pdcoord", ...]` or `["pdcoord-sidecar", ...]`."""
        command, *arguments = module_or_script
        entry = {"pdcoord": "pdcoord.cli", "pdcoord-sidecar": "sidecar.main"}[command]
        log = self._folder / f"{name}.log"
        with log.open("ab") as sink:
            handle = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                f"import sys; from {entry} import main; sys.exit(main())",
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            )
        process = self._started[name] = Process(name, log, handle)
        return process

    async def terminate(self, name: str, wait_s: float) -> int:
        """SIGTERM, and the exit status once it has ended.

        Raises:
            DemoError: if it has not ended after wait_s.
        """
        process = self._started[name]
        process.handle.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(wait_s):
                return await process.handle.wait()
        except TimeoutError:
            tail = process.log_tail()
            raise DemoError(f"{name} had not ended {wait_s:.0f} s after SIGTERM:\n{tail}") from None

    async def wait_ready(self, name: str, address: HostPort, path: str, client: Client) -> None:
        """Wait until `path` answers 200.

        Raises:
            DemoError: if the process ends first or does not become ready in time.
        """
        process = self._started[name]
        try:
            async with asyncio.timeout(READY_S_MAX):
                while not await _answers(client, address, path):
                    if process.has_ended:
                        raise DemoError(f"{name} ended before it was ready:\n{process.log_tail()}")
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise DemoError(f"{name} was not ready in {READY_S_MAX:.0f} s:\n{process.log_tail()}") from None


async def _answers(client: Client, address: HostPort, path: str) -> bool:
    try:
        async with await client.request("GET", address, path, head_timeout_s=2.0) as response:
            await response.read_all(timeout_s=2.0)
            return response.status == 200
    except WireError:
        return False


async def _wait_or_kill(process: Process) -> None:
    try:
        async with asyncio.timeout(STOP_S_MAX):
            await process.handle.wait()
    except TimeoutError:
        process.kill()
        await process.handle.wait()
