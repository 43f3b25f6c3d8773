"""Block accounting."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdcoord.sim.kvpool import AllCleared, BlocksRemoved, BlocksStored, KvPool
from pdcoord.sim.tokens import BlockHash, chain_hashes, root_hash

ROOT = root_hash("m", "")


def hashes_of(ids: list[int], block_tokens: int = 4) -> list[BlockHash]:
    return chain_hashes(ROOT, ids, block_tokens)


def filled(pool: KvPool, ids: list[int]) -> list[int]:
    """Allocate and store the full blocks of a prompt."""
    hashes = hashes_of(ids)
    blocks = pool.allocate(len(hashes))
    assert blocks is not None
    pool.store(blocks, hashes, None, ids[: 4 * len(hashes)])
    return blocks


def test_released_blocks_are_found_again_until_they_are_evicted() -> None:
    pool = KvPool(4, 4)
    ids = list(range(12))
    blocks = filled(pool, ids)
    pool.release(blocks)
    assert pool.usage == 0.0
    assert pool.match(hashes_of(ids)) == blocks
    assert pool.match(hashes_of([*ids[:8], 99, 99, 99, 99])) == blocks[:2]
    pool.drain_events()
    assert pool.allocate(2) is not None  # One free block, and the tail of the cached chain.
    assert pool.drain_events() == [BlocksRemoved((hashes_of(ids)[2],))]
    assert pool.match(hashes_of(ids)) == blocks[:2]


def test_a_held_or_pinned_block_is_never_evicted() -> None:
    pool = KvPool(4, 4)
    held = filled(pool, list(range(8)))
    pinned = filled(pool, list(range(100, 108)))
    pool.pin(pinned)
    pool.release(pinned)
    assert pool.available_count == 0
    assert pool.allocate(1) is None
    pool.validate(held, pinned)
    pool.unpin(pinned)
    assert pool.available_count == 2


def test_allocation_is_all_or_nothing() -> None:
    pool = KvPool(3, 4)
    assert pool.allocate(4) is None
    assert pool.available_count == 3
    assert pool.allocate(0) == []
    assert pool.allocate(3) is not None
    assert pool.usage == 1.0


def test_a_block_shared_by_two_is_free_when_both_let_go() -> None:
    pool = KvPool(4, 4)
    blocks = filled(pool, list(range(8)))
    pool.hold(blocks)
    pool.release(blocks)
    assert pool.available_count == 2
    pool.release(blocks)
    assert pool.available_count == 4


def test_stored_events_name_the_parent_and_leave_out_what_is_cached_already() -> None:
    pool = KvPool(8, 4)
    ids = list(range(12))
    first = filled(pool, ids[:8])
    (event,) = pool.drain_events()
    hashes = hashes_of(ids)
    assert event == BlocksStored(tuple(hashes[:2]), None, tuple(ids[:8]), 4)
    # The same prompt computed at the same time elsewhere: only its third block is new.
    blocks = pool.allocate(3)
    assert blocks is not None
    pool.store(blocks, hashes, None, ids)
    assert pool.drain_events() == [BlocksStored((hashes[2],), hashes[1], tuple(ids[8:]), 4)]
    pool.release(blocks)
    pool.release(first)
    pool.validate([], [])
    assert pool.match(hashes) == [*first, blocks[2]]


def test_wrong_content_is_remembered_as_long_as_it_can_be_found() -> None:
    pool = KvPool(2, 4)
    hashes = hashes_of(list(range(8)))
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.store(blocks[:1], hashes[:1], None, list(range(4)))
    pool.store(blocks[1:], hashes[1:], hashes[0], list(range(4, 8)), taint=77)
    assert pool.taint_of(blocks[:1]) == 0
    assert pool.taint_of(blocks) == 77
    pool.release(blocks)
    again = pool.allocate(2)
    assert again is not None
    assert pool.taint_of(again) == 0


def test_clearing_forgets_what_is_cached_and_keeps_what_is_held() -> None:
    pool = KvPool(4, 4)
    held, idle = filled(pool, list(range(4))), filled(pool, list(range(50, 54)))
    pool.release(idle)
    pool.drain_events()
    pool.clear_cache()
    assert pool.drain_events() == [AllCleared()]
    assert pool.match(hashes_of(list(range(4)))) == []
    pool.validate(held, [])
    pool.release(held)
    assert pool.available_count == 4


def test_without_caching_nothing_is_found() -> None:
    pool = KvPool(4, 4, is_caching=False)
    blocks = filled(pool, list(range(8)))
    pool.release(blocks)
    assert pool.match(hashes_of(list(range(8)))) == []
    assert pool.drain_events() == []


class PoolMachine(RuleBasedStateMachine):
    """Sequences and leases come and go; every block stays accounted for."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = KvPool(12, 4)
        self.held: list[list[int]] = []
        self.pinned: list[list[int]] = []

    @rule(prompt=st.integers(0, 3), tokens=st.integers(0, 24), tail=st.integers(0, 2))
    def begin(self, prompt: int, tokens: int, tail: int) -> None:
        ids = [prompt * 1_000 + n for n in range(tokens)]
        hashes = hashes_of(ids)
        hit = self.pool.match(hashes)
        before = self.pool.available_count
        self.pool.hold(hit)
        fresh = self.pool.allocate(len(hashes) - len(hit) + tail)
        if fresh is None:
            self.pool.release(hit)
            assert self.pool.available_count == before
            return
        blocks = hit + fresh
        done, parent = len(hit), hashes[len(hit) - 1] if hit else None
        full = blocks[done : len(hashes)]
        self.pool.store(full, hashes[done:], parent, ids[4 * done : 4 * len(hashes)])
        self.held.append(blocks)

    @rule(index=st.integers(0, 20), pins=st.booleans())
    def end(self, index: int, pins: bool) -> None:
        if self.held:
            blocks = self.held.pop(index % len(self.held))
            if pins:
                self.pool.pin(blocks)
                self.pinned.append(blocks)
            self.pool.release(blocks)

    @rule(index=st.integers(0, 20))
    def unpin(self, index: int) -> None:
        if self.pinned:
            self.pool.unpin(self.pinned.pop(index % len(self.pinned)))

    @rule()
    def clear(self) -> None:
        self.pool.clear_cache()

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        taken = {block for blocks in [*self.held, *self.pinned] for block in blocks}
        self.pool.validate(
            (block for blocks in self.held for block in blocks),
            (block for blocks in self.pinned for block in blocks),
        )
        assert self.pool.available_count == 12 - len(taken)
        assert 0.0 <= self.pool.usage <= 1.0
        assert self.pool.pinned_count == len({block for blocks in self.pinned for block in blocks})

    @invariant()
    def events_tell_exactly_what_is_cached(self) -> None:
        # A subscriber that replays the events holds the same hashes.
        mirror: set[BlockHash] = getattr(self, "mirror", set())
        for event in self.pool.drain_events():
            match event:
                case BlocksStored():
                    assert not mirror & set(event.hashes)
                    mirror |= set(event.hashes)
                case BlocksRemoved():
                    assert set(event.hashes) <= mirror
                    mirror -= set(event.hashes)
                case AllCleared():
                    mirror.clear()
        self.mirror = mirror
        assert mirror == set(self.pool._block_of)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
