"""Who reads what from whom: every wanted head exactly once, and both sides count readers alike."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.errors import LayoutError
from transfer.layout import GroupShape, HeadRange, KvLayout, RankLayout
from transfer.plan import SourceNeed, sources_of, staged_heads, wanted_heads

MLA = GroupShape(2, 1, 576, 0)
HEADS = (1, 2, 4, 8)


def heads_shape(kv_heads: int) -> GroupShape:
    return GroupShape(2, kv_heads, 64, 64)


def can_share(kv_heads: int, ranks: int) -> bool:
    return kv_heads % ranks == 0 or ranks % kv_heads == 0


def ranks_of(groups: tuple[GroupShape, ...], tensor_parallel: int) -> list[RankLayout]:
    layout = KvLayout(16, tensor_parallel=tensor_parallel)
    return [RankLayout(layout, rank, groups) for rank in range(tensor_parallel)]


def heads_in(ranges: list[HeadRange]) -> list[int]:
    return sorted(head for found in ranges for head in range(found.first, found.end))


def check_pair(groups: tuple[GroupShape, ...], producer_ranks: int, consumer_ranks: int) -> None:
    """Everything that must hold between all ranks of two engines."""
    producers = ranks_of(groups, producer_ranks)
    staged = [staged_heads(producer) for producer in producers]
    readers = dict.fromkeys(range(producer_ranks), 0)
    told: dict[int, set[int]] = {rank: set() for rank in range(producer_ranks)}
    for index, shape in enumerate(groups):
        all_staged = [part[index] for part in staged]
        assert heads_in([heads for heads in all_staged if heads]) == list(range(shape.kv_heads))
    for consumer in ranks_of(groups, consumer_ranks):
        needs = sources_of(consumer, producer_ranks)
        assert [need.rank for need in needs] == sorted({need.rank for need in needs})
        for index in range(len(groups)):
            wanted = wanted_heads(consumer, index)
            given_heads = [
                part
                for need in needs
                if (heads := staged[need.rank][index]) is not None
                and (part := heads.overlap(wanted)) is not None
            ]
            assert heads_in(given_heads) == list(range(wanted.first, wanted.end))
        for need in needs:
            assert any(
                heads is not None and heads.overlap(wanted_heads(consumer, index)) is not None
                for index, heads in enumerate(staged[need.rank])
            ), "a source that gives nothing"
            readers[need.rank] += 1
            told[need.rank].add(need.reader_count)
    for rank, count in readers.items():
        assert told[rank] == ({count} if count else set())


PAIRS = [
    (kv_heads, producer, consumer)
    for kv_heads, producer, consumer in product(HEADS, range(1, 9), range(1, 9))
    if can_share(kv_heads, producer) and can_share(kv_heads, consumer)
]


@pytest.mark.parametrize(("kv_heads", "producer", "consumer"), PAIRS)
def test_every_head_comes_once_and_both_sides_count_the_same_readers(
    kv_heads: int, producer: int, consumer: int
) -> None:
    check_pair((heads_shape(kv_heads),), producer, consumer)


@pytest.mark.parametrize(("producer", "consumer"), [*product(range(1, 9), range(1, 9))])
def test_latents_are_read_from_the_first_rank_by_all(producer: int, consumer: int) -> None:
    check_pair((MLA,), producer, consumer)
    for rank in ranks_of((MLA,), consumer):
        assert sources_of(rank, producer) == (SourceNeed(0, consumer),)


@given(
    st.lists(st.sampled_from([MLA, *map(heads_shape, HEADS)]), min_size=1, max_size=4),
    st.integers(1, 16),
    st.integers(1, 16),
)
def test_groups_of_unlike_head_counts_share_their_sources(
    groups: list[GroupShape], producer: int, consumer: int
) -> None:
    if all(can_share(g.kv_heads, ranks) for g in groups for ranks in (producer, consumer)):
        check_pair(tuple(groups), producer, consumer)


def test_two_ranks_that_share_six_heads_feed_three() -> None:
    """Neither rank count divides the other, and the heads still meet."""
    check_pair((heads_shape(6),), 2, 3)
    (_, middle, _) = ranks_of((heads_shape(6),), 3)
    assert sources_of(middle, 2) == (SourceNeed(0, 2), SourceNeed(1, 2))


def test_the_copies_of_a_head_stage_nothing() -> None:
    staged = [staged_heads(rank) for rank in ranks_of((heads_shape(2), heads_shape(4)), 4)]
    assert staged == [
        (HeadRange(0, 1), HeadRange(0, 1)),
        (None, HeadRange(1, 1)),
        (HeadRange(1, 1), HeadRange(2, 1)),
        (None, HeadRange(3, 1)),
    ]


def test_a_rank_count_that_cannot_share_the_heads_is_refused() -> None:
    (consumer,) = ranks_of((heads_shape(4),), 1)
    for ranks in (3, 6):
        with pytest.raises(LayoutError, match="tensor_parallel"):
            sources_of(consumer, ranks)


def test_a_rank_count_from_a_hostile_peer_costs_nothing() -> None:
    (consumer,) = ranks_of((MLA,), 1)
    assert sources_of(consumer, 1 << 40) == (SourceNeed(0, 1),)
