"""The pool's tokens: shared keys count once, the oldest idle goes first, and nothing is ever lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.sim.coarse.pool import TokenPool

CHAIN = (1, 2, 3, 4)


def filled(capacity: int = 128) -> TokenPool:
    """A pool in which the chain was computed and released."""
    pool = TokenPool(capacity, 16, 16)
    pool.take(64)
    named: list[int] = []
    pool.name(CHAIN, named)
    pool.release(named, 0, 0)
    return pool


def test_what_was_released_is_found_again_and_counts_as_free() -> None:
    pool = filled()
    assert (pool.held_tokens, pool.idle_tokens, pool.available_tokens, pool.usage) == (0, 64, 128, 0.0)
    assert pool.match(CHAIN, 9) == 4
    assert pool.match((1, 2, 9), 9) == 2
    assert pool.match(CHAIN, 3) == 3
    assert pool.match((9,), 9) == 0
    assert pool.stored == list(CHAIN)
    assert pool.cached_keys() == set(CHAIN)


def test_a_shared_key_counts_once_and_stays_until_its_last_holder_goes() -> None:
    pool = filled()
    pool.hold(CHAIN[:2])
    pool.hold(CHAIN[:2])
    assert (pool.held_tokens, pool.idle_tokens) == (32, 32)
    pool.validate([1, 2, 1, 2], 0)
    pool.unhold(CHAIN[:2])
    assert pool.held_tokens == 32
    pool.unhold(CHAIN[:2])
    assert pool.held_tokens == 0
    pool.validate([], 0)


def test_the_oldest_goes_first_and_of_a_chain_its_tail() -> None:
    pool = filled(capacity=96)
    pool.take(48)
    assert pool.removed == [4]
    pool.take(32)
    assert pool.removed == [4, 3, 2]
    assert pool.match(CHAIN, 9) == 1
    pool.validate([], 80)


def test_a_key_computed_twice_is_named_once() -> None:
    pool = TokenPool(128, 16, 16)
    first: list[int] = []
    second: list[int] = []
    pool.take(64)
    pool.name((1, 2), first)
    pool.name((1, 2, 3), second)
    assert (first, second) == ([1, 2], [3])
    pool.validate([1, 2, 3], 16)
    # What has no name of its own is free at once, not idle.
    pool.release(second, 16, 0)
    assert (pool.held_tokens, pool.idle_tokens) == (32, 16)


def test_a_run_without_keys_is_reclaimed_as_far_as_it_is_left() -> None:
    pool = TokenPool(128, 16, 16)
    pool.take(64)
    run = pool.release((), 64, 48)
    assert run is not None
    assert (pool.held_tokens, pool.idle_tokens, pool.run_tokens(run)) == (0, 48, 48)
    pool.take(96)
    assert pool.run_tokens(run) == 32
    assert pool.reclaim(run) == 32
    assert pool.reclaim(run) == 0
    pool.validate([], 128)


def test_without_caching_nothing_stays() -> None:
    pool = TokenPool(64, 16, 16, is_caching=False)
    named: list[int] = []
    pool.take(32)
    pool.name((1, 2), named)
    assert named == []
    assert pool.release(named, 32, 32) is None
    assert (pool.match((1, 2), 9), pool.idle_tokens, pool.held_tokens) == (0, 0, 0)


def test_keys_count_in_whole_blocks() -> None:
    pool = TokenPool(1_024, 128, 64)
    named: list[int] = []
    pool.take(384)
    pool.name((1, 2, 3, 4, 5), named)
    assert pool.match((1, 2, 3, 4, 5), 9) == 4
    assert pool.match((1,), 9) == 0


@pytest.mark.parametrize("sizes", [(0, 16, 16), (16, 0, 16), (16, 16, 0)])
def test_sizes_are_positive(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        TokenPool(*sizes)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), max_size=60))
def test_every_token_is_accounted_for_whatever_comes(moves: list[tuple[int, int, bool]]) -> None:
    """Sequences over four chains come, name what they compute and go, in any order."""
    pool = TokenPool(16 * 24, 16, 16)
    held: list[tuple[list[int], int]] = []
    for chain, length, goes in moves:
        if goes and held:
            named, own = held.pop(0)
            pool.release(named, own, own // 2 // 16 * 16)
        keys = [chain * 10 + index for index in range(length)]
        hit = keys[: pool.match(keys, length)]
        pool.hold(hit)
        rest = (length - len(hit)) * 16 + 16
        if rest > pool.available_tokens:
            pool.unhold(hit)
            continue
        pool.take(rest)
        named = list(hit)
        pool.name(keys[len(hit) :], named)
        held.append((named, rest - (len(named) - len(hit)) * 16))
        pool.validate((key for keys, _ in held for key in keys), sum(own for _, own in held))
