"""What the sides of a control stream may ask of each other: one stream each, bounded lists, any length."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import Action, Event, SidecarReported
from pdcoord.core.fleet import (
    Endpoint,
    EndpointId,
    EndpointSeen,
    EngineKind,
    ModelName,
    Pool,
    PoolName,
    Role,
)
from pdcoord.core.targets import TargetLists
from pdcoord.feeds import reports_server
from pdcoord.feeds.reports import ReportsFeed
from pdcoord.feeds.reports_server import ControlServer, ControlSettings
from pdcoord.protocol.control import (
    CONTROL_VERSION,
    EVENTS_MAX,
    METHOD,
    REQUESTS_MAX,
    Events,
    RequestBegan,
    SidecarHello,
    SidecarProof,
    Snapshot,
)
from pdcoord.protocol.control_codec import encode_report
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName, PlannedLoad
from sidecar.observe import Metrics
from sidecar.reporter import Reporter, ReporterSettings
from sidecar.vocabulary import Order
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

WAIT_S = 30.0
SIDECAR, PREFILL = HostPort("127.0.0.1:18000"), HostPort("127.0.0.1:18001")
ORDER = Order(dialect=DialectName.NIXLV2, engine=HostPort("127.0.0.1:1"))
REPLICA = "a/1"


def endpoint(role: Role, address: HostPort) -> Endpoint:
    pool = Pool(
        name=PoolName(role),
        model=ModelName("m"),
        role=role,
        vendor="v",
        engine=EngineKind.VLLM,
        side=Side(Connector.PDCOORD, KvLayout(16)),
        speed=SpeedFigures(0.01, 1e-4, 0.01),
        kv_bytes_per_token=1_000,
        link_bytes_per_s=1e10,
    )
    return Endpoint(EndpointId(f"{role}/{address}"), pool, address)


class Replica:
    """A coordinator behind a control server on every address of loopback."""

    def __init__(self, *prefills: HostPort) -> None:
        self.coordinator = Coordinator(replica=REPLICA)
        self.told: list[SidecarReported] = []
        fleet = self.coordinator.fleet
        self.handle(EndpointSeen(endpoint(Role.DECODE, SIDECAR)))
        for each in prefills or (PREFILL,):
            self.handle(EndpointSeen(endpoint(Role.PREFILL, each)))
        self.feed = ReportsFeed(
            self,
            TargetLists(fleet, self.coordinator.paths),
            at=lambda address: [state.endpoint for state in fleet.at(address)],
            replica=REPLICA,
            clock=time.monotonic,
            log=structlog.get_logger(),
        )
        self.server = ControlServer(
            ControlSettings("0.0.0.0", 0, REPLICA),  # As a Service has several addresses.
            self.feed,
            structlog.get_logger(),
        )

    def handle(self, event: Event) -> list[Action]:
        if isinstance(event, SidecarReported):
            self.told.append(event)
        return self.coordinator.handle(event, time.monotonic())

    def at(self, host: str = "127.0.0.1") -> HostPort:
        return HostPort(f"{host}:{self.server.port}")

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async with self.server, asyncio.TaskGroup() as group:
            looking = group.create_task(self.feed.run())
            yield
            looking.cancel()


class Told:
    """The sidecar's side, with its metrics."""

    def __init__(self, *coordinators: HostPort, name: str = "pod") -> None:
        self.metrics = Metrics()
        self.reporter = Reporter(
            ReporterSettings(coordinators, name, SIDECAR),
            metrics=self.metrics,
            rng=random.Random(1),
            now_s=time.monotonic,
        )
        self.reporter.listening(18_000)

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"pdcoord_sidecar_{name}", labels) or 0.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Told"]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.reporter.run())
            yield self
            task.cancel()


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_so():
            await asyncio.sleep(0.01)


async def ending(call: Any) -> tuple[grpc.StatusCode, str]:
    """How the other side ended a stream."""
    async with asyncio.timeout(WAIT_S):
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
        return await call.code(), await call.details()


async def say(call: Any, *messages: Any) -> None:
    for message in messages:
        for part in encode_report(message):
            await call.write(part)


HELLO = SidecarHello(CONTROL_VERSION, "pod", SIDECAR, "e", b"n")


