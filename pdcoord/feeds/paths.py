"""Asks the sidecars of decode endpoints how their paths are, and tells the coordinator of each new probe."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from pdcoord.core.events import PathProbed
from pdcoord.core.fleet import Endpoint, EndpointId
from pdcoord.core.ports import Handler
from pdcoord.core.probes import Probe
from pdcoord.feeds.scrapes import Page, Round, ScrapeFailure, ScrapeLimits, Target, fetch
from pdcoord.protocol.headers import HostPort, format_host_port, parse_host_port
from pdcoord.protocol.paths import PathReport, decode_paths
from pdcoord.wire.client import Client

_PAGE = Page("/paths", b"application/json")
_TEXT_MAX = 200

ReportFailed = Callable[[EndpointId, ScrapeFailure], None]
"""Is told of each report that could not be had."""


@dataclass(slots=True)
class PathsFeed:
    """Turns the reports of sidecars into probes; those that say nothing new are left out.

    Endpoints without a metrics port are not asked. A report that cannot be had changes nothing: what was
    known grows old by itself.

    Attributes:
        endpoints: the fleet; asked again before every round.
        clock: monotonic seconds, the same that the coordinator is driven with.
        report_failed: for metrics.
        tells_itself: whether the sidecar at that address tells of its probes unasked.
    """

    handler: Handler
    endpoints: Callable[[], Iterable[Endpoint]]
    client: Client
    clock: Callable[[], float]
    limits: ScrapeLimits
    report_failed: ReportFailed
    tells_itself: Callable[[HostPort], bool] = lambda _address: False
    _told: dict[EndpointId, "_Told"] = field(default_factory=dict, init=False)

    async def run(self) -> None:
        """Ask until cancelled."""
        turns = Round(self.limits)
        slots = asyncio.Semaphore(self.limits.concurrent_max)
        async with asyncio.TaskGroup() as group:
            while True:
                now_s = self.clock()
                turns.sync(self._listed(), now_s)
                self._told = {id_: told for id_, told in self._told.items() if id_ in turns.targets}
                for target in turns.take_due(now_s):
                    group.create_task(self._ask(target, turns, slots))
                await asyncio.sleep(turns.wait_s(now_s))

    def _listed(self) -> Iterator[tuple[EndpointId, HostPort]]:
        for endpoint in self.endpoints():
            if self.tells_itself(endpoint.address):
                continue
            if endpoint.metrics_port is not None and endpoint.pool.can_decode:
                host, _ = parse_host_port(endpoint.address)
                yield endpoint.id, format_host_port(host, endpoint.metrics_port)

    async def _ask(self, target: Target, turns: Round, slots: asyncio.Semaphore) -> None:
        async with slots:
            began_s = self.clock()
            found = await fetch(self.client, target.address, _PAGE, self.limits)
        report = None if isinstance(found, ScrapeFailure) else decode_paths(found)
        if isinstance(found, bytes) and report is None:
            found = ScrapeFailure.UNREADABLE
        if not turns.done(target, began_s, is_failure=report is None):
            return
        if isinstance(found, ScrapeFailure):
            self.report_failed(target.id, found)
        if report is None:
            return
        told = self._told.get(target.id)
        if told is None or told.address != target.address:
            told = self._told[target.id] = _Told(target.address)
        for path in told.news(report.paths, began_s, self.limits.deadline_s):
            # The age counts from when the sidecar wrote it: what is taken for the moment of the probe is
            # at most one scrape too early, never too late.
            probe = probe_of(path, at_s=began_s - path.age_s, interval_s=report.interval_s)
            self.handler.handle(PathProbed(path.target, target.id, probe))


@dataclass(slots=True)
class _Told:
    """Which probe of each path the coordinator has been told of."""

    address: HostPort
    _last: dict[HostPort, tuple[int, float]] = field(default_factory=dict)

    def news(self, paths: Iterable[PathReport], began_s: float, deadline_s: float) -> list[PathReport]:
        """The reports of probes that were not told before, and note them as told."""
        before = self._last
        self._last = {path.target: (path.probe_count, began_s - path.age_s) for path in paths}
        return [p for p in paths if p.probe_count and self._is_news(p.target, before, deadline_s)]

    def _is_news(
        self, target: HostPort, before: dict[HostPort, tuple[int, float]], deadline_s: float
    ) -> bool:
        count, at_s = self._last[target]
        known = before.get(target)
        # A sidecar that restarted counts from 1 again. The moment of one and the same probe moves by the
        # time that a scrape takes, no more.
        return known is None or known[0] != count or abs(at_s - known[1]) > 2.0 * deadline_s


def probe_of(path: PathReport, *, at_s: float, interval_s: float) -> Probe:
    """What a sidecar told of a path, with what came over the network bounded."""
    return Probe(
        at_s=at_s,
        interval_s=interval_s,
        failure=path.failure[:_TEXT_MAX],
        detail=path.detail[:_TEXT_MAX],
        verdict=path.verdict[:_TEXT_MAX],
        verdict_reason=path.verdict_reason[:_TEXT_MAX],
        transport=path.transport[:_TEXT_MAX],
        is_degraded=path.is_degraded,
        latency_s=path.latency_s,
        bandwidth_bytes_per_s=path.bandwidth_bytes_per_s or None,
    )
