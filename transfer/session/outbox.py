"""The producer's side of one rank: what is staged, for whom, and until when.

1.  Opened begins a transfer; what came early for it (6) is answered. A rank that stages none of the heads, or
    whose readers are all done already, gives the blocks free and ends the transfer at once. So does one that
    could never fit (STAGING_FULL) or is one too many (OVERLOADED).
2.  ChunkComputed is cut into pieces at multiples of the chunk size. Tokens that were cut before, as after a
    preemption, are passed over; a gap, an early end or a missing block fails the transfer (PACK_FAILED).
3.  A transfer is admitted when all of it will fit, in order of its first piece, so that two half-staged ones
    never wait for each other. Its pieces get memory in order. A piece that waits too long fails its transfer
    (STAGING_FULL).
4.  BlocksFree comes when nothing more will be packed and no Pack is under way; TransferEnded when its memory
    is free. Each comes once for every Opened.
5.  A fetch is let in with the right nonce and prompt hash, for as many ranks as the first one said, each
    once. It is offered parts as they are packed, the last one marked. A release counts with the same proof;
    when all those ranks have released, the transfer ends.
6.  A fetch or a release of a transfer that is not open waits for it, bounded in number and time
    (UNKNOWN_TRANSFER). A fetch whose first part is not packed in time is denied (STAGING_TIMEOUT).
7.  From the last Pack on the lease runs, renewed by its readers up to a bound (LEASE_EXPIRED). Before that
    only the bound of the prefill holds (STAGING_TIMEOUT).
8.  Memory that was offered to a reader is kept until it is done or gone. If that outlasts the end of the
    transfer by the grace time, its connection is ordered closed: a dead reader pins nothing for ever, a live
    one is never read under.
9.  An ended transfer is remembered, so that a late fetch is told why: as it failed, or REPLAYED_TICKET.
10. Pages form is chosen only if every reader is waiting at the first piece and stores its KV as this rank
    does; one that does not and comes in the place of another is denied (IMPOSSIBLE_LAYOUT).
11. A transfer opened twice is refused, and the first one with it: its chunks could be of either request.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from transfer.canonical import Form
from transfer.errors import Failure, FailureKind, SettingError
from transfer.layout import RankLayout
from transfer.plan import staged_heads
from transfer.session.arena import Arena, Share
from transfer.session.cutting import Cutter
from transfer.session.early import Early, EarlyBook, EndedBook
from transfer.session.packing import Packing
from transfer.session.staged import Phase, Transfer
from transfer.session.vocabulary import (
    Aborted,
    BlocksFree,
    ChunkComputed,
    ConsumerGone,
    DoneHeard,
    DropConsumer,
    FetchAsked,
    Opened,
    OutboxAction,
    OutboxEvent,
    Packed,
    PackFailed,
    RenewAsked,
    SendDenial,
    StagedPart,
    Tick,
    TransferEnded,
    TransferId,
)


@dataclass(frozen=True, slots=True)
class OutboxLimits:
    """Bounds of a producer's side.

    Attributes:
        chunk_tokens_max: tokens of one part at most.
        head_runs: runs into which a rank's heads are cut, so that consumers of more ranks read only theirs.
        lease_s: how long staged KV is kept after the last Pack, and after each renewal.
        kept_s_max: longest time from the last Pack to the end, renewals or not.
        prefill_s_max: longest time from Opened to the last Pack.
        staging_wait_s: longest wait of a piece for room in staging.
        staging_bytes_max: share of the arena that may be staged; None for all of it.
        grace_s: how long after the end of a transfer a reader may hold its memory before it is dropped.
        early_s_max: longest wait of a fetch, and longest memory of a release, for a transfer not yet opened.
        early_max: fetches and releases together that wait for a transfer not yet opened.
        readers_max: ranks of one consumer at most.
        transfers_max: transfers live at a time.
        remembered_max: ended transfers that are remembered.
        window_slack_tokens: tokens before a sliding window that are staged nevertheless: a consumer keeps
            whole blocks, and may ask for less than the whole prompt.
        offer_parts_max: parts of one offer.
        room_retry_s: time between two looks for room while the other side of the arena is in the way.

    Raises:
        SettingError: if one is not positive; slack may be 0.
    """

    chunk_tokens_max: int = 512
    head_runs: int = 1
    lease_s: float = 20.0
    kept_s_max: float = 300.0
    prefill_s_max: float = 600.0
    staging_wait_s: float = 10.0
    staging_bytes_max: int | None = None
    grace_s: float = 15.0
    early_s_max: float = 120.0
    early_max: int = 1024
    readers_max: int = 1024
    transfers_max: int = 1024
    remembered_max: int = 4096
    window_slack_tokens: int = 1024
    offer_parts_max: int = 256
    room_retry_s: float = 0.05

    def __post_init__(self) -> None:
        for own in fields(self):
            value = getattr(self, own.name)
            least = 0 if own.name == "window_slack_tokens" else 1e-9
            if value is not None and value < least:
                raise SettingError(own.name, value, "give a positive number")


class Outbox:
    """The machine of a producer rank; `handle` after every event, `Tick` when `deadline_s` is due.

    Attributes:
        deadline_s: when Tick is due; None while nothing is waited for.
    """

    def __init__(self, layout: RankLayout, limits: OutboxLimits, arena: Arena) -> None:
        self.deadline_s: float | None = None
        self._limits = limits
        self._share = Share(arena, limits.staging_bytes_max)
        cutter = Cutter(
            layout,
            staged_heads(layout),
            limits.chunk_tokens_max,
            limits.head_runs,
            limits.window_slack_tokens,
        )
        self._stages_anything = cutter.stages_anything
        self._packing = Packing(layout, cutter, self._share)
        self._live: dict[TransferId, Transfer] = {}
        self._early = EarlyBook(limits.early_max)
        self._ended = EndedBook(limits.remembered_max)
        self._retry_at_s: float | None = None
        self._actions: list[OutboxAction] = []

    @property
    def live_count(self) -> int:
        """Transfers that are opened and not ended."""
        return len(self._live)

    @property
    def staged_bytes(self) -> int:
        """Staging memory held, alignment included."""
        return self._share.used_bytes

    def is_reading(self, requests: Iterable[str]) -> bool:
        """Whether blocks of any of these requests are being packed, or wait to be.

        A piece that waits for room is packed from the tables as last told. So whoever takes blocks from a
        running prefill (preemption) first waits for this to become false, or aborts the transfer.
        """
        asked = set(requests)
        return any(t.request in asked and (t.packing_count or t.pieces) for t in self._live.values())

    def handle(self, event: OutboxEvent, now_s: float) -> list[OutboxAction]:
        """Take an event; return what is to be done, in order."""
        self._actions = []
        # A release or a renewal that comes together with the end of the lease has come in time.
        if not isinstance(event, DoneHeard | RenewAsked):
            self._expire(now_s)
        self._take(event, now_s)
        self._pump(now_s)
        self.deadline_s = self._next_deadline()
        self._expire(now_s)
        return self._actions

    def _take(self, event: OutboxEvent, now_s: float) -> None:
        match event:
            case Opened():
                self._open(event, now_s)
            case ChunkComputed():
                self._cut(event, now_s)
            case Packed() | PackFailed():
                self._settle_pack(event, now_s)
            case Aborted():
                self._abort(event, now_s)
            case FetchAsked():
                self._fetch(event, now_s)
            case RenewAsked():
                self._renew(event, now_s)
            case DoneHeard():
                self._release(event, now_s)
            case ConsumerGone():
                self._forget(event)
            case Tick():
                pass

    # Prefill and packing.

    def _open(self, event: Opened, now_s: float) -> None:
        live = self._live.get(event.transfer)
        if live is not None or event.transfer in self._ended:
            assert live is None or live.request != event.request, "a request opens its transfer once"
            failure = Failure(FailureKind.REPLAYED_TICKET, "the transfer was opened before")
            if live is not None:
                self._end(live, failure, now_s)
            self._actions += [BlocksFree(event.request), TransferEnded(event.transfer, failure)]
            return
        is_one_too_many = len(self._live) >= self._limits.transfers_max
        transfer = Transfer(event.transfer, event.request, event.proof, event.token_count, now_s)
        self._live[transfer.id] = transfer
        refusal = self._packing.refusal(event.token_count)
        if not self._stages_anything:
            self._end(transfer, None, now_s)
        elif is_one_too_many:
            detail = f"{self._limits.transfers_max} transfers are live"
            self._end(transfer, Failure(FailureKind.OVERLOADED, detail), now_s)
        elif refusal is not None:
            self._end(transfer, refusal, now_s)
        for early in self._early.take(event.transfer):
            self._take(early, now_s)

    def _cut(self, event: ChunkComputed, now_s: float) -> None:
        transfer = self._live.get(event.transfer)
        if transfer is None or transfer.phase is not Phase.FILLING or transfer.is_computed:
            return
        before = transfer.computed_end
        transfer.computed_end = max(before, event.tokens.end)
        transfer.tables = event.tables
        transfer.is_computed = event.is_last
        detail = ""
        if event.tokens.first > before or transfer.computed_end > transfer.token_count:
            detail = f"tokens {event.tokens.first}..{event.tokens.end} do not follow {before}"
        elif event.is_last and transfer.computed_end != transfer.token_count:
            detail = f"the prefill ended at token {transfer.computed_end} of {transfer.token_count}"
        if detail:
            self._end(transfer, Failure(FailureKind.PACK_FAILED, detail), now_s)
            return
        self._packing.add(transfer, now_s)
        self._complete(transfer, now_s)

    def _abort(self, event: Aborted, now_s: float) -> None:
        transfer = self._live.get(event.transfer)
        if transfer is not None and transfer.phase is Phase.FILLING:
            failure = Failure(FailureKind.PREFILL_ABORTED, "the engine gave the prefill up")
            self._end(transfer, failure, now_s)

    def _pump(self, now_s: float) -> None:
        """Order what can be packed; the end of one transfer may make room for the next."""
        while True:
            ordered = self._packing.look()
            self._actions += ordered.packs
            self._retry_at_s = now_s + self._limits.room_retry_s if ordered.is_crowded else None
            for transfer in ordered.emptied:
                self._complete(transfer, now_s)
            for transfer, failure in ordered.failed:
                self._end(transfer, failure, now_s)
            if not ordered.failed:
                return

    def _settle_pack(self, event: Packed | PackFailed, now_s: float) -> None:
        transfer = self._live.get(event.transfer)
        if transfer is None or not 0 <= event.chunk < len(transfer.chunks):
            return
        chunk = transfer.chunks[event.chunk]
        if chunk.is_settled:
            return
        chunk.is_settled = True
        transfer.packing_count -= 1
        if transfer.phase is Phase.ENDING:
            self._settle(transfer)
        elif isinstance(event, PackFailed):
            self._end(transfer, Failure(FailureKind.PACK_FAILED, event.detail), now_s)
        elif len(event.digests) != len(chunk.slots):
            detail = f"{len(event.digests)} digests for {len(chunk.slots)} parts"
            self._end(transfer, Failure(FailureKind.PACK_FAILED, detail), now_s)
        else:
            transfer.parts += [
                StagedPart(slot.shape, slot.offset, slot.length_bytes, digest)
                for slot, digest in zip(chunk.slots, event.digests, strict=True)
            ]
            self._complete(transfer, now_s)
            self._offer(transfer)

    def _complete(self, transfer: Transfer, now_s: float) -> None:
        """If all of the prompt is packed, begin the lease."""
        is_packed = transfer.is_computed and not transfer.pieces and not transfer.packing_count
        if transfer.phase is not Phase.FILLING or not is_packed:
            return
        transfer.phase = Phase.KEPT
        transfer.lease_until_s = now_s + self._limits.lease_s
        transfer.kept_until_s = now_s + self._limits.kept_s_max
        self._packing.withdraw(transfer)
        self._free_blocks(transfer)
        self._offer(transfer)

    def _free_blocks(self, transfer: Transfer) -> None:
        if not transfer.are_blocks_free:
            transfer.are_blocks_free = True
            self._actions.append(BlocksFree(transfer.request))

    # Readers.

    def _offer(self, transfer: Transfer) -> None:
        for consumer in transfer.readers:
            self._actions += transfer.offers(consumer, self._limits.offer_parts_max)

    def _fetch(self, event: FetchAsked, now_s: float) -> None:
        transfer = self._live.get(event.transfer)
        failure: Failure | None
        if event.transfer in self._ended:
            failure = self._ended.answer(event.transfer)
        elif transfer is None:
            until_s = now_s + min(event.wait_s, self._limits.early_s_max)
            failure = self._early.add(Early(event, until_s))
        else:
            failure = transfer.refusal(event.proof) or transfer.no_place(
                event.consumer, event.reader_count, self._limits.readers_max
            )
            if failure is None and transfer.form is Form.PAGES and not event.is_layout_equal:
                detail = "it is staged as pages for readers of the same layout"
                failure = Failure(FailureKind.IMPOSSIBLE_LAYOUT, detail)
            if failure is None:
                transfer.add_reader(event, now_s + min(event.wait_s, self._limits.prefill_s_max))
                self._actions += transfer.offers(event.consumer, self._limits.offer_parts_max)
        if failure is not None:
            self._actions.append(SendDenial(event.consumer, event.transfer, failure))

    def _renew(self, event: RenewAsked, now_s: float) -> None:
        for id_ in event.transfers:
            transfer = self._live.get(id_)
            if transfer is not None and event.consumer in transfer.readers:
                transfer.lease_until_s = max(transfer.lease_until_s, now_s + self._limits.lease_s)

    def _release(self, event: DoneHeard, now_s: float) -> None:
        transfer = self._live.get(event.transfer)
        if transfer is None:
            if event.transfer not in self._ended:
                self._early.add(Early(event, now_s + self._limits.early_s_max))
            return
        if transfer.refusal(event.proof) is not None:
            return
        if event.consumer in transfer.readers:
            del transfer.readers[event.consumer]
        elif transfer.no_place(event.consumer, event.reader_count, self._limits.readers_max) is not None:
            return
        transfer.reader_count = transfer.reader_count or event.reader_count
        transfer.done.add(event.consumer)
        if transfer.phase is Phase.ENDING:
            self._settle(transfer)
        elif transfer.is_all_done:
            self._end(transfer, None, now_s)

    def _forget(self, event: ConsumerGone) -> None:
        self._early.forget(event.consumer)
        for transfer in list(self._live.values()):
            reader = transfer.readers.pop(event.consumer, None)
            if reader is not None and transfer.phase is Phase.ENDING:
                self._settle(transfer)

    # Ends.

    def _end(self, transfer: Transfer, failure: Failure | None, now_s: float) -> None:
        """The transfer is over; its memory goes when nobody writes or reads it any more."""
        if transfer.phase is Phase.ENDING:
            return
        transfer.phase = Phase.ENDING
        transfer.failure = failure
        transfer.drop_at_s = now_s + self._limits.grace_s
        self._ended.add(transfer.id, failure)
        self._packing.withdraw(transfer)
        for consumer, reader in list(transfer.readers.items()):
            self._actions.append(SendDenial(consumer, transfer.id, self._ended.answer(transfer.id)))
            if not reader.may_read:
                del transfer.readers[consumer]
        self._settle(transfer)

    def _settle(self, transfer: Transfer) -> None:
        """Free what an ended transfer no longer needs."""
        if transfer.packing_count:
            return
        self._free_blocks(transfer)
        if not transfer.readers:
            self._packing.free(transfer)
            del self._live[transfer.id]
            self._actions.append(TransferEnded(transfer.id, transfer.failure))

    # Time.

    def _next_deadline(self) -> float | None:
        due = [self._early.deadline_s, self._retry_at_s]
        due += [
            t.deadline_s(self._limits.prefill_s_max, self._limits.staging_wait_s) for t in self._live.values()
        ]
        return min((at_s for at_s in due if at_s is not None), default=None)

    def _expire(self, now_s: float) -> None:
        """Do all that is due, and set `deadline_s` to what comes next."""
        while self.deadline_s is not None and self.deadline_s <= now_s:
            for event in self._early.expire(now_s):
                failure = Failure(FailureKind.UNKNOWN_TRANSFER, "the producer has not opened it in time")
                self._actions.append(SendDenial(event.consumer, event.transfer, failure))
            for transfer in list(self._live.values()):
                self._expire_transfer(transfer, now_s)
            self._pump(now_s)
            self.deadline_s = self._next_deadline()

    def _expire_transfer(self, transfer: Transfer, now_s: float) -> None:
        limits = self._limits
        if transfer.phase is Phase.ENDING:
            if transfer.drop_at_s <= now_s:
                self._drop_readers(transfer)
            return
        for consumer, reader in list(transfer.readers.items()):
            if reader.wait_until_s is not None and reader.wait_until_s <= now_s:
                failure = Failure(FailureKind.STAGING_TIMEOUT, "no part was staged in time")
                self._actions.append(SendDenial(consumer, transfer.id, failure))
                del transfer.readers[consumer]
        if transfer.phase is Phase.KEPT:
            if min(transfer.lease_until_s, transfer.kept_until_s) <= now_s:
                failure = Failure(FailureKind.LEASE_EXPIRED, "its readers were not done in time")
                self._end(transfer, failure, now_s)
        elif transfer.opened_s + limits.prefill_s_max <= now_s:
            detail = f"the prefill was not staged within {limits.prefill_s_max} s"
            self._end(transfer, Failure(FailureKind.STAGING_TIMEOUT, detail), now_s)
        elif transfer.pieces and transfer.pieces[0].queued_s + limits.staging_wait_s <= now_s:
            detail = f"no room in staging within {limits.staging_wait_s} s"
            self._end(transfer, Failure(FailureKind.STAGING_FULL, detail), now_s)

    def _drop_readers(self, transfer: Transfer) -> None:
        for consumer, reader in transfer.readers.items():
            if not reader.was_dropped:
                reader.was_dropped = True
                self._actions.append(DropConsumer(consumer))

    def validate(self) -> None:
        """Assert what holds between any two events."""
        live = list(self._live.values())
        self._early.validate()
        self._ended.validate()
        self._packing.validate(live)
        assert len(live) <= self._limits.transfers_max, "live transfers are bounded"
        for transfer in live:
            transfer.validate()
            is_remembered = transfer.id in self._ended
            assert is_remembered is (transfer.phase is Phase.ENDING), "what is over is remembered"
        assert self.deadline_s == self._next_deadline(), "the next deadline is known"
