"""The gateway as a process: starts, says where it listens, follows signals, exits as told."""

import asyncio
import http.client
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pdcoord.runtime.explain import NOT_FOUND, UNREACHABLE, explain

POLICY = """\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {name: m}
model: {name: org/model}
pools:
  - name: both
    role: both
    vendor: v
    engine: vllm
    connector: none
    kv_bytes_per_token: 1024
    endpoints: [{name: a, address: "127.0.0.1:9"}]
    speed: {prefill_base_ms: 8, prefill_ms_per_token: 0.1, step_base_ms: 8}
"""
WAIT_S = 60.0
MAIN = """\
import sys
from pdcoord.runtime.serve import serve
from pdcoord.runtime.settings import load_settings
sys.exit(serve(load_settings()))
"""


class Running:
    """A process and the lines that it has logged."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []

    async def line(self, event: str) -> dict[str, Any]:
        """The next log line of that name."""
        assert self.process.stderr is not None
        async with asyncio.timeout(30.0):
            while raw := await self.process.stderr.readline():
                self.lines.append(json.loads(raw))
                if self.lines[-1]["event"] == event:
                    return self.lines[-1]
        raise AssertionError(f"ended without {event}: {self.lines}")

    async def exit_status(self) -> int:
        async with asyncio.timeout(30.0):
            return await self.process.wait()


@asynccontextmanager
async def started(policy: Path, **environment: str) -> AsyncIterator[Running]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        MAIN,
        env=os.environ
        | {
            "PDCOORD_POLICY": str(policy),
            "PDCOORD_PORT": "0",
            "PDCOORD_ADMIN_PORT": "0",
            "PDCOORD_RELOAD_INTERVAL_S": "600",
        }
        | environment,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Running(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def write(folder: Path, text: str) -> Path:
    path = folder / "policy.yaml"
    path.write_text(text)
    return path


async def test_it_starts_reloads_on_sighup_and_stops_on_sigterm(tmp_path: Path) -> None:
    policy = write(tmp_path, POLICY)
    async with started(policy) as running:
        line = await running.line("process.started")
        assert line["models"] == ["org/model"]
        assert urlsplit(line["url"]).port
        write(tmp_path, POLICY.replace("org/model", "org/other"))
        running.process.send_signal(signal.SIGHUP)
        assert (await running.line("policy.accepted"))["source"] == "policy"
        write(tmp_path, "kind: [")
        running.process.send_signal(signal.SIGHUP)
        assert "policy.yaml" in (await running.line("policy.refused"))["problems"][0]
        code = await asyncio.to_thread(explain, None, line["admin_url"])
        assert code == NOT_FOUND
        running.process.send_signal(signal.SIGTERM)
        await running.line("process.stopped")
        assert await running.exit_status() == 0


async def test_a_drain_can_be_watched_to_its_end(tmp_path: Path) -> None:
    """No new calls, and whoever asks what goes on is answered until the last has ended."""
    notice = {"PDCOORD_DRAIN_NOTICE_S": "0", "PDCOORD_DRAIN_S": "60"}
    async with started(write(tmp_path, POLICY), **notice) as running, asyncio.timeout(WAIT_S):
        line = await running.line("process.started")
        port = urlsplit(line["url"]).port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 9\r\n\r\n"
        )
        writer.write(head)
        assert b"100" in await reader.readline()  # The call is being read: it is under way.
        running.process.send_signal(signal.SIGTERM)
        await running.line("process.draining")
        while True:
            try:
                _, late = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                break
            late.close()
        assert await asyncio.to_thread(status_of, f"{line['admin_url']}/fleet") == 200
        writer.close()
        await running.line("process.stopped")
        assert await running.exit_status() == 0


def status_of(url: str) -> int:
    place = urlsplit(url)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=WAIT_S)
    try:
        connection.request("GET", place.path)
        return connection.getresponse().status
    finally:
        connection.close()


async def test_a_port_that_is_taken_is_one_line_and_status_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with started(write(tmp_path, POLICY), PDCOORD_PORT=str(port)) as running:
            assert await running.exit_status() == 2
            _, error = await running.process.communicate()
    assert error.decode().startswith(f"pdcoord serve: not started: cannot listen on 127.0.0.1:{port}")
    assert error.count(b"\n") == 1


async def test_a_policy_that_cannot_be_used_is_status_2(tmp_path: Path) -> None:
    async with started(write(tmp_path, POLICY.replace("vllm", "other"))) as running:
        assert await running.exit_status() == 2
        _, error = await running.process.communicate()
    assert b"policy.yaml:9: pools[0].engine" in error
    assert b"Traceback" not in error


def test_an_admin_listener_that_is_not_there_is_said_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert explain("r", f"http://127.0.0.1:{port}") == UNREACHABLE
