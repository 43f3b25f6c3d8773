"""Probes end to end: a sidecar process, its engine's agent, a producer's, and the coordinator."""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.events import Action, Event, ModelsReplaced
from pdcoord.core.fleet import EndpointId, EndpointSeen
from pdcoord.core.pathview import PathView
from pdcoord.feeds.paths import PathsFeed
from pdcoord.feeds.scrapes import ScrapeFailure, ScrapeLimits
from pdcoord.policy.compile import CompiledPolicy, compile_policy
from pdcoord.policy.load import parse_policies
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.paths import PathReport, PathsReport, decode_paths
from pdcoord.wire.client import Client
from transfer.agent import Agent
from transfer.backends.tcp import TcpBackend
from transfer.door import Identity
from transfer.errors import LayoutError
from transfer.layout import GroupShape, KvDtype, KvLayout, RankLayout
from transfer.session.vocabulary import Slot, Tables, Unpack
from transfer.settings import AgentSettings
from transfer.staging import HostStaging

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0
KEY = b"a key of the tests, 16 bytes or more"
SHAPE = GroupShape(layer_count=1, kv_heads=2, key_dim=8, value_dim=8)


class NoBlocks:
    """A repacker of an engine without blocks: a probe asks for the layout and no more."""

    def __init__(self, layout: RankLayout) -> None:
        self.layout = layout

    def pack(self, slots: Sequence[Slot], tables: Tables) -> tuple[bytes, ...]:
        raise LayoutError("tables", tables, "none: there are no blocks")

    def unpack(self, order: Unpack) -> bool:
        raise LayoutError("tables", order, "none: there are no blocks")


@contextlib.contextmanager
def agent(
    name: str, *, block_tokens: int = 16, port: int = 0, transports: tuple[str, ...] = ()
) -> Iterator[Agent]:
    """One engine rank's agent over tcp on loopback."""
    layout = RankLayout(KvLayout(block_tokens, dtype=KvDtype.FLOAT32), 0, (SHAPE,))
    settings = AgentSettings(
        listen_host="127.0.0.1",
        advertise_host="127.0.0.1",
        port=port,
        key=KEY,
        backends=("tcp",),
        transports=transports,
        staging_bytes=8 << 20,
        pattern_bytes=256 << 10,
        backoff_first_s=0.01,
        backoff_max_s=0.05,
    )
    staging = HostStaging(settings.staging_bytes)
    made = Agent(
        settings,
        Identity(name, f"epoch of {name}"),
        staging,
        NoBlocks(layout),
        [TcpBackend("127.0.0.1", advertise_host="127.0.0.1")],
    )
    made.start()
    try:
        yield made
    finally:
        made.close()
        staging.close()


def port_of(made: Agent) -> int:
    return int(made.address.rpartition(":")[2])


@dataclass
class Sidecar:
    """A running sidecar process."""

    process: asyncio.subprocess.Process
    client: Client
    ports: dict[str, int] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    async def read_log(self) -> None:
        assert self.process.stdout is not None
        async for raw in self.process.stdout:
            self.lines.append(json.loads(raw))

    async def get(self, path: str) -> tuple[int, bytes]:
        address = HostPort(f"127.0.0.1:{self.ports['metrics_port']}")
        async with await self.client.request("GET", address, path, head_timeout_s=WAIT_S) as response:
            return response.status, await response.read_all(timeout_s=WAIT_S)

    async def report(self) -> PathsReport:
        status, body = await self.get("/paths")
        report = decode_paths(body)
        assert status == 200
        assert report is not None
        return report

    async def until_told(self, is_true: Callable[[PathReport], bool]) -> PathReport:
        """The one path, once it is as it should be."""
        async with asyncio.timeout(WAIT_S):
            while True:
                (path,) = (await self.report()).paths
                if is_true(path):
                    return path
                await asyncio.sleep(0.02)

    def changes(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == "path.changed"]


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_true():  # what is waited for has no event of its own
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def sidecar(engine: HostPort, *flags: str) -> AsyncIterator[Sidecar]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sidecar.main",
        *("--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", "--engine", engine),
        *flags,
        cwd=ROOT,
        env=os.environ,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with Client() as client, asyncio.TaskGroup() as group:
            made = Sidecar(process, client)
            log = group.create_task(made.read_log())
            await until(lambda: any(line["event"] == "sidecar.started" for line in made.lines))
            made.ports = next(line for line in made.lines if line["event"] == "sidecar.started")
            yield made
            log.cancel()
    finally:
        process.terminate()
        async with asyncio.timeout(WAIT_S):
            await process.wait()


