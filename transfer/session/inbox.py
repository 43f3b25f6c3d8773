"""The consumer's side of one rank: what is loaded, from whom, and how it ends.

1.  A load connects its producer, then fetches from every source it needs heads from. No two loads of one
    transfer are live (REPLAYED_TICKET), nor more than `loads_max` loads (OVERLOADED).
2.  A producer of another epoch than the ticket's is not asked (STALE_EPOCH); one whose ranks do not hold our
    heads once each is released (IMPOSSIBLE_LAYOUT).
3.  Offers are checked before anything is read: a part outside the prompt, the source's heads or its staging
    buffer, of another size, or with a token that came before, ends the load (MALFORMED), and so does a hole
    when all sources have offered their last. Parts that are not needed here are not read.
4.  Parts are read in order of their source's offers, so many at a time, of one source too, and as far as
    there is room to land; then unpacked.
5.  A load succeeds when every token whose block is kept has come, of every head, and is unpacked.
6.  Whatever fails first is what is reported. After that no read begins; the Report waits until nothing of the
    load is unpacked. It does not wait for reads, which write to landing places only and may outlast their
    deadline (NIXL cannot end one): such a place is kept until its read has ended.
7.  A source is told Done when nothing is read from it any more and nothing more will be, however it went.
    A load that ended before its producer was connected leaves a farewell behind: Done is sent when PeerReady
    comes.
8.  A load that needs no token succeeds at once and leaves a farewell: the engine waits for no release.
9.  Every wait is bounded: connecting (HANDSHAKE_TIMEOUT), the load (TRANSFER_TIMEOUT), each read. While a
    load fetches, its sources are told so every `heartbeat_s`, so that their lease outlasts it.
10. Completions of parts that are over, and offers for loads that are gone, are dropped.
"""

from dataclasses import dataclass, fields

from transfer.errors import Failure, FailureKind, FrameError, LayoutError, SettingError
from transfer.layout import RankLayout
from transfer.session.arena import Arena, Share
from transfer.session.bounds import TRANSFERS_PER_RENEWAL_MAX
from transfer.session.loads import Feed, Load, LoadState, Need, Part, PartState, needs_of
from transfer.session.reads import Reads
from transfer.session.vocabulary import (
    Connect,
    Denied,
    InboxAction,
    InboxEvent,
    LoadAsked,
    LoadCancelled,
    Offered,
    PartArrived,
    PartFailed,
    PartUnpacked,
    PeerFailed,
    PeerReady,
    ReadPart,
    Report,
    SendDone,
    SendFetch,
    SendRenewal,
    SourceLost,
    Tick,
    TransferId,
    Unpack,
)


@dataclass(frozen=True, slots=True)
class InboxLimits:
    """Bounds of a consumer's side.

    Attributes:
        loads_max: loads live at a time, and farewells.
        load_s_max: upper bound of LoadAsked.wait_s.
        connect_s_max: longest wait for PeerReady, and longest life of a farewell.
        read_s_max: longest single read.
        heartbeat_s: time between renewals; with `read_s_max` it stays below the lease.
        lease_s: the producer's lease.
        reads_in_flight_max: parts that are read or unpacked at a time.
        reads_per_source_max: those of them from one source, so that a silent one leaves room for others.
        landing_bytes_max: share of the arena for landing; None for all of it.
        parts_max: parts that may be offered for one load.
        room_retry_s: time between two looks for room while the other side of the arena is in the way.

    Raises:
        SettingError: if one is not positive, or a read could outlast the lease.
    """

    loads_max: int = 1024
    load_s_max: float = 600.0
    connect_s_max: float = 5.0
    read_s_max: float = 10.0
    heartbeat_s: float = 5.0
    lease_s: float = 20.0
    reads_in_flight_max: int = 16
    reads_per_source_max: int = 4
    landing_bytes_max: int | None = None
    parts_max: int = 65_536
    room_retry_s: float = 0.05

    def __post_init__(self) -> None:
        for own in fields(self):
            value = getattr(self, own.name)
            if value is not None and value <= 0:
                raise SettingError(own.name, value, "give a positive number")
        if self.heartbeat_s + self.read_s_max >= self.lease_s:
            remedy = f"with read_s_max {self.read_s_max} it must stay below lease_s {self.lease_s}"
            raise SettingError("heartbeat_s", self.heartbeat_s, remedy)


@dataclass(frozen=True, slots=True)
class Farewell:
    """A release that is owed to a producer that is still being connected."""

    asked: LoadAsked
    until_s: float


