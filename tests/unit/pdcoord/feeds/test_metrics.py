"""When an endpoint is asked for its metrics, and what is made of its answer."""

import asyncio
from collections.abc import Callable
from typing import Self

import pytest

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import Action, Event
from pdcoord.core.fleet import (
    Endpoint,
    EndpointId,
    EngineKind,
    ModelName,
    Pool,
    PoolName,
    Role,
    SampleFailed,
    SampleTaken,
)
from pdcoord.feeds.metrics import MetricsFeed
from pdcoord.feeds.scrapes import ScrapeFailure, ScrapeLimits
from pdcoord.protocol.headers import HostPort
from pdcoord.wire.errors import BodyTooLargeError, ConnectError, HeadTimeoutError, StreamError
from transfer.verdict import Connector, Side

GOOD = b"vllm:num_requests_running 1\nvllm:num_requests_waiting 2\nvllm:kv_cache_usage_perc 0.5\n"
FAST = ScrapeLimits(interval_s=0.01, deadline_s=0.2, backoff_s_max=0.04, concurrent_max=2)


def endpoint(name: str, address: str = "10.0.0.1:8000") -> Endpoint:
    pool = Pool(
        name=PoolName("pool"),
        model=ModelName("m"),
        role=Role.BOTH,
        vendor="v",
        engine=EngineKind.VLLM,
        side=Side(Connector.NONE, None),
        speed=SpeedFigures(0.0, 0.0, 0.0),
        kv_bytes_per_token=1,
        link_bytes_per_s=0.0,
    )
    return Endpoint(EndpointId(f"pool/{name}"), pool, HostPort(address))


class Reply:
    def __init__(
        self,
        status: int = 200,
        body: bytes = GOOD,
        error: Exception | None = None,
        reason: bytes | None = None,
    ) -> None:
        self.status = status
        self.body = body
        self.error = error
        self.reason = reason

    def header(self, name: bytes) -> bytes | None:
        return self.reason if name == b"x-pdcoord-reason" else None

    async def read_all(self, *, timeout_s: float, bytes_max: int) -> bytes:
        if self.error is not None:
            raise self.error
        return self.body

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *details: object) -> None:
        pass


class ScriptedClient:
    """Answers by address; a reply may also be an error, or None for silence."""

    def __init__(self) -> None:
        self.replies: dict[str, Reply | Exception | None] = {}
        self.asked: list[str] = []
        self.busy = 0
        self.busy_max = 0

    async def request(self, method: str, address: str, target: str, **options: object) -> Reply:
        assert (method, target) == ("GET", "/metrics")
        self.asked.append(address)
        self.busy += 1
        self.busy_max = max(self.busy, self.busy_max)
        try:
            await asyncio.sleep(0)
            reply = self.replies.get(address, Reply())
            if reply is None:
                await asyncio.Event().wait()
            if isinstance(reply, Exception):
                raise reply
            assert reply is not None
            return reply
        finally:
            self.busy -= 1


class Recorder:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def handle(self, event: Event) -> list[Action]:
        self.events.append(event)
        return []


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # What the code under test does sets no event.
        await asyncio.sleep(0.001)


class Bench:
    def __init__(self, limits: ScrapeLimits = FAST) -> None:
        self.client = ScriptedClient()
        self.recorder = Recorder()
        self.listed: list[Endpoint] = [endpoint("a")]
        self.feed = MetricsFeed(
            self.recorder,
            lambda: self.listed,
            self.client,
            asyncio.get_running_loop().time,
            limits,
        )

    async def run_until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5.0), asyncio.TaskGroup() as group:
            task = group.create_task(self.feed.run())
            await until(condition)
            task.cancel()


async def test_a_good_answer_becomes_a_sample_with_its_time() -> None:
    bench = Bench()
    before_s = asyncio.get_running_loop().time()
    await bench.run_until(lambda: len(bench.recorder.events) >= 2)
    event = bench.recorder.events[0]
    assert isinstance(event, SampleTaken)
    assert (event.sample.running, event.sample.waiting, event.sample.kv_usage) == (1, 2, 0.5)
    assert event.sample.at_s >= before_s


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (ConnectError("refused"), ScrapeFailure.UNREACHABLE),
        (HeadTimeoutError("slow"), ScrapeFailure.TIMEOUT),
        (None, ScrapeFailure.TIMEOUT),
        (StreamError("not http"), ScrapeFailure.BROKEN),
        (Reply(error=StreamError("broke off")), ScrapeFailure.BROKEN),
        (Reply(error=BodyTooLargeError(8)), ScrapeFailure.TOO_LARGE),
        (Reply(status=503), ScrapeFailure.STATUS),
        (Reply(status=503, reason=b"draining"), ScrapeFailure.DRAINING),
        (Reply(body=b"<html>"), ScrapeFailure.UNREADABLE),
    ],
)
async def test_every_bad_answer_has_its_reason(reply: Reply | Exception | None, why: ScrapeFailure) -> None:
    bench = Bench(ScrapeLimits(interval_s=0.01, deadline_s=0.03, backoff_s_max=0.04))
    bench.client.replies["10.0.0.1:8000"] = reply
    await bench.run_until(lambda: bool(bench.recorder.events))
    assert bench.recorder.events[0] == SampleFailed(EndpointId("pool/a"), why)


async def test_a_failing_endpoint_is_asked_less_often_and_a_good_one_is_not() -> None:
    bench = Bench()
    bench.client.replies["10.0.0.1:8000"] = ConnectError("refused")
    rounds = 0

    def endpoints() -> list[Endpoint]:
        # Each round is one interval later, so that the machine's load cannot decide who is due.
        nonlocal rounds
        rounds += 1
        return [endpoint("a", "10.0.0.1:8000"), endpoint("b", "10.0.0.2:8000")]

    bench.feed.endpoints = endpoints
    bench.feed.clock = lambda: rounds * FAST.interval_s
    await bench.run_until(lambda: rounds >= 40)
    assert bench.client.asked.count("10.0.0.2:8000") >= 2 * bench.client.asked.count("10.0.0.1:8000")


async def test_no_more_scrapes_at_a_time_than_allowed() -> None:
    bench = Bench()
    bench.listed = [endpoint(str(i), f"10.0.0.{i}:8000") for i in range(1, 9)]
    await bench.run_until(lambda: len(set(bench.client.asked)) == 8)
    assert bench.client.busy_max <= FAST.concurrent_max


async def test_an_endpoint_that_moved_while_it_was_asked_is_not_told_of_under_its_old_address() -> None:
    bench = Bench(ScrapeLimits(interval_s=0.01, deadline_s=0.05))
    bench.client.replies["10.0.0.1:8000"] = None
    async with asyncio.timeout(5.0), asyncio.TaskGroup() as group:
        task = group.create_task(bench.feed.run())
        await until(lambda: bool(bench.client.asked))
        bench.listed = [endpoint("a", "10.0.0.9:8000")]
        await until(lambda: len(bench.recorder.events) >= 12)
        task.cancel()
    assert all(isinstance(event, SampleTaken) for event in bench.recorder.events)


async def test_an_endpoint_that_is_gone_is_not_asked_again() -> None:
    bench = Bench()
    await bench.run_until(lambda: bool(bench.recorder.events))
    bench.listed = []
    bench.client.asked.clear()
    rounds = 0

    def count_rounds() -> bool:
        nonlocal rounds
        rounds += 1
        return rounds > 30

    await bench.run_until(count_rounds)
    assert bench.client.asked == []
