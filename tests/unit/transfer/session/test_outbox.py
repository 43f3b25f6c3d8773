"""The rules of the producer's side as transcripts; the numbers in names are those of outbox.py."""

from collections.abc import Sequence
from typing import TypeVar

import pytest

from transfer.canonical import Form, TokenRange
from transfer.errors import Failure, FailureKind, SettingError
from transfer.layout import GroupShape, KvLayout, RankLayout
from transfer.session.arena import Arena
from transfer.session.outbox import Outbox, OutboxLimits
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
    Pack,
    Packed,
    PackFailed,
    Proof,
    RenewAsked,
    SendDenial,
    SendOffer,
    Tables,
    Tick,
    TransferEnded,
    TransferId,
)

ID = TransferId("1" * 32)
OTHER = TransferId("2" * 32)
PROOF = Proof(b"n" * 16, b"p" * 16)
# One layer of one head with 16 elements of 2 bytes: 32 bytes a token, 512 for 16 tokens.
GROUP = GroupShape(1, 1, 8, 8)
LIMITS = OutboxLimits(chunk_tokens_max=16)
KIB = 1024

_Action = TypeVar("_Action", bound=OutboxAction)


class Rank:
    """An Outbox that is validated after every event."""

    def __init__(
        self,
        limits: OutboxLimits = LIMITS,
        *,
        groups: tuple[GroupShape, ...] = (GROUP,),
        layout: KvLayout | None = None,
        rank: int = 0,
        staging_bytes: int = 64 * KIB,
    ) -> None:
        self.arena = Arena(staging_bytes)
        layout = layout or KvLayout(16)
        self.outbox = Outbox(RankLayout(layout, rank, groups), limits, self.arena)
        self.packs: list[Pack] = []

    def tell(self, event: OutboxEvent, now_s: float = 0.0) -> list[OutboxAction]:
        actions = self.outbox.handle(event, now_s)
        self.outbox.validate()
        self.arena.validate()
        self.packs += [a for a in actions if isinstance(a, Pack)]
        return actions

    def pack(self, now_s: float = 0.0) -> list[OutboxAction]:
        """Carry out all Packs that were ordered."""
        actions: list[OutboxAction] = []
        while self.packs:
            order = self.packs.pop(0)
            digests = tuple(b"d" * 16 for _ in order.slots)
            actions += self.tell(Packed(order.transfer, order.chunk, digests), now_s)
        return actions

    def open(self, transfer: TransferId = ID, count: int = 32, now_s: float = 0.0) -> list[OutboxAction]:
        return self.tell(Opened(transfer, f"r{transfer[0]}", PROOF, count), now_s)

    def compute(
        self, first: int, end: int, *, is_last: bool = False, transfer: TransferId = ID, now_s: float = 0.0
    ) -> list[OutboxAction]:
        return self.tell(ChunkComputed(transfer, TokenRange(first, end - first), table(end), is_last), now_s)

    def stage(self, transfer: TransferId = ID, now_s: float = 0.0) -> list[OutboxAction]:
        """A whole prefill of 32 tokens, packed."""
        actions = [*self.open(transfer, now_s=now_s)]
        actions += self.compute(0, 32, is_last=True, transfer=transfer, now_s=now_s)
        return actions + self.pack(now_s)


