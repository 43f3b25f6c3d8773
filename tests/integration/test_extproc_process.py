"""`pdcoord extproc` as a process: flags, ports, TLS with a certificate that changes, health, and its end."""

import asyncio
import json
import os
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2

from pdcoord.extproc.listener import self_signed
from pdcoord.protocol.headers import HostPort
from pdcoord.wire.client import Client
from pdcoord.wire.validity import validity_of

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
MAIN = "import sys; from pdcoord.runtime.extproc import main; sys.exit(main(sys.argv[1:]))"
PORTS = ("--grpc-port=0", "--grpc-health-port", "0", "-metrics-port=0", "--admin-port=0", "--host=127.0.0.1")


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


@asynccontextmanager
async def started(folder: Path, *flags: str, **environment: str) -> AsyncIterator[Running]:
    policy = folder / "policy.yaml"
    policy.write_text(POLICY)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        MAIN,
        *flags,
        env=os.environ | {"PDCOORD_POLICY": str(policy), "PDCOORD_DRAIN_NOTICE_S": "0"} | environment,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Running(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def status(channel: aio.Channel, service: str) -> int:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    answer = await check(health_pb2.HealthCheckRequest(service=service), timeout=10.0)
    return int(answer.status)


def certificate_at(address: str) -> str:
    host, port = address.rsplit(":", 1)
    return ssl.get_server_certificate((host, int(port)), timeout=10.0)


async def samples_at(url: str) -> dict[str, float]:
    """Each series of a page of metrics with its value."""
    address = HostPort(url.removeprefix("http://").removesuffix("/metrics"))
    async with (
        Client() as client,
        await client.request("GET", address, "/metrics", head_timeout_s=10.0) as response,
    ):
        lines = (await response.read_all(timeout_s=10.0)).decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def write_pair(folder: Path, pair: tuple[bytes, bytes]) -> str:
    for name, content in zip(("tls.key", "tls.crt"), pair, strict=True):
        (folder / name).write_bytes(content)
    return pair[1].decode()


async def test_it_serves_health_and_metrics_takes_foreign_flags_and_ends_as_told(tmp_path: Path) -> None:
    foreign = ("--zap-encoder", "json", "-v=4", "--kv-cache-usage-percentage-metric", "vllm:x")
    async with started(tmp_path, *PORTS, *foreign) as running:
        ignored = (await running.line("flags.ignored"))["flags"]
        assert [each.split(":")[0] for each in ignored] == [
            "--zap-encoder",
            "--v",
            "--kv-cache-usage-percentage-metric",
        ]
        line = await running.line("process.started")
        async with aio.insecure_channel(line["grpc_health"]) as channel:
            assert await status(channel, "liveness") == 1
            assert await status(channel, "readiness") == 2
        certificate = await asyncio.to_thread(certificate_at, line["grpc"])
        assert certificate.startswith("-----BEGIN CERTIFICATE-----")
        host, port = line["metrics_url"].removeprefix("http://").removesuffix("/metrics").split(":")
        for path, expected in (("/metrics", b"200"), ("/livez", b"200"), ("/readyz", b"503"), ("/x", b"404")):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            async with asyncio.timeout(10.0):
                answer = await reader.read()
            writer.close()
            assert answer.split()[1] == expected
            assert path != "/metrics" or b"pdcoord_gateway_extproc_streams 0.0" in answer
        running.process.send_signal(signal.SIGTERM)
        await running.line("process.stopped")
        async with asyncio.timeout(30.0):
            assert await running.process.wait() == 0


async def test_a_certificate_that_changes_is_used_and_a_broken_one_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    folder.mkdir()
    first = write_pair(folder, self_signed())
    async with started(tmp_path, *PORTS, "--cert-path", str(folder)) as running:
        address = (await running.line("process.started"))["grpc"]
        assert await asyncio.to_thread(certificate_at, address) == first
        second = write_pair(folder, self_signed())
        assert await asyncio.to_thread(certificate_at, address) == second
        (folder / "tls.key").write_bytes(self_signed()[0])
        assert await asyncio.to_thread(certificate_at, address) == second
        credentials = grpc.ssl_channel_credentials(second.encode())
        options = (("grpc.ssl_target_name_override", "localhost"),)
        async with aio.secure_channel(address, credentials, options=options) as channel:
            assert await status(channel, "liveness") == 1


async def test_with_an_authority_it_serves_only_who_has_a_certificate_of_it(tmp_path: Path) -> None:
    key, cert = self_signed()
    (tmp_path / "clients.crt").write_bytes(cert)
    authority = str(tmp_path / "clients.crt")
    folder = tmp_path / "tls"
    folder.mkdir()
    own = write_pair(folder, self_signed())
    async with started(
        tmp_path, *PORTS, "--cert-path", str(folder), PDCOORD_GRPC_CLIENT_CA_FILE=authority
    ) as running:
        line = await running.line("process.started")
        options = (("grpc.ssl_target_name_override", "localhost"), ("grpc.use_local_subchannel_pool", 1))
        known = grpc.ssl_channel_credentials(own.encode(), key, cert)
        async with aio.secure_channel(line["grpc"], known, options=options) as channel:
            assert await status(channel, "liveness") == 1
        stranger = grpc.ssl_channel_credentials(own.encode())
        async with aio.secure_channel(line["grpc"], stranger, options=options) as channel:
            with pytest.raises(aio.AioRpcError) as caught:
                await status(channel, "liveness")
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        async with aio.insecure_channel(line["grpc_health"]) as channel:
            assert await status(channel, "liveness") == 1
        shown = await samples_at(line["metrics_url"])
        name = 'pdcoord_gateway_certificate_expires_timestamp_seconds{use="extproc"}'
        assert shown[name] == validity_of(own.encode()).ends_s
        assert shown["pdcoord_gateway_tasks"] > 5


async def test_what_it_cannot_start_with_is_one_line_and_status_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            ((*PORTS, "--no-such-flag"), "--no-such-flag"),
            ((*PORTS, "--secure-serving=maybe"), "'maybe' is neither true nor false"),
            ((*PORTS, "--grpc-port=x"), "PDCOORD_GRPC_PORT"),
            ((*PORTS, "--cert-path", str(tmp_path / "none")), "tls.crt"),
            ((*PORTS, f"--grpc-port={port}"), f"cannot listen on 127.0.0.1:{port}"),
        ]
        for flags, said in cases:
            async with started(tmp_path, *flags) as running:
                async with asyncio.timeout(30.0):
                    _, error = await running.process.communicate()
                assert running.process.returncode == 2
                lines = [
                    line for line in error.decode().splitlines() if line.startswith("pdcoord extproc: not")
                ]
                assert len(lines) == 1
                assert said in lines[0]
