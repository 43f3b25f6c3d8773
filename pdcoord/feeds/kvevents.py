"""Follows every engine's KV events over ZMQ and tells the coordinator what they say of its cache."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from pdcoord.core.fleet import Endpoint, EndpointId
from pdcoord.core.kvcache import KvCleared, KvLost
from pdcoord.core.ports import Handler
from pdcoord.feeds.kvdecode import BatchError, BatchTooLargeError, open_batch, pieces
from pdcoord.feeds.kvsequence import (
    Action,
    Batch,
    BatchSequence,
    Clear,
    Count,
    Deliver,
    Lose,
    Replay,
    Trouble,
)

END_OF_REPLAY = b"\xff" * 8
"""The number -1, which ends a replay (vLLM 0.32)."""

BATCHES_PER_TURN = 64
"""Batches read before others have their turn: a socket does not wait where something is there."""

BLOCKS_PER_TURN = 256
"""Blocks taken in before others have their turn: about a millisecond's work."""

BYTES_PER_BLOCK = 512
"""Of a payload, read or not, that cost as much as a block on top of what is in it."""


@dataclass(frozen=True, slots=True)
class KvEventsLimits:
    """Bounds on what following costs and on what one endpoint may do to it.

    Attributes:
        sync_s: how often the endpoints are asked for.
        check_s: how often a publisher with a replay socket is asked whether it is the same and all was heard.
        retry_s: wait before a broken subscription is made anew.
        lost_s: without a connection for so long, what is known of the endpoint is given up, and it is
            subscribed to anew.
        queue_batches_max: batches waiting to be read; ZMQ drops the rest, which shows as a gap.
        payload_bytes_max: of one batch; a larger one is not read, and all before it counts as lost.
        frame_bytes_max: at a larger one ZMQ gives the connection up for good; another is made after `lost_s`.
        blocks_per_s_max: blocks of 16 tokens of one endpoint taken in; past it the queue fills. Larger blocks
            count as several, events without blocks or that cannot be read as one each, and so do every
            batch and every 512 bytes of it.
        burst_blocks_max: blocks taken in at once before that counts.
        replay_s: the whole of one replay.
        replay_gap_s_min: between the ends of two series of replays of one endpoint.
        replay_batches_max, replay_bytes_max: of one replay; a larger one counts as failed.
        replays_max: at a time, of all endpoints.
        endpoints_max: followed at a time; the rest is not.
    """

    sync_s: float = 1.0
    check_s: float = 30.0
    retry_s: float = 1.0
    lost_s: float = 30.0
    queue_batches_max: int = 10_000
    payload_bytes_max: int = 2 << 20
    frame_bytes_max: int = 8 << 20
    blocks_per_s_max: float = 50_000.0
    burst_blocks_max: float = 100_000.0
    replay_s: float = 20.0
    replay_gap_s_min: float = 1.0
    replay_batches_max: int = 20_000
    replay_bytes_max: int = 256 << 20
    replays_max: int = 4
    endpoints_max: int = 2_000


class _Source(NamedTuple):
    """Whom to listen to."""

    id: EndpointId
    host: str
    port: int
    replay_port: int | None


@dataclass(slots=True)
class KvEventsFeed:
    """Turns the KV events of all endpoints that publish them into signals.

    Attributes:
        endpoints: asked again every `sync_s`, so the fleet may change at any time; those without a
            kv_events_port are passed over.
        clock: monotonic seconds.
        troubles: how often what went wrong, over all endpoints.
        batches: taken in, over all endpoints.
    """

    handler: Handler
    endpoints: Callable[[], Iterable[Endpoint]]
    clock: Callable[[], float]
    limits: KvEventsLimits = field(default_factory=KvEventsLimits)
    troubles: Counter[Trouble] = field(default_factory=Counter)
    batches: int = 0

    async def run(self) -> None:
        """Follow until cancelled."""
        context = zmq.asyncio.Context()
        followed: dict[_Source, asyncio.Task[None]] = {}
        replays = asyncio.Semaphore(self.limits.replays_max)
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    wanted = set(self._sources())
                    self._drop(followed, wanted)
                    for source in wanted - followed.keys():
                        follower = _Follower(self, source, context, replays)
                        followed[source] = group.create_task(follower.run())
                    await asyncio.sleep(self.limits.sync_s)
        finally:
            context.destroy(linger=0)

    def _drop(self, followed: dict[_Source, asyncio.Task[None]], wanted: set[_Source]) -> None:
        """Stop following; what was known grows stale from now on."""
        heard = {source.id for source in wanted}
        for source in followed.keys() - wanted:
            followed.pop(source).cancel()
            if source.id not in heard:
                self.handler.handle(KvLost(source.id))

    def _sources(self) -> Iterable[_Source]:
        """Whom to follow; the host is the address's, in brackets if it is IPv6, as ZMQ wants it too."""
        count = 0
        for endpoint in self.endpoints():
            port = endpoint.kv_events_port
            if port is None or count >= self.limits.endpoints_max:
                continue
            count += 1
            host, _, _ = endpoint.address.rpartition(":")
            yield _Source(endpoint.id, host, port, endpoint.kv_events_replay_port)