@contextlib.asynccontextmanager
async def engine() -> AsyncIterator[HostPort]:
    """Says that it is well."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield HostPort(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    finally:
        server.close()


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "key"
    path.write_bytes(KEY)
    path.chmod(0o600)
    return str(path)


TARGET = HostPort("127.0.0.1:8000")


async def test_a_path_is_probed_lost_and_found_again(key_file: str) -> None:
    async with engine() as own:
        with agent("consumer", block_tokens=32) as consumer, contextlib.ExitStack() as producers:
            producer = producers.enter_context(agent("producer"))
            port = port_of(producer)
            flags = ("--kv-agent", consumer.address, "--kv-key-file", key_file, "--probe-interval-s", "1")
            async with sidecar(own, "--allow", f"{TARGET}/{port}", *flags) as s:
                path = await s.until_told(lambda path: path.probe_count > 0)
                assert (path.target, path.kv_address, path.failure) == (TARGET, producer.address, "")
                assert (path.verdict, path.is_degraded) == ("regroup", False)
                assert "tcp" in path.transport
                assert path.latency_s is not None
                assert path.bandwidth_bytes_per_s is not None
                assert path.latency_s > 0.0 < path.bandwidth_bytes_per_s
                assert (await s.get("/readyz"))[0] == 200
                metrics = (await s.get("/metrics"))[1].decode()
                assert f'pdcoord_sidecar_path_usable{{target="{TARGET}"}} 1.0' in metrics
                producers.close()
                path = await s.until_told(lambda path: path.failure != "")
                assert path.verdict == ""
                with agent("producer anew", port=port, block_tokens=32):
                    path = await s.until_told(lambda path: path.verdict == "native")
                    assert path.failure == ""
                await until(lambda: len(s.changes()) >= 3)
                assert [line["is_usable"] for line in s.changes()[:2]] == [True, False]
                assert KEY.decode() not in json.dumps(s.lines)


async def test_a_transport_that_was_not_asked_for_is_said(key_file: str) -> None:
    async with engine() as own:
        with agent("consumer", transports=("rc",)) as consumer, agent("producer") as producer:
            flags = ("--kv-agent", consumer.address, "--kv-key-file", key_file)
            async with sidecar(own, "--allow", f"{TARGET}/{port_of(producer)}", *flags) as s:
                path = await s.until_told(lambda path: path.probe_count > 0)
                assert (path.failure, path.is_degraded) == ("", True)


async def test_a_wrong_key_is_the_own_agents_refusal_and_no_news_of_the_path(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"another key of 16 bytes or more")
    other.chmod(0o600)
    async with engine() as own:
        with agent("consumer") as consumer, agent("producer") as producer:
            flags = ("--kv-agent", consumer.address, "--kv-key-file", str(other))
            async with sidecar(own, "--allow", f"{TARGET}/{port_of(producer)}", *flags) as s:
                outcome = 'pdcoord_sidecar_probes_total{outcome="agent-unreachable"}'
                async with asyncio.timeout(WAIT_S):
                    while outcome not in (await s.get("/metrics"))[1].decode():
                        await asyncio.sleep(0.02)
                report = await s.report()
                assert not report.is_agent_up
                assert report.paths[0].probe_count == 0
                status, body = await s.get("/readyz")
                assert (status, b"being probed" in body) == (503, True)


@pytest.mark.parametrize("content", [None, b"short"])
async def test_a_key_file_that_cannot_be_used_stops_the_start(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sidecar.main",
        *("--kv-agent", "127.0.0.1:1", "--kv-key-file", str(path)),
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(WAIT_S):
        _, said = await process.communicate()
    assert process.returncode == 2
    assert b"--kv-key-file is" in said


async def test_without_an_agent_there_are_no_paths_to_tell_of() -> None:
    async with engine() as own, sidecar(own, "--allow", TARGET) as s:
        status, body = await s.get("/paths")
        assert (status, b"--kv-agent" in body) == (404, True)
        assert (await s.get("/readyz"))[0] == 200


# The coordinator.

POLICY = """\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {name: m}
model: {name: m}
pools:
  - {name: p, role: prefill, vendor: a, engine: vllm, connector: pdcoord, layout: {block_tokens: 16},
     kv_bytes_per_token: 131072, link_gbit_per_s: 400, endpoints: [{name: "0", address: "127.0.0.1:8000"}],
     speed: {prefill_base_ms: 8, prefill_ms_per_token: 0.02, step_base_ms: 10}}
  - {name: d, role: decode, vendor: b, engine: vllm, connector: pdcoord, layout: {block_tokens: 32},
     kv_bytes_per_token: 131072, link_gbit_per_s: 400,
     endpoints: [{name: "0", address: "127.0.0.1:8001", metrics_port: METRICS_PORT}],
     speed: {prefill_base_ms: 8, prefill_ms_per_token: 0.3, step_base_ms: 8}}