class Inbox:
    """The machine of a consumer rank; `handle` after every event, `Tick` when `deadline_s` is due.

    Attributes:
        deadline_s: when Tick is due; None while nothing is waited for.
    """

    def __init__(self, layout: RankLayout, limits: InboxLimits, arena: Arena) -> None:
        self.deadline_s: float | None = None
        self._layout = layout
        self._limits = limits
        self._share = Share(arena, limits.landing_bytes_max, from_end=True)
        self._loads: dict[str, Load] = {}
        self._requests: dict[TransferId, str] = {}
        self._farewells: dict[TransferId, Farewell] = {}
        self._connecting: dict[str, float] = {}
        """Addresses that are being connected, and when that is no longer believed."""
        self._reads = Reads(limits.reads_in_flight_max, limits.reads_per_source_max, self._share)
        self._renew_at_s: float | None = None
        self._retry_at_s: float | None = None
        self._actions: list[InboxAction] = []

    @property
    def live_count(self) -> int:
        """Loads that are not reported yet."""
        return len(self._loads)

    @property
    def landing_bytes(self) -> int:
        """Staging memory held, alignment included."""
        return self._share.used_bytes

    def handle(self, event: InboxEvent, now_s: float) -> list[InboxAction]:
        """Take an event; return what is to be done, in order."""
        self._actions = []
        self._take(event, now_s)
        self._expire(now_s)
        self._read(now_s)
        self._renew(now_s)
        self.deadline_s = self._next_deadline()
        return self._actions

    def _take(self, event: InboxEvent, now_s: float) -> None:
        match event:
            case LoadAsked():
                self._ask(event, now_s)
            case LoadCancelled():
                if event.request in self._loads:
                    failure = Failure(FailureKind.CANCELLED, "the engine no longer wants it")
                    self._fail(self._loads[event.request], failure, now_s)
            case PeerReady() | PeerFailed():
                self._meet(event, now_s)
            case Offered() | Denied():
                self._hear(event, now_s)
            case SourceLost():
                self._lose(event, now_s)
            case PartArrived() | PartFailed() | PartUnpacked():
                self._settle_part(event, now_s)
            case Tick():
                pass

    # Connecting.

    def _ask(self, event: LoadAsked, now_s: float) -> None:
        assert event.request not in self._loads, "a request is loaded once at a time"
        needs: tuple[Need, ...] = ()
        failure = None
        try:
            if event.tokens.count > 0:
                needs = needs_of(self._layout, event.tokens, event.tables)
        except LayoutError as error:
            failure = Failure(FailureKind.MALFORMED, str(error))
        needs_nothing = failure is None and not any(need.count for need in needs)
        if event.transfer in self._requests or event.transfer in self._farewells:
            # Its rank is the one reader already; a release now would end the transfer under that.
            if not needs_nothing:
                failure = failure or Failure(FailureKind.REPLAYED_TICKET, "it is being loaded already")
            self._actions.append(Report(event.request, failure, 0))
            return
        if failure is None and not needs_nothing and len(self._loads) >= self._limits.loads_max:
            failure = Failure(FailureKind.OVERLOADED, f"{self._limits.loads_max} loads are live")
        if failure is not None or needs_nothing:
            self._actions.append(Report(event.request, failure, 0))
            if self._leave(event, now_s):
                self._connect(event.address, now_s)
            return
        deadline_s = now_s + min(event.wait_s, self._limits.load_s_max)
        self._loads[event.request] = Load(event, needs, deadline_s, now_s + self._limits.connect_s_max)
        self._requests[event.transfer] = event.request
        self._connect(event.address, now_s)

    def _connect(self, address: str, now_s: float) -> None:
        """Order Connect, unless an order is open."""
        if address not in self._connecting:
            self._connecting[address] = now_s + self._limits.connect_s_max
            self._actions.append(Connect(address))

    def _leave(self, asked: LoadAsked, now_s: float) -> bool:
        """Owe a producer a release, if there is room to remember that; else its lease does it."""
        if len(self._farewells) >= self._limits.loads_max:
            return False
        self._farewells[asked.transfer] = Farewell(asked, now_s + self._limits.connect_s_max)
        return True

    def _meet(self, event: PeerReady | PeerFailed, now_s: float) -> None:
        self._connecting.pop(event.address, None)
        for farewell in [f for f in self._farewells.values() if f.asked.address == event.address]:
            del self._farewells[farewell.asked.transfer]
            if isinstance(event, PeerReady) and farewell.asked.epoch in ("", event.epoch):
                self._actions += [
                    SendDone(source.id, farewell.asked.transfer, farewell.asked.proof, source.reader_count)
                    for source in event.sources
                ]
        for load in list(self._loads.values()):
            if load.state is LoadState.CONNECTING and load.asked.address == event.address:
                if isinstance(event, PeerFailed):
                    self._fail(load, event.failure, now_s)
                else:
                    self._begin(load, event, now_s)

    def _begin(self, load: Load, event: PeerReady, now_s: float) -> None:
        """Fetch from every source."""
        load.state = LoadState.FETCHING
        if load.asked.epoch not in ("", event.epoch):
            failure = Failure(FailureKind.STALE_EPOCH, "the producer was started again since the ticket")
            self._fail(load, failure, now_s)
            return
        load.feeds = {source.id: Feed.of(source) for source in event.sources}
        detail = load.uncovered_heads(self._layout)
        if detail:
            self._fail(load, Failure(FailureKind.IMPOSSIBLE_LAYOUT, detail), now_s)
            return
        if self._renew_at_s is None:
            self._renew_at_s = now_s + self._limits.heartbeat_s
        asked = load.asked
        self._actions += [
            SendFetch(
                source.id,
                asked.transfer,
                asked.proof,
                asked.tokens.first,
                source.reader_count,
                max(load.deadline_s - now_s, 0.0),
            )
            for source in event.sources
        ]

    # Fetching.

    def _hear(self, event: Offered | Denied, now_s: float) -> None:
        load = self._loads.get(self._requests.get(event.transfer, ""))
        feed = load.feeds.get(event.source) if load else None
        if load is None or feed is None or load.state is not LoadState.FETCHING:
            return
        if isinstance(event, Denied):
            if not feed.is_over:
                self._fail(load, event.failure, now_s)
            return
        detail = self._take_offer(load, feed, event)
        if detail:
            self._fail(load, Failure(FailureKind.MALFORMED, detail), now_s)
        else:
            self._advance(load, now_s)

    def _take_offer(self, load: Load, feed: Feed, event: Offered) -> str:
        """Queue what is needed of an offer; what is wrong with it, or empty."""
        if feed.is_last:
            return "an offer after the last one"
        if event.token_count != (feed.token_count or event.token_count):
            return f"a prompt of {event.token_count} tokens that had {feed.token_count}"
        if event.token_count < load.asked.tokens.end:
            return f"a prompt of {event.token_count} tokens where {load.asked.tokens.end} are needed"
        feed.token_count = event.token_count
        feed.offered_count += len(event.parts)
        if feed.offered_count > self._limits.parts_max:
            return f"more than {self._limits.parts_max} parts"
        for offered in event.parts:
            detail = feed.fault(offered, self._layout, event.token_count)
            if detail:
                return f"a part of {detail}"
            try:
                part = load.accept(feed, offered)
            except FrameError as error:
                return str(error)
            if part is not None:
                self._reads.queue(load, part)
        feed.is_last = event.is_last
        return ""

    def _read(self, now_s: float) -> None:
        """Begin the reads that there is room for, of each source in order of its offers."""
        self._retry_at_s = None
        for source in self._reads.sources():
            if not self._read_from(source, now_s):
                return

    def _read_from(self, source: str, now_s: float) -> bool:
        """Begin reads from one source; False if there is no room to land."""
        while (found := self._reads.next(source)) is not None:
            load, part = found
            if not self._share.can_ever_hold(part.offered.length_bytes):
                detail = (
                    f"a part takes {part.offered.length_bytes} bytes, landing has {self._share.bytes_max}"
                )
                self._fail(load, Failure(FailureKind.STAGING_FULL, detail), now_s)
                continue
            landing = self._share.allocate(part.offered.length_bytes)
            if landing is None:
                if self._share.is_crowded or self._reads.is_waiting_for_late:
                    self._retry_at_s = now_s + self._limits.room_retry_s
                return False
            self._reads.begin(load, part, landing)
            self._actions.append(
                ReadPart(
                    load.asked.request,
                    part.index,
                    part.read,
                    source,
                    part.offered.offset,
                    landing,
                    part.offered.length_bytes,
                    min(self._limits.read_s_max, max(load.deadline_s - now_s, 0.0)),
                )
            )
        return True

    def _settle_part(self, event: PartArrived | PartFailed | PartUnpacked, now_s: float) -> None:
        if not isinstance(event, PartUnpacked) and (owed := self._reads.end_late(event.read)) is not None:
            self._actions += owed
            return
        load = self._loads.get(event.request)
        if load is None or not 0 <= event.part < len(load.parts):
            return
        part = load.parts[event.part]
        if isinstance(event, PartArrived) and event.read != part.read:
            return
        match event, part.state:
            case PartArrived(), PartState.READING:
                part.feed.unread_count -= 1
                part.state = PartState.UNPACKING
                self._unpack(load, part)
            case PartUnpacked(), PartState.UNPACKING:
                part.run_index += 1
                if part.run_index < len(part.runs) and load.failure is None:
                    self._unpack(load, part)
                else:
                    load.loaded_bytes += part.offered.length_bytes
                    self._reads.finish(load, part)
            case PartFailed(), PartState.READING | PartState.UNPACKING:
                part.feed.unread_count -= part.state is PartState.READING
                self._reads.finish(load, part)
                self._fail(load, event.failure, now_s)
                return
            case _:
                return
        self._advance(load, now_s)

    def _unpack(self, load: Load, part: Part) -> None:
        self._actions.append(
            Unpack(
                load.asked.request,
                part.index,
                part.offered.shape,
                part.feed.source.layout,
                part.landing,
                part.offered.length_bytes,
                part.offered.digest,
                load.asked.tables,
                part.runs[part.run_index],
            )
        )

    # Ends.

    def _lose(self, event: SourceLost, now_s: float) -> None:
        for load in list(self._loads.values()):
            feed = load.feeds.get(event.source)
            if feed is not None and not feed.is_over:
                feed.is_over = True
                self._fail(load, event.failure, now_s)

    def _fail(self, load: Load, failure: Failure, now_s: float) -> None:
        """The load will end with this failure, if it has none yet."""
        if load.failure is None:
            if load.state is LoadState.CONNECTING and load.asked.address in self._connecting:
                self._leave(load.asked, now_s)
            load.failure = failure
            load.state = LoadState.CLOSING
            load.drop_waiting()
            for part in [part for part in load.parts if part.state is PartState.READING]:
                self._reads.abandon(load, part)
        self._advance(load, now_s)

    def _advance(self, load: Load, now_s: float) -> None:
        """Tell sources that we are done, and report, when that is due."""
        is_all_last = all(feed.is_last for feed in load.feeds.values())
        if load.state is LoadState.FETCHING and load.missing_count and is_all_last:
            detail = f"{load.missing_count} tokens times heads were not offered"
            self._fail(load, Failure(FailureKind.MALFORMED, detail), now_s)
            return
        is_closing = load.state is LoadState.CLOSING or load.missing_count == 0
        for feed in load.feeds.values():
            if not feed.is_over and not feed.unread_count and (is_closing or feed.is_last):
                feed.is_over = True
                source = feed.source
                done = SendDone(source.id, load.asked.transfer, load.asked.proof, source.reader_count)
                self._actions += self._reads.release(done)
        if is_closing and load.is_settled:
            del self._loads[load.asked.request]
            del self._requests[load.asked.transfer]
            self._actions.append(Report(load.asked.request, load.failure, load.loaded_bytes))

    # Time.

    def _expire(self, now_s: float) -> None:
        for load in [x for x in self._loads.values() if x.due_s is not None and x.due_s <= now_s]:
            if load.state is LoadState.CONNECTING:
                failure = Failure(FailureKind.HANDSHAKE_TIMEOUT, "the producer was not connected in time")
            else:
                detail = f"{load.missing_count} tokens times heads were not offered in time"
                failure = Failure(FailureKind.TRANSFER_TIMEOUT, detail)
            self._fail(load, failure, now_s)
        for farewell in [f for f in self._farewells.values() if f.until_s <= now_s]:
            del self._farewells[farewell.asked.transfer]
        # An order that nobody answered in time must not keep the next load from asking again.
        for address in [a for a, until_s in self._connecting.items() if until_s <= now_s]:
            del self._connecting[address]

    def _renew(self, now_s: float) -> None:
        """Tell every source which loads still need it, when the time has come."""
        waiting: dict[str, list[TransferId]] = {}
        if self._renew_at_s is None or not any(load.feeds for load in self._loads.values()):
            self._renew_at_s = None
            return
        if now_s < self._renew_at_s:
            return
        self._renew_at_s = now_s + self._limits.heartbeat_s
        for load in self._loads.values():
            for feed in load.feeds.values():
                if not feed.is_over:
                    waiting.setdefault(feed.source.id, []).append(load.asked.transfer)
        for source, transfers in waiting.items():
            for first in range(0, len(transfers), TRANSFERS_PER_RENEWAL_MAX):
                batch = tuple(transfers[first : first + TRANSFERS_PER_RENEWAL_MAX])
                self._actions.append(SendRenewal(source, batch))

    def _next_deadline(self) -> float | None:
        due = [load.due_s for load in self._loads.values()]
        due += [farewell.until_s for farewell in self._farewells.values()]
        due += self._connecting.values()
        due += [self._renew_at_s, self._retry_at_s]
        return min((at_s for at_s in due if at_s is not None), default=None)

    def validate(self) -> None:
        """Assert what holds between any two events."""
        loads = list(self._loads.values())
        self._share.validate()
        for load in loads:
            load.validate()
        assert self._reads.busy_count == sum(load.busy_count for load in loads), "busy parts are counted"
        assert len(loads) <= self._limits.loads_max, "loads are bounded"
        assert len(self._farewells) <= self._limits.loads_max, "farewells are bounded"
        requests = {load.asked.transfer: request for request, load in self._loads.items()}
        assert self._requests == requests, "each live transfer has its load"
        self._reads.validate(loads)
        assert self.deadline_s == self._next_deadline(), "the next deadline is known"
