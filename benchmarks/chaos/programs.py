"""Programs under chaos: started in sessions of their own, signalled by process id, counted from /proc."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from pdcoord.protocol.headers import HostPort, parse_host_port
from pdcoord.wire.client import Client
from pdcoord.wire.errors import WireError

READY_S_MAX = 60.0
_POLL_S = 0.05
_STOP_S_MAX = 15.0
_ENTRIES = {"pdcoord": "pdcoord.cli", "pdcoord-sidecar": "sidecar.main"}


class ChaosError(Exception):
    """The run cannot go on; the message says why."""


@dataclass(slots=True)
class Part:
    """One program of the fleet: how it is started, where it answers.

    Attributes:
        kind: prefill, decode, sidecar or gateway.
        ready: where and on which path it answers 200 once it runs.
        admin: where its metrics are, and an engine's state.
        prefix: words before the command, such as those that enter a network namespace.
        side_ports: of an engine: its own side channel and its transfer agent's.
    """

    name: str
    kind: str
    command: list[str]
    address: HostPort
    ready: tuple[HostPort, str]
    admin: HostPort
    env: Mapping[str, str] = field(default_factory=dict)
    prefix: Sequence[str] = ()
    side_ports: tuple[int, ...] = ()

    @property
    def ports(self) -> frozenset[int]:
        """All that it listens at, but for what its KV goes through."""
        named = (self.address, self.ready[0], self.admin)
        return frozenset([*self.side_ports, *(parse_host_port(each)[1] for each in named)])


class Programs:
    """All parts while they run; leaving it ends them, by process id."""

    def __init__(self, folder: Path, parts: Sequence[Part], client: Client) -> None:
        self.parts = {part.name: part for part in parts}
        self._folder = folder
        self._client = client
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._sinks: list[IO[bytes]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for name in self._running:
            for number in (signal.SIGCONT, signal.SIGTERM):
                self.signal(name, number)
        for name in list(self._running):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_S_MAX):
                    await self._running[name].wait()
            self.signal(name, signal.SIGKILL)
            await self._running[name].wait()

    def log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def pid(self, name: str) -> int:
        return self._running[name].pid

    def is_running(self, name: str) -> bool:
        return name in self._running and self._running[name].returncode is None

    async def start(self, name: str) -> None:
        part = self.parts[name]
        command, *arguments = part.command
        code = f"import sys; from {_ENTRIES[command]} import main; sys.exit(main())"
        with self.log(name).open("ab") as sink:
            self._running[name] = await asyncio.create_subprocess_exec(
                *part.prefix,
                sys.executable,
                "-c",
                code,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **part.env},
            )

    async def until_ready(self, name: str) -> None:
        """Wait until a part answers.

        Raises:
            ChaosError: if it ends first or does not answer in time.
        """
        part = self.parts[name]
        try:
            async with asyncio.timeout(READY_S_MAX):
                while (await self.get(*part.ready))[0] != 200:
                    if not self.is_running(name):
                        raise ChaosError(f"{name} ended before it was ready:\n{self.log_tail(name)}")
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise ChaosError(f"{name} was not ready in {READY_S_MAX:g} s:\n{self.log_tail(name)}") from None

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal; one that has ended hears nothing."""
        if self.is_running(name):
            with contextlib.suppress(ProcessLookupError):
                self._running[name].send_signal(number)

    async def until_ended(self, name: str, wait_s: float) -> bool:
        """Whether it ended in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._running[name].wait()
        return not self.is_running(name)

    async def get(self, address: HostPort, path: str) -> tuple[int, bytes]:
        """Status and body; 0 if there is no answer."""
        with contextlib.suppress(WireError):
            async with await self._client.request("GET", address, path, head_timeout_s=3.0) as response:
                return response.status, await response.read_all(timeout_s=3.0)
        return 0, b""

    async def post(self, address: HostPort, path: str, body: bytes) -> int:
        """Status; 0 if there is no answer."""
        headers = [(b"content-type", b"application/json")]
        with contextlib.suppress(WireError):
            async with await self._client.request(
                "POST", address, path, headers=headers, body=body, head_timeout_s=3.0
            ) as response:
                await response.read_all(timeout_s=3.0)
                return response.status
        return 0

    def log_tail(self, name: str, line_count: int = 15) -> str:
        return "\n".join(self.log(name).read_text(errors="replace").splitlines()[-line_count:])


@dataclass(frozen=True, slots=True)
class Use:
    """What a process holds of the system now; zeros if it is gone."""

    rss_bytes: int = 0
    files: int = 0
    sockets: int = 0
    threads: int = 0


def use_of(pid: int) -> Use:
    """Read from proc(5)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        links = [str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir() if each.is_symlink()]
    except OSError:
        return Use()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return Use(
        rss_bytes=int(fields.get("VmRSS", "0 kB").split()[0]) * 1024,
        files=len(links),
        sockets=sum(link.startswith("socket:") for link in links),
        threads=int(fields.get("Threads", "0")),
    )
