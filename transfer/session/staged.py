"""One transfer on the producer's side: its pieces, its staged chunks and its readers."""

import hmac
import math
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from transfer.canonical import Form, TokenRange
from transfer.errors import Failure, FailureKind
from transfer.session.vocabulary import (
    FetchAsked,
    Proof,
    SendOffer,
    Slot,
    StagedPart,
    Tables,
    TransferId,
)


class Phase(Enum):
    """Where a transfer stands.

    filling: its prefill runs, or parts of it are not packed yet. kept: all is packed, the lease runs.
    ending: it is over; its memory waits for those that still write or read it.
    """

    FILLING = "filling"
    KEPT = "kept"
    ENDING = "ending"


@dataclass(frozen=True, slots=True)
class Piece:
    """Computed tokens that wait for room in staging."""

    tokens: TokenRange
    queued_s: float


@dataclass(slots=True)
class Chunk:
    """Staged memory of one Pack."""

    offset: int
    slots: tuple[Slot, ...] = ()
    is_settled: bool = False  # The Pack was answered.


@dataclass(slots=True)
class Reader:
    """A consumer rank that was let in.

    Attributes:
        wait_until_s: when it no longer waits for its first part; None once it was offered one.
        sent_count: parts that were offered, or passed over because it does not want them.
        may_read: it was offered memory, so that memory stays until it is done or gone.
        has_all: it was told that no more parts will come.
        was_dropped: its connection was ordered closed.
    """

    first_token: int
    is_layout_equal: bool
    wait_until_s: float | None
    sent_count: int = 0
    may_read: bool = False
    has_all: bool = False
    was_dropped: bool = False


@dataclass(slots=True)
class Transfer:
    """What the Outbox knows of one hand-over.

    Attributes:
        promised_bytes: room in staging that others cannot be promised; what it holds, once no more comes.
        cut_end: tokens before it were cut into pieces.
        computed_end: tokens before it are computed.
        tables: as last told; they cover all tokens so far.
        packing_count: Packs that are not answered yet.
        lease_until_s: in phase kept, when it ends if nobody renews.
        kept_until_s: in phase kept, when it ends in any case.
        drop_at_s: in phase ending, when readers that still hold memory are dropped.
    """

    id: TransferId
    request: str
    proof: Proof
    token_count: int
    opened_s: float
    phase: Phase = Phase.FILLING
    form: Form | None = None
    reader_count: int | None = None
    cut_end: int = 0
    computed_end: int = 0
    is_computed: bool = False
    is_admitted: bool = False
    promised_bytes: int = 0
    tables: Tables = ()
    pieces: deque[Piece] = field(default_factory=deque)
    chunks: list[Chunk] = field(default_factory=list)
    packing_count: int = 0
    parts: list[StagedPart] = field(default_factory=list)
    readers: dict[str, Reader] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    lease_until_s: float = 0.0
    kept_until_s: float = 0.0
    drop_at_s: float = 0.0
    failure: Failure | None = None
    are_blocks_free: bool = False

    @property
    def is_all_done(self) -> bool:
        return self.reader_count is not None and len(self.done) >= self.reader_count

    def refusal(self, proof: Proof) -> Failure | None:
        """Why this proof does not open this transfer; takes the same time wherever it differs."""
        is_nonce_right = hmac.compare_digest(proof.nonce, self.proof.nonce)
        is_prompt_right = hmac.compare_digest(proof.prompt_hash, self.proof.prompt_hash)
        if not is_nonce_right:
            return Failure(FailureKind.WRONG_NONCE, "the ticket is not of this transfer")
        if not is_prompt_right:
            return Failure(FailureKind.WRONG_PROMPT, "the prompt is not the one that was prefilled")
        return None

    def no_place(self, consumer: str, reader_count: int, readers_max: int) -> Failure | None:
        """Why a consumer rank cannot become a reader, or be done without having been one."""
        if not 1 <= reader_count <= readers_max:
            return Failure(FailureKind.MALFORMED, f"reader_count is not in 1..{readers_max}")
        if self.reader_count not in (None, reader_count):
            return Failure(FailureKind.MALFORMED, f"reader_count was {self.reader_count} before")
        if consumer in self.readers or consumer in self.done:
            return Failure(FailureKind.REPLAYED_TICKET, "this rank has fetched it already")
        if len(self.readers) + len(self.done) >= reader_count:
            return Failure(FailureKind.REPLAYED_TICKET, f"all {reader_count} readers have fetched it already")
        return None

    def choose_form(self) -> Form:
        """Pages if every reader is here already and stores its KV as this rank does, else tokens."""
        is_everyone_here = len(self.readers) == self.reader_count
        if is_everyone_here and all(reader.is_layout_equal for reader in self.readers.values()):
            return Form.PAGES
        return Form.TOKENS

    def add_reader(self, event: FetchAsked, until_s: float) -> None:
        self.reader_count = event.reader_count
        self.readers[event.consumer] = Reader(event.first_token, event.is_layout_equal, until_s)

    def offers(self, consumer: str, parts_max: int) -> list[SendOffer]:
        """Offers of what a reader has not been told of yet, at most `parts_max` parts each."""
        reader = self.readers[consumer]
        if reader.has_all:
            return []
        fresh = [p for p in self.parts[reader.sent_count :] if p.shape.tokens.end > reader.first_token]
        reader.sent_count = len(self.parts)
        reader.has_all = self.phase is Phase.KEPT
        reader.may_read = reader.may_read or bool(fresh)
        if fresh or reader.has_all:
            reader.wait_until_s = None
        batches = [tuple(fresh[i : i + parts_max]) for i in range(0, len(fresh), parts_max)]
        if not batches and reader.has_all:
            batches = [()]
        last = len(batches) - 1
        return [
            SendOffer(consumer, self.id, batch, self.token_count, is_last=reader.has_all and i == last)
            for i, batch in enumerate(batches)
        ]

    def deadline_s(self, prefill_s_max: float, staging_wait_s: float) -> float | None:
        """When something is due next."""
        if self.phase is Phase.ENDING:
            is_held = any(not reader.was_dropped for reader in self.readers.values())
            return self.drop_at_s if is_held else None
        due = [r.wait_until_s for r in self.readers.values() if r.wait_until_s is not None]
        if self.phase is Phase.KEPT:
            return min(*due, self.lease_until_s, self.kept_until_s)
        if self.pieces:
            due.append(self.pieces[0].queued_s + staging_wait_s)
        return min(*due, self.opened_s + prefill_s_max, math.inf)

    def validate(self) -> None:
        unsettled = sum(not chunk.is_settled for chunk in self.chunks)
        assert self.packing_count == unsettled, "Packs under way are counted"
        assert not self.are_blocks_free or not (self.packing_count or self.pieces), (
            "blocks that are read are held"
        )
        assert self.cut_end <= self.computed_end, "nothing is cut before it is computed"
        assert not self.done & set(self.readers), "a reader that is done reads no more"
        match self.phase:
            case Phase.FILLING:
                assert not self.is_all_done, "nothing is staged for nobody"
            case Phase.KEPT:
                assert self.are_blocks_free, "all is packed, so the blocks are free"
                assert not self.pieces, "all is packed"
                assert all(r.has_all for r in self.readers.values()), "readers know that all is packed"
            case Phase.ENDING:
                assert not self.pieces, "nothing more is packed"
                assert self.packing_count or self.readers, "an ended transfer waits for somebody"
                assert all(r.may_read for r in self.readers.values()), "only who may read is waited for"
