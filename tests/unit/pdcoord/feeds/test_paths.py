"""Which sidecars are asked about their paths, and what the coordinator hears of their answers."""

import asyncio
from collections.abc import Callable
from typing import Self

import pytest

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import Action, Event, PathProbed
from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.probes import Probe
from pdcoord.feeds.paths import PathsFeed
from pdcoord.feeds.scrapes import ScrapeFailure, ScrapeLimits
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.paths import PathReport, PathsReport, encode_paths
from pdcoord.wire.errors import ConnectError
from transfer.verdict import Connector, Side

LIMITS = ScrapeLimits(interval_s=0.01, deadline_s=0.2, backoff_s_max=0.02, concurrent_max=2)
P, Q = HostPort("10.0.0.1:8000"), HostPort("10.0.0.2:8000")


def endpoint(
    name: str, role: Role = Role.DECODE, *, address: str = "10.0.0.9:8000", metrics_port: int | None = 9400
) -> Endpoint:
    pool = Pool(
        name=PoolName("pool"),
        model=ModelName("m"),
        role=role,
        vendor="v",
        engine=EngineKind.VLLM,
        side=Side(Connector.PDCOORD, None),
        speed=SpeedFigures(0.0, 0.0, 0.0),
        kv_bytes_per_token=1,
        link_bytes_per_s=0.0,
    )
    return Endpoint(EndpointId(f"pool/{name}"), pool, HostPort(address), metrics_port=metrics_port)


def path(target: HostPort, probe_count: int = 1, **more: object) -> PathReport:
    return PathReport(target=target, kv_address=target, probe_count=probe_count, **more)  # type: ignore[arg-type]


class Reply:
    def __init__(self, body: bytes, status: int = 200) -> None:
        self.status = status
        self.body = body

    def header(self, _name: bytes) -> None:
        return None

    async def read_all(self, *, timeout_s: float, bytes_max: int) -> bytes:
        return self.body

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *details: object) -> None:
        pass


class Bench:
    """A feed over a scripted client; its clock moves by hand, one interval with each look at the fleet."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.listed = [endpoint("d")]
        self.asked: list[tuple[str, str]] = []
        self.body: bytes | Exception = b""
        self.status = 200
        self.events: list[PathProbed] = []
        self.failures: list[tuple[EndpointId, ScrapeFailure]] = []
        self.feed = PathsFeed(
            self,
            self.endpoints,
            self,  # type: ignore[arg-type]
            lambda: self.now_s,
            LIMITS,
            lambda endpoint_id, why: self.failures.append((endpoint_id, why)),
        )

    def endpoints(self) -> list[Endpoint]:
        self.now_s += LIMITS.interval_s
        return self.listed

    def tell(self, *paths: PathReport) -> None:
        self.body = encode_paths(PathsReport(interval_s=30.0, is_agent_up=True, paths=paths))

    async def request(self, method: str, address: str, target: str, **options: object) -> Reply:
        self.asked.append((address, target))
        await asyncio.sleep(0)
        if isinstance(self.body, Exception):
            raise self.body
        return Reply(self.body, self.status)

    def handle(self, event: Event) -> list[Action]:
        assert isinstance(event, PathProbed)
        self.events.append(event)
        return []

    async def ask(self, times: int = 3) -> None:
        """Let every listed sidecar be asked so many times more."""
        before = len(self.asked)
        await self.run_until(lambda: len(self.asked) >= before + times * len(self.listed))

    async def run_until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5.0), asyncio.TaskGroup() as group:
            task = group.create_task(self.feed.run())
            while not condition():  # What the code under test does sets no event.
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
            task.cancel()


async def test_only_decode_endpoints_that_name_their_metrics_port_are_asked() -> None:
    bench = Bench()
    bench.tell()
    bench.listed = [
        endpoint("d"),
        endpoint("both", Role.BOTH, address="[fd00::1]:8000", metrics_port=7),
        endpoint("p", Role.PREFILL, address="10.0.0.8:8000"),
        endpoint("quiet", address="10.0.0.7:8000", metrics_port=None),
    ]
    await bench.run_until(lambda: len(bench.asked) >= 4)
    assert set(bench.asked) == {("10.0.0.9:9400", "/paths"), ("[fd00::1]:7", "/paths")}


async def test_a_sidecar_that_tells_of_its_probes_itself_is_not_asked() -> None:
    bench = Bench()
    bench.tell()
    bench.listed = [endpoint("d"), endpoint("e", address="10.0.0.7:8000")]
    bench.feed.tells_itself = lambda address: address == "10.0.0.9:8000"
    await bench.run_until(lambda: len(bench.asked) >= 2)
    assert set(bench.asked) == {("10.0.0.7:9400", "/paths")}


async def test_a_probe_is_told_once_with_its_time() -> None:
    bench = Bench()
    bench.tell(
        path(P, age_s=0.25, verdict="convert", transport="tcp", is_degraded=True, latency_s=0.1),
        path(Q, probe_count=0),
    )
    await bench.ask()
    (event,) = bench.events
    assert (event.prefill, event.decode) == (P, "pool/d")
    assert event.probe == Probe(
        at_s=event.probe.at_s,
        interval_s=30.0,
        verdict="convert",
        transport="tcp",
        is_degraded=True,
        latency_s=0.1,
    )
    assert 1_000.0 - 0.25 <= event.probe.at_s <= bench.now_s - 0.25


async def test_the_next_probe_is_told_and_so_is_one_of_a_sidecar_that_counts_anew() -> None:
    bench = Bench()
    bench.tell(path(P, age_s=100.0))
    await bench.ask()
    bench.tell(path(P, probe_count=2, failure="unreachable"))
    await bench.run_until(lambda: len(bench.events) == 2)
    assert bench.events[1].probe.failure == "unreachable"
    bench.tell(path(P, probe_count=2, age_s=500.0))
    await bench.run_until(lambda: len(bench.events) == 3)


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        (ConnectError("refused"), 200, ScrapeFailure.UNREACHABLE),
        (b"", 404, ScrapeFailure.STATUS),
        (b"{}", 200, ScrapeFailure.UNREADABLE),
        (b'{"interval_s": 0, "is_agent_up": true}', 200, ScrapeFailure.UNREADABLE),
    ],
)
async def test_a_report_that_cannot_be_had_changes_nothing_and_is_counted(
    body: bytes | Exception, status: int, why: ScrapeFailure
) -> None:
    bench = Bench()
    bench.body, bench.status = body, status
    await bench.run_until(lambda: bool(bench.failures))
    assert bench.failures[0] == (EndpointId("pool/d"), why)
    assert bench.events == []


async def test_a_sidecar_that_moved_is_heard_anew() -> None:
    bench = Bench()
    bench.tell(path(P))
    await bench.ask()
    bench.listed = [endpoint("d", address="10.0.0.5:8000")]
    await bench.run_until(lambda: len(bench.events) == 2)
    assert bench.asked[-1] == ("10.0.0.5:9400", "/paths")


async def test_a_bandwidth_of_nothing_is_none() -> None:
    bench = Bench()
    bench.tell(path(P, bandwidth_bytes_per_s=0.0))
    await bench.run_until(lambda: bool(bench.events))
    assert bench.events[0].probe.bandwidth_bytes_per_s is None
