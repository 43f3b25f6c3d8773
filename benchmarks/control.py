"""The control stream: what telling costs a sidecar and hearing a coordinator, and how soon replicas agree.

`python -m benchmarks.control`: CPU time of one request's six events on either side, then over real gRPC on
loopback the time from a request's beginning at a sidecar to its being in the ledgers of two coordinators, and
from the start of a coordinator to its ledger being whole again; then both times between real processes, each
beside what is promised.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable

import structlog

from benchmarks import control_processes
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
from pdcoord.feeds.reports import ReportsFeed
from pdcoord.feeds.reports_server import ControlServer, ControlSettings
from pdcoord.protocol.control import Events
from pdcoord.protocol.control_codec import decode_report, encode_report
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName, PlannedLoad, PrefillTarget
from pdcoord.protocol.tickets import Ticket
from sidecar.handoff import Handoff
from sidecar.observe import Metrics
from sidecar.reporter import Reporter, ReporterSettings
from sidecar.reports import Journal, RequestReport
from sidecar.vocabulary import Begun, DecodeEnded, DecodeOpened, Order, PrefillAnswered
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

PREFILL = HostPort("10.0.0.2:8000")
SIDECARS = tuple(HostPort(f"10.0.0.{index}:8000") for index in (11, 12, 13))
ORDER = Order(
    dialect=DialectName.NIXLV2,
    engine=HostPort("127.0.0.1:8200"),
    prefills=(PrefillTarget(address=PREFILL),),
    is_stream=True,
)
LOAD = PlannedLoad(
    replica="elsewhere/1",
    model="m",
    prefill_us=200_000,
    prompt_tokens=4_000,
    landing_tokens=4_000,
    transfer_bytes=500_000_000,
)
STEPS = (Begun(), PrefillAnswered(1, Ticket(b"{}"), 0), DecodeOpened(2), DecodeEnded(2))


def endpoint(role: Role, address: HostPort) -> Endpoint:
    pool = Pool(
        name=PoolName(role),
        model=ModelName("m"),
        role=role,
        vendor="v",
        engine=EngineKind.VLLM,
        side=Side(Connector.PDCOORD, KvLayout(16)),
        speed=SpeedFigures(0.01, 1e-4, 0.01),
        kv_bytes_per_token=131_072,
        link_bytes_per_s=5e10,
    )
    return Endpoint(EndpointId(f"{role}/{address}"), pool, address)


class Replica:
    """A coordinator behind a control server."""

    def __init__(self, name: str = "here/1") -> None:
        self.name = name
        self.coordinator = Coordinator(replica=name)
        for each in (
            endpoint(Role.PREFILL, PREFILL),
            *(endpoint(Role.DECODE, address) for address in SIDECARS),
        ):
            self.handle(EndpointSeen(each))
        fleet = self.coordinator.fleet
        self.feed = ReportsFeed(
            self,
            TargetLists(fleet, self.coordinator.paths),
            at=lambda address: [state.endpoint for state in fleet.at(address)],
            replica=name,
            clock=time.monotonic,
            log=structlog.get_logger(),
        )

    def handle(self, event: Event) -> list[Action]:
        return self.coordinator.handle(event, time.monotonic())


def tell_costs(count: int) -> tuple[list[Events], float]:
    """Messages of whole requests, and the CPU time of telling of one; the machine's own time is taken off."""

    def run(*, is_told: bool) -> tuple[float, Journal]:
        journal = Journal(events_max=8 * count)
        began_s = time.process_time()
        for _ in range(count):
            handoff = Handoff(ORDER)
            report = RequestReport(journal, ORDER, LOAD, 0.0) if is_told else None
            for step in STEPS:
                handoff.handle(step, 0.0)
                if report is not None:
                    report.look(handoff, 0.0)
            if report is not None:
                report.end(handoff, "served", 0.0)
        return time.process_time() - began_s, journal

    run(is_told=True)
    plain_s, _ = run(is_told=False)
    told_s, journal = run(is_told=True)
    messages, number = [], 0
    while number < journal.end:
        events, number = journal.since(number)
        messages.append(events)
    return messages, (told_s - plain_s) / count


