"""Asks many servers for one page each in turn: how often, how long, how many at a time, and what failed."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from pdcoord.core.fleet import SAID_DRAINING, EndpointId
from pdcoord.protocol.errors import RefuseReason
from pdcoord.protocol.headers import REASON, HostPort
from pdcoord.wire.client import Client
from pdcoord.wire.errors import BodyTooLargeError, ConnectError, HeadTimeoutError, WireError


class ScrapeFailure(StrEnum):
    """Why a scrape gave nothing; closed, the reason label of metrics and `SampleFailed.why`."""

    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    BROKEN = "broken"
    STATUS = "status"
    DRAINING = SAID_DRAINING
    """It answered that it goes away."""
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
        body_bytes_max: a longer answer is not what was asked for.
    """

    interval_s: float = 0.2
    deadline_s: float = 1.0
    backoff_s_max: float = 2.0
    concurrent_max: int = 64
    body_bytes_max: int = 8 << 20

    def pause_s(self, failure_count: int) -> float:
        """From the start of one scrape to the start of the next, after so many failures in a row."""
        pause_s = self.interval_s * 2.0 ** min(failure_count, 16)
        return max(min(pause_s, self.backoff_s_max), self.interval_s)


@dataclass(frozen=True, slots=True)
class Page:
    """What is asked for."""

    target: str
    accept: bytes


def failure_of(error: TimeoutError | WireError) -> ScrapeFailure:
    """What a request that got no whole answer failed for."""
    match error:
        case TimeoutError() | HeadTimeoutError():
            return ScrapeFailure.TIMEOUT
        case ConnectError():
            return ScrapeFailure.UNREACHABLE
        case BodyTooLargeError():
            return ScrapeFailure.TOO_LARGE
        case _:
            return ScrapeFailure.BROKEN


async def fetch(client: Client, address: HostPort, page: Page, limits: ScrapeLimits) -> bytes | ScrapeFailure:
    """The page's body, or why there is none."""
    try:
        async with asyncio.timeout(limits.deadline_s):
            response = await client.request(
                "GET",
                address,
                page.target,
                headers=[(b"accept", page.accept)],
                head_timeout_s=limits.deadline_s,
            )
            async with response:
                if response.status != 200:
                    is_draining = response.header(REASON) == RefuseReason.DRAINING.encode()
                    return ScrapeFailure.DRAINING if is_draining else ScrapeFailure.STATUS
                return await response.read_all(timeout_s=limits.deadline_s, bytes_max=limits.body_bytes_max)
    except (TimeoutError, WireError) as error:
        return failure_of(error)


@dataclass(slots=True, eq=False)
class Target:
    """One endpoint as a feed knows it; a new one when the address changes."""

    id: EndpointId
    address: HostPort
    due_s: float
    failure_count: int = 0
    is_busy: bool = False


@dataclass(slots=True)
class Round:
    """Whose turn it is."""

    limits: ScrapeLimits
    targets: dict[EndpointId, Target] = field(default_factory=dict)

    def sync(self, listed: Iterable[tuple[EndpointId, HostPort]], now_s: float) -> None:
        """Take on new endpoints and drop those that are gone; a moved one is both."""
        known = self.targets
        self.targets = {}
        for endpoint_id, address in listed:
            target = known.get(endpoint_id)
            if target is None or target.address != address:
                target = Target(endpoint_id, address, due_s=now_s)
            self.targets[endpoint_id] = target

    def take_due(self, now_s: float) -> list[Target]:
        """Those to ask now; each is busy until `done`."""
        due = [target for target in self.targets.values() if not target.is_busy and target.due_s <= now_s]
        for target in due:
            target.is_busy = True
        return due

    def done(self, target: Target, began_s: float, *, is_failure: bool) -> bool:
        """A scrape has ended; False if it was of a process that is no longer listed."""
        target.failure_count = target.failure_count + 1 if is_failure else 0
        target.due_s = began_s + self.limits.pause_s(target.failure_count)
        target.is_busy = False
        return self.targets.get(target.id) is target

    def wait_s(self, now_s: float) -> float:
        """Until the next endpoint is due; at most one interval, so that a new one is soon seen.

        At least a tenth of one: a thousand endpoints out of step must not mean a thousand rounds.
        """
        interval_s = self.limits.interval_s
        due_s = min((t.due_s for t in self.targets.values() if not t.is_busy), default=now_s + interval_s)
        return min(max(due_s - now_s, interval_s / 10.0), interval_s)
