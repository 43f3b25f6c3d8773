"""The feed of KV events against the emulator's publishers: gaps, replays, restarts and floods."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from pdcoord.core.blocks import token_keys
from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import Action, Event, ModelsReplaced
from pdcoord.core.exact import ExactIndex
from pdcoord.core.fleet import (
    Endpoint,
    EndpointGone,
    EndpointId,
    EndpointSeen,
    EngineKind,
    ModelName,
    Pool,
    PoolName,
    Role,
)
from pdcoord.core.kvcache import KvCleared, KvLost
from pdcoord.core.model import Model, PrefixMode
from pdcoord.core.prefixes import Trust
from pdcoord.feeds.kvevents import KvEventsFeed, KvEventsLimits
from pdcoord.feeds.kvsequence import Trouble
from pdcoord.protocol.headers import HostPort
from pdcoord.sim.emulator import running
from pdcoord.sim.emulator_kv import KvEventForm, KvEventPublisher
from pdcoord.sim.fleetfile import EmulatedFleet
from pdcoord.sim.kvpool import AllCleared, BlocksRemoved, BlocksStored, PoolEvent
from pdcoord.sim.tokens import BlockHash
from pdcoord.wire.client import Client
from transfer.verdict import Connector, Side

M = ModelName("demo/tiny")
E = EndpointId("e")
POOL = Pool(
    name=PoolName("p"),
    model=M,
    role=Role.BOTH,
    vendor="x",
    engine=EngineKind.VLLM,
    side=Side(Connector.NONE, None),
    speed=SpeedFigures(0.0, 1e-3, 0.01),
    kv_bytes_per_token=1,
    link_bytes_per_s=1.0,
)
LIMITS = KvEventsLimits(sync_s=0.02, check_s=0.2, retry_s=0.05, replay_gap_s_min=0.0, replay_s=5.0)


@dataclass
class Told:
    """A coordinator that notes what it is told."""

    coordinator: Coordinator = field(default_factory=Coordinator)
    events: list[Event] = field(default_factory=list)

    def handle(self, event: Event) -> list[Action]:
        self.events.append(event)
        return self.coordinator.handle(event, time.monotonic())

    def see(self, endpoint: Endpoint) -> None:
        self.coordinator.handle(ModelsReplaced((Model(M, (POOL,), prefix_mode=PrefixMode.PRECISE),)), 0.0)
        self.coordinator.handle(EndpointSeen(endpoint), 0.0)

    def endpoints(self) -> list[Endpoint]:
        return [state.endpoint for state in self.coordinator.fleet.states()]

    @property
    def index(self) -> ExactIndex:
        found = self.coordinator.prefixes.index(M)
        assert found is not None
        return found

    @property
    def trust(self) -> Trust:
        state = self.coordinator.fleet.get(E)
        assert state is not None
        return self.coordinator.prefixes.trust(state)

    def cached(self, tokens: range, block_tokens: int = 16) -> int:
        keys = token_keys(tokens, model=M, block_tokens=block_tokens)
        return self.index.cached_tokens(0, keys)


@asynccontextmanager
async def following(told: Told, limits: KvEventsLimits = LIMITS) -> AsyncIterator[KvEventsFeed]:
    feed = KvEventsFeed(told, told.endpoints, time.monotonic, limits)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(feed.run())
        yield feed
        task.cancel()
    told.coordinator.validate()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20.0):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def publishing(
    port: int = 0, replay_port: int | None = 0, form: KvEventForm | None = None
) -> AsyncIterator[KvEventPublisher]:
    publisher = KvEventPublisher(
        "127.0.0.1", port, topic="kv@x", form=form or KvEventForm(), replay_port=replay_port
    )
    async with publisher, asyncio.TaskGroup() as group:
        replay = group.create_task(publisher.serve_replay())
        yield publisher
        replay.cancel()


def port_of(address: str | None) -> int | None:
    return None if address is None else int(address.rpartition(":")[2])


def endpoint(publisher: KvEventPublisher) -> Endpoint:
    return Endpoint(
        id=E,
        pool=POOL,
        address=HostPort("127.0.0.1:9"),
        kv_events_port=port_of(publisher.address),
        kv_events_replay_port=port_of(publisher.replay_address),
    )


def block_hash(begin: int, end: int) -> BlockHash:
    return BlockHash(f"{begin}-{end}".encode().rjust(32))


def stored(tokens: range) -> BlocksStored:
    begin = tokens.start
    ends = range(begin + 16, tokens.stop + 1, 16)
    return BlocksStored(tuple(block_hash(begin, end) for end in ends), None, tuple(tokens), 16)


def publish(publisher: KvEventPublisher, *events: PoolEvent) -> None:
    publisher.publish(events, at_s=1.7e9)


def publish_unheard(publisher: KvEventPublisher, *events: PoolEvent) -> None:
    """What a subscriber that is too slow loses: it is kept, and reaches nobody."""
    socket, publisher._publisher = publisher._publisher, None
    publish(publisher, *events)
    publisher._publisher = socket


ONE, TWO, THREE = range(32), range(100, 148), range(200, 264)


async def test_an_emulated_engines_cache_is_known_block_by_block() -> None:
    spec = {
        "name": "e",
        "profile": "nvidia-h100-8b",
        "port": 0,
        "kv_events_port": 0,
        "kv_events_replay_port": 0,
        "kv_blocks": 16,
        "context_tokens_max": 256,
        "speed": {"prefill_base_ms": 0.1, "prefill_ms_per_token": 0.001, "step_base_ms": 1.0},
    }
    fleet = EmulatedFleet.model_validate_json(
        json.dumps(
            {"apiVersion": "pdcoord.io/v1alpha1", "kind": "EmulatedFleet", "model": M, "engines": [spec]}
        )
    )
    told = Told()
    async with AsyncExitStack() as stack:
        (engine,), _ = await stack.enter_async_context(running(fleet, fleet.engines))
        client = await stack.enter_async_context(Client())

        async def complete(tokens: range) -> None:
            body = json.dumps({"prompt": list(tokens), "max_tokens": 1}).encode()
            async with await client.request(
                "POST", engine.address, "/v1/completions", body=body, head_timeout_s=10.0
            ) as response:
                await response.read_all(timeout_s=10.0)
                assert response.status == 200

        publisher = engine.host.publisher
        assert publisher is not None
        told.see(endpoint(publisher))
        # What came before anybody listened is replayed.
        await complete(range(1_000, 1_040))
        async with following(told) as feed:
            await until(lambda: told.cached(range(1_000, 1_040)) == 32)
            assert told.trust is Trust.FULL
            await complete(range(1_000, 1_070))
            await until(lambda: told.cached(range(1_000, 1_070)) == 64)
            # 16 blocks: a prompt of 240 tokens evicts what was there.
            await complete(range(5_000, 5_240))
            await until(lambda: told.cached(range(5_000, 5_240)) == 240)
            pool = engine.host.model.pool
            await until(lambda: told.index.block_count == pool.cached_count)
            assert told.cached(range(1_000, 1_070)) < 64
            assert not feed.troubles[Trouble.EVENT_UNREADABLE]


@pytest.mark.parametrize("form", [KvEventForm(), KvEventForm(is_map=False, has_int_hashes=True)])
async def test_what_was_missed_is_replayed(form: KvEventForm) -> None:
    told = Told()
    async with publishing(form=form) as publisher:
        told.see(endpoint(publisher))
        async with following(told) as feed:
            publish(publisher, stored(ONE))
            await until(lambda: told.cached(ONE) == 32)
            publish_unheard(publisher, stored(TWO), BlocksRemoved((block_hash(0, 32),)))
            publish(publisher, stored(THREE))
            await until(lambda: told.cached(THREE) == 64)
            # As if nothing had been missed.
            assert (told.cached(ONE), told.cached(TWO)) == (16, 48)
            assert told.trust is Trust.FULL
            assert not any(isinstance(event, KvLost) for event in told.events)
            assert feed.troubles[Trouble.LOST] == 0


async def test_what_was_missed_at_the_end_is_found_without_another_event() -> None:
    told = Told()
    async with publishing() as publisher:
        told.see(endpoint(publisher))
        async with following(told):
            publish(publisher, stored(ONE))
            await until(lambda: told.cached(ONE) == 32)
            publish_unheard(publisher, AllCleared())
            await until(lambda: told.cached(ONE) == 0)
            assert told.trust is Trust.FULL


async def test_without_replay_a_gap_forgets_and_goes_on() -> None:
    told = Told()
    async with publishing(replay_port=None) as publisher:
        told.see(endpoint(publisher))
        async with following(told) as feed:
            # A PUB drops what comes before it knows of a subscriber.
            async with asyncio.timeout(20.0):
                while not told.cached(ONE):
                    publish(publisher, stored(ONE))
                    await asyncio.sleep(0.02)
            publish_unheard(publisher, AllCleared())
            publish(publisher, stored(TWO))
            await until(lambda: told.cached(TWO) == 48)
            assert told.cached(ONE) == 0
            assert told.trust is Trust.PARTIAL
            assert feed.troubles[Trouble.GAP] == 1


async def test_another_process_at_the_address_begins_anew() -> None:
    told = Told()
    async with publishing() as first:
        ports = port_of(first.address), port_of(first.replay_address)
        told.see(endpoint(first))
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(20.0):
                feed = await stack.enter_async_context(following(told))
            for _ in range(5):
                publish(first, stored(ONE))
            await until(lambda: told.cached(ONE) == 32)
            first._close()
            told.events.clear()
            async with publishing(ports[0] or 0, ports[1]) as second:
                publish(second, stored(TWO))
                await until(lambda: told.cached(TWO) == 48)
                assert told.cached(ONE) == 0
                assert told.trust is Trust.FULL
                assert any(isinstance(event, KvCleared) for event in told.events)
                assert feed.troubles[Trouble.RESTART]


async def test_a_publisher_that_stays_away_is_given_up() -> None:
    told = Told()
    limits = KvEventsLimits(sync_s=0.02, check_s=0.05, lost_s=0.2, replay_s=0.5)
    async with publishing() as publisher:
        told.see(endpoint(publisher))
        async with following(told, limits):
            publish(publisher, stored(ONE))
            await until(lambda: told.cached(ONE) == 32)
            publisher._close()
            await until(lambda: told.trust is not Trust.FULL)
            assert told.cached(ONE) == 0


async def test_an_endpoint_that_goes_is_no_longer_followed() -> None:
    told = Told()
    async with publishing() as publisher:
        told.see(endpoint(publisher))
        async with following(told) as feed:
            publish(publisher, stored(ONE))
            await until(lambda: told.cached(ONE) == 32)
            told.coordinator.handle(EndpointGone(E), 0.0)
            await until(lambda: isinstance(told.events[-1], KvLost))
            taken = feed.batches
            publish(publisher, stored(TWO))
            await asyncio.sleep(0.1)
            assert feed.batches == taken
            told.coordinator.handle(EndpointSeen(endpoint(publisher)), 0.0)
            await until(lambda: told.cached(TWO) == 48)
            assert told.cached(ONE) == 32


async def test_nonsense_is_counted_and_passed_over() -> None:
    told = Told()
    async with publishing() as publisher:
        told.see(endpoint(publisher))
        async with following(told) as feed:
            publish(publisher, stored(ONE))
            await until(lambda: told.cached(ONE) == 32)
            raw = publisher._publisher
            assert raw is not None
            for frames in ([b"kv@x"], [b"kv@x", b"short", b"x"], [b"a", b"b", b"c", b"d"]):
                raw.send_multipart(frames, zmq.NOBLOCK)
            number = publisher._sequence
            publisher._sequence += 1
            publisher._kept.append((number, b"\xc1nonsense"))
            raw.send_multipart([b"kv@x", number.to_bytes(8, "big"), b"\xc1nonsense"], zmq.NOBLOCK)
            publish(publisher, stored(TWO))
            await until(lambda: told.cached(TWO) == 48)
            assert told.cached(ONE) == 32
            assert feed.troubles[Trouble.FRAMES_UNREADABLE] == 3
            assert feed.troubles[Trouble.BATCH_UNREADABLE] == 1


async def test_a_flood_waits_in_the_queue() -> None:
    told = Told()
    limits = KvEventsLimits(sync_s=0.02, blocks_per_s_max=1e-3, burst_blocks_max=100.0)
    async with publishing() as publisher:
        told.see(endpoint(publisher))
        async with following(told, limits) as feed:
            await until(lambda: any(isinstance(event, KvCleared) for event in told.events))
            for number in range(100):
                publish(publisher, stored(range(number * 100, number * 100 + 64)))
            await until(lambda: feed.troubles[Trouble.THROTTLED] > 0)
            for _ in range(20):
                await asyncio.sleep(0.01)
            assert told.index.block_count <= 100


async def test_a_flood_leaves_others_their_turn() -> None:
    told = Told()
    limits = KvEventsLimits(sync_s=0.02)
    async with publishing() as publisher:
        told.see(endpoint(publisher))
        async with following(told, limits) as feed:
            await until(lambda: any(isinstance(event, KvCleared) for event in told.events))
            # All in one batch.
            publish(publisher, *(stored(range(number * 100, number * 100 + 64)) for number in range(1_000)))
            turns = 0
            async with asyncio.timeout(20.0):
                while told.index.block_count < 4_000:
                    turns += told.index.block_count > 0
                    await asyncio.sleep(0)
            assert feed.troubles[Trouble.LOST] == 0
            assert turns > 3


class Flood:
    """Raw payloads from a publisher that has a replay socket, and how often others had a turn meanwhile."""

    def __init__(self, told: Told, publisher: KvEventPublisher) -> None:
        self.told, self.publisher = told, publisher

    def send(self, *events: Any, padding: int = 0) -> None:
        payload = msgspec.msgpack.encode([1.0, [*events], 0, b"x" * padding])
        publisher, number = self.publisher, self.publisher._sequence
        publisher._sequence += 1
        publisher._kept.append((number, payload))
        raw = publisher._publisher
        assert raw is not None
        raw.send_multipart([b"kv@x", number.to_bytes(8, "big"), payload], zmq.NOBLOCK)

    async def turns(self, progress: Callable[[], int], end: int) -> int:
        """Turns of this task while something was done and something was still to do."""
        turns = 0
        async with asyncio.timeout(20.0):
            while progress() < end:
                turns += progress() > 0
                await asyncio.sleep(0)
        return turns


@asynccontextmanager
async def flooding(limits: KvEventsLimits = LIMITS) -> AsyncIterator[tuple[Flood, KvEventsFeed]]:
    told = Told()
    async with publishing() as publisher:
        told.see(endpoint(publisher))
        async with following(told, limits) as feed:
            publish(publisher, stored(ONE))
            await until(lambda: told.cached(ONE) == 32)
            yield Flood(told, publisher), feed


async def test_one_event_of_many_blocks_leaves_others_their_turn() -> None:
    async with flooding() as (flood, _):
        before = flood.told.index.block_count
        flood.send(["BlockStored", list(range(10_000)), None, list(range(10_000)), 1])
        assert await flood.turns(lambda: flood.told.index.block_count - before, 10_000) > 10
        # The next begins where it ended.
        flood.send(["BlockStored", [10_000], 9_999, list(range(10_000, 10_016)), 16])
        await until(lambda: flood.told.cached(range(10_016)) == 10_016)


async def test_events_that_nobody_can_read_leave_others_their_turn_and_are_paid_for() -> None:
    async with flooding() as (flood, feed):
        flood.send(*([None] * 10_000))
        assert await flood.turns(lambda: feed.troubles[Trouble.EVENT_UNREADABLE], 10_000) > 10
    async with flooding(KvEventsLimits(sync_s=0.02, blocks_per_s_max=1e-3, burst_blocks_max=100.0)) as (
        flood,
        feed,
    ):
        flood.send(*([None] * 10_000))
        await until(lambda: feed.troubles[Trouble.THROTTLED] > 0)
        assert feed.troubles[Trouble.EVENT_UNREADABLE] <= 100


async def test_bytes_are_paid_for() -> None:
    async with flooding(KvEventsLimits(sync_s=0.02, blocks_per_s_max=1e-3, burst_blocks_max=100.0)) as (
        flood,
        feed,
    ):
        flood.send(padding=100_000)
        await until(lambda: feed.troubles[Trouble.THROTTLED] > 0)


@pytest.mark.parametrize(
    "events",
    [[["AllBlocksCleared", "CPU"]] * 20_000, [["BlockRemoved", [0] * 20_000]]],
    ids=["events", "blocks"],
)
async def test_a_batch_over_the_bounds_counts_as_lost(events: list[Any]) -> None:
    async with flooding() as (flood, feed):
        flood.send(*events)
        publish(flood.publisher, stored(TWO))
        await until(lambda: flood.told.cached(TWO) == 48)
        assert flood.told.cached(ONE) == 0
        assert flood.told.trust is Trust.PARTIAL
        assert feed.troubles[Trouble.LOST] == 1


@pytest.mark.parametrize("bound", ["payload_bytes_max", "frame_bytes_max"])
async def test_a_payload_over_the_bounds_counts_as_lost(bound: str) -> None:
    limits = replace(LIMITS, replay_s=0.5, lost_s=0.2, payload_bytes_max=2_000, frame_bytes_max=10_000)
    async with flooding(limits) as (flood, feed):
        flood.send(padding=getattr(limits, bound))
        async with asyncio.timeout(20.0):
            # The subscription may have to be made anew, and does not hear what comes before it is.
            while not flood.told.cached(TWO):
                publish(flood.publisher, stored(TWO))
                await asyncio.sleep(0.05)
        assert flood.told.trust is Trust.PARTIAL
        assert feed.troubles[Trouble.LOST]


async def test_a_replay_socket_that_says_nothing_ends_in_time() -> None:
    told = Told()
    context = zmq.asyncio.Context()
    silent = context.socket(zmq.ROUTER)
    port = silent.bind_to_random_port("tcp://127.0.0.1")
    limits = KvEventsLimits(sync_s=0.02, replay_s=0.1, replay_gap_s_min=0.0)
    try:
        async with publishing(replay_port=None) as publisher:
            one = endpoint(publisher)
            told.see(
                Endpoint(E, POOL, one.address, kv_events_port=one.kv_events_port, kv_events_replay_port=port)
            )
            async with following(told, limits) as feed:
                await until(lambda: feed.troubles[Trouble.REPLAY_FAILED] > 0)
                async with asyncio.timeout(20.0):
                    while not told.cached(ONE):
                        publish(publisher, stored(ONE))
                        await asyncio.sleep(0.02)
                assert feed.troubles[Trouble.REPLAY]
    finally:
        context.destroy(linger=0)


async def test_an_address_that_nobody_can_take_does_not_stop_the_feed() -> None:
    told = Told()
    async with publishing() as publisher:
        told.see(endpoint(publisher))
        odd: dict[str, Any] = {"pool": POOL, "address": HostPort("not a host:1"), "kv_events_port": 5}
        told.coordinator.handle(EndpointSeen(Endpoint(EndpointId("odd"), **odd)), 0.0)
        async with following(told):
            publish(publisher, stored(ONE))
            await until(lambda: told.cached(ONE) == 32)