class _Follower:
    """One endpoint's subscription, made anew whenever it breaks."""

    def __init__(
        self,
        feed: KvEventsFeed,
        source: _Source,
        context: zmq.asyncio.Context,
        replays: asyncio.Semaphore,
    ) -> None:
        self._feed = feed
        self._limits = feed.limits
        self._source = source
        self._context = context
        self._replays = replays
        self._sequence = BatchSequence(has_replay=source.replay_port is not None)
        self._blocks_left = feed.limits.burst_blocks_max
        self._refilled_s = feed.clock()
        self._replay_at_s = feed.clock()
        self._since_yield = 0
        self._gone_s: float | None = feed.clock()

    async def run(self) -> None:
        while True:
            try:
                async with self._subscribed() as (socket, monitor):
                    await self._listen(socket, monitor)
            except (zmq.ZMQError, TimeoutError):
                # Out of sockets, or an address that no socket takes: that may change.
                self._note_gone()
            await asyncio.sleep(self._limits.retry_s)

    @asynccontextmanager
    async def _subscribed(self) -> AsyncIterator[tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]]:
        socket = self._socket(zmq.SUB)
        try:
            monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
            try:
                socket.set(zmq.SUBSCRIBE, b"")
                socket.connect(f"tcp://{self._source.host}:{self._source.port}")
                yield socket, monitor
            finally:
                socket.disable_monitor()
                monitor.close(linger=0)
        finally:
            socket.close(linger=0)

    def _socket(self, kind: int) -> zmq.asyncio.Socket:
        limits = self._limits
        socket = self._context.socket(kind)
        is_replay = kind == zmq.DEALER
        options = {
            zmq.LINGER: 0,
            zmq.IPV6: 1,
            zmq.RCVHWM: limits.replay_batches_max if is_replay else limits.queue_batches_max,
            zmq.MAXMSGSIZE: limits.frame_bytes_max,
            zmq.RECONNECT_IVL: 200,
            zmq.RECONNECT_IVL_MAX: 5_000,
            # A peer that vanished without a word is gone after two of these.
            zmq.HEARTBEAT_IVL: 5_000,
            zmq.HEARTBEAT_TIMEOUT: 10_000,
        }
        for option, value in options.items():
            socket.set(option, value)
        return socket

    async def _listen(self, socket: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket) -> None:
        """Read what comes until nothing can, and see to it in time where nothing does."""
        poller = zmq.asyncio.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        check_at_s = self._feed.clock() + self._limits.check_s
        while True:
            wait_s = max(0.0, min(check_at_s - self._feed.clock(), self._limits.lost_s))
            async with asyncio.timeout(wait_s + 60.0):
                ready = dict(await poller.poll(wait_s * 1e3))
            if monitor in ready:
                await self._take_change(await self._receive(monitor))
            if socket in ready:
                await self._read(socket)
                await asyncio.sleep(0)
            now_s = self._feed.clock()
            if self._gone_s is not None:
                if self._note_gone():
                    return
            elif now_s >= check_at_s:
                await self._do(self._sequence.check())
            if now_s >= check_at_s:
                check_at_s = self._feed.clock() + self._limits.check_s

    async def _receive(self, socket: zmq.asyncio.Socket) -> list[bytes]:
        async with asyncio.timeout(self._limits.replay_s):
            return await socket.recv_multipart()

    async def _take_change(self, frames: Sequence[bytes]) -> None:
        event = parse_monitor_message([*frames])["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._gone_s = None
            await self._do(self._sequence.connected())
        elif self._gone_s is None:
            self._gone_s = self._feed.clock()

    def _note_gone(self) -> bool:
        """Whether it has been gone for so long that another subscription is called for."""
        now_s = self._feed.clock()
        if self._gone_s is None:
            self._gone_s = now_s
        if now_s - self._gone_s < self._limits.lost_s:
            return False
        self._gone_s = now_s
        if self._sequence.next_number is not None:
            self._sequence = BatchSequence(has_replay=self._source.replay_port is not None)
            self._feed.troubles[Trouble.LOST] += 1
            self._feed.handler.handle(KvLost(self._source.id))
        return True

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        for _ in range(BATCHES_PER_TURN):
            try:
                frames = await socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            batch = _batch(frames[1:]) if len(frames) == 3 else None
            if batch is None:
                self._feed.troubles[Trouble.FRAMES_UNREADABLE] += 1
                await self._pay(1 + sum(map(len, frames)) // BYTES_PER_BLOCK)
                continue
            await self._do(self._sequence.received(batch))

    async def _do(self, actions: Sequence[Action]) -> None:
        """Carry out what the sequence asks for; a replay leads to more."""
        waiting = list(actions)
        if waiting and isinstance(waiting[-1], Replay):
            await asyncio.sleep(max(0.0, self._replay_at_s - self._feed.clock()))
            self._replay_at_s = self._feed.clock() + self._limits.replay_gap_s_min
        while waiting:
            again: Replay | None = None
            for action in waiting:
                match action:
                    case Deliver(payload):
                        await self._deliver(payload)
                    case Clear():
                        self._feed.handler.handle(KvCleared(self._source.id))
                    case Lose():
                        self._feed.handler.handle(KvLost(self._source.id))
                    case Count(trouble):
                        self._feed.troubles[trouble] += 1
                    case Replay():
                        again = action
            if again is None:
                return
            found = await self._replay(again.first)
            waiting = self._sequence.replay_failed() if found is None else self._sequence.replayed(found)

    async def _deliver(self, payload: bytes) -> None:
        """Tell the coordinator of one batch, and give way to others in between."""
        self._feed.batches += 1
        try:
            await self._take_in(payload)
        except BatchTooLargeError:
            # It could have told of anything, and a replay would bring the same.
            self._feed.troubles[Trouble.BATCH_UNREADABLE] += 1
            self._feed.troubles[Trouble.LOST] += 1
            self._feed.handler.handle(KvLost(self._source.id))
        except BatchError:
            self._feed.troubles[Trouble.BATCH_UNREADABLE] += 1

    async def _take_in(self, payload: bytes) -> None:
        await self._pay(1 + len(payload) // BYTES_PER_BLOCK)
        if len(payload) > self._limits.payload_bytes_max:
            raise BatchTooLargeError("the payload is over its bound")
        batch = open_batch(payload)
        if len(payload) >= BLOCKS_PER_TURN * BYTES_PER_BLOCK:
            await asyncio.sleep(0)
        for signal, blocks in pieces(batch, self._source.id):
            if signal is None:
                self._feed.troubles[Trouble.EVENT_UNREADABLE] += 1
            else:
                self._feed.handler.handle(signal)
            await self._pay(blocks)

    async def _pay(self, blocks: int) -> None:
        """Wait where the endpoint has had more than its rate."""
        limits = self._limits
        now_s = self._feed.clock()
        earned = (now_s - self._refilled_s) * limits.blocks_per_s_max
        self._refilled_s = now_s
        before = self._blocks_left
        self._blocks_left = min(limits.burst_blocks_max, before + earned) - blocks
        if self._blocks_left < 0:
            self._feed.troubles[Trouble.THROTTLED] += 1
            await asyncio.sleep(-self._blocks_left / limits.blocks_per_s_max)
        self._since_yield += blocks
        if self._since_yield >= BLOCKS_PER_TURN:
            self._since_yield = 0
            await asyncio.sleep(0)

    async def _replay(self, first: int) -> list[Batch] | None:
        """All batches from a number on that the publisher still has; None if it did not say in time."""
        port = self._source.replay_port
        assert port is not None, "a replay without a socket"
        try:
            async with asyncio.timeout(self._limits.replay_s), self._replays:
                return await self._ask(f"tcp://{self._source.host}:{port}", first)
        except (TimeoutError, zmq.ZMQError):
            return None

    async def _ask(self, address: str, first: int) -> list[Batch] | None:
        """Ask as vLLM 0.32 has it: `[b"", first]` is answered by `[b"", topic, number, payload]` of each.

        Earlier versions leave out the topic.
        """
        socket = self._socket(zmq.DEALER)
        try:
            socket.connect(address)
            await socket.send_multipart([b"", first.to_bytes(8, "big")])
            found: list[Batch] = []
            size = 0
            while True:
                frames = await socket.recv_multipart()
                if len(frames) not in {3, 4} or len(found) >= self._limits.replay_batches_max:
                    return None
                if frames[-2] == END_OF_REPLAY:
                    return found
                batch = _batch(frames[-2:])
                size += len(frames[-1])
                if batch is None or size > self._limits.replay_bytes_max:
                    return None
                if batch.number >= first and (not found or batch.number > found[-1].number):
                    found.append(batch)
                if len(found) % BATCHES_PER_TURN == 0:
                    await asyncio.sleep(0)
        finally:
            socket.close(linger=0)


def _batch(frames: Sequence[bytes]) -> Batch | None:
    number, payload = frames
    return Batch(int.from_bytes(number, "big"), payload) if len(number) == 8 else None