def table(end: int) -> Tables:
    return (tuple(range(1, -(-end // 16) + 1)),)


def fetch(
    consumer: str = "c",
    transfer: TransferId = ID,
    *,
    proof: Proof = PROOF,
    first: int = 0,
    readers: int = 1,
    is_equal: bool = False,
    wait_s: float = 5.0,
) -> FetchAsked:
    return FetchAsked(consumer, transfer, proof, first, readers, is_equal, wait_s)


def done(consumer: str = "c", transfer: TransferId = ID, readers: int = 1, proof: Proof = PROOF) -> DoneHeard:
    return DoneHeard(consumer, transfer, proof, readers)


def only(actions: Sequence[OutboxAction], kind: type[_Action]) -> list[_Action]:
    return [a for a in actions if isinstance(a, kind)]


def denials(actions: Sequence[OutboxAction]) -> list[tuple[str, FailureKind]]:
    return [(a.consumer, a.failure.kind) for a in only(actions, SendDenial)]


def test_1_to_5_a_prompt_is_staged_offered_and_released() -> None:
    rank = Rank()
    assert rank.open() == []
    [first] = rank.compute(0, 20)[:1]
    assert isinstance(first, Pack)
    assert [p.slots[0].shape.tokens for p in rank.packs] == [TokenRange(0, 16), TokenRange(16, 4)]
    assert rank.tell(fetch()) == []
    [offer] = rank.tell(Packed(ID, 0, (b"d" * 16,)))
    assert isinstance(offer, SendOffer)
    assert (offer.parts[0].shape.tokens, offer.is_last, offer.token_count) == (TokenRange(0, 16), False, 32)
    del rank.packs[0]
    rank.compute(20, 32, is_last=True)
    actions = rank.pack()
    assert [a.is_last for a in only(actions, SendOffer)] == [False, True]
    assert only(actions, BlocksFree) == [BlocksFree("r1")]
    assert rank.tell(done()) == [TransferEnded(ID, None)]
    assert rank.arena.used_bytes == 0


def test_1_a_rank_whose_heads_others_stage_gives_its_blocks_free_at_once() -> None:
    rank = Rank(layout=KvLayout(16, tensor_parallel=4), rank=3)
    assert rank.open() == [BlocksFree("r1"), TransferEnded(ID, None)]
    assert rank.compute(0, 32, is_last=True) == []


def test_1_a_prompt_that_can_never_fit_is_refused_before_its_prefill() -> None:
    rank = Rank(staging_bytes=KIB)
    rank.tell(fetch())
    actions = rank.open(count=33)
    assert denials(actions) == [("c", FailureKind.STAGING_FULL)]
    assert [type(a) for a in actions] == [BlocksFree, TransferEnded, SendDenial]


def test_1_one_transfer_too_many_is_refused() -> None:
    rank = Rank(OutboxLimits(transfers_max=1))
    rank.open()
    actions = rank.open(OTHER)
    assert [a.failure.kind for a in only(actions, TransferEnded) if a.failure] == [FailureKind.OVERLOADED]
    assert denials(rank.tell(fetch(transfer=OTHER))) == [("c", FailureKind.OVERLOADED)]


@pytest.mark.parametrize(
    ("chunks", "tables"),
    [
        ([(0, 16, False), (20, 32, True)], None),
        ([(0, 16, True)], None),
        ([(0, 40, True)], None),
        ([(0, 32, True)], ((),)),
        ([(0, 32, True)], ()),
        ([(0, 32, True)], ((1,),)),
    ],
    ids=["gap", "early end", "too many", "empty blocks", "no tables", "short table"],
)
def test_2_a_prefill_that_is_not_whole_hands_nothing_over(
    chunks: list[tuple[int, int, bool]], tables: Tables | None
) -> None:
    """vLLM 48141, 50297: a preempted last step must not hand over empty blocks."""
    rank = Rank()
    rank.open()
    rank.tell(fetch())
    actions: list[OutboxAction] = []
    for first, end, is_last in chunks:
        own = table(end) if tables is None else tables
        actions += rank.tell(ChunkComputed(ID, TokenRange(first, end - first), own, is_last))
    actions += rank.pack()
    assert denials(actions) == [("c", FailureKind.PACK_FAILED)]
    assert len(only(actions, BlocksFree)) == len(only(actions, TransferEnded)) == 1


def test_2_tokens_computed_again_after_a_preemption_are_staged_once() -> None:
    rank = Rank()
    rank.open()
    rank.compute(0, 20)
    rank.compute(0, 8)
    rank.compute(8, 32, is_last=True)
    tokens = [slot.shape.tokens for order in rank.packs for slot in order.slots]
    assert tokens == [TokenRange(0, 16), TokenRange(16, 4), TokenRange(20, 12)]


def test_3_a_second_prompt_waits_until_all_of_it_fits() -> None:
    rank = Rank(staging_bytes=KIB)
    rank.open()
    rank.compute(0, 16)
    rank.open(OTHER)
    assert rank.compute(0, 16, transfer=OTHER) == [], "the first prompt still needs the room"
    assert rank.outbox.is_reading(["r2"])
    rank.compute(16, 32, is_last=True)
    rank.pack()
    actions = rank.tell(done())
    assert [type(a) for a in actions] == [TransferEnded, Pack]


def test_3_a_prompt_without_room_in_time_is_given_up() -> None:
    rank = Rank(OutboxLimits(chunk_tokens_max=16, staging_wait_s=2.0), staging_bytes=KIB)
    rank.stage()
    rank.open(OTHER)
    rank.tell(fetch(transfer=OTHER))
    rank.compute(0, 32, is_last=True, transfer=OTHER, now_s=1.0)
    assert rank.outbox.deadline_s == 3.0
    actions = rank.tell(Tick(), 3.0)
    assert denials(actions) == [("c", FailureKind.STAGING_FULL)]
    assert only(actions, BlocksFree) == [BlocksFree("r2")]


def test_4_blocks_are_not_free_while_a_pack_reads_them() -> None:
    rank = Rank()
    rank.open()
    rank.compute(0, 20)
    assert rank.tell(Aborted(ID)) == []
    assert rank.outbox.is_reading(["r1"])
    assert rank.tell(Packed(ID, 0, (b"d" * 16,))) == []
    failure = Failure(FailureKind.PREFILL_ABORTED, "the engine gave the prefill up")
    assert rank.tell(PackFailed(ID, 1, "no")) == [BlocksFree("r1"), TransferEnded(ID, failure)]
    assert rank.tell(Packed(ID, 0, (b"d" * 16,))) == [], "a late completion is dropped"


def test_4_a_failed_pack_ends_the_transfer() -> None:
    rank = Rank()
    rank.open()
    rank.tell(fetch())
    rank.compute(0, 32, is_last=True)
    assert denials(rank.tell(PackFailed(ID, 0, "no"))) == [("c", FailureKind.PACK_FAILED)]
    actions = rank.tell(Packed(ID, 1, (b"d" * 16,)))
    assert [type(a) for a in actions] == [BlocksFree, TransferEnded]


def test_4_an_abort_ends_what_is_still_being_packed_and_nothing_later() -> None:
    """The engine could wait no longer: what the Pack reads by now may be another request's."""
    rank = Rank()
    rank.open()
    rank.tell(fetch())
    rank.compute(0, 32, is_last=True)
    assert denials(rank.tell(Aborted(ID))) == [("c", FailureKind.PREFILL_ABORTED)]
    actions = rank.pack()
    assert only(actions, SendOffer) == []
    assert only(actions, BlocksFree) == [BlocksFree("r1")]
    rank.open(OTHER)
    rank.compute(0, 32, transfer=OTHER, is_last=True)
    rank.pack()
    assert rank.tell(Aborted(OTHER)) == []


def test_4_an_abort_ends_pieces_that_still_wait_for_room() -> None:
    """Their blocks are about to be another request's: what would be packed then has a right digest."""
    rank = Rank(OutboxLimits(chunk_tokens_max=16), staging_bytes=KIB)
    rank.open()
    rank.open(OTHER)
    rank.compute(0, 32, is_last=True)
    rank.compute(0, 32, transfer=OTHER, is_last=True)
    failure = Failure(FailureKind.PREFILL_ABORTED, "the engine gave the prefill up")
    assert rank.tell(Aborted(OTHER)) == [BlocksFree("r2"), TransferEnded(OTHER, failure)]
    assert only(rank.pack(), BlocksFree) == [BlocksFree("r1")]


@pytest.mark.parametrize("is_early", [True, False])
@pytest.mark.parametrize(
    ("proof", "kind"),
    [
        (Proof(b"x" * 16, PROOF.prompt_hash), FailureKind.WRONG_NONCE),
        (Proof(PROOF.nonce, b"x" * 16), FailureKind.WRONG_PROMPT),
        (Proof(b"", b""), FailureKind.WRONG_NONCE),
    ],
)
def test_5_a_wrong_proof_gets_nothing(proof: Proof, kind: FailureKind, *, is_early: bool) -> None:
    """vLLM 52234: a ticket of another prompt never returns its KV."""
    rank = Rank()
    actions = rank.tell(fetch(proof=proof)) if is_early else []
    actions += rank.stage()
    actions += [] if is_early else rank.tell(fetch(proof=proof))
    assert denials(actions) == [("c", kind)]
    assert only(actions, SendOffer) == []
    assert rank.tell(done(proof=proof)) == [], "and releases nothing"
    assert rank.outbox.live_count == 1


def test_5_as_many_ranks_as_the_first_one_said_are_let_in() -> None:
    """vLLM 36958: with more ranks than heads every reader counts."""
    rank = Rank()
    rank.stage()
    for consumer in ("a", "b", "c"):
        [offer] = rank.tell(fetch(consumer, readers=3))
        assert isinstance(offer, SendOffer)
    assert denials(rank.tell(fetch("a", readers=3))) == [("a", FailureKind.REPLAYED_TICKET)]
    assert denials(rank.tell(fetch("d", readers=3))) == [("d", FailureKind.REPLAYED_TICKET)]
    assert denials(rank.tell(fetch("d", readers=4))) == [("d", FailureKind.MALFORMED)]
    assert denials(rank.tell(fetch("d", readers=0))) == [("d", FailureKind.MALFORMED)]
    assert rank.tell(done("a", readers=3)) == rank.tell(done("b", readers=3)) == []
    assert rank.tell(done("a", readers=3)) == [], "once each"
    assert rank.tell(done("d", readers=3)) == [], "its place is taken by one that reads"
    assert rank.tell(done("c", readers=3)) == [TransferEnded(ID, None)]


def test_5_a_rank_that_never_fetched_is_done_as_well() -> None:
    """vLLM 56640: a full prefix hit releases the producer."""
    rank = Rank()
    rank.stage()
    assert rank.tell(done()) == [TransferEnded(ID, None)]


def test_5_all_readers_done_before_the_end_of_the_prefill() -> None:
    rank = Rank()
    rank.open()
    rank.compute(0, 16)
    assert rank.tell(done()) == []
    assert rank.pack() == [BlocksFree("r1"), TransferEnded(ID, None)]
    assert rank.compute(16, 32, is_last=True) == []


def test_6_an_early_fetch_is_answered_when_the_transfer_opens() -> None:
    rank = Rank()
    assert rank.tell(fetch()) == []
    actions = rank.stage()
    assert [len(o.parts) for o in only(actions, SendOffer)] == [1, 1]


def test_6_a_release_that_comes_first_is_remembered() -> None:
    rank = Rank()
    rank.tell(fetch())
    assert rank.tell(done()) == []
    assert rank.open() == [BlocksFree("r1"), TransferEnded(ID, None)]
    assert rank.compute(0, 32, is_last=True) == []


def test_6_a_transfer_that_is_never_opened_is_unknown_in_the_end() -> None:
    rank = Rank()
    rank.tell(fetch(wait_s=3.0), 1.0)
    assert rank.outbox.deadline_s == 4.0
    assert rank.tell(Tick(), 3.9) == []
    assert denials(rank.tell(Tick(), 4.0)) == [("c", FailureKind.UNKNOWN_TRANSFER)]
    assert rank.outbox.deadline_s is None


def test_6_waiting_is_bounded_in_number_and_time() -> None:
    rank = Rank(OutboxLimits(early_max=1, early_s_max=2.0))
    rank.tell(fetch("a", wait_s=100.0))
    assert denials(rank.tell(fetch("b"))) == [("b", FailureKind.OVERLOADED)]
    assert rank.outbox.deadline_s == 2.0
    assert denials(rank.tell(Tick(), 2.0)) == [("a", FailureKind.UNKNOWN_TRANSFER)]


def test_6_a_first_part_that_is_not_staged_in_time_is_denied() -> None:
    rank = Rank()
    rank.open()
    rank.tell(fetch(wait_s=3.0))
    assert denials(rank.tell(Tick(), 3.0)) == [("c", FailureKind.STAGING_TIMEOUT)]
    rank.tell(fetch(wait_s=3.0), 3.0)
    rank.compute(0, 16, now_s=4.0)
    assert len(only(rank.pack(4.0), SendOffer)) == 1
    assert denials(rank.tell(Tick(), 60.0)) == [], "only the first part is waited for so long"


def test_6_a_consumer_that_left_is_not_answered() -> None:
    rank = Rank()
    rank.tell(fetch())
    rank.tell(ConsumerGone("c"))
    assert only(rank.stage(), SendOffer) == []


def test_7_the_lease_runs_from_the_last_pack() -> None:
    """vLLM 47021: what is asked for after the lease is not given."""
    rank = Rank(OutboxLimits(lease_s=20.0, prefill_s_max=600.0))
    rank.open()
    rank.compute(0, 16)
    assert rank.tell(Tick(), 500.0) == [], "a prefill that runs has no lease"
    rank.compute(16, 32, is_last=True, now_s=500.0)
    rank.pack(501.0)
    assert rank.outbox.deadline_s == 521.0
    assert denials(rank.tell(fetch(), 521.0)) == [("c", FailureKind.LEASE_EXPIRED)]
    assert rank.arena.used_bytes == 0
    assert denials(rank.tell(fetch(), 600.0)) == [("c", FailureKind.LEASE_EXPIRED)]


def test_7_readers_renew_the_lease_up_to_a_bound() -> None:
    rank = Rank(OutboxLimits(lease_s=20.0, kept_s_max=50.0))
    rank.stage()
    rank.tell(fetch())
    rank.tell(RenewAsked("stranger", (ID, OTHER)), 15.0)
    assert rank.outbox.deadline_s == 20.0
    for now_s in (15.0, 34.0, 49.0):
        assert rank.tell(RenewAsked("c", (ID, OTHER)), now_s) == []
    assert rank.outbox.deadline_s == 50.0
    assert denials(rank.tell(Tick(), 50.0)) == [("c", FailureKind.LEASE_EXPIRED)]


def test_7_a_prefill_that_does_not_end_is_given_up() -> None:
    rank = Rank(OutboxLimits(prefill_s_max=100.0))
    rank.open()
    rank.tell(fetch(wait_s=1000.0))
    actions = rank.tell(Tick(), 100.0)
    assert FailureKind.STAGING_TIMEOUT in {kind for _, kind in denials(actions)}
    assert only(actions, BlocksFree) == [BlocksFree("r1")]


@pytest.mark.parametrize("is_done_first", [True, False])
def test_7_expiry_and_release_in_one_step_end_it_once(*, is_done_first: bool) -> None:
    """vLLM 25067, 25562: both orders of expiry and completion."""
    rank = Rank()
    rank.stage()
    rank.tell(fetch())
    events: list[OutboxEvent] = [done(), Tick()] if is_done_first else [Tick(), done()]
    actions = [a for event in events for a in rank.tell(event, 20.0)]
    [ended] = only(actions, TransferEnded)
    assert (ended.failure is None) is is_done_first
    assert rank.tell(done(), 21.0) == [], "a release after the end is ignored"
    assert rank.arena.used_bytes == 0


def test_8_memory_stays_while_somebody_may_read_it_and_a_dead_reader_is_dropped() -> None:
    rank = Rank(OutboxLimits(lease_s=20.0, grace_s=15.0))
    rank.stage()
    rank.tell(fetch())
    assert [type(a) for a in rank.tell(Tick(), 20.0)] == [SendDenial]
    assert rank.arena.used_bytes > 0
    assert rank.outbox.deadline_s == 35.0
    assert rank.tell(Tick(), 35.0) == [DropConsumer("c")]
    assert rank.outbox.deadline_s is None, "it is dropped once"
    [ended] = rank.tell(ConsumerGone("c"), 36.0)
    assert isinstance(ended, TransferEnded)
    assert rank.arena.used_bytes == 0


def test_8_a_live_reader_frees_the_memory_of_a_failed_transfer() -> None:
    rank = Rank()
    rank.open()
    rank.tell(fetch())
    rank.compute(0, 16)
    rank.pack()
    actions = rank.tell(Aborted(ID))
    assert denials(actions) == [("c", FailureKind.PREFILL_ABORTED)]
    assert only(actions, BlocksFree) == [BlocksFree("r1")]
    assert only(actions, TransferEnded) == []
    assert [type(a) for a in rank.tell(done())] == [TransferEnded]


def test_8_a_reader_that_is_gone_makes_room_for_another() -> None:
    rank = Rank()
    rank.stage()
    rank.tell(fetch("a"))
    rank.tell(ConsumerGone("a"))
    assert len(only(rank.tell(fetch("b")), SendOffer)) == 1


def test_9_a_transfer_that_was_taken_is_not_given_again() -> None:
    rank = Rank()
    rank.stage()
    rank.tell(fetch())
    rank.tell(done())
    assert denials(rank.tell(fetch("d"))) == [("d", FailureKind.REPLAYED_TICKET)]


def test_9_memory_of_ended_transfers_is_bounded() -> None:
    rank = Rank(OutboxLimits(chunk_tokens_max=16, remembered_max=1))
    for transfer in (ID, OTHER):
        rank.stage(transfer)
        rank.tell(done(transfer=transfer))
    assert denials(rank.tell(fetch(transfer=OTHER))) == [("c", FailureKind.REPLAYED_TICKET)]
    assert rank.tell(fetch()) == [], "it is as if it had never been opened"


def test_10_pages_are_staged_for_readers_of_the_same_layout() -> None:
    rank = Rank()
    rank.tell(fetch("a", readers=2, is_equal=True))
    rank.tell(fetch("b", readers=2, is_equal=True))
    rank.open()
    rank.compute(0, 20)
    shapes = [slot.shape for order in rank.packs for slot in order.slots]
    assert [(s.form, s.tokens) for s in shapes] == [(Form.PAGES, TokenRange(0, 16))]
    rank.compute(20, 32, is_last=True)
    assert rank.packs[1].slots[0].shape.tokens == TokenRange(16, 16), "half a page waits for the rest"
    rank.tell(ConsumerGone("b"))
    assert denials(rank.tell(fetch("d", readers=2))) == [("d", FailureKind.IMPOSSIBLE_LAYOUT)]
    rank.pack()
    assert len(only(rank.tell(fetch("d", readers=2, is_equal=True)), SendOffer)) == 1


@pytest.mark.parametrize("is_over", [True, False])
def test_11_a_transfer_opened_twice_is_refused(*, is_over: bool) -> None:
    rank = Rank()
    rank.stage()
    if is_over:
        rank.tell(done())
    actions = rank.tell(Opened(ID, "again", PROOF, 32))
    assert [a.request for a in only(actions, BlocksFree)] == ["again"]
    assert len(only(actions, TransferEnded)) == (1 if is_over else 2)
    assert rank.compute(0, 32, is_last=True) == [], "whose tokens these are cannot be told"
    assert denials(rank.tell(fetch())) == [("c", FailureKind.REPLAYED_TICKET)]


@pytest.mark.parametrize("name", ["lease_s", "chunk_tokens_max", "early_max", "staging_bytes_max"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(SettingError, match=name):
        OutboxLimits(**{name: 0})
