"""What runs in an agent's control thread: the session machines, the side channel, and what they order."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from transfer.agent_state import Counters, Results
from transfer.backends.base import Backend, Piece, ReadReport
from transfer.door import Door, House, Identity
from transfer.errors import Failure, FailureKind, PeerLostError, ReadTimeoutError, TransferError
from transfer.layout import RankLayout
from transfer.links import Link, LinkError, LinkLimits, is_wildcard
from transfer.peers import Peers, PeersSettings
from transfer.probe import PatternServer, Prober, failed_probe, may_ask_probes
from transfer.repack.base import Repacker
from transfer.session.arena import Arena
from transfer.session.inbox import Inbox, InboxLimits
from transfer.session.messages import (
    Denial,
    Done,
    Fetch,
    Message,
    Offer,
    PatternAsk,
    PatternTold,
    ProbeAsk,
    ProbeTold,
    Renewal,
)
from transfer.session.outbox import Outbox, OutboxLimits
from transfer.session.vocabulary import (
    BlocksFree,
    ChunkComputed,
    Connect,
    ConsumerGone,
    DropConsumer,
    InboxAction,
    InboxEvent,
    LoadAsked,
    Opened,
    OutboxAction,
    OutboxEvent,
    Pack,
    Packed,
    PackFailed,
    PartArrived,
    PartFailed,
    PartUnpacked,
    PeerFailed,
    PeerReady,
    ReadPart,
    Report,
    SendDenial,
    SendDone,
    SendFetch,
    SendOffer,
    SendRenewal,
    SourceLost,
    Tick,
    TransferEnded,
    TransferId,
    Unpack,
)
from transfer.session.wire import inbox_event, message_of, outbox_event
from transfer.settings import AgentSettings
from transfer.staging import Staging

_log = logging.getLogger("pdcoord.transfer")
T = TypeVar("T")

SIDE_SHARE = 0.75
"""What offers may hold of the staging memory, and landings too, so that neither keeps the other out."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the control thread is given by the agent around it.

    Attributes:
        call: does something in the control thread, from any; False if it will not be done any more.
        in_worker: does something in a thread that may pack and unpack.
        failed: told, inside an exception handler, of a fault of ours.
    """

    call: Callable[[Callable[[], None]], bool]
    in_worker: Callable[[Callable[[], None]], object]
    results: Results
    counters: Counters
    failed: Callable[[], None]


class Control:
    """Everything of an agent that lives in one event loop; but for `address`, used in its thread only."""

    def __init__(
        self,
        settings: AgentSettings,
        identity: Identity,
        staging: Staging,
        repacker: Repacker,
        backends: Mapping[str, Backend],
        *,
        surroundings: Surroundings,
    ) -> None:
        self._ranks: tuple[str, ...] = ()
        self._settings = settings
        self._repacker = repacker
        self._backends = backends
        self._call = surroundings.call
        self._in_worker = surroundings.in_worker
        self._results = surroundings.results
        self._counters = surroundings.counters
        self._failed = surroundings.failed
        self._arena = Arena(staging.region.length_bytes)
        self._patterns = PatternServer(staging, self._arena, identity.epoch, settings.pattern_bytes)
        share_bytes = int(self._arena.free_bytes * SIDE_SHARE)
        self._outbox = Outbox(repacker.layout, _outbox_limits(settings, share_bytes), self._arena)
        self._inbox = Inbox(repacker.layout, _inbox_limits(settings, share_bytes), self._arena)
        self._ready: dict[TransferId, Callable[[], None] | None] = {}
        self._consumers: dict[str, Link] = {}
        self._pack_waiters: list[tuple[frozenset[str], Future[None]]] = []
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._group: asyncio.TaskGroup | None = None
        self._is_closing = False
        limits = LinkLimits(settings.heartbeat_s, settings.handshake_timeout_s, settings.out_bytes_max)
        house = House(
            identity,
            repacker.layout,
            backends,
            settings.advertise_host,
            staging.region.length_bytes,
            lambda: self._ranks,
        )
        self._door = Door(house, settings.key, limits, settings.connections_max)
        self._peers = Peers(
            identity,
            repacker.layout,
            backends,
            PeersSettings.of(settings, limits),
            spawn=self._spawn,
            hear=self._on_producer_said,
            lost=self._on_producer_lost,
        )
        self._prober = Prober(self._peers, backends, staging, self._patterns, settings.transports)

    @property
    def address(self) -> str:
        host = self._settings.advertise_host
        if is_wildcard(host):
            host = "127.0.0.1"
        return f"[{host}]:{self._door.port}" if ":" in host else f"{host}:{self._door.port}"

    @property
    def staging_used_bytes(self) -> int:
        """Held by offers and landings, without what probes have for good."""
        return self._arena.used_bytes - self._patterns.reserved_bytes

    @property
    def offered_count(self) -> int:
        return self._outbox.live_count

    async def run(self, stop: asyncio.Event, started: Callable[[], None]) -> None:
        """Listen and serve until `stop`.

        Raises:
            SettingError: in a group of one, if the address cannot be listened on.
        """
        settings, layout = self._settings, self._repacker.layout
        async with asyncio.TaskGroup() as self._group:
            try:
                await self._door.open(settings.listen_host, settings.port_of_rank(layout.rank), self._serve)
                if not self._ranks and layout.layout.tensor_parallel == 1:
                    self._ranks = (self.address,)
                started()
                await stop.wait()
            finally:
                self._is_closing = True
                for timer in self._timers.values():
                    timer.cancel()
                for _, waiter in self._pack_waiters:
                    waiter.cancel()
                await self._door.close()
                # Backends forget the peers of links that end, so that reads under way end soon.
                for task in list(self._tasks):
                    task.cancel()

    def set_ranks(self, addresses: tuple[str, ...]) -> None:
        """Side channel addresses of the engine's ranks, by rank."""
        self._ranks = addresses

    def probe_into(self, told: "Future[ProbeTold]", address: str, timeout_s: float) -> None:
        """Probe a producer and put into `told` how it went."""
        answers: list[ProbeTold] = []

        async def work() -> None:
            answers.append(await self._prober.probe(address, timeout_s))

        def ended(_: object) -> None:
            closed = failed_probe(address, FailureKind.CLOSED, "the transfer agent has stopped")
            told.set_result(answers[0] if answers else closed)

        self._spawn(work()).add_done_callback(ended)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        assert self._group is not None, "the agent runs"
        task = self._group.create_task(self._watched(work))
        self._tasks.add(task)

        def ended(_: object) -> None:
            self._tasks.discard(task)
            work.close()  # One that was cancelled before its first step has not begun it.

        task.add_done_callback(ended)
        return task

    async def _watched(self, work: Coroutine[Any, Any, object]) -> None:
        try:
            await work
        except Exception:  # noqa: BLE001  # a fault of ours must not hang the engine
            self._failed()
        finally:
            work.close()

    # Machines.

    def tell_outbox(self, event: OutboxEvent) -> None:
        if self._is_closing:
            return
        for action in self._outbox.handle(event, time.monotonic()):
            self._do_outbox(action)
        self._arm("outbox", self._outbox.deadline_s, lambda: self.tell_outbox(Tick()))
        if self._pack_waiters:
            self._release_pack_waiters()

    def tell_inbox(self, event: InboxEvent) -> None:
        if self._is_closing:
            return
        for action in self._inbox.handle(event, time.monotonic()):
            self._do_inbox(action)
        self._arm("inbox", self._inbox.deadline_s, lambda: self.tell_inbox(Tick()))

    def stage(self, chunk: ChunkComputed, ready: Callable[[], None] | None) -> None:
        """See `Agent.stage`."""
        if chunk.transfer in self._ready:
            self._ready[chunk.transfer] = ready or self._ready[chunk.transfer]
        self.tell_outbox(chunk)

    def open(self, opened: Opened) -> None:
        """See `Agent.open`."""
        self._ready.setdefault(opened.transfer, None)
        self.tell_outbox(opened)

    def load(self, asked: LoadAsked) -> None:
        """See `Agent.load`."""
        self._peers.hint(asked.address, asked.epoch)
        self.tell_inbox(asked)

    def _arm(self, name: str, deadline_s: float | None, tick: Callable[[], None]) -> None:
        """Have a machine ticked in time; a timer that comes too early for it costs less than a new one."""
        timer = self._timers.get(name)
        if deadline_s is None or (timer is not None and timer.when() <= deadline_s):
            return
        if timer is not None:
            timer.cancel()
        # An event loop's clock is time.monotonic.
        self._timers[name] = asyncio.get_running_loop().call_at(deadline_s, self._tick, name, tick)

    def _tick(self, name: str, tick: Callable[[], None]) -> None:
        del self._timers[name]
        self._call(tick)

    def _do_outbox(self, action: OutboxAction) -> None:
        match action:
            case Pack():
                self._pack(action)
            case SendOffer() | SendDenial():
                consumer = self._consumers.get(action.consumer)
                if consumer is not None:
                    consumer.send(message_of(action))
            case BlocksFree(request):
                self._results.free(request)
            case TransferEnded(transfer, failure):
                self._ready.pop(transfer, None)
                self._counters.ended(failure)
            case DropConsumer(consumer_id):
                link = self._consumers.get(consumer_id)
                if link is None:  # Its end was told too early for the machine to have made sense of it.
                    self._call(lambda: self.tell_outbox(ConsumerGone(consumer_id)))
                else:
                    link.end(FailureKind.LEASE_EXPIRED, "it holds memory of a transfer that is over")

    def _do_inbox(self, action: InboxAction) -> None:
        match action:
            case Connect(address):
                self._spawn(self._connect(address))
            case SendFetch() | SendDone() | SendRenewal():
                link = self._peers.link(action.source)
                if link is not None:  # Else its end is told to the machine as well.
                    link.send(message_of(action))
            case ReadPart():
                self._read(action)
            case Unpack():
                self._unpack(action)
            case Report():
                if action.failure is not None and action.failure.kind is not FailureKind.CANCELLED:
                    _log.warning("a prompt's KV did not come, it is computed here: %s", action.failure)
                self._counters.loaded(action)
                self._results.report(action)

    # Packing and unpacking.

    def _pack(self, order: Pack) -> None:
        ready = self._ready.get(order.transfer)

        def work() -> OutboxEvent:
            began_s = time.perf_counter()
            try:
                if ready is not None:
                    ready()
                digests = self._repacker.pack(order.slots, order.tables)
            except Exception as error:  # noqa: BLE001  # whatever a device or an engine raises
                _log.warning("a chunk could not be packed", exc_info=True)
                return PackFailed(order.transfer, order.chunk, _detail(error))
            packed_bytes = sum(slot.length_bytes for slot in order.slots)
            self._counters.packed(packed_bytes, time.perf_counter() - began_s)
            return Packed(order.transfer, order.chunk, digests)

        self._work(work, self.tell_outbox)

    def _unpack(self, order: Unpack) -> None:
        def work() -> InboxEvent:
            began_s = time.perf_counter()
            try:
                is_right = self._repacker.unpack(order)
            except Exception as error:  # noqa: BLE001  # whatever a device or an engine raises
                _log.warning("a part could not be unpacked", exc_info=True)
                failure = Failure(FailureKind.UNPACK_FAILED, _detail(error))
                return PartFailed(order.request, order.part, failure)
            if not is_right:
                failure = Failure(FailureKind.WRONG_DIGEST, f"part {order.part} is not as it was packed")
                return PartFailed(order.request, order.part, failure)
            self._counters.unpacked(order.length_bytes, time.perf_counter() - began_s)
            return PartUnpacked(order.request, order.part)

        self._work(work, self.tell_inbox)

    def _work(self, work: Callable[[], T], tell: Callable[[T], None]) -> None:
        def run() -> None:
            event = work()
            self._call(lambda: tell(event))

        self._in_worker(run)

    def wait_for_packs(self, names: frozenset[str], waiter: "Future[None]") -> None:
        """Resolve `waiter` when no blocks of these requests are read any more."""
        self._pack_waiters.append((names, waiter))
        self._release_pack_waiters()

    def _release_pack_waiters(self) -> None:
        still: list[tuple[frozenset[str], Future[None]]] = []
        for names, waiter in self._pack_waiters:
            if self._outbox.is_reading(names):
                still.append((names, waiter))
            elif waiter.set_running_or_notify_cancel():
                waiter.set_result(None)
        self._pack_waiters = still

    # Consumers, who have dialled.

    async def _serve(self, link: Link) -> None:
        self._consumers[link.id] = link
        try:
            await self._watched(link.run(lambda message: self._on_consumer_said(link, message)))
        finally:
            del self._consumers[link.id]
            self._call(lambda: self.tell_outbox(ConsumerGone(link.id)))

    def _on_consumer_said(self, link: Link, message: Message) -> None:
        layout = link.peer.layout
        match message:
            case Renewal(transfers=()):
                pass  # A sign of life.
            case Fetch() | Renewal() | Done() if layout is not None:
                is_equal = _is_layout_equal(layout, self._repacker.layout)
                event = outbox_event(link.id, message, is_layout_equal=is_equal)
                self.tell_outbox(event)
            case PatternAsk(length_bytes=length_bytes) if layout is not None:
                link.send(self._patterns.tell(length_bytes))
            case ProbeAsk() if may_ask_probes(link, self._settings.key):
                self._spawn(self._probe_for(link, message))
            case _:
                link.end(FailureKind.MALFORMED, f"a {type(message).__name__} is not for this side to hear")

    async def _probe_for(self, link: Link, ask: ProbeAsk) -> None:
        link.send(await self._prober.probe(ask.address, ask.timeout_s))

    # Producers, whom we have dialled.

    async def _connect(self, address: str) -> None:
        try:
            group = await self._peers.connect(address)
        except LinkError as error:
            self.tell_inbox(PeerFailed(address, error.failure))
        else:
            if group.is_open:
                self.tell_inbox(PeerReady(address, group.epoch, group.sources))
            else:  # The end of its links was told before, when no load knew of them.
                lost = Failure(FailureKind.PEER_LOST, f"{address} was lost as soon as it was connected")
                self.tell_inbox(PeerFailed(address, lost))

    def _on_producer_lost(self, link: Link, failure: Failure) -> None:
        self._prober.lost(link, failure)
        self.tell_inbox(SourceLost(link.id, failure))

    def _on_producer_said(self, link: Link, message: Message) -> None:
        match message:
            case Renewal():
                pass  # A sign of life.
            case Offer() | Denial():
                self.tell_inbox(inbox_event(link.id, message))
            case PatternTold():
                self._prober.heard(link, message)
            case _:
                link.end(FailureKind.MALFORMED, f"a {type(message).__name__} is not for this side to hear")

    def _read(self, order: ReadPart) -> None:
        link = self._peers.link(order.source)
        backend = None if link is None else self._backends.get(link.peer.backend)
        if backend is None:
            lost = Failure(FailureKind.PEER_LOST, "the side channel is closed")
            self._call(lambda: self.tell_inbox(PartFailed(order.request, order.part, lost, order.read)))
            return
        piece = Piece(order.remote_offset, order.landing, order.length_bytes)
        future = backend.read(order.source, (piece,), timeout_s=order.wait_s)
        future.add_done_callback(
            lambda done: self._call(lambda: self.tell_inbox(self._read_end(order, done)))
        )

    def _read_end(self, order: ReadPart, done: "Future[ReadReport]") -> InboxEvent:
        error = done.exception()
        if error is not None:
            link = self._peers.link(order.source)
            if link is not None and isinstance(error, PeerLostError):
                # The transport has lost it while the side channel lives: only a new connection mends that.
                link.end(FailureKind.PEER_LOST, _detail(error))
            return PartFailed(order.request, order.part, _read_failure(error), order.read)
        report = done.result()
        self._counters.read(report.read_bytes, report.moved_s)
        return PartArrived(order.request, order.part, order.read)


