"""Room is never more than there is, and what is given back can be taken again."""

from hypothesis import given
from hypothesis import strategies as st

from pdcoord.wire.room import ByteRoom


@given(st.integers(0, 100), st.lists(st.integers(0, 60), max_size=50))
def test_no_more_is_taken_than_there_is(bytes_max: int, wishes: list[int]) -> None:
    room = ByteRoom(bytes_max)
    taken: list[int] = []
    for wish in wishes:
        if room.take(wish):
            taken.append(wish)
        else:
            assert sum(taken) + wish > bytes_max
            if taken:
                room.give(taken.pop())
        assert room.held_bytes == sum(taken) <= bytes_max
