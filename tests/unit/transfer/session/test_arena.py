"""The staging allocator against a plain model of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.errors import SettingError
from transfer.session.arena import Arena, Share


@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(1, 3000), st.booleans()),
            st.integers(0, 50),
        ),
        max_size=80,
    )
)
def test_pieces_never_overlap_and_all_comes_back(steps: list[tuple[int, bool] | int]) -> None:
    arena = Arena(8192)
    held: dict[int, int] = {}
    for step in steps:
        if isinstance(step, tuple):
            length, from_end = step
            offset = arena.allocate(length, from_end=from_end)
            if offset is not None:
                assert offset % 256 == 0
                assert offset + length <= arena.capacity
                assert all(offset >= o + n or o >= offset + length for o, n in held.items())
                held[offset] = length
            elif not held:
                assert length > arena.capacity, "an empty arena has room for all that fits"
        elif held:
            offset = sorted(held)[step % len(held)]
            del held[offset]
            arena.free(offset)
        arena.validate()
        assert arena.used_bytes == sum(arena.rounded(n) for n in held.values())
    for offset in list(held):
        arena.free(offset)
    arena.validate()
    assert arena.allocate(arena.capacity) == 0


def test_the_two_ends_keep_apart() -> None:
    arena = Arena(1024)
    assert arena.allocate(1) == 0
    assert arena.allocate(1, from_end=True) == 768
    assert arena.allocate(512) == 256
    assert arena.allocate(1) is None


@pytest.mark.parametrize("capacity", [0, -1, 255])
def test_a_buffer_without_room_for_a_piece_is_refused(capacity: int) -> None:
    with pytest.raises(SettingError, match="staging_bytes"):
        Arena(capacity)


def test_a_piece_is_freed_once() -> None:
    arena = Arena(1024)
    arena.allocate(10)
    arena.free(0)
    with pytest.raises(AssertionError):
        arena.free(0)


def test_a_share_keeps_its_bound_and_tells_whose_fault_a_lack_of_room_is() -> None:
    arena = Arena(1024)
    one, other = Share(arena, 512), Share(arena, from_end=True)
    assert one.allocate(512) == 0
    assert one.allocate(1) is None
    assert not one.is_crowded, "its own bound is in the way"
    assert other.allocate(512) == 512
    one.free(0)
    assert other.allocate(257) == 0
    assert one.allocate(257) is None
    assert one.is_crowded, "the other side is in the way"
    assert not one.can_ever_hold(513)
    one.validate()
    other.validate()
