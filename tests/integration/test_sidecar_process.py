"""The sidecar as a process: how it starts, refuses to start, is told of targets, and goes away."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pdcoord.protocol.headers import HostPort
from pdcoord.wire.client import Client

WAIT_S = 20.0
ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"


@dataclass
class Engine:
    """Answers everything with 200 and an empty ticket holder; `/v1/models` waits until `is_free` is set."""

    is_free: asyncio.Event = field(default_factory=asyncio.Event)
    waiting_count: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = [line for line in head.split("\r\n") if line.startswith("content-length: ")]
                await reader.readexactly(int(length[0].split(": ")[1]) if length else 0)
                if " /v1/models " in head:
                    self.waiting_count += 1
                    await self.is_free.wait()
                body = b'{"kv_transfer_params": {"a": 1}}'
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()


@contextlib.asynccontextmanager
async def engine() -> AsyncIterator[tuple[Engine, HostPort]]:
    played = Engine()
    server = await asyncio.start_server(played.serve, "127.0.0.1", 0)
    try:
        yield played, HostPort(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    finally:
        played.is_free.set()
        server.close()


async def start(*flags: str, **variables: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sidecar.main",
        *flags,
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@dataclass
class Process:
    """A running sidecar and the log lines read so far."""

    process: asyncio.subprocess.Process
    client: Client
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def address(self) -> HostPort:
        return HostPort(f"127.0.0.1:{self.lines[0]['port']}")

    @property
    def backstage(self) -> HostPort:
        return HostPort(f"127.0.0.1:{self.lines[0]['metrics_port']}")

    async def until_logged(self, event: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        async with asyncio.timeout(WAIT_S):
            while True:
                raw = await self.process.stdout.readline()
                assert raw, f"the process ended before it logged {event}"
                self.lines.append(json.loads(raw))
                if self.lines[-1]["event"] == event:
                    return self.lines[-1]

    async def status(self, method: str, path: str, *headers: tuple[bytes, bytes], body: bytes = b"") -> int:
        async with await self.client.request(
            method, self.address, path, headers=headers, body=body, head_timeout_s=WAIT_S
        ) as response:
            await response.read_all(timeout_s=WAIT_S)
            return response.status

    async def ended(self) -> int:
        async with asyncio.timeout(WAIT_S):
            return await self.process.wait()


@contextlib.asynccontextmanager
async def running(*flags: str, **variables: str) -> AsyncIterator[Process]:
    ports = ("--host", "127.0.0.1", "--port", "0", "--metrics-port", "0")
    process = await start(*ports, *flags, **variables)
    try:
        async with Client() as client:
            started = Process(process, client)
            await started.until_logged("sidecar.started")
            yield started
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        # Both pipes are read to their end, so that their transports are closed in this loop.
        await process.communicate()


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (("--port", "x"), 2, "--port is 'x': give a port"),
        (("--allow-file", "/no/such/file"), 2, "--allow-file is '/no/such/file': cannot be read"),
        (("--nonsense",), 2, "--nonsense"),
        (
            ("--host", "192.0.2.1", "--metrics-port", "0"),
            2,
            "--host (PDCOORD_SIDECAR_HOST) is '192.0.2.1'; give an address of this host",
        ),
    ],
)
async def test_settings_that_cannot_be_used_end_it_with_one_line(
    flags: tuple[str, ...], status: int, said: str
) -> None:
    process = await start(*flags)
    async with asyncio.timeout(WAIT_S):
        _, told = await process.communicate()
    assert process.returncode == status
    lines = told.decode().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("pdcoord-sidecar: ")
    assert said in lines[0]


@pytest.mark.parametrize(
    ("flags", "said"), [(("--help",), "--allow-file"), (("--describe", "flags"), "| `--port")]
)
async def test_it_explains_itself(flags: tuple[str, ...], said: str) -> None:
    process = await start(*flags)
    async with asyncio.timeout(WAIT_S):
        told, _ = await process.communicate()
    assert process.returncode == 0
    assert said in told.decode()


async def test_it_takes_its_settings_from_the_environment() -> None:
    async with engine() as (_, address), running(PDCOORD_SIDECAR_ENGINE=address) as s:
        assert s.lines[0]["engine"] == address
        assert await s.status("GET", "/readyz") == 200


async def test_targets_added_to_the_file_are_allowed_without_a_restart(tmp_path: Path) -> None:
    allow = tmp_path / "allow"
    allow.write_text("")
    async with engine() as (_, address), running("--engine", address, "--allow-file", str(allow)) as s:
        asked = (b"x-prefiller-host-port", address.encode())
        body = b'{"model":"m","messages":[]}'
        assert await s.status("POST", CHAT, asked, body=body) == 403
        allow.write_text(f"{address}\n")
        await s.until_logged("allowlist.reloaded")
        assert await s.status("POST", CHAT, asked, body=body) == 200
        allow.write_text("nonsense\n")
        assert "line 1" in (await s.until_logged("allowlist.refused"))["error"]
        assert await s.status("POST", CHAT, asked, body=body) == 200


async def test_sigterm_lets_run_what_runs_and_then_ends() -> None:
    async with engine() as (played, address), running("--engine", address) as s, asyncio.TaskGroup() as group:
        call = group.create_task(s.status("GET", "/v1/models"))
        async with asyncio.timeout(WAIT_S):
            while played.waiting_count == 0:  # the engine has no event for it
                await asyncio.sleep(0.005)
        s.process.send_signal(signal.SIGTERM)
        await s.until_logged("sidecar.draining")
        assert await s.status("GET", "/readyz") == 503
        assert await s.status("GET", "/livez") == 200
        assert await s.status("POST", CHAT, body=b'{"model":"m","messages":[]}') == 503
        played.is_free.set()
        assert await call == 200
        assert await s.ended() == 0


async def test_a_drain_is_cut_when_its_time_is_up() -> None:
    async with engine() as (played, address), running("--engine", address, "--drain-s", "0.2") as s:
        with contextlib.suppress(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(s.status("GET", "/v1/models"))
                async with asyncio.timeout(WAIT_S):
                    while played.waiting_count == 0:  # the engine has no event for it
                        await asyncio.sleep(0.005)
                s.process.send_signal(signal.SIGTERM)
                await s.until_logged("sidecar.drain_cut")
        assert await s.ended() == 0


async def test_an_answer_that_is_broken_off_on_purpose_is_no_error_of_the_server() -> None:
    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc")
        writer.close()

    server = await asyncio.start_server(break_off, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with running("--engine", address) as s:
        with contextlib.suppress(Exception):
            await s.status("POST", CHAT, body=b'{"model":"m","messages":[],"stream":true}')
        done = await s.until_logged("request.done")
        assert done["outcome"] == "broken-off"
        s.process.send_signal(signal.SIGTERM)
        assert await s.ended() == 0
        assert s.process.stderr is not None
        assert await s.process.stderr.read() == b""
    server.close()
