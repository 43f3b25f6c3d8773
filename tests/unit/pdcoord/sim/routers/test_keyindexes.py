from hypothesis import given
from hypothesis import strategies as st

from pdcoord.sim.routers.keyindexes import ActiveIndex, EventIndex, SentIndex


def test_sent_blocks_are_every_so_many_keys() -> None:
    index = SentIndex(key_tokens=16, block_tokens=64, match_tokens_max=128)
    assert index.block_tokens == 64
    assert list(index.blocks(range(16))) == [3, 7], "four keys a block, and no more than 128 tokens"
    index.record(2, index.blocks(range(16)), blocks_max=10)
    assert index.match(index.blocks([*range(4), 99, 99, 99, 99])) == {2: 1}
    index.forget(2)
    assert index.match([3]) == {}
    assert index.block_count == 0


def test_keys_that_are_coarser_than_blocks_are_the_blocks() -> None:
    index = SentIndex(key_tokens=512, block_tokens=64, match_tokens_max=131_072)
    assert index.block_tokens == 512
    assert list(index.blocks([1, 2])) == [1, 2]


def test_sent_blocks_are_bounded_and_the_front_stays() -> None:
    index = SentIndex(key_tokens=64, block_tokens=64, match_tokens_max=1 << 20)
    index.record(0, index.blocks(range(8)), blocks_max=8)
    index.record(0, index.blocks([100, 101]), blocks_max=8)
    assert index.match(index.blocks(range(8))) == {0: 6}
    assert index.block_count == 8


def test_events_say_who_holds_what() -> None:
    index = EventIndex([10, 10], None)
    index.apply(0, [1, 2, 3], [])
    index.apply(1, [1, 2], [])
    assert index.match([1, 2, 3, 4], 0.0) == {0: 3, 1: 2}
    index.apply(0, [], [2])
    assert index.match([1, 2, 3, 4], 0.0) == {0: 1, 1: 2}
    index.forget(1)
    assert index.match([1, 2], 0.0) == {0: 1}
    index.validate()


def test_a_prediction_counts_until_it_is_due_or_confirmed() -> None:
    index = EventIndex([10], 2.0)
    index.predict(0, [1, 2], 0.0)
    assert index.match([1, 2], 1.9) == {0: 2}
    index.apply(0, [1], [])
    assert index.match([1, 2], 2.0) == {0: 1}, "the first is stored, the second never came"
    index.predict(0, [1, 2], 3.0)
    index.predict(0, [1, 2], 4.0)
    assert index.match([1, 2], 5.5) == {0: 2}, "sent again since"
    assert index.match([1, 2], 6.0) == {0: 1}
    index.validate()


def test_without_a_ttl_nothing_is_predicted() -> None:
    index = EventIndex([10], None)
    index.predict(0, [1], 0.0)
    assert index.match([1], 0.0) == {}


steps = st.lists(
    st.tuples(
        st.sampled_from(["store", "remove", "predict", "forget", "wait"]),
        st.integers(0, 2),
        st.lists(st.integers(0, 12), max_size=8),
    ),
    max_size=40,
)


@given(steps)
def test_the_event_index_agrees_with_itself_and_stays_bounded(
    events: list[tuple[str, int, list[int]]],
) -> None:
    index, now_s = EventIndex([5, 5, 5], 1.0), 0.0
    for kind, place, keys in events:
        match kind:
            case "store":
                index.apply(place, keys, [])
            case "remove":
                index.apply(place, [], keys)
            case "predict":
                index.predict(place, keys, now_s)
            case "forget":
                index.forget(place)
            case _:
                now_s += 0.5
                index.match(keys, now_s)
        index.validate()
        assert index.key_count <= 3 * 2 * 5


def test_an_active_block_counts_once_however_many_share_it() -> None:
    index = ActiveIndex(2)
    index.open(0, [1, 2, 3])
    index.open(0, [1, 2, 4])
    assert index.block_count(0) == 4
    assert index.match([1, 2, 5]) == {0: 2}
    index.close(0, [1, 2, 3])
    assert index.match([1, 2, 3]) == {0: 2}
    index.close(0, [1, 2, 4])
    assert index.block_count(0) == 0
    assert index.match([1]) == {}