def _read_failure(error: BaseException) -> Failure:
    kind = FailureKind.READ_FAILED
    if isinstance(error, PeerLostError):
        kind = FailureKind.PEER_LOST
    elif isinstance(error, ReadTimeoutError):
        kind = FailureKind.TRANSFER_TIMEOUT
    return Failure(kind, _detail(error))


def _detail(error: BaseException) -> str:
    """Of errors that are not our own only the kind is told: their text may hold anything."""
    return str(error) if isinstance(error, TransferError) else type(error).__name__


def _is_layout_equal(theirs: RankLayout, own: RankLayout) -> bool:
    """Whether pages can be taken over as they are."""
    return (theirs.layout, theirs.rank, theirs.groups, theirs.scales) == (
        own.layout,
        own.rank,
        own.groups,
        own.scales,
    )


def _outbox_limits(settings: AgentSettings, share_bytes: int) -> OutboxLimits:
    return OutboxLimits(
        staging_bytes_max=share_bytes,
        chunk_tokens_max=settings.chunk_tokens_max,
        head_runs=settings.head_runs,
        lease_s=settings.lease_s,
        transfers_max=settings.transfers_max,
    )


def _inbox_limits(settings: AgentSettings, share_bytes: int) -> InboxLimits:
    return InboxLimits(
        landing_bytes_max=share_bytes,
        loads_max=settings.transfers_max,
        # A renewal and the longest read after it fit into a lease.
        heartbeat_s=min(settings.heartbeat_s, settings.lease_s / 4),
        read_s_max=min(settings.transfer_timeout_s, settings.lease_s / 2),
        lease_s=settings.lease_s,
        connect_s_max=2 * settings.handshake_timeout_s,
    )