def hear_costs(messages: list[Events], count: int) -> tuple[float, float, int]:
    """CPU time of encoding and of taking in one request, and its bytes."""
    began_s = time.process_time()
    raw = [part for message in messages for part in encode_report(message)]
    encode_s = time.process_time() - began_s
    replica = Replica()
    began_s = time.process_time()
    for each in raw:
        message = decode_report(each)
        assert isinstance(message, Events)
        replica.handle(SidecarReported(SIDECARS[0], "e", message))
    hear_s = time.process_time() - began_s
    return encode_s / count, hear_s / count, sum(map(len, raw)) // count


async def until(is_so: Callable[[], bool]) -> float:
    began_s = time.monotonic()
    async with asyncio.timeout(60.0):
        while not is_so():  # noqa: ASYNC110  # what is waited for sets no event
            await asyncio.sleep(0.0005)
    return time.monotonic() - began_s


async def agree(rounds: int) -> tuple[list[float], float]:
    """Times until two replicas have a request of each sidecar, and until one that starts again has all."""
    replicas = [Replica(), Replica("here/2")]
    servers = [ControlServer(_settings(0, each), each.feed, structlog.get_logger()) for each in replicas]
    async with servers[0], asyncio.TaskGroup() as group:
        await servers[1].__aenter__()
        destinations = tuple(HostPort(f"127.0.0.1:{server.port}") for server in servers)
        reporters = [_reporter(destinations, address) for address in SIDECARS]
        tasks = [group.create_task(each.run()) for each in reporters]
        await until(lambda: all(replica.feed.stream_count == len(SIDECARS) for replica in replicas))
        times = []
        for _ in range(rounds):
            reports = [reporter.begin(ORDER, LOAD) for reporter in reporters]
            times.append(await until(lambda: all(r.coordinator.remote.count == 3 for r in replicas)))
            for reporter, report in zip(reporters, reports, strict=True):
                reporter.end(report, Handoff(ORDER), "served")
            await until(lambda: all(r.coordinator.remote.count == 0 for r in replicas))
        for reporter in reporters:
            for _ in range(100):
                reporter.begin(ORDER, LOAD)
        await until(lambda: replicas[0].coordinator.remote.count == 300)
        await servers[1].__aexit__()
        again = Replica("here/3")
        async with ControlServer(_settings(servers[1].port, again), again.feed, structlog.get_logger()):
            whole_s = await until(lambda: again.coordinator.remote.count == 300)
        for task in tasks:
            task.cancel()
    return times, whole_s


def _settings(port: int, replica: Replica) -> ControlSettings:
    return ControlSettings("127.0.0.1", port, replica.name)


def _reporter(destinations: tuple[HostPort, ...], address: HostPort) -> Reporter:
    reporter = Reporter(
        ReporterSettings(destinations, "pod", address),
        metrics=Metrics(),
        rng=random.Random(1),
        now_s=time.monotonic,
    )
    reporter.listening(8_000)
    return reporter


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.control", description=__doc__)
    parser.add_argument("--requests", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--process-rounds", type=int, default=20, help="0: no processes")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    messages, tell_s = tell_costs(options.requests)
    encode_s, hear_s, size = hear_costs(messages, options.requests)
    print(f"telling of a request (sidecar, no stream)   {tell_s * 1e6:8.1f} us")
    print(f"encoding it, for each stream                {encode_s * 1e6:8.1f} us, {size} bytes")
    print(f"taking it in (coordinator, ledger included) {hear_s * 1e6:8.1f} us")
    times, whole_s = asyncio.run(agree(options.rounds))
    times_ms = sorted(seconds * 1e3 for seconds in times)
    print(
        f"two replicas agree on three sidecars: median {statistics.median(times_ms):.1f} ms, "
        f"worst of {len(times_ms)} {times_ms[-1]:.1f} ms"
    )
    print(f"a replica that starts again has 300 requests back after {whole_s * 1e3:.0f} ms")
    if options.process_rounds:
        control_processes.report(asyncio.run(control_processes.measure(options.process_rounds)))


if __name__ == "__main__":
    main()
