"""The rules of the consumer's side as transcripts; the numbers in names are those of inbox.py."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import pytest

from transfer.canonical import Form, PartShape, TokenRange, part_bytes
from transfer.errors import Failure, FailureKind, SettingError
from transfer.layout import GroupShape, HeadRange, KvLayout, RankLayout
from transfer.session.arena import Arena
from transfer.session.inbox import Inbox, InboxLimits
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
    Proof,
    ReadPart,
    Report,
    SendDone,
    SendFetch,
    SendRenewal,
    Source,
    SourceLost,
    StagedPart,
    Tick,
    TransferId,
    Unpack,
)

ID = TransferId("1" * 32)
OTHER = TransferId("2" * 32)
PROOF = Proof(b"n" * 16, b"p" * 16)
GROUPS = (GroupShape(1, 2, 8, 8),)
OWN = RankLayout(KvLayout(16), 0, GROUPS)
# Two producer ranks, one head of 32 bytes a token each.
HALVES = [RankLayout(KvLayout(32, tensor_parallel=2), rank, GROUPS) for rank in range(2)]
SOURCES = tuple(Source(f"s{half.rank}", half, 1, 1 << 20) for half in HALVES)
READY = PeerReady("p:1", "e1", SOURCES)
LOST = Failure(FailureKind.PEER_LOST)

_Action = TypeVar("_Action", bound=InboxAction)


class Rank:
    """An Inbox that is validated after every event."""

    def __init__(self, limits: InboxLimits | None = None, *, layout: RankLayout = OWN) -> None:
        self.arena = Arena(1 << 16)
        self.inbox = Inbox(layout, limits or InboxLimits(), self.arena)
        self.reads: dict[tuple[str, int], int] = {}

    def tell(self, event: InboxEvent, now_s: float = 0.0) -> list[InboxAction]:
        if isinstance(event, PartArrived | PartFailed) and not event.read:
            # As the agent answers: with the number of the part's own read, while it is under way.
            event = replace(event, read=self.reads.pop((event.request, event.part), 0))
        actions = self.inbox.handle(event, now_s)
        self.reads.update({(a.request, a.part): a.read for a in actions if isinstance(a, ReadPart)})
        self.inbox.validate()
        self.arena.validate()
        return actions

    def tell_all(self, *events: InboxEvent) -> list[InboxAction]:
        return [action for event in events for action in self.tell(event)]


def load(request: str = "r1", transfer: TransferId = ID, *, count: int = 40, epoch: str = "e1") -> LoadAsked:
    return LoadAsked(
        request, transfer, PROOF, "p:1", epoch, ((1, 2, 3),), TokenRange(40 - count, count), wait_s=30.0
    )


def part(source: int, first: int, end: int) -> StagedPart:
    shape = PartShape(Form.TOKENS, 0, HeadRange(source, 1), TokenRange(first, end - first))
    return StagedPart(shape, first * 32, part_bytes(shape, GROUPS[0], HALVES[source].layout), b"d" * 16)


def offer(source: int, *parts: StagedPart, is_last: bool = True, transfer: TransferId = ID) -> Offered:
    return Offered(f"s{source}", transfer, parts, 40, is_last)


def only(actions: Sequence[InboxAction], kind: type[_Action]) -> list[_Action]:
    return [a for a in actions if isinstance(a, kind)]


def reported(actions: Sequence[InboxAction]) -> list[tuple[str, FailureKind | None]]:
    return [(a.request, a.failure.kind if a.failure else None) for a in only(actions, Report)]


def done_sources(actions: Sequence[InboxAction]) -> list[str]:
    return [a.source for a in only(actions, SendDone)]


def test_1_to_7_a_load_is_fetched_read_unpacked_and_reported() -> None:
    rank = Rank()
    assert rank.tell(load()) == [Connect("p:1")]
    assert rank.tell(READY) == [SendFetch(s.id, ID, PROOF, 0, 1, 30.0) for s in SOURCES]
    [read] = rank.tell(offer(0, part(0, 0, 40)))
    assert isinstance(read, ReadPart)
    assert (read.source, read.remote_offset, read.length_bytes, read.wait_s) == ("s0", 0, 1280, 10.0)
    [unpack, done] = rank.tell(PartArrived("r1", 0, 0))
    assert isinstance(unpack, Unpack)
    assert (unpack.source, unpack.landing, unpack.tokens) == (HALVES[0], read.landing, TokenRange(0, 40))
    assert done == SendDone("s0", ID, PROOF, 1), "the source is free while we unpack"
    assert rank.tell(PartUnpacked("r1", 0)) == []
    rank.tell(offer(1, part(1, 0, 40)))
    rank.tell(PartArrived("r1", 1, 0))
    assert rank.tell(PartUnpacked("r1", 1)) == [Report("r1", None, 2560)]
    assert rank.arena.used_bytes == 0
    assert rank.inbox.live_count == 0


def test_1_loads_of_one_producer_share_the_connect() -> None:
    rank = Rank()
    actions = rank.tell_all(load(), load("r2", OTHER))
    assert actions == [Connect("p:1")]
    assert [a.transfer for a in only(rank.tell(READY), SendFetch)] == [ID, ID, OTHER, OTHER]


def test_1_a_transfer_is_loaded_once_at_a_time() -> None:
    """vLLM 43509: n > 1 fans one ticket out to requests of their own."""
    rank = Rank()
    rank.tell(load())
    assert reported(rank.tell(load("r2"))) == [("r2", FailureKind.REPLAYED_TICKET)]
    assert rank.tell(load("r3", count=0)) == [Report("r3", None, 0)], "no release under the first"
    assert only(rank.tell(READY), SendDone) == []


def test_1_loads_are_bounded() -> None:
    rank = Rank(InboxLimits(loads_max=1))
    rank.tell(load())
    assert reported(rank.tell(load("r2", OTHER))) == [("r2", FailureKind.OVERLOADED)]
    assert [a.transfer for a in only(rank.tell(READY), SendDone)] == [OTHER, OTHER]


def test_1_a_request_is_not_asked_for_twice() -> None:
    rank = Rank()
    rank.tell(load())
    with pytest.raises(AssertionError):
        rank.inbox.handle(load(), 0.0)


def test_2_a_restarted_producer_is_not_asked() -> None:
    """vLLM 49238, 50047: a ticket of before the restart fails, the next one works."""
    rank = Rank()
    rank.tell(load(epoch="e0"))
    actions = rank.tell(READY)
    assert reported(actions) == [("r1", FailureKind.STALE_EPOCH)]
    assert len(actions) == 1
    rank.tell(load("r2"))
    assert len(only(rank.tell(READY), SendFetch)) == 2


def test_2_a_ticket_without_an_epoch_takes_the_producer_as_it_is() -> None:
    rank = Rank()
    rank.tell(load(epoch=""))
    assert len(only(rank.tell(READY), SendFetch)) == 2


@pytest.mark.parametrize(
    "sources",
    [
        (),
        SOURCES[:1],
        (*SOURCES, replace(SOURCES[1], id="s2")),
        (replace(SOURCES[0], layout=RankLayout(KvLayout(16), 0, (GroupShape(1, 2, 8, 4),))),),
    ],
    ids=["none", "a head missing", "a head twice", "another shape"],
)
def test_2_sources_that_do_not_hold_our_heads_once_each_are_released(sources: tuple[Source, ...]) -> None:
    rank = Rank()
    rank.tell(load())
    actions = rank.tell(replace(READY, sources=sources))
    assert reported(actions) == [("r1", FailureKind.IMPOSSIBLE_LAYOUT)]
    assert done_sources(actions) == [s.id for s in sources]


def overlap() -> list[Offered]:
    return [offer(0, part(0, 0, 24), part(0, 23, 40))]


def hole() -> list[Offered]:
    return [offer(0, part(0, 0, 24), part(0, 25, 40)), offer(1, part(1, 0, 40))]


def nothing() -> list[Offered]:
    return [offer(0), offer(1)]


def foreign_head() -> list[Offered]:
    return [offer(0, part(1, 0, 40))]


def beyond_staging() -> list[Offered]:
    return [offer(0, replace(part(0, 0, 40), offset=(1 << 20) - 1279))]


def another_size() -> list[Offered]:
    return [offer(0, replace(part(0, 0, 40), length_bytes=1281))]


def beyond_prompt() -> list[Offered]:
    return [offer(0, part(0, 32, 41))]


def after_last() -> list[Offered]:
    return [offer(0), offer(0, part(0, 0, 40))]


def shorter_prompt() -> list[Offered]:
    return [replace(offer(0), token_count=39)]


def another_prompt() -> list[Offered]:
    return [offer(0, is_last=False), replace(offer(0), token_count=41)]


def too_many() -> list[Offered]:
    return [offer(0, *(part(0, i, i + 1) for i in range(7)))]


@pytest.mark.parametrize(
    "offers",
    [
        overlap,
        hole,
        nothing,
        foreign_head,
        beyond_staging,
        another_size,
        beyond_prompt,
        after_last,
        shorter_prompt,
        another_prompt,
        too_many,
    ],
)
def test_3_offers_that_cannot_be_are_malformed(offers: Callable[[], list[Offered]]) -> None:
    rank = Rank(InboxLimits(parts_max=6))
    actions = rank.tell_all(load(), READY, *offers())
    for read in only(actions, ReadPart):
        actions += rank.tell(PartArrived("r1", read.part, 0))
    assert reported(actions) == [("r1", FailureKind.MALFORMED)]
    assert sorted(done_sources(actions)) == ["s0", "s1"]
    assert rank.arena.used_bytes == 0


def test_3_parts_that_are_not_needed_are_not_read() -> None:
    rank = Rank()
    rank.tell_all(load(count=8), READY)
    reads = only(rank.tell(offer(0, part(0, 0, 32), part(0, 32, 40))), ReadPart)
    assert [r.remote_offset for r in reads] == [32 * 32]


def test_3_tokens_of_blocks_that_are_gone_are_not_needed() -> None:
    rank = Rank()
    rank.tell_all(replace(load(), tables=((0, 2, 3),)), READY)
    [read] = rank.tell(offer(0, part(0, 0, 40)))
    assert isinstance(read, ReadPart)
    [unpack] = only(rank.tell(PartArrived("r1", 0, 0)), Unpack)
    assert unpack.tokens == TokenRange(16, 24)


def test_3_a_part_across_a_hole_in_the_table_is_unpacked_in_runs() -> None:
    rank = Rank()
    rank.tell_all(replace(load(), tables=((1, 0, 3),)), READY, offer(0, part(0, 0, 40)))
    [first] = only(rank.tell(PartArrived("r1", 0, 0)), Unpack)
    [second] = rank.tell(PartUnpacked("r1", 0))
    assert isinstance(second, Unpack)
    assert (first.tokens, second.tokens) == (TokenRange(0, 16), TokenRange(32, 8))


def test_3_tables_without_blocks_for_the_tokens_fall_back() -> None:
    """vLLM 48141, 50297: empty blocks lead to a local prefill."""
    rank = Rank()
    for number, tables in enumerate([((),), (), ((1, 2),)]):
        asked = replace(load(f"r{number}", TransferId(f"{number:032x}")), tables=tables)
        assert reported(rank.tell(asked)) == [(f"r{number}", FailureKind.MALFORMED)]


def test_4_reads_keep_to_their_number_and_to_the_room() -> None:
    rank = Rank(InboxLimits(reads_in_flight_max=2))
    rank.tell_all(load(), READY)
    parts = [part(0, i, i + 8) for i in range(0, 40, 8)]
    assert [r.part for r in only(rank.tell(offer(0, *parts)), ReadPart)] == [0, 1]
    assert only(rank.tell(PartArrived("r1", 1, 0)), ReadPart) == [], "it is still unpacked"
    assert [r.part for r in only(rank.tell(PartUnpacked("r1", 1)), ReadPart)] == [2]
    rank = Rank(InboxLimits(landing_bytes_max=512))
    rank.tell_all(load(), READY)
    assert [r.part for r in only(rank.tell(offer(0, *parts)), ReadPart)] == [0, 1]
    assert rank.inbox.landing_bytes == 512


def test_4_a_part_that_can_never_land_ends_the_load() -> None:
    rank = Rank(InboxLimits(landing_bytes_max=1024))
    actions = rank.tell_all(load(), READY, offer(0, part(0, 0, 40)))
    assert reported(actions) == [("r1", FailureKind.STAGING_FULL)]


def test_4_room_that_the_other_side_holds_is_looked_for_again() -> None:
    rank = Rank()
    staged = rank.arena.allocate(1 << 16)
    assert staged is not None
    rank.tell_all(load(), READY)
    assert rank.tell(offer(0, part(0, 0, 40)), 1.0) == []
    assert rank.inbox.deadline_s == pytest.approx(1.05)
    rank.arena.free(staged)
    assert len(only(rank.tell(Tick(), 1.05), ReadPart)) == 1


@pytest.mark.parametrize(
    "failure",
    [FailureKind.WRONG_DIGEST, FailureKind.UNPACK_FAILED, FailureKind.READ_FAILED],
)
def test_6_the_first_failure_is_reported_and_a_read_under_way_keeps_its_landing(failure: FailureKind) -> None:
    rank = Rank(InboxLimits(reads_in_flight_max=2))
    rank.tell_all(load(), READY, offer(0, part(0, 0, 16), part(0, 16, 32), part(0, 32, 40)))
    if failure is not FailureKind.READ_FAILED:
        rank.tell(PartArrived("r1", 0, 0))
    actions = rank.tell(PartFailed("r1", 0, Failure(failure)))
    assert only(actions, ReadPart) == [], "nothing more is read"
    assert done_sources(actions) == ["s1"]
    assert reported(actions) == [("r1", failure)]
    assert rank.arena.used_bytes == 512, "the other read may still write there"
    late = rank.tell(PartArrived("r1", 1, 0))
    assert late == [SendDone("s0", ID, PROOF, 1)], "nothing more is written, and now nothing is read"
    assert rank.arena.used_bytes == 0


def test_6_blocks_are_given_back_only_when_nothing_writes_to_them() -> None:
    """vLLM 32255: an abort while KV is being written."""
    rank = Rank()
    rank.tell_all(load(), READY, offer(0, part(0, 0, 16), part(0, 16, 40)), PartArrived("r1", 0, 0))
    assert reported(rank.tell(LoadCancelled("r1"))) == [], "the first part is being unpacked"
    assert reported(rank.tell(PartArrived("r1", 1, 0))) == []
    assert reported(rank.tell(PartUnpacked("r1", 0))) == [("r1", FailureKind.CANCELLED)]
    assert rank.arena.used_bytes == 0


def test_6_a_silent_producer_does_not_keep_others_from_reading() -> None:
    """NIXL 1.5.1 cannot end a transfer: the read of a peer that hangs ends when it pleases."""
    rank = Rank(InboxLimits(reads_in_flight_max=4, reads_per_source_max=2))
    rank.tell_all(load(), READY)
    silent = [part(0, i, i + 8) for i in range(0, 40, 8)]
    first = only(rank.tell(offer(0, *silent)), ReadPart)
    assert [r.part for r in first] == [0, 1]
    assert [r.source for r in only(rank.tell(offer(1, part(1, 0, 40))), ReadPart)] == ["s1"]
    assert reported(rank.tell(Tick(), 30.0)) == [("r1", FailureKind.TRANSFER_TIMEOUT)]
    again = rank.tell_all(load(), READY, offer(0, *silent), offer(1, part(1, 0, 40)))
    second = only(again, ReadPart)
    assert {r.landing for r in first}.isdisjoint(r.landing for r in second), "their places are still taken"
    for late in first:
        rank.tell(PartArrived("r1", late.part, late.read))
    assert only(rank.tell(LoadCancelled("r1")), Report) != []
    for late in second:
        rank.tell(PartFailed("r1", late.part, LOST, late.read))
    assert rank.tell(PartFailed("r1", 0, LOST, 99)) == []


@pytest.mark.parametrize("after", range(6))
def test_6_a_load_is_cancelled_in_every_state(after: int) -> None:
    """vLLM 46283: an abort while the KV is on its way is reported once, and leaks nothing."""
    rank = Rank()
    story: list[InboxEvent] = [
        load(),
        READY,
        offer(0, part(0, 0, 16), is_last=False),
        PartArrived("r1", 0, 0),
        PartUnpacked("r1", 0),
        offer(0, part(0, 16, 40)),
    ]
    told = story[: after + 1]
    actions = rank.tell_all(*told, LoadCancelled("r1"), LoadCancelled("r1"))
    # What was on its way still comes; late and doubled completions are dropped (vLLM 43226, 46240).
    late: list[InboxEvent] = [
        READY,
        PartArrived("r1", 0, 0),
        PartUnpacked("r1", 0),
        PartArrived("r1", 1, 0),
        PartUnpacked("r1", 1),
        offer(1, part(1, 0, 40)),
        SourceLost("s0", LOST),
        PartFailed("r1", 0, LOST),
    ]
    actions += rank.tell_all(*late)
    assert reported(actions) == [("r1", FailureKind.CANCELLED)]
    assert sorted(done_sources(actions)) == ["s0", "s1"]
    assert rank.arena.used_bytes == 0
    assert rank.inbox.live_count == 0


def test_6_a_denial_ends_the_load_and_releases_all_sources() -> None:
    rank = Rank()
    rank.tell_all(load(), READY)
    actions = rank.tell(Denied("s1", ID, Failure(FailureKind.LEASE_EXPIRED)))
    assert reported(actions) == [("r1", FailureKind.LEASE_EXPIRED)]
    assert done_sources(actions) == ["s0", "s1"]
    assert rank.tell(Denied("s0", ID, Failure(FailureKind.LEASE_EXPIRED))) == []


def test_6_a_lost_source_ends_the_loads_that_still_need_it() -> None:
    rank = Rank()
    rank.tell_all(load(), READY, offer(0, part(0, 0, 40)), offer(1, part(1, 0, 40)))
    rank.tell(PartArrived("r1", 0, 0))
    assert rank.tell(SourceLost("s0", LOST)) == [], "all it had is here"
    assert rank.tell(SourceLost("s1", LOST)) == [], "what the other gave is being unpacked"
    actions = rank.tell(PartUnpacked("r1", 0))
    assert actions == [Report("r1", LOST, 1280)], "nobody is there to be told"
    assert rank.tell(PartFailed("r1", 1, LOST)) == []
    assert rank.arena.used_bytes == 0


def test_7_a_load_cancelled_while_connecting_still_releases_the_producer() -> None:
    rank = Rank()
    rank.tell(load())
    assert reported(rank.tell(LoadCancelled("r1"))) == [("r1", FailureKind.CANCELLED)]
    assert done_sources(rank.tell(READY)) == ["s0", "s1"]
    assert rank.tell(READY) == []
    assert rank.inbox.deadline_s is None


@pytest.mark.parametrize("answer", [PeerFailed("p:1", LOST), replace(READY, epoch="e2"), None])
def test_7_a_farewell_does_not_wait_for_ever(answer: InboxEvent | None) -> None:
    rank = Rank()
    rank.tell_all(load(), LoadCancelled("r1"))
    assert rank.tell(answer or Tick(), 5.0) == []
    assert rank.tell(READY, 6.0) == []
    assert rank.inbox.deadline_s is None


def test_8_a_load_that_needs_nothing_succeeds_and_releases_the_producer() -> None:
    """vLLM 56640: a full prefix hit is reported and frees the producer, reachable or not."""
    rank = Rank()
    asked = replace(load(count=0), tables=())
    assert rank.tell(asked) == [Report("r1", None, 0), Connect("p:1")]
    assert rank.tell(READY) == [SendDone(s.id, ID, PROOF, 1) for s in SOURCES]
    rank.tell(load("r2", OTHER, count=0))
    assert rank.tell(PeerFailed("p:1", LOST)) == []


@pytest.mark.parametrize(
    "kind",
    [FailureKind.UNREACHABLE, FailureKind.NOT_AUTHENTICATED, FailureKind.VERSION_MISMATCH],
)
def test_9_a_producer_that_cannot_be_connected_fails_its_loads(kind: FailureKind) -> None:
    """vLLM 33745, 41863: a failed handshake is a failed load, no crash."""
    rank = Rank()
    rank.tell_all(load(), load("r2", OTHER))
    actions = rank.tell(PeerFailed("p:1", Failure(kind)))
    assert reported(actions) == [("r1", kind), ("r2", kind)]
    assert rank.tell(load("r3", count=8)) == [Connect("p:1")], "the next load tries again"


def test_9_a_connect_without_an_answer_times_out_and_is_ordered_again() -> None:
    rank = Rank()
    rank.tell(load())
    assert rank.inbox.deadline_s == 5.0
    assert reported(rank.tell(Tick(), 5.0)) == [("r1", FailureKind.HANDSHAKE_TIMEOUT)]
    assert rank.tell(load("r2", OTHER), 5.5) == [Connect("p:1")]


def test_9_a_load_has_a_deadline_and_its_reads_a_shorter_one() -> None:
    rank = Rank()
    rank.tell_all(load(), READY)
    [read] = only(rank.tell(offer(0, part(0, 0, 40)), 27.0), ReadPart)
    assert read.wait_s == 3.0
    assert reported(rank.tell(Tick(), 30.0)) == [("r1", FailureKind.TRANSFER_TIMEOUT)]
    assert rank.arena.used_bytes > 0, "the read has not ended"
    late = rank.tell(PartFailed("r1", 0, Failure(FailureKind.READ_FAILED)), 30.1)
    assert done_sources(late) == ["s0"]
    assert rank.arena.used_bytes == 0


def test_9_waiting_loads_are_renewed_until_their_source_is_over() -> None:
    rank = Rank()
    rank.tell_all(load(), load("r2", OTHER), READY)
    assert rank.tell(Tick(), 4.9) == []
    assert rank.tell(Tick(), 5.0) == [SendRenewal("s0", (ID, OTHER)), SendRenewal("s1", (ID, OTHER))]
    assert rank.inbox.deadline_s == 10.0
    rank.tell(offer(0, part(0, 0, 40)), 6.0)
    rank.tell(PartArrived("r1", 0, 0), 6.0)
    assert rank.tell(Tick(), 10.0) == [SendRenewal("s1", (ID, OTHER)), SendRenewal("s0", (OTHER,))]
    rank.tell(LoadCancelled("r2"), 11.0)
    rank.tell(LoadCancelled("r1"), 11.0)
    rank.tell(PartUnpacked("r1", 0), 11.0)
    assert rank.inbox.deadline_s is None


def test_10_words_for_nobody_are_dropped() -> None:
    rank = Rank()
    strays: list[InboxEvent] = [
        READY,
        PeerFailed("q:1", LOST),
        offer(0, part(0, 0, 40)),
        Denied("s0", ID, LOST),
        SourceLost("s0", LOST),
        PartArrived("r1", 0, 0),
        PartUnpacked("r1", 0),
        PartFailed("r1", 0, LOST),
        LoadCancelled("r1"),
        Tick(),
    ]
    assert rank.tell_all(*strays) == []
    rank.tell_all(load(), READY)
    assert (
        rank.tell_all(PartArrived("r1", 0, 0), replace(offer(0), source="s7"), PartUnpacked("r1", -1)) == []
    )


@pytest.mark.parametrize(
    "given", [{"heartbeat_s": 10.0}, {"read_s_max": 15.0}, {"loads_max": 0}, {"landing_bytes_max": 0}]
)
def test_limits_are_positive_and_reads_end_within_the_lease(given: dict[str, float]) -> None:
    with pytest.raises(SettingError):
        InboxLimits(**given)
