"""Scrapes every endpoint's /metrics in turn and tells the coordinator what it read, or that it could not."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pdcoord.core.fleet import Endpoint, Sample, SampleFailed, SampleTaken
from pdcoord.core.ports import Handler
from pdcoord.feeds.samples import parse_sample
from pdcoord.feeds.scrapes import Page, Round, ScrapeFailure, ScrapeLimits, Target, fetch
from pdcoord.protocol.headers import HostPort
from pdcoord.wire.client import Client

_PAGE = Page("/metrics", b"text/plain; version=0.0.4")


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

    async def run(self) -> None:
        """Scrape until cancelled."""
        turns = Round(self.limits)
        slots = asyncio.Semaphore(self.limits.concurrent_max)
        async with asyncio.TaskGroup() as group:
            while True:
                now_s = self.clock()
                turns.sync(((endpoint.id, endpoint.address) for endpoint in self.endpoints()), now_s)
                for target in turns.take_due(now_s):
                    group.create_task(self._scrape(target, turns, slots))
                await asyncio.sleep(turns.wait_s(now_s))

    async def _scrape(self, target: Target, turns: Round, slots: asyncio.Semaphore) -> None:
        async with slots:
            began_s = self.clock()
            found = await self._sample(target.address)
        is_failure = isinstance(found, ScrapeFailure)
        if not turns.done(target, began_s, is_failure=is_failure):
            return
        if isinstance(found, ScrapeFailure):
            self.handler.handle(SampleFailed(target.id, found))
        else:
            self.handler.handle(SampleTaken(target.id, found))

    async def _sample(self, address: HostPort) -> Sample | ScrapeFailure:
        text = await fetch(self.client, address, _PAGE, self.limits)
        if isinstance(text, ScrapeFailure):
            return text
        return parse_sample(text, at_s=self.clock()) or ScrapeFailure.UNREADABLE