async def test_of_two_sidecars_with_one_address_the_older_is_ended_by_name() -> None:
    replica = Replica()
    async with replica.serving(), grpc.aio.insecure_channel(replica.at()) as channel:
        older: Any = channel.stream_stream(METHOD)()
        await say(older, HELLO, SidecarProof(b""))
        await until(lambda: replica.feed.stream_count == 1)
        async with Told(replica.at(), name="newer").running() as newer:
            code, details = await ending(older)
            assert code is grpc.StatusCode.ALREADY_EXISTS
            assert SIDECAR in details
            assert replica.server.refused == {"replaced": 1}
            assert replica.feed.stream_count == 1
            newer.reporter.begin(ORDER, PlannedLoad(replica="b/1", model="m"))
            await until(lambda: replica.coordinator.remote.count == 1)
            # And of two of ours, the one that is pushed out counts it and waits.
            async with Told(replica.at(), name="newest").running():
                await until(lambda: newer.value("control_failures_total", why="replaced"))
                await until(lambda: newer.value("control_streams") == 0.0)
                assert replica.server.refused["replaced"] == 2


async def test_a_replica_of_two_addresses_has_one_stream_and_its_targets_stay() -> None:
    replica = Replica()
    async with replica.serving():
        told = Told(replica.at(), replica.at("127.0.0.2"))
        async with told.running():
            await until(lambda: told.value("control_streams") == 1.0 and told.reporter.doubles)
            assert replica.feed.stream_count == 1
            assert replica.server.refused == {}
            assert told.value("control_failures_total", why="duplicate") == 0.0
            assert told.reporter.targets.get(PREFILL) is not None
            assert [row.is_connected for row in told.reporter.targets.rows()] == [True]
            told.reporter.targets.sweep(time.monotonic() + 3_600.0)
            assert told.reporter.targets.get(PREFILL) is not None


async def test_a_sidecar_that_tells_of_too_many_requests_is_cut() -> None:
    replica = Replica()
    own = PlannedLoad(replica=REPLICA, model="m")
    async with replica.serving(), grpc.aio.insecure_channel(replica.at()) as channel:
        call: Any = channel.stream_stream(METHOD)()
        await say(call, HELLO, SidecarProof(b""), Snapshot())
        for first in range(0, REQUESTS_MAX, EVENTS_MAX):
            ordinals = range(first, first + EVENTS_MAX)
            await say(call, Events(tuple(RequestBegan(ordinal, own) for ordinal in ordinals)))
        await say(call, Events((RequestBegan(REQUESTS_MAX, own),)))
        code, details = await ending(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "more than 8192 requests" in details
        assert replica.server.refused == {"malformed": 1}


async def test_the_longest_messages_travel_whole_and_at_once() -> None:
    """8,192 requests and 4,096 targets with long names: more than one message of gRPC holds."""
    prefills = [HostPort(f"{'p' * 240}-{number}:8000") for number in range(4_096)]
    replica = Replica(*prefills)
    load = PlannedLoad(replica="b/1", model="\N{GRINNING FACE}" * 256)
    async with replica.serving():
        told = Told(replica.at())
        for _ in range(REQUESTS_MAX):
            told.reporter.begin(ORDER, load)
        async with told.running():
            await until(lambda: replica.feed.reports["snapshot"])
            (report,) = [event.report for event in replica.told if isinstance(event.report, Snapshot)]
            assert len(report.requests) == REQUESTS_MAX
            assert len(encode_report(report)) > 1
            await until(lambda: len(told.reporter.targets) == len(prefills))
            assert replica.server.refused == {}
            assert told.value("control_snapshots_total") == 1.0


async def test_streams_that_have_not_proved_themselves_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports_server, "STREAMS_MAX", 2)
    monkeypatch.setattr(reports_server, "HANDSHAKES_MAX", 1)
    replica = Replica()
    async with replica.serving(), grpc.aio.insecure_channel(replica.at()) as channel:
        calls: list[Any] = []
        for _ in range(3):
            # One by one: streams that are opened together reach the server in any order.
            calls.append(channel.stream_stream(METHOD)())
            await say(calls[-1], HELLO)
            assert await calls[-1].read() is not grpc.aio.EOF
        assert (await ending(channel.stream_stream(METHOD)()))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