"""


class Told:
    """A coordinator on the real clock, told by a feed."""

    def __init__(self, policy: CompiledPolicy) -> None:
        self.coordinator = Coordinator()
        self.failures: list[tuple[EndpointId, ScrapeFailure]] = []
        self.handle(ModelsReplaced(policy.models))
        self.listed = [endpoint for binding in policy.bindings for endpoint in binding.endpoints]
        for endpoint in self.listed:
            self.handle(EndpointSeen(endpoint))

    def handle(self, event: Event) -> list[Action]:
        actions = self.coordinator.handle(event, time.monotonic())
        self.coordinator.validate()
        return actions

    def path(self) -> PathView:
        (view,) = self.coordinator.paths_view(time.monotonic())
        return view


async def test_the_coordinator_hears_of_it_and_shuts_and_opens_the_path(key_file: str) -> None:
    async with engine() as own:
        with agent("consumer", block_tokens=32) as consumer, contextlib.ExitStack() as producers:
            producer = producers.enter_context(agent("producer"))
            port = port_of(producer)
            flags = ("--kv-agent", consumer.address, "--kv-key-file", key_file, "--probe-interval-s", "1")
            async with sidecar(own, "--allow", f"{TARGET}/{port}", *flags) as s:
                text = POLICY.replace("METRICS_PORT", str(s.ports["metrics_port"]))
                told = Told(compile_policy(parse_policies(text.encode(), "p")))
                assert told.path().probe is None
                feed = PathsFeed(
                    told,
                    lambda: told.listed,
                    s.client,
                    time.monotonic,
                    ScrapeLimits(interval_s=0.05, deadline_s=1.0),
                    lambda endpoint_id, why: told.failures.append((endpoint_id, why)),
                )
                async with asyncio.TaskGroup() as group:
                    running = group.create_task(feed.run())
                    await until(lambda: told.path().probe is not None)
                    view = told.path()
                    assert view.probe is not None
                    assert (view.probe.verdict, view.fault, str(view.state)) == ("regroup", "", "closed")
                    assert view.bandwidth_bytes_per_s <= 5e10
                    producers.close()
                    await until(lambda: told.path().fault != "")
                    assert str(told.path().state) == "open"
                    with agent("producer anew", port=port):
                        await until(lambda: told.path().fault == "")
                        assert str(told.path().state) == "closed"
                    running.cancel()
                assert told.failures == []
