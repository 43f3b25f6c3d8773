"""Pieces get room in order, whole transfers at a time."""

from transfer.canonical import TokenRange
from transfer.layout import GroupShape, KvLayout, RankLayout
from transfer.plan import staged_heads
from transfer.session.arena import Arena, Share
from transfer.session.cutting import Cutter
from transfer.session.packing import Packing
from transfer.session.staged import Phase, Transfer
from transfer.session.vocabulary import Pack, Proof, TransferId

# 32 bytes a token.
LAYOUT = RankLayout(KvLayout(16), 0, (GroupShape(1, 1, 8, 8),))


def packing(bytes_max: int, arena: Arena | None = None) -> Packing:
    cutter = Cutter(LAYOUT, staged_heads(LAYOUT), 16, 1, window_slack_tokens=0)
    return Packing(LAYOUT, cutter, Share(arena or Arena(bytes_max), bytes_max))


def transfer(name: str, token_count: int) -> Transfer:
    return Transfer(TransferId(name * 32), name, Proof(b"n" * 16, b"p" * 16), token_count, opened_s=0.0)


def compute(own: Transfer, end: int) -> None:
    own.computed_end = end
    own.is_computed = end == own.token_count
    own.tables = (tuple(range(1, -(-end // 16) + 1)),)


def asked(packs: list[Pack]) -> list[tuple[str, TokenRange]]:
    return [(pack.transfer[0], slot.shape.tokens) for pack in packs for slot in pack.slots]


def test_a_prompt_longer_than_one_chunk_is_staged_whole() -> None:
    """vLLM 30419: a prompt past the chunked prefill boundary."""
    own, work = transfer("a", 1000), packing(1 << 20)
    packs: list[Pack] = []
    for end in [*range(48, 1000, 48), 1000]:
        compute(own, end)
        work.add(own, 0.0)
        packs += work.look().packs
        work.validate([own])
    assert [t for _, run in asked(packs) for t in range(run.first, run.end)] == list(range(1000))
    assert len({slot.offset for pack in packs for slot in pack.slots}) == len(packs)


def test_of_two_transfers_the_first_has_its_room_kept_free() -> None:
    one, two, work = transfer("a", 32), transfer("b", 32), packing(1536)
    compute(one, 16)
    compute(two, 32)
    work.add(one, 0.0)
    work.add(two, 0.0)
    assert asked(work.look().packs) == [("a", TokenRange(0, 16))]
    compute(one, 32)
    work.add(one, 0.0)
    assert asked(work.look().packs) == [("a", TokenRange(16, 16))]
    one.packing_count = 0
    for chunk in one.chunks:
        chunk.is_settled = True
    work.validate([one, two])
    work.free(one)
    ordered = work.look()
    assert asked(ordered.packs) == [("b", TokenRange(0, 16)), ("b", TokenRange(16, 16))]
    assert ordered.emptied == [two]


def test_a_withdrawn_transfer_is_promised_only_what_it_holds() -> None:
    one, two, work = transfer("a", 32), transfer("b", 32), packing(1536)
    compute(one, 16)
    compute(two, 16)
    work.add(one, 0.0)
    work.add(two, 0.0)
    work.look()
    one.phase = Phase.ENDING
    work.withdraw(one)
    assert asked(work.look().packs) == [("b", TokenRange(0, 16))], "1024 fit beside the 512 held"
    work.validate([one, two])


def test_a_prompt_that_can_never_fit_is_refused() -> None:
    work = packing(1024)
    assert work.refusal(32) is None
    refusal = work.refusal(33)
    assert refusal is not None
    assert "1056 bytes" in refusal.detail


def test_room_that_the_other_side_holds_is_told() -> None:
    arena = Arena(1024)
    landing = arena.allocate(1024, from_end=True)
    assert landing is not None
    own, work = transfer("a", 32), packing(1024, arena)
    compute(own, 32)
    work.add(own, 0.0)
    ordered = work.look()
    assert ordered.is_crowded
    assert not ordered.packs
    arena.free(landing)
    assert len(work.look().packs) == 2
