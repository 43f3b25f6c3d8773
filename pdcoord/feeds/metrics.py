"""Scrapes every endpoint's /metrics in turn and tells the coordinator what it read, or that it could not."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from pdcoord.core.fleet import Endpoint, EndpointId, Sample, SampleFailed, SampleTaken
from pdcoord.core.ports import Handler
from pdcoord.feeds.samples import parse_sample
from pdcoord.protocol.headers import HostPort
from pdcoord.wire.client import Client
from pdcoord.wire.errors import BodyTooLargeError, ConnectError, HeadTimeoutError, WireError

_TARGET = "/metrics"
_HEADERS = [(b"accept", b"text/plain; version=0.0.4")]


class ScrapeFailure(StrEnum):
    """Why a scrape gave no sample; closed, the reason label of metrics and `SampleFailed.why`."""

    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    BROKEN = "broken"
    STATUS = "status"
    UNREADABLE = "unreadable"
    TOO_LARGE = "too-large"


@dataclass(frozen=True, slots=True)
class ScrapeLimits:
    """How often, how long, how many at a time.

    Attributes:
        interval_s: from the start of one scrape of an endpoint to the start of its next.
        deadline_s: longest one scrape may take, connecting included.
        backoff_s_max: an endpoint that fails is asked half as often each time, down to this.
        concurrent_max: scrapes at a time, over all endpoints.
        body_bytes_max: a longer answer is not an engine's metrics.
    """

    interval_s: float = 0.2
    deadline_s: float = 1.0
    backoff_s_max: float = 2.0
    concurrent_max: int = 64
    body_bytes_max: int = 8 << 20


@dataclass(slots=True)
class _Target:
    """One endpoint as this feed knows it; a new one when the address changes."""

    id: EndpointId
    address: HostPort
    due_s: float
    failure_count: int = 0
    is_busy: bool = False


@dataclass(slots=True)
class MetricsFeed:
    """Turns the metrics of all endpoints into samples.

    Attributes:
        endpoints: what to scrape; asked again before every round, so the fleet may change at any time.
        clock: monotonic seconds, the same that the coordinator is driven with.
    """

    handler: Handler
    endpoints: Callable[[], Iterable[Endpoint]]
    client: Client
    clock: Callable[[], float]
    limits: ScrapeLimits = field(default_factory=ScrapeLimits)
    _targets: dict[EndpointId, _Target] = field(default_factory=dict, init=False)

    async def run(self) -> None:
        """Scrape until cancelled."""
        slots = asyncio.Semaphore(self.limits.concurrent_max)
        async with asyncio.TaskGroup() as group:
            while True:
                now_s = self.clock()
                self._sync(now_s)
                for target in self._targets.values():
                    if not target.is_busy and target.due_s <= now_s:
                        target.is_busy = True
                        group.create_task(self._scrape(target, slots))
                await asyncio.sleep(self._wait_s(now_s))

    def _sync(self, now_s: float) -> None:
        """Take on new endpoints and drop those that are gone; a moved one is both."""
        known = self._targets
        self._targets = {}
        for endpoint in self.endpoints():
            target = known.get(endpoint.id)
            if target is None or target.address != endpoint.address:
                target = _Target(endpoint.id, endpoint.address, due_s=now_s)
            self._targets[endpoint.id] = target

    def _wait_s(self, now_s: float) -> float:
        """Until the next endpoint is due; at most one interval, so that a new one is soon seen.

        At least a tenth of one: a thousand endpoints out of step must not mean a thousand rounds.
        """
        interval_s = self.limits.interval_s
        due_s = min((t.due_s for t in self._targets.values() if not t.is_busy), default=now_s + interval_s)
        return min(max(due_s - now_s, interval_s / 10.0), interval_s)

    async def _scrape(self, target: _Target, slots: asyncio.Semaphore) -> None:
        async with slots:
            began_s = self.clock()
            found = await self._sample(target.address)
        is_failure = isinstance(found, ScrapeFailure)
        target.failure_count = target.failure_count + 1 if is_failure else 0
        target.due_s = began_s + self._pause_s(target.failure_count)
        target.is_busy = False
        if self._targets.get(target.id) is not target:
            return  # Gone or moved meanwhile: this is about a process that is no longer listed.
        if isinstance(found, ScrapeFailure):
            self.handler.handle(SampleFailed(target.id, found))
        else:
            self.handler.handle(SampleTaken(target.id, found))

    async def _sample(self, address: HostPort) -> Sample | ScrapeFailure:
        text = await self._fetch(address)
        if isinstance(text, ScrapeFailure):
            return text
        return parse_sample(text, at_s=self.clock()) or ScrapeFailure.UNREADABLE

    def _pause_s(self, failure_count: int) -> float:
        doublings = min(failure_count, 16)
        pause_s = self.limits.interval_s * 2.0**doublings
        return max(min(pause_s, self.limits.backoff_s_max), self.limits.interval_s)

    async def _fetch(self, address: HostPort) -> bytes | ScrapeFailure:
        """The metrics text, or why there is none."""
        limits = self.limits
        try:
            async with asyncio.timeout(limits.deadline_s):
                response = await self.client.request(
                    "GET", address, _TARGET, headers=_HEADERS, head_timeout_s=limits.deadline_s
                )
                async with response:
                    if response.status != 200:
                        return ScrapeFailure.STATUS
                    return await response.read_all(
                        timeout_s=limits.deadline_s, bytes_max=limits.body_bytes_max
                    )
        except (TimeoutError, HeadTimeoutError):
            return ScrapeFailure.TIMEOUT
        except ConnectError:
            return ScrapeFailure.UNREACHABLE
        except BodyTooLargeError:
            return ScrapeFailure.TOO_LARGE
        except WireError:
            return ScrapeFailure.BROKEN
